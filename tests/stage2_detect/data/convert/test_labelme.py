"""LabelMe's JSON: shapes of every kind, images by name and place, splits, and its faults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_data import by_name, counted, line, read, save, write
from PIL import Image

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.data.coco import read_coco

SQUARE = [[10, 4], [20, 4], [20, 14], [10, 14]]


def shape(label: Any, points: Any, kind: str | None = "rectangle") -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}


def label(file: Path, image: str, *shapes: dict[str, Any], size: tuple[int, int] | None = (40, 20)) -> None:
    sides = {"imageWidth": size[0], "imageHeight": size[1]} if size else {}
    write(
        file,
        json.dumps({"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None} | sides),
    )


def test_shapes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    save(root / "a.png")
    label(
        root / "a.json",
        "a.png",
        shape("dog", [[30, 15], [10, 5]]),  # corners in any order
        shape("dog", SQUARE),  # four of them, as X-AnyLabeling writes
        shape("cat", [[10, 4], [20, 4], [15, 14]], "polygon"),
        shape("cat", [[10, 4], [20, 4], [15, 14]], None),
        shape("dog", [[10, 10], [13, 14]], "circle"),
        shape("dog", [[1, 1], [39, 19]], "mask"),
        shape("dog", SQUARE, "rotation"),
        shape("dog", SQUARE, "oriented_rectangle"),
        shape("cat", [[3, 4]], "point"),
        shape("cat", SQUARE, "cuboid"),
    )
    assert main(line(root, tmp_path / "out")) == 0
    data = read_coco(tmp_path / "out" / "train.json", root, training=False, segmentations=True)
    (record,) = data.images
    assert data.class_names == ("cat", "dog")
    assert record.labels_N.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    square, triangle = [10, 4, 10, 10], [10, 4, 20, 4, 15, 14]
    boxes = [[10, 5, 20, 10], square, square, square, [5, 5, 10, 10], [1, 1, 38, 18], square, square]
    np.testing.assert_allclose(record.file_boxes_N4, boxes)
    outlines = [None, None, [triangle], [triangle], None, None, *[[[value for point in SQUARE for value in point]]] * 2]
    assert record.segmentations is not None
    assert list(record.segmentations) == outlines
    assert counted(tmp_path / "out")["box"]["dropped"] == {
        "of the kind 'point', which has no area": {"count": 1, "first": f"{root}/a.json, shape 9"},
        "of the kind 'cuboid', which is not read": {"count": 1, "first": f"{root}/a.json, shape 10"},
    }


def test_where_images_are(tmp_path: Path) -> None:
    """By the mentioned path, of another machine by name; in folders for images and labels; upright as LabelMe shows them."""
    root = tmp_path / "set"
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("train/a.png", "train/b.png", "train/unlabeled.png", "val/c.png"):
        save(root / "images" / name)
    save(root / "images" / "val" / "d.jpg", (20, 40), exif=exif)
    label(root / "labels/train/a.json", "..\\..\\images\\train\\a.png", shape("dog", [[1, 2], [11, 12]]))
    label(root / "labels/train/b.json", "C:\\Users\\me\\b.png", shape("dog", [[1, 2], [11, 12]]))
    label(root / "labels/val/c.json", "c.png", shape("dog", [[1, 2], [11, 12]]), size=None)
    label(root / "labels/val/d.json", "d.jpg", shape("dog", [[1, 2], [11, 12]]))
    write(root / "labels/other.json", "{}")
    assert main(line(root, tmp_path / "out")) == 0
    assert by_name(read(tmp_path / "out", "train")).keys() == {"a", "b"}
    assert by_name(read(tmp_path / "out", "val")).keys() == {"c", "d"}
    for split in ("train", "val"):
        for record in read(tmp_path / "out", split).images:
            assert (record.width, record.height, record.file_boxes_N4.tolist()) == (40, 20, [[1, 2, 10, 10]])
    entry = {"count": 1, "first": f"{root}/images/train/unlabeled.png"}
    assert counted(tmp_path / "out")["image"]["skipped"] == {"without a JSON file": entry}  # not a negative image


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"shapes": [], "imagePath": "a.png"', "a.json is not JSON: "),
        ('{"shapes": {}, "imagePath": "a.png"}', "a.json: shapes: expected a list of objects"),
        ([shape("", SQUARE)], "a.json, shape 1: has no label"),
        ([shape("cat", [[1, 2], [3]])], "a.json, shape 1: points: expected a list of x, y"),
        ([shape("cat", [[1, 2], [None, 4]])], "a.json, shape 1: x is 'None', not a number"),
        ([shape("cat", [[1, 2]])], "a.json, shape 1: has 1 point, too few for a rectangle"),
        ([shape("cat", SQUARE[:2], "polygon")], "a.json, shape 1: has 2 points, too few for a polygon"),
        ([], "split train: no object in 1 image (in 1 JSON file in "),
    ],
)
def test_faults(tmp_path: Path, user_error: Callable[..., str], content: Any, message: str) -> None:
    root = tmp_path / "set"
    save(root / "a.png")
    if isinstance(content, str):
        write(root / "a.json", content)
    else:
        label(root / "a.json", "a.png", *content, shape("dog", SQUARE[:1], "point")) if content else label(
            root / "a.json", "a.png"
        )
        write(tmp_path / "names.txt", "cat\ndog\n")
    classes = [] if content else ["--classes", str(tmp_path / "names.txt")]
    assert message in user_error(main, line(root, tmp_path / "out", *classes))


def test_faults_of_places(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    save(root / "train" / "a.png")
    label(root / "train" / "a.json", "gone.png", shape("dog", SQUARE), size=(41, 20))
    assert "a.json: gives the size 41x20, but the image" in user_error(main, line(root, tmp_path / "size"))
    label(root / "train" / "b.json", "a.png", shape("dog", SQUARE))
    label(root / "train" / "a.json", "a.png", shape("dog", SQUARE))
    assert "b.json: is of the image" in user_error(main, line(root, tmp_path / "twice"))
    label(root / "train" / "b.json", "b.png", shape("dog", SQUARE))
    assert "b.json: its image is not there, neither as 'b.png' nor" in user_error(main, line(root, tmp_path / "gone"))
    (root / "train" / "b.json").rename(root / "b.json")
    assert "b.json: is beside train, which look like splits" in user_error(main, line(root, tmp_path / "beside"))
    (root / "b.json").unlink()
    write(tmp_path / "names.txt", "cat\n")
    classes = ("--classes", str(tmp_path / "names.txt"))
    assert "the label 'dog' is not among the 1 of" in user_error(main, line(root, tmp_path / "names", *classes))
    assert main(line(root, tmp_path / "out")) == 0
