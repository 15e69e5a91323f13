"""Conversion of YOLO data sets to the COCO file that they were made from; every error is one line with its place."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from converted_data import by_name, counted, equal_objects, line, numbered, read, save, write
from filled_shapes import filled
from PIL import Image

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.data.coco import read_coco

NAMES = ("wide", "tall")


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two images of 40 x 20 pixels, one with a box and a polygon."""
    root = tmp_path / "yolo"
    for name in ("a", "b"):
        save(root / "images" / "train" / f"{name}.png")
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.6 0.1 0.1 0.9\n")
    write(root / "data.yaml", "train: images/train\nnames: [wide, tall]\n")
    return root


def test_yolo_by_hand(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(yolo, tmp_path / "out")) == 0
    data = read_coco(tmp_path / "out" / "train.json", yolo / "images/train", training=False, segmentations=True)
    first, second = data.images
    np.testing.assert_allclose(first.file_boxes_N4, [[15, 5, 10, 10], [4, 2, 20, 16]])
    assert first.labels_N.tolist() == [1, 0]
    assert second.labels_N.size == 0
    assert data.class_names == NAMES
    assert first.segmentations is not None
    assert first.segmentations[0] is None
    assert first.segmentations[1] == [[4.0, 2.0, 24.0, 2.0, 4.0, 18.0]]
    assert first.areas_N[0] == 100
    assert first.areas_N[1] == filled(first.segmentations[1], 20, 40).sum()
    out = capsys.readouterr().out
    assert "2 images, 2 objects, 1 image without objects" in out
    assert f"1 without a label file, read as an image without objects (first: {yolo}/images/train/b.png)" in out


