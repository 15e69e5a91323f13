"""Layouts of VOC data sets as tools and sites write them: all give the same objects, in the same splits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from converted_data import counted, line, read, save, voc_xml, write

from ssld.stage2_detect.convert_data import main

BOXES = {"a": (1, 1, 40, 20), "b": (3, 4, 30, 14), "c": (7, 2, 9, 12)}
IN_TRAIN = ("a", "b")


def build(root: Path, xml: str, images: str, *, suffix: str = ".xml") -> None:
    """Three images of 40 x 20 pixels with an object each; `{}` in the folders is the split."""
    for name, box in BOXES.items():
        split = "train" if name in IN_TRAIN else "valid"
        write(root / xml.format(split) / f"{name}{suffix}", voc_xml(("wide" if name == "a" else "tall", 0, box)))
        save(root / images.format(split) / f"{name}.png")


def boxes_of(run: Path, split: str) -> dict[str, list[float]]:
    """(x, y, width, height) by image."""
    return {Path(one.path).stem: one.file_boxes_N4[0].tolist() for one in read(run, split).images}


def expected(*names: str) -> dict[str, list[float]]:
    return {name: [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1] for name in names for x1, y1, x2, y2 in [BOXES[name]]}


def splits_of(run: Path) -> list[str]:
    return list(json.loads((run / "result.json").read_text())["metrics"]["splits"])


@pytest.mark.parametrize(
    ("xml", "images"),
    [
        ("Annotations", "JPEGImages"),
        ("annotations", "images"),
        ("ANNOTATIONS", "Images"),
        ("Annotation", "JPEGIMAGES"),
        ("xmls", "img"),
        ("Annotations", "."),
        ("labels", "images"),
        (".", "."),
        ("images", "images"),
        ("annotations/xmls", "images"),
    ],
)
def test_one_folder_of_xml(tmp_path: Path, xml: str, images: str) -> None:
    build(tmp_path / "set", xml, images)
    write(tmp_path / "set" / xml / "._a.xml", "of a Mac")
    assert main(line(tmp_path / "set", tmp_path / "out")) == 0
    assert splits_of(tmp_path / "out") == ["train"]
    assert boxes_of(tmp_path / "out", "train") == expected("a", "b", "c")


@pytest.mark.parametrize(
    ("xml", "images"),
    [
        ("{}", "{}"),  # Roboflow
        ("{}/Annotations", "{}/JPEGImages"),
        ("{}/annotations", "{}/images"),
        ("images/{}", "images/{}"),
        ("annotations/{}", "images/{}"),
        ("Annotations/{}", "JPEGImages"),
    ],
)
def test_a_folder_for_each_split(tmp_path: Path, user_error: Callable[..., str], xml: str, images: str) -> None:
    build(tmp_path / "set", xml, images, suffix=".XML")
    write(tmp_path / "set" / "README.roboflow.txt", "not a list")
    assert main(line(tmp_path / "set", tmp_path / "out")) == 0
    assert boxes_of(tmp_path / "out", "train") == expected("a", "b")
    assert boxes_of(tmp_path / "out", "valid") == expected("c")
    assert main(line(tmp_path / "set", tmp_path / "one", "--splits", '["valid"]')) == 0
    assert splits_of(tmp_path / "one") == ["valid"]
    message = user_error(main, line(tmp_path / "set", tmp_path / "none", "--splits", '["test"]'))
    assert "has no split 'test' (it has train, valid)" in message


def test_xml_files_beside_those_of_splits(tmp_path: Path, user_error: Callable[..., str]) -> None:
    build(tmp_path / "set", "annotations/{}", "images/{}")
    write(tmp_path / "set" / "annotations" / "d.xml", voc_xml(("wide", 0, BOXES["a"])))
    message = user_error(main, line(tmp_path / "set", tmp_path / "out"))
    assert (
        "annotations: has XML files beside train, valid, which look like splits; move them into one of these" in message
    )


@pytest.mark.parametrize(
    ("names", "ending", "form"),
    [
        (("train.txt", "valid.txt"), "\n", "./images/{}.png ./annotations/{}.xml"),  # PaddleDetection
        (("train_list.txt", "valid_list.txt"), "\r\n", "images/{}.png annotations/{}.xml"),  # PaddleX
        (("train.txt", "valid.txt"), "\n", "images\\{}.png\tannotations\\{}.xml"),
        (("train.txt", "valid.txt"), "\n", "{}"),
        (("train.txt", "valid.txt"), "\n", "{}.png"),
        (("train.txt", "valid.txt"), "\n", "images/{}.png"),
        (("train.txt", "valid.txt"), "\n", '"{}"'),
    ],
)
def test_lists_beside_the_folders(tmp_path: Path, names: tuple[str, str], ending: str, form: str) -> None:
    root = tmp_path / "set"
    build(root, "annotations", "images")
    for file, stems in zip(names, (IN_TRAIN, ("c",)), strict=True):
        (root / file).write_bytes("".join(form.replace("{}", stem) + ending for stem in stems).encode("utf-8-sig"))
    write(root / "label_list.txt", "wide\ntall\nnever\n")
    assert main(line(root, tmp_path / "out")) == 0
    assert splits_of(tmp_path / "out") == ["train", "valid"]
    assert boxes_of(tmp_path / "out", "train") == expected("a", "b")
    assert boxes_of(tmp_path / "out", "valid") == expected("c")
    assert read(tmp_path / "out").class_names == ("wide", "tall", "never")


def test_paddles_lists_above_a_devkit(tmp_path: Path, user_error: Callable[..., str]) -> None:
    build(tmp_path / "voc" / "VOCdevkit" / "VOC2007", "Annotations", "JPEGImages")
    pair = "VOCdevkit/VOC2007/JPEGImages/{0}.png VOCdevkit/VOC2007/Annotations/{0}.xml\n"
    write(tmp_path / "voc" / "trainval.txt", "".join(pair.format(stem) for stem in IN_TRAIN))
    write(tmp_path / "voc" / "test.txt", pair.format("c"))
    assert main(line(tmp_path / "voc", tmp_path / "out")) == 0
    assert boxes_of(tmp_path / "out", "trainval") == expected("a", "b")
    assert boxes_of(tmp_path / "out", "test") == expected("c")
    write(tmp_path / "voc" / "test.txt", pair.format("z"))
    assert "test.txt, line 1: VOCdevkit/VOC2007/JPEGImages/z.png: no such file" in user_error(
        main, line(tmp_path / "voc", tmp_path / "o")
    )


@pytest.mark.parametrize("sets", ["ImageSets/Main", "imagesets/main", "ImageSets"])
def test_sets_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: str) -> None:
    """CVAT's default set is read if no list has a usual name, else reported as not read. Lists of classes are ignored."""
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    write(root / sets / "default.txt", "a\nb\nc\n")
    write(root / sets / "tall_train.txt", "a -1\nb  1\n")
    assert main(line(root, tmp_path / "out")) == 0
    assert splits_of(tmp_path / "out") == ["default"]
    assert boxes_of(tmp_path / "out", "default") == expected("a", "b", "c")
    write(root / sets / "Train.TXT", "a\nb\n")
    capsys.readouterr()
    assert main(line(root, tmp_path / "again")) == 0
    assert splits_of(tmp_path / "again") == ["Train"]
    out = capsys.readouterr().out
    assert "1 of 3 XML files in no requested split (first: c.xml)" in out
    assert "lists that are not read: default; name those to read by --splits" in out


