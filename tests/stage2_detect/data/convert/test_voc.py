"""Conversion of Pascal VOC data sets to the COCO file that they were made from; every error is one line with its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from converted_data import by_name, counted, equal_objects, line, numbered, read, save, voc_xml, write

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.coco_rows import TURNED


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images of 40 x 20 pixels; one is of the training split."""
    root = tmp_path / "voc"
    for name in ("a", "b"):
        save(root / "JPEGImages" / f"{name}.png")
    whole, pixel = ("tall", 0, (1, 1, 40, 20)), ("wide", 1, (3, 4, 3, 4))
    write(root / "Annotations/a.xml", voc_xml(whole, pixel, ("wide", 0, (5, 5, 9, 9))))
    write(root / "Annotations/b.xml", voc_xml(("tall", 0, (5, 5, 9, 9))))
    for split, names in (("train", "a"), ("val", "b"), ("trainval", "a\nb"), ("tall_train", "a 1")):
        write(root / f"ImageSets/Main/{split}.txt", names + "\n")
    return root


def test_voc_by_hand(voc: Path, tmp_path: Path) -> None:
    """Pixels are counted from 1 and the last one belongs to the box: 1..40 is the whole width, 3..3 one pixel."""
    assert main(line(voc, tmp_path / "out")) == 0
    data = read(tmp_path / "out")
    assert data.class_names == ("tall", "wide")
    (record,) = data.images
    np.testing.assert_array_equal(record.file_boxes_N4, [[0, 0, 40, 20], [2, 3, 1, 1], [4, 4, 5, 5]])
    assert record.labels_N.tolist() == [0, 1, 1]
    assert record.crowd_N.tolist() == [False, True, False]
    assert len(read(tmp_path / "out", "val").images) == 1
    assert not (tmp_path / "out" / "trainval.json").exists()
    flags = ("--voc_inclusive", "false", "--voc_difficult", "keep", "--splits", '["trainval"]')
    assert main(line(voc, tmp_path / "edges", *flags)) == 0
    record = by_name(read(tmp_path / "edges", "trainval"))["a"]
    np.testing.assert_array_equal(record.file_boxes_N4, [[1, 1, 39, 19], [5, 5, 4, 4]])  # the other box is outside
    assert not record.crowd_N.any()
    record = by_name(read(tmp_path / "edges", "trainval"))["b"]
    np.testing.assert_array_equal(record.file_boxes_N4, [[5, 5, 4, 4]])


