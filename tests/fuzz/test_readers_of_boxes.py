"""Readers of boxes on thousands of damaged files: COCO JSON, VOC, YOLO, Parquet, and what a prediction goes on from."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssld.stage2_detect.config import ConvertDataConfig
from ssld.stage2_detect.data.check.annotations import check_rows
from ssld.stage2_detect.data.coco import CocoImage, read_coco
from ssld.stage2_detect.data.convert.conversion import _read
from ssld.stage2_detect.prediction.files import Parts
from tests.fuzz.conftest import Fuzz, encoded_png, write_json
from tests.fuzz.mutations import as_json, mutated_parquet, mutated_text

VOC = """<annotation>
<filename>0.png</filename>
<size><width>16</width><height>12</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>11</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>5</xmax><ymax>7</ymax></bndbox></object>
</annotation>
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded_png(number))
    return folder


def coco() -> dict[str, Any]:
    box = {"bbox": [1.0, 2, 5, 6.5], "iscrowd": 0, "area": 32.5}
    rle = {"size": [12, 16], "counts": [30, 5, 7, 5, 145]}
    shapes: list[Any] = [[[1, 2, 6, 2, 6, 8]], rle, None]
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 16, "height": 12} for n in range(3)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1 + n % 2, "segmentation": shape, **box}
            for n, shape in enumerate(shapes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def test_annotations_as_they_are_trained_on(fuzz: Fuzz, tmp_path: Path, images: Path) -> None:
    file = write_json(tmp_path / "a.json", coco())
    fuzz(as_json(coco()), file, lambda: read_coco(file, images, training=True, segmentations=True))


def test_annotations_as_the_doctor_sees_them(fuzz: Fuzz, tmp_path: Path, images: Path) -> None:
    file = write_json(tmp_path / "a.json", coco())
    fuzz(as_json(coco()), file, lambda: check_rows("train", file, images, masks=True))


def test_voc(fuzz: Fuzz, tmp_path: Path) -> None:
    for number in range(2):
        write = tmp_path / "voc" / "JPEGImages" / f"{number}.png"
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_bytes(encoded_png(number))
    file = tmp_path / "voc" / "Annotations" / "0.xml"
    file.parent.mkdir()
    file.write_text(VOC)
    (file.parent / "1.xml").write_text(VOC.replace("0.png", "1.png"))

    def read() -> None:
        _read(ConvertDataConfig(output=tmp_path / "run", source=str(tmp_path / "voc")), tmp_path / "pending")

    fuzz(lambda draw: mutated_text(VOC, draw), file, read)


@pytest.mark.parametrize("which", ["labels", "data.yaml"])
def test_yolo(which: str, fuzz: Fuzz, tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    labels = "0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.8\n"
    described = "path: .\ntrain: images/train\nnames: {0: cat, 1: dog}\nnc: 2\n"
    for number in range(2):
        for folder, name, content in (("images", "png", encoded_png(number)), ("labels", "txt", labels.encode())):
            place = root / folder / "train" / f"{number}.{name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    (root / "data.yaml").write_text(described)
    file = root / "data.yaml" if which == "data.yaml" else root / "labels" / "train" / "0.txt"

    def read() -> None:
        _read(ConvertDataConfig(output=tmp_path / "run", source=str(root)), tmp_path / "pending")

    fuzz(lambda draw: mutated_text(described if which == "data.yaml" else labels, draw), file, read)


def test_parquet_boxes(fuzz: Fuzz, tmp_path: Path) -> None:
    file = tmp_path / "boxes" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    objects = [{"bbox": [[1.0, 2.0, 4.0, 5.0]], "category": [0]}, {"bbox": [], "category": []}]
    names = {
        "info": {"features": {"objects": {"feature": {"category": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}}
    }
    images = [{"bytes": encoded_png(n), "path": f"{n}.png"} for n in range(2)]
    table = pa.table({"image": images, "objects": objects})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), file, compression="none")
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n")
    sound = file.read_bytes()

    def read() -> None:
        config = ConvertDataConfig(output=tmp_path / "run", source=str(file.parent), classes=classes)
        _read(config, tmp_path / "pending")

    fuzz(lambda draw: mutated_parquet(sound, draw), file, read)


def test_predictions(fuzz: Fuzz, tmp_path: Path, images: Path) -> None:
    """A part of a prediction that a run goes on from."""
    records = read_coco(write_json(tmp_path / "a.json", coco()), images, training=False).images
    parts = Parts(tmp_path / "parts", records, 4)
    row = {"image_id": 0, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    parts.write(0, {0: [row]}, [["x.png", "broken"]], 0.5)
    (file,) = (tmp_path / "parts").glob("*.json")
    content = json.loads(file.read_text())
    assert isinstance(records[0], CocoImage)

    def read() -> None:
        for number in {0} - set(parts.left()):  # what is damaged counts as missing, and is detected again
            assert parts.read(number)["found"] == [[0, [row]]]

    fuzz(as_json(content), file, read, refuses=False)