def test_names_with_blanks_and_of_two_forms(tmp_path: Path) -> None:
    """An accent is one character or two, depending on the file system."""
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    for old, xml, image in (("a", "my photo", "my photo"), ("b", "caf\u00e9 1", "cafe\u0301 1")):
        (root / "Annotations" / f"{old}.xml").rename(root / "Annotations" / f"{xml}.xml")
        (root / "JPEGImages" / f"{old}.png").rename(root / "JPEGImages" / f"{image}.png")
    write(root / "ImageSets/Main/train.txt", '"my photo"\ncafe\u0301 1\n')
    assert main(line(root, tmp_path / "out")) == 0
    assert len(boxes_of(tmp_path / "out", "train")) == 2


def test_a_name_listed_twice_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    write(root / "ImageSets/Main/train.txt", "a\nb\na\n")
    assert main(line(root, tmp_path / "out")) == 0
    assert boxes_of(tmp_path / "out", "train") == expected("a", "b")
    place = f"{root}/ImageSets/Main/train.txt, line 3"
    assert f"train: 1 image changed: 1 listed more than once, read once (first: {place})" in capsys.readouterr().out
    read_of = counted(tmp_path / "out")
    assert read_of["image"]["changed"] == {"listed more than once, read once": {"count": 1, "first": place}}