def test_corners_with_fractions_are_edges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No pixel has the number 4.5. A few of them, as in VOC2011, change nothing."""
    cases: list[tuple[str, list[tuple[float, ...]], list[list[float]]]] = [
        ("few", [(4.5, 3, 9, 9), (1, 1, 4, 4), (2, 2, 5, 5)], [[3.5, 2, 5.5, 7], [0, 0, 4, 4], [1, 1, 4, 4]]),
        ("most", [(4.5, 3, 9, 9), (0, 0.25, 4, 4), (2, 2, 5, 5)], [[4.5, 3, 4.5, 6], [0, 0.25, 4, 3.75], [2, 2, 3, 3]]),
    ]
    for name, corners, expected in cases:
        save(tmp_path / name / "a.png")
        write(tmp_path / name / "a.xml", voc_xml(*(("wide", 0, box) for box in corners)))
        assert main(line(tmp_path / name, tmp_path / f"{name}_out")) == 0
        np.testing.assert_allclose(read(tmp_path / f"{name}_out").images[0].file_boxes_N4, expected)
        assert ("most boxes have fractions of pixels" in capsys.readouterr().out) == (name == "most")


def test_rectangles_that_cvat_has_turned(tmp_path: Path) -> None:
    """Written before the turn: 11..20 x 6..9 is, turned by 90 degrees about its center (15, 7), the box from 13, 2 to 17, 12."""
    save(tmp_path / "set" / "a.png")
    turned = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes></object>"
    rotations = ("90.0", "0.0", "left", "180.0", "nan", "inf")
    text = voc_xml(*(("wide", 0, (11, 6, 20, 9)) for _ in rotations))
    for degrees in rotations:
        text = text.replace("</bndbox></object>", f"</bndbox>{turned.format(degrees)}", 1)
    write(tmp_path / "set" / "a.xml", text)
    assert main(line(tmp_path / "set", tmp_path / "out")) == 0
    boxes_N4 = read(tmp_path / "out").images[0].file_boxes_N4
    np.testing.assert_allclose(boxes_N4, [[13, 2, 4, 10], *[[10, 5, 10, 4]] * 5])
    assert counted(tmp_path / "out")["box"]["changed"][TURNED]["count"] == 1


def test_voc_from_an_independent_writer(tiny_coco: Any, tmp_path: Path) -> None:
    """hotcoco too counts pixels from 1, the last included, and writes crowds as difficult."""
    content = numbered(tiny_coco.train_annotations)
    content["annotations"][2]["iscrowd"] = 1
    write(tmp_path / "coco.json", json.dumps(content))
    root = tmp_path / "voc"
    hotcoco.COCO(content).to_voc(str(root))
    shutil.copytree(tiny_coco.train_images, root / "JPEGImages")
    write(tmp_path / "names.txt", "wide\ntall")
    assert main(line(root, tmp_path / "out", "--classes", str(tmp_path / "names.txt"))) == 0
    expected = read_coco(tmp_path / "coco.json", None, training=False)
    equal_objects(read(tmp_path / "out"), expected)
    assert expected.counts["crowd"] == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Annotations/a.xml", "<annotation>\n<object></annotation>", "a.xml, line 2: is not well-formed XML"),
        (
            "Annotations/a.xml",
            "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>\n<x>&e;</x>",
            "has a document type",
        ),
        ("Annotations/a.xml", "<annotation><object/></annotation>", "line 1: the object has no name"),
        ("Annotations/a.xml", voc_xml(("tall", 0, (0, 1, 5, 5))), "a.xml, line 4: a corner at 0, but VOC counts"),
        ("Annotations/a.xml", voc_xml(("tall", 0, (5, 1, 4, 5))), "line 4: xmax or ymax lies before"),
        ("Annotations/a.xml", voc_xml(("tall", 0, ("", 1, 4, 5))), "line 4: xmin is '', not a number"),
        (
            "Annotations/a.xml",
            voc_xml(("tall", 0, (1, 1, 2, 2)), size=(41, 20)),
            "a.xml, line 3: gives the size 41x20, but the image",
        ),
        ("Annotations/a.xml", "<annotation><object><name>a</name></object></annotation>", "has no bndbox"),
        ("ImageSets/Main/train.txt", "a\nz\n", "train.txt, line 2: there is no Annotations/z.xml"),
        ("ImageSets/Main/train.txt", "a 1\n", "train.txt, line 1: has 2 columns"),
        ("JPEGImages/a.png", "", "would be left out: 1 that cannot be read (first: "),
    ],
)
def test_voc_faults(
    voc: Path, tmp_path: Path, user_error: Callable[..., str], file: str, text: str, message: str
) -> None:
    write(voc / file, text)
    assert message in user_error(main, line(voc, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*rain.json"))


def test_voc_class_that_is_not_listed(voc: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    write(tmp_path / "names.txt", "tall\nsmall\n")
    message = user_error(main, line(voc, tmp_path / "out", "--classes", str(tmp_path / "names.txt")))
    assert f"a.xml, line 7: class 'wide' is not among the 2 of {tmp_path}/names.txt" in message
    (voc / "JPEGImages/a.png").unlink()
    assert "a.xml: its image is not in" in user_error(main, line(voc, tmp_path / "out2"))


@pytest.mark.parametrize("word", ["1", "true", "True", "yes", "1.0", " y "])
def test_words_for_difficult(voc: Path, tmp_path: Path, word: str) -> None:
    write(voc / "Annotations/a.xml", voc_xml(("tall", 0, (1, 1, 40, 20)), ("tall", word, (3, 4, 8, 9))))
    assert main(line(voc, tmp_path / "out")) == 0
    assert by_name(read(tmp_path / "out"))["a"].crowd_N.tolist() == [False, True]


@pytest.mark.parametrize("word", ["", "0", "Unspecified", "False", "no", "None", "-1", "0.0", "unknown", "null", "NaN"])
def test_words_for_not_difficult(voc: Path, tmp_path: Path, word: str) -> None:
    write(voc / "Annotations/a.xml", voc_xml(("tall", word, (1, 1, 40, 20)), ("tall", word, (3, 4, 8, 9))))
    assert main(line(voc, tmp_path / "out")) == 0
    assert by_name(read(tmp_path / "out"))["a"].crowd_N.tolist() == [False, False]


@pytest.mark.parametrize("word", ["2", "maybe", "0.5", "1;0"])
def test_other_words_for_difficult_are_errors(
    voc: Path, tmp_path: Path, user_error: Callable[..., str], word: str
) -> None:
    write(voc / "Annotations/a.xml", voc_xml(("tall", 0, (1, 1, 40, 20)), ("tall", word, (3, 4, 8, 9))))
    message = user_error(main, line(voc, tmp_path / "out"))
    assert f"a.xml, line 7: difficult is {word!r}, neither yes (1, true, yes) nor no (0, false, no, Uns" in message


def test_nothing_but_difficult_objects(voc: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    write(voc / "Annotations/a.xml", voc_xml(("tall", 1, (1, 1, 40, 20)), ("tall", "yes", (3, 4, 8, 9))))
    message = user_error(main, line(voc, tmp_path / "out"))
    assert "split train: all boxes would be left out: 2 marked iscrowd (first: " in message
    assert "a.xml, line 4)" in message
    message = user_error(main, line(voc, tmp_path / "out", "--allow_loss", "true"))
    assert "of 2 objects none is left to train on: all marked difficult, which makes them iscrowd" in message
    assert main(line(voc, tmp_path / "out", "--voc_difficult", "keep")) == 0
    assert len(read(tmp_path / "out").images[0].labels_N) == 2


def test_images_of_one_name(voc: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    """The file name in the XML decides; of a path only the last part counts."""
    save(voc / "JPEGImages/a.jpg", (20, 40))
    assert "its image may be a.jpg or a.png" in user_error(main, line(voc, tmp_path / "out"))
    text = voc_xml(("tall", 0, (1, 1, 20, 20)), size=(20, 40))
    write(voc / "Annotations/a.xml", text.replace("x.png", "C:\\photos\\a.jpg"))
    assert main(line(voc, tmp_path / "out")) == 0
    assert read(tmp_path / "out").images[0].path == str(voc / "JPEGImages/a.jpg")
    write(voc / "Annotations/c.xml", text.replace("x.png", "/home/me/a.jpg"))
    write(voc / "ImageSets/Main/train.txt", "c\n")
    assert main(line(voc, tmp_path / "other")) == 0
    assert read(tmp_path / "other").images[0].path == str(voc / "JPEGImages/a.jpg")


def test_missing_sizes(voc: Path, tmp_path: Path) -> None:
    for size in ("<size/>", "<size><width>0</width><height>0</height></size>", ""):
        text = voc_xml(("tall", 0, (1, 1, 20, 20)))
        write(voc / "Annotations/a.xml", text[: text.index("<size>")] + size + text[text.index("</size>") + 7 :])
        assert main(line(voc, tmp_path / f"out{len(size)}")) == 0
        assert read(tmp_path / f"out{len(size)}").images[0].width == 40
