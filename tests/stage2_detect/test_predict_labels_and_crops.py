"""predict.py: YOLO labels are read back as the boxes, crops show the objects."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from run_files import content

from ssld.stage2_detect import convert_data, predict
from ssld.stage2_detect.prediction.files import folder_names

Call = Callable[..., int]
Files = Callable[[Path], set[str]]


def test_yolo_labels_are_read_back_as_the_boxes(call: Call, predict_line: Any, photos: Path, tmp_path: Path) -> None:
    """By the reader of YOLO data sets, which knows nothing of this writer."""
    assert call(predict.main, predict_line("--write", "json,yolo")) == 0
    run = tmp_path / "predicted"
    shutil.copytree(photos, run / "images")
    flags = ["--source", str(run / "data.yaml"), "--splits", "val", "--output", str(tmp_path / "back")]
    assert call(convert_data.main, flags) == 0
    predictions = content(run / "predictions.json")
    (file,) = (path for path in (tmp_path / "back").glob("*.json") if path.name == "val.json")
    back = content(file)
    assert [category["name"] for category in back["categories"]] == ["wide", "tall"]
    label_of = {category["id"]: number for number, category in enumerate(predictions["categories"])}
    label_back = {category["id"]: number for number, category in enumerate(back["categories"])}

    def boxes(data: dict[str, Any], labels: dict[int, int]) -> list[tuple[Any, ...]]:
        names = {image["id"]: image["file_name"].removeprefix("images/") for image in data["images"]}
        rows = [(names[row["image_id"]], labels[row["category_id"]], row["bbox"]) for row in data["annotations"]]
        return sorted(rows, key=lambda row: (row[0], row[1], row[2]))

    expected, read = boxes(predictions, label_of), boxes(back, label_back)
    assert len(expected) == len(read) > 0
    for one, other in zip(expected, read, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(other[2], one[2], atol=1e-3)
    labels = {path.relative_to(run / "labels").as_posix() for path in (run / "labels").rglob("*.txt")}
    assert labels == {f"{n}.txt" for n in range(12) if n != 3} | {"deep/3.txt"}  # empty ones too
    assert (run / "classes.txt").read_text() == "wide\ntall\n"


def test_yolo_labels_with_scores(call: Call, predict_line: Any, tmp_path: Path) -> None:
    assert call(predict.main, predict_line("--write", "json,yolo_scores")) == 0
    predictions = content(tmp_path / "predicted" / "predictions.json")
    names = {image["id"]: image["file_name"] for image in predictions["images"]}
    for image_id, name in names.items():
        scores = [row["score"] for row in predictions["annotations"] if row["image_id"] == image_id]
        lines = (tmp_path / "predicted" / "labels" / name.replace(".png", ".txt")).read_text().splitlines()
        assert [len(one.split()) for one in lines] == [6] * len(scores)
        np.testing.assert_allclose([float(one.split()[5]) for one in lines], scores, atol=1e-6)


def test_crops_show_the_objects(
    call: Call, predict_line: Any, photos: Path, tmp_path: Path, files_below: Files
) -> None:
    assert call(predict.main, predict_line("--write", "json,crops")) == 0
    run = tmp_path / "predicted"
    predictions = content(run / "predictions.json")
    class_of = {category["id"]: category["name"] for category in predictions["categories"]}
    expected = {}
    for image in predictions["images"]:
        rows = [row for row in predictions["annotations"] if row["image_id"] == image["id"]]
        for number, row in enumerate(rows, 1):
            name = f"{class_of[row['category_id']]}/{image['file_name'].removesuffix('.png')}_{number}.jpg"
            expected[name] = (image["file_name"], row["bbox"])
    assert set(files_below(run / "crops")) == set(expected)
    assert expected
    for name, (file, (x, y, width, height)) in expected.items():
        crop = np.array(Image.open(run / "crops" / name), dtype=float)
        left, top = int(np.floor(x)), int(np.floor(y))
        right, bottom = int(np.ceil(x + width)), int(np.ceil(y + height))
        whole = np.array(Image.open(photos / file).convert("RGB"), dtype=float)
        assert crop.shape == (bottom - top, right - left, 3)
        assert np.abs(crop - whole[top:bottom, left:right]).mean() < 4  # JPEG


def test_class_folders_are_safe_and_differ() -> None:
    assert folder_names(("cat", "a/b", "a:b", "..", "Cat", "red blood cell")) == [
        "cat_0", "a_b_1", "a_b_2", "_", "Cat_4", "red blood cell",
    ]  # fmt: skip