def test_yolo_from_an_independent_writer(tiny_coco: Any, tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        hotcoco.COCO(numbered(getattr(tiny_coco, f"{split}_annotations"))).to_yolo(str(root / "labels" / split))
        shutil.copytree(getattr(tiny_coco, f"{split}_images"), root / "images" / split)
        (root / "labels" / split / "data.yaml").unlink()
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: {0: wide, 1: tall}\n")
    assert main(line(root / "data.yaml", tmp_path / "out")) == 0
    for split in ("train", "val"):
        expected = read_coco(getattr(tiny_coco, f"{split}_annotations"), None, training=False)
        equal_objects(read(tmp_path / "out", split), expected)
    assert main(line(root / "data.yaml", tmp_path / "one", "--splits", '["val"]')) == 0
    assert sorted(file.name for file in (tmp_path / "one").glob("*.json")) == [
        "environment.json",
        "result.json",
        "val.json",
    ]


def test_yolo_layouts(yolo: Path, tmp_path: Path) -> None:
    """Lists of images, Roboflow's ../ and a folder without data.yaml name the same images."""
    write(yolo / "list.txt", "images/train/a.png\n./images/train/b.png\n")
    robo = yolo / "train"
    shutil.copytree(yolo / "images" / "train", robo / "images")
    shutil.copytree(yolo / "labels" / "train", robo / "labels")
    bare = tmp_path / "bare"
    shutil.copytree(yolo / "images" / "train", bare / "images")
    shutil.copytree(yolo / "labels" / "train", bare / "labels")
    write(bare / "labels" / "classes.txt", "wide\ntall\n")
    write(tmp_path / "names.txt", "wide\ntall\n")
    shutil.copytree(yolo, tmp_path / "deep", ignore=shutil.ignore_patterns("data.yaml", "train.txt", "list.txt"))
    shutil.rmtree(tmp_path / "deep" / "train")
    assert main(line(yolo, tmp_path / "plain")) == 0
    expected = read(tmp_path / "plain")
    for number, text in enumerate(("train: list.txt", "train: ../train/images", "train: [images/train]")):
        write(yolo / "data.yaml", f"{text}\nnames: [wide, tall]\n")
        assert main(line(yolo, tmp_path / f"out{number}")) == 0
        equal_objects(read(tmp_path / f"out{number}"), expected)
    assert main(line(bare, tmp_path / "out_bare")) == 0
    equal_objects(read(tmp_path / "out_bare"), expected)
    assert main(line(tmp_path / "deep", tmp_path / "out_deep", "--classes", str(tmp_path / "names.txt"))) == 0
    equal_objects(read(tmp_path / "out_deep"), expected)


def test_boxes_over_the_border_are_clipped_and_empty_ones_dropped(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["0 0.9 0.5 0.4 0.5", "1 0.5 0.5 0 0.5", "1 0.5 0.5 0.5 1.0000001"]
    write(yolo / "labels/train/b.txt", "\n".join(rows))
    assert main(line(yolo, tmp_path / "out")) == 0
    record = by_name(read(tmp_path / "out"))["b"]
    np.testing.assert_allclose(record.file_boxes_N4, [[28, 5, 12, 10], [10, 0, 20, 20]])
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["splits"]["train"]
    assert (counts["objects"], counts["images"]) == (4, 2)
    first = f"{yolo}/labels/train/b.txt, line"
    assert counted(tmp_path / "out")["box"] == {
        "kept": 4,
        "dropped": {"without width or height": {"count": 1, "first": f"{first} 2"}},
        "changed": {"clipped to the image": {"count": 1, "first": f"{first} 1"}},
    }
    out = capsys.readouterr().out
    assert f"train: 1 box dropped: 1 without width or height (first: {first} 2); 1 box changed: 1 clipped" in out


def test_boxes_refer_to_the_upright_image(yolo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (yolo / "images/train/a.png").unlink()
    save(yolo / "images/train/a.jpg", (20, 40), exif=exif)
    assert main(line(yolo, tmp_path / "out")) == 0
    record = by_name(read(tmp_path / "out"))["a"]
    assert (record.width, record.height) == (40, 20)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "labels/train/a.txt",
            "1 .5 .5 .2 .2\n2 .5 .5 .2 .2",
            "a.txt, line 2: class 2, but there are 2 classes, 0 to 1",
        ),
        ("labels/train/a.txt", "0 20 10 5 5", "a.txt, line 1: 20 is outside 0..1; coordinates are shares"),
        ("labels/train/a.txt", "0 .5 .5 .2", "a.txt, line 1: has 4 values"),
        (
            "labels/train/a.txt",
            "0 .5 .5 .2 .2 .97",
            "a.txt, line 1: has 6 values; expected a class and a box (5), or a class and three points or more (7, 9, ...); a confidence",
        ),
        (
            "labels/train/a.txt",
            "0 .5 .5 .2 .2 .5 .5 2 .4 .4 2",
            "a.txt, line 1: 2 is outside 0..1; coordinates are shares of the image's width and height, and keypoints",
        ),
        ("labels/train/a.txt", "0 .5 nan .2 .2", "a.txt, line 1: value 3 is 'nan', not a number"),
        ("labels/train/a.txt", "wide .5 .5 .2 .2", "a.txt, line 1: the class is 'wide', not a number"),
        ("labels/train/c.txt", "0 .5 .5 .2 .2", "c.txt: no image in"),
        ("data.yaml", "train: images/train\nnames: [a, a]", "two classes are called 'a'"),
        ("data.yaml", "train: images/train\nnames: [a, b]\nnc: 3", "nc is 3, but names has 2"),
        ("data.yaml", "train: images/train\nnames: {0: a, 2: b}", "the class numbers are not 0..1"),
        ("data.yaml", "train: images/trian\nnames: [a, b]", "is neither a folder nor a .txt list"),
        ("data.yaml", "names: [a, b]", "has none of the keys train, val, valid, validation, test"),
        ("data.yaml", "train: images/train\nnames: [a, b]\nkpt_shape: [17, 3]", "pose data"),
        ("data.yaml", "train: images/train", "no class names"),
        ("data.yaml", "train: list.txt\nnames: [a, b]", "list.txt, line 1: no image"),
    ],
)
def test_yolo_faults(
    yolo: Path, tmp_path: Path, user_error: Callable[..., str], file: str, text: str, message: str
) -> None:
    write(yolo / "list.txt", "images/train/z.png\n")
    write(yolo / file, text)
    assert message in user_error(main, line(yolo, tmp_path / "out"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {".lock", "config.yaml", "environment.json", "error.json"}


@pytest.mark.parametrize("visibility", ["", " 1"], ids=["two values", "three values"])
def test_keypoints_without_kpt_shape(
    yolo: Path, tmp_path: Path, user_error: Callable[..., str], visibility: str
) -> None:
    """Boxes with four keypoints, one of them not there, are as long as polygons."""
    points = [(-0.05, -0.1), (0.05, -0.1), (0.0, 0.1)]
    rows = []
    for x, y in ((0.2, 0.3), (0.5, 0.5), (0.8, 0.6)):
        seen = "".join(f" {x + dx:.3f} {y + dy:.3f}{visibility}" for dx, dy in points)
        rows.append(f"0 {x} {y} 0.2 0.3{seen} 0 0{visibility and ' 0'}")
    write(yolo / "labels/train/a.txt", "\n".join(rows))
    message = user_error(main, line(yolo, tmp_path / "out"))
    assert "a.txt, line 1: all 3 rows look like a box and 4 keypoints; keypoints are not supported: keep the" in message


@pytest.mark.parametrize("first", range(6))
def test_small_polygons_of_equal_length_are_no_keypoints(yolo: Path, tmp_path: Path, first: int) -> None:
    """Hexagons, closed rectangles and long strips, from any of their points on; far from the corner all points lie in the box around the first."""
    turns = [(math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)) for k in range(6)]
    shapes = {"hexagons": turns, "strips": [(4 * x, y / 2) for x, y in turns]}
    shapes["rectangles"] = [(1, 1), (-1, 1), (-1, -1), (1, -1), (1, 1), (1, 1)]
    for name, around in shapes.items():
        around = around[first:] + around[:first]
        rows = [
            "0" + "".join(f" {x + dx / 60:.4f} {y + dy / 50:.4f}" for dx, dy in around)
            for x in (0.2, 0.5, 0.8)
            for y in (0.3, 0.6, 0.9)
        ]
        write(yolo / "labels/train/a.txt", "\n".join(rows))
        assert main(line(yolo, tmp_path / name)) == 0
        assert len(by_name(read(tmp_path / name))["a"].labels_N) == 9


def test_rows_of_another_format(
    yolo: Path, tmp_path: Path, user_error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Corners, or the upper left corner, in place of the center: boxes of 8 x 8 pixels on a grid, in an image of 40 x 20."""
    question = "is it center, width and height, not two corners or the upper left corner?"
    places = [(x, y) for x in (1, 11, 21, 31) for y in (1, 5, 10)]

    def convert(name: str, *row: Callable[[int, int], float]) -> list[str]:
        rows = [" ".join(f"{value(x, y):.6f}" for value in row) for x, y in places]
        write(yolo / "labels/train/a.txt", "\n".join(f"0 {text}" for text in rows))
        return line(yolo, tmp_path / name)

    corners = convert(
        "corners", lambda x, y: x / 40, lambda x, y: y / 20, lambda x, y: (x + 8) / 40, lambda x, y: (y + 8) / 20
    )
    assert "a.txt, line 1: the box reaches out of its image, as do " in (message := user_error(main, corners))
    assert message.endswith(question)
    assert main([*corners[:3], str(tmp_path / "anyway"), "--allow_loss", "true"]) == 0
    assert question in capsys.readouterr().out
    upper_left = convert("left", lambda x, y: x / 40, lambda x, y: y / 20, lambda x, y: 8 / 40, lambda x, y: 8 / 20)
    assert main(upper_left) == 0  # a warning: six of twelve reach over the border, by three pixels
    assert question in capsys.readouterr().out
    centers = convert(
        "center", lambda x, y: (x + 4) / 40, lambda x, y: (y + 4) / 20, lambda x, y: 8 / 40, lambda x, y: 8 / 20
    )
    assert main(centers) == 0
    assert question not in capsys.readouterr().out


def test_mostly_images_without_label_files(yolo: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    """Photos that nobody has labeled would be trained on as images without objects."""
    for name in "cde":
        shutil.copy(yolo / "images/train/a.png", yolo / f"images/train/{name}.png")
    assert "4 of the 5 images have no label file (1 label file, searched in" in user_error(
        main, line(yolo, tmp_path / "out")
    )
    assert main(line(yolo, tmp_path / "anyway", "--allow_loss", "true")) == 0
    for name in "cde":
        write(yolo / f"labels/train/{name}.txt", "")  # labeled, without objects
    assert main(line(yolo, tmp_path / "labeled")) == 0
    assert len(read(tmp_path / "labeled").images) == 5


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n\0\0"])
def test_damaged_images_are_left_out_and_counted(
    yolo: Path, tmp_path: Path, user_error: Callable[..., str], content: bytes
) -> None:
    """As the readers of COCO files and of folders do, which go on without them."""
    (yolo / "images/train/c.png").write_bytes(content)
    write(yolo / "labels/train/c.txt", "1 .5 .5 .2 .2\n")
    assert main(line(yolo, tmp_path / "out")) == 0
    assert by_name(read(tmp_path / "out")).keys() == {"a", "b"}
    entry = {"count": 1, "first": f"{yolo}/images/train/c.png"}
    assert counted(tmp_path / "out")["image"]["dropped"] == {"that cannot be read": entry}
    assert counted(tmp_path / "out")["box"]["dropped"] == {"on images that cannot be read": entry}
    (yolo / "images/train/b.png").write_bytes(content)
    message = user_error(main, line(yolo, tmp_path / "most"))
    assert "2 of the 3 images would be left out: 2 that cannot be read (first: " in message


def test_a_fixed_fault_needs_no_other_output(yolo: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    sound = (yolo / "labels/train/a.txt").read_text()
    write(yolo / "labels/train/a.txt", "9 .5 .5 .1 .1")
    user_error(main, line(yolo, tmp_path / "out"))
    write(yolo / "labels/train/a.txt", sound)
    assert main(line(yolo, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "train.json").stat().st_mtime_ns
    assert main(line(yolo, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "train.json").stat().st_mtime_ns == before