def test_images_without_xml_are_counted(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    save(root / "JPEGImages" / "d.png")
    assert main(line(root, tmp_path / "out")) == 0
    assert counted(tmp_path / "out")["image"]["dropped"] == {
        "without an XML file": {"count": 1, "first": str(root / "JPEGImages/d.png")}
    }
    for name in "efg":
        save(root / "JPEGImages" / f"{name}.png")
    message = user_error(main, line(root, tmp_path / "half"))
    assert message == (
        f"{root}: split train: 4 of the 7 images would be left out: 4 without an XML file (first: {root}/JPEGImages/d.png); "
        "correct the source, or set allow_loss: true to convert the rest"
    )
    assert not (tmp_path / "half" / "train.json").exists()
    assert main(line(root, tmp_path / "half", "--allow_loss", "true")) == 0
    assert boxes_of(tmp_path / "half", "train") == expected("a", "b", "c")


def test_unsupported_images_are_counted_by_suffix(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    (root / "JPEGImages/c.png").unlink()
    save(root / "JPEGImages/c.dng", (8, 4), format="TIFF")  # camera raw files begin with a thumbnail
    assert main(line(root, tmp_path / "out")) == 0  # half of the tall ones, which is not more than half
    assert boxes_of(tmp_path / "out", "train") == expected("a", "b")
    result = counted(tmp_path / "out")
    entry = {"count": 1, "first": str(root / "JPEGImages/c.dng")}
    assert result["image"]["dropped"] == {"of a kind that is not read (.dng)": entry}
    assert result["box"]["dropped"] == {"on images that are not read (.dng)": entry}
    (root / "JPEGImages/b.png").unlink()
    (root / "JPEGImages/b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    message = user_error(main, line(root, tmp_path / "none"))
    assert "split train: 2 of the 3 images would be left out: 1 of a kind that is not read (.heic)" in message
    (root / "JPEGImages/a.png").rename(root / "JPEGImages/a.jxl")
    assert main(line(root, tmp_path / "some", "--allow_loss", "true")) == 0
    assert boxes_of(tmp_path / "some", "train") == expected("a")  # a PNG under another suffix


def test_layout_faults(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "Annotations", "JPEGImages")
    write(root / "labels.txt", "wide\n")
    assert f"b.xml, line 4: class 'tall' is not among the 1 of {root}/labels.txt" in user_error(
        main, line(root, tmp_path / "o1")
    )
    (root / "labels.txt").unlink()
    shutil.copytree(root / "Annotations", root / "xmls")
    assert "has XML files in Annotations, xmls; leave one" in user_error(main, line(root, tmp_path / "o2"))
    shutil.rmtree(root / "xmls")
    assert "has no split 'val' (there is neither ImageSets/Main/ nor a list beside Annotations/)" in user_error(
        main, line(root, tmp_path / "o3", "--splits", '["val"]')
    )
    for year in ("VOC2007", "VOC2012"):
        shutil.copytree(root, tmp_path / "devkit" / year)
        write(tmp_path / "devkit" / year / "ImageSets/Main/train.txt", "a\n")
    assert "holds VOC2007, VOC2012, each with splits; give one of them" in user_error(
        main, line(tmp_path / "devkit", tmp_path / "o4")
    )
    shutil.rmtree(tmp_path / "devkit" / "VOC2012")
    assert main(line(tmp_path / "devkit", tmp_path / "o5")) == 0
    assert boxes_of(tmp_path / "o5", "train") == expected("a")
