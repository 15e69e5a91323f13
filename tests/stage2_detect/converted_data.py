"""Data sets to convert, and the COCO files they became, read back and compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssld.stage2_detect.data.coco import CocoData, read_coco

OBJECT = (
    "<object>\n<name>{name}</name><difficult>{difficult}</difficult>\n<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>\
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def voc_xml(*objects: tuple[str, object, tuple[Any, ...]], size: tuple[int, int] = (40, 20)) -> str:
    """An XML file; the first object begins in line 4."""
    texts = [OBJECT.format(name=name, difficult=difficult, box=box) for name, difficult, box in objects]
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>x.png</filename>\n{sides}\n" + "\n".join(texts) + "\n</annotation>"


def read(run: Path, split: str = "train") -> CocoData:
    result = json.loads((run / "result.json").read_text())
    assert set(result["outputs"]) == {f"{name}.json" for name in result["metrics"]["splits"]}
    return read_coco(run / f"{split}.json", result["metrics"]["splits"][split]["image_folder"], training=False)


def counted(run: Path, split: str = "train") -> dict[str, Any]:
    """What the reader of a split left out or changed."""
    found: dict[str, Any] = json.loads((run / "result.json").read_text())["read"][split]
    return found


def by_name(data: CocoData) -> dict[str, Any]:
    return {Path(record.path).stem: record for record in data.images}


def equal_objects(found: CocoData, wanted: CocoData, atol: float = 2e-3) -> None:
    assert found.class_names == wanted.class_names
    ours, theirs = by_name(found), by_name(wanted)
    assert ours.keys() == theirs.keys()
    for name, record in theirs.items():
        np.testing.assert_allclose(ours[name].file_boxes_N4, record.file_boxes_N4, atol=atol)
        np.testing.assert_array_equal(ours[name].labels_N, record.labels_N)
        np.testing.assert_array_equal(ours[name].crowd_N, record.crowd_N)
        assert (ours[name].width, ours[name].height) == (record.width, record.height)


def numbered(file: Path) -> dict[str, Any]:
    """A COCO file with numbers for ids, as hotcoco needs them."""
    content: dict[str, Any] = json.loads(file.read_text())
    number = {image["id"]: index for index, image in enumerate(content["images"], 1)}
    for image in content["images"]:
        image["id"] = number[image["id"]]
    for one in content["annotations"]:
        one["image_id"] = number[one["image_id"]]
    return content


def save(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def line(source: Path | str, output: Path, *flags: str) -> list[str]:
    return ["--source", str(source), "--output", str(output), *flags]
