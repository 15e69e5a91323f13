"""Data sets to convert, and helpers that read the converted COCO files back and compare them."""

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
    """Counts of images and boxes that the reader of a split dropped or changed."""
    counts: dict[str, Any] = json.loads((run / "result.json").read_text())["read"][split]
    return counts


def by_name(data: CocoData) -> dict[str, Any]:
    return {Path(record.path).stem: record for record in data.images}


def equal_objects(actual: CocoData, expected: CocoData, atol: float = 2e-3) -> None:
    assert actual.class_names == expected.class_names
    actual_by_name, expected_by_name = by_name(actual), by_name(expected)
    assert actual_by_name.keys() == expected_by_name.keys()
    for name, record in expected_by_name.items():
        np.testing.assert_allclose(actual_by_name[name].file_boxes_N4, record.file_boxes_N4, atol=atol)
        np.testing.assert_array_equal(actual_by_name[name].labels_N, record.labels_N)
        np.testing.assert_array_equal(actual_by_name[name].crowd_N, record.crowd_N)
        assert (actual_by_name[name].width, actual_by_name[name].height) == (record.width, record.height)


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
