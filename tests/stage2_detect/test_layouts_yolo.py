"""Layouts of YOLO data sets as tools and sites write them: all give the same objects, in the same splits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from converted_data import by_name, counted, line, read, save, write

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.layouts.yolo import find_yolo, input_places, label_folders

ROWS = {"a": "0 0.5 0.5 0.25 0.5\n", "b": "1 0.25 0.5 0.5 1\n", "c": "1 0.5 0.25 1 0.5\n"}
BOXES = {"a": [15, 5, 10, 10], "b": [0, 0, 20, 20], "c": [0, 0, 40, 10]}
IN_TRAIN = ("a", "b")
NAMES = "wide\ntall\n"


def build(root: Path, images: str, labels: str, *, ending: str = ".txt", suffix: str = ".png") -> None:
    """Three images of 40 x 20 pixels with an object each; `{}` in the folders is the split."""
    for name, rows in ROWS.items():
        split = "train" if name in IN_TRAIN else "val"
        save(root / images.format(split) / f"{name}{suffix}")
        write(root / labels.format(split) / f"{name}{ending}", rows)


def check(run: Path, split: str, *names: str) -> None:
    data = read(run, split)
    assert data.class_names == ("wide", "tall")
    assert by_name(data).keys() == set(names)
    for name, record in by_name(data).items():
        np.testing.assert_allclose(record.file_boxes_N4, [BOXES[name]])
        assert record.labels_N.tolist() == [int(ROWS[name][0])]


def splits_of(run: Path) -> dict[str, dict[str, object]]:
    splits: dict[str, dict[str, object]] = json.loads((run / "result.json").read_text())["metrics"]["splits"]
    return splits


# ---- where labels lie


@pytest.mark.parametrize(
    ("images", "labels", "ending"),
    [
        ("images/{}", "labels/{}", ".txt"),
        ("Images/{}", "Labels/{}", ".txt"),
        ("IMAGES/{}", "labels/{}", ".TXT"),
        ("images/{}", "label/{}", ".Txt"),
        ("JPEGImages/{}", "labels/{}", ".txt"),
        ("{}/images", "{}/labels", ".txt"),
        ("{}/Images", "{}/LABELS", ".txt"),
        ("images/{}", "images/{}", ".txt"),
        ("{}", "{}", ".txt"),
        ("images/{}", "labels/{}", ".png.txt"),
    ],
)
@pytest.mark.parametrize("above", ["set", "images/set"])
def test_labels_of_described_folders(tmp_path: Path, images: str, labels: str, ending: str, above: str) -> None:
    """Works even if a folder above the data set is called `images`."""
    root = tmp_path / above
    build(root, images, labels, ending=ending)
    for place in (images, labels):
        write(root / place.format("train") / "._a.txt", "of a Mac")
    write(root / "data.yaml", f"train: {images.format('train')}\nval: {images.format('val')}\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b")
    check(tmp_path / "out", "val", "c")


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ("images/{}", "labels/{}", "classes.txt"),  # Label Studio
        ("images/{}", "labels/{}", "labels/classes.txt"),
        ("Images/{}", "Labels/{}", "Labels/classes.txt"),
        ("{}/images", "{}/labels", "classes.txt"),
        ("{}", "{}", "{}/_darknet.labels"),  # Roboflow
        ("{}", "{}", "{}/classes.txt"),
        ("{}", "{}", "classes.txt"),
        ("below/images/{}", "below/labels/{}", "below/classes.txt"),
    ],
)
def test_folders_without_a_description(tmp_path: Path, images: str, labels: str, names: str) -> None:
    root = tmp_path / "set"
    build(root, images, labels)
    write(root / ".DS_Store", "")
    for split in ("train", "val"):
        write(root / names.format(split), NAMES)
    assert main(line(root, tmp_path / "out")) == 0
    assert splits_of(tmp_path / "out").keys() == {"train", "val"}
    check(tmp_path / "out", "train", "a", "b")
    check(tmp_path / "out", "val", "c")


def test_labels_beside_images_in_one_folder(tmp_path: Path, user_error: Callable[..., str]) -> None:
    """labelImg."""
    root = tmp_path / "set"
    build(root, ".", ".")
    assert "no class names" in user_error(main, line(root, tmp_path / "out"))
    write(root / "classes.txt", NAMES)
    write(root / "notes.txt", "labeled by me\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b", "c")
    write(root / "d.txt", ROWS["a"])
    assert "d.txt: no image in" in user_error(main, line(root, tmp_path / "other"))


@pytest.mark.parametrize("source", ["set", "set/obj.data"])
def test_darknet_as_cvat_writes_it(tmp_path: Path, source: str) -> None:
    """Its paths are written for Darknet, whose data set is in data/."""
    root = tmp_path / "set"
    build(root, "obj_{}_data", "obj_{}_data")
    write(
        root / "obj.data",
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n",
    )
    write(root / "obj.names", NAMES)
    write(root / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    write(root / "valid.txt", "data/obj_val_data/c.png\n")
    assert main(line(tmp_path / source, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b")
    check(tmp_path / "out", "valid", "c")


@pytest.mark.parametrize(
    "form", ["images/train/{}.png", "./images/train/{}.png", "images\\train\\{}.png", "{root}/images/train/{}.png"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists(tmp_path: Path, form: str, encoding: str) -> None:
    root = tmp_path / "set"
    build(root, "images/train", "labels/train")
    text = "\r\n".join(form.replace("{root}", str(root)).replace("{}", name) for name in "abc")
    (root / "list.TXT").write_bytes(text.encode(encoding))
    write(root / "data.yaml", "train: list.TXT\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b", "c")


def test_accents_of_two_forms(tmp_path: Path) -> None:
    root = tmp_path / "set"
    save(root / "images" / "cafe\u0301.png")
    write(root / "labels" / "caf\u00e9.txt", ROWS["a"])
    write(root / "data.yaml", "train: images\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    assert read(tmp_path / "out").counts["boxes"] == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.avif", "PNG"), ("a.heic", "JPEG"), ("a.HEIF", "PNG")]
)
def test_images_are_recognized_by_their_content(tmp_path: Path, name: str, kind: str) -> None:
    save(tmp_path / "set" / "images" / name, format=kind)
    write(tmp_path / "set" / "labels" / "a.txt", ROWS["a"])
    write(tmp_path / "set" / "data.yaml", "train: images\nnames: [wide, tall]\n")
    assert main(line(tmp_path / "set", tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a")


@pytest.mark.parametrize("name", ["a.heic", "a.jxl", "a.cr2"])
def test_unsupported_kinds_are_counted(tmp_path: Path, user_error: Callable[..., str], name: str) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    (root / "images" / "a.png").unlink()
    write(root / "images" / name, "\0\0\0\x18ftypheic")
    write(root / "data.yaml", "train: images\nnames: [wide, tall]\n")
    suffix = name[1:]
    cause = f"1 on images that are not read ({suffix}) (first: {root}/images/{name})"
    assert f"all boxes of class 'wide' would be left out: {cause}" in user_error(main, line(root, tmp_path / "out"))
    assert main(line(root, tmp_path / "out", "--allow_loss", "true")) == 0
    check(tmp_path / "out", "train", "b", "c")
    dropped = counted(tmp_path / "out")["image"]["dropped"]
    assert dropped[f"of a kind that is not read ({suffix})"]["count"] == 1


# ---- no labels


@pytest.mark.parametrize("case", ["elsewhere", "empty", "blank", "none"])
def test_a_split_without_an_object_is_refused(tmp_path: Path, user_error: Callable[..., str], case: str) -> None:
    root = tmp_path / "set"
    build(root, "images/{}", "elsewhere/{}" if case == "elsewhere" else "labels/{}")
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [wide, tall]\n")
    for file in (root / "labels/val").glob("*.txt"):
        if case == "none":
            file.unlink()
        else:
            write(file, "" if case == "empty" else "\n \n")
    split, images = ("train", 2) if case == "elsewhere" else ("val", 1)
    message = user_error(main, line(root, tmp_path / "out"))
    assert f"{root}: split {split}: no object in {images} image" in message
    searched = "" if case == "elsewhere" else f"{root}/labels/{split}, "
    files = "1 label file" if case in ("empty", "blank") else "0 label files"
    assert f"({files}, searched in {searched}{root}/images/{split})" in message
    assert not list((tmp_path / "out").glob("*l.json"))
    if case != "elsewhere":
        assert main(line(root, tmp_path / "out", "--splits", '["train"]')) == 0
        check(tmp_path / "out", "train", "a", "b")


# ---- description files


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [no, yes]", ("no", "yes")),
        ("names: {0: on, 1: off}", ("on", "off")),
        ("names: ['null', ~x]", ("null", "~x")),
        ("names: [1, 01]", ("1", "01")),
        ("names: [1.10, 2020-01-01]", ("1.10", "2020-01-01")),
        ("names:\n  1: tall\n  0: 'wide '", ("wide", "tall")),
        ("nc: '2'\nnames: [wide, tall]", ("wide", "tall")),
        ("nc: 2\nnames: classes.txt", ("wide", "tall")),
        ("names: [wide, tall]\nval: null\ntest:\n", ("wide", "tall")),
    ],
)
def test_names_are_text(tmp_path: Path, text: str, names: tuple[str, str]) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    write(root / "classes.txt", NAMES)
    write(root / "coco128.YAML", f"train: images\n{text}\n")
    write(root / "mkdocs.yml", "site_name: a page\n")
    assert main(line(root, tmp_path / "out")) == 0
    assert read(tmp_path / "out").class_names == names
    assert splits_of(tmp_path / "out").keys() == {"train"}


@pytest.mark.parametrize("key", ["val", "valid", "validation", "test", "Val"])
def test_keys_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    root = tmp_path / "set"
    build(root, "images/{}", "labels/{}")
    shutil.copytree(root / "images" / "train", root / "images" / "more")
    write(root / "data.yaml", f"train: images/train\n{key}: images/val\nextra: images/more\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", key, "c")
    assert (
        "data.yaml: extra: is no split (train, val, valid, validation, test) and is not read" in capsys.readouterr().out
    )


def test_a_root_of_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], user_error: Callable[..., str]
) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    write(root / "data.yaml", "path: /content/set\ntrain: images\nnames: [wide, tall]\n")
    assert main(line(root / "data.yaml", tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b", "c")
    assert (
        "data.yaml: path: /content/set does not exist; the folders beside the file are read" in capsys.readouterr().out
    )
    write(root / "data.yaml", "path: /content/set\ntrain: photos\nnames: [wide, tall]\n")
    assert "path: /content/set is not a folder" in user_error(main, line(root / "data.yaml", tmp_path / "o"))


@pytest.mark.parametrize(
    "places",
    [
        "train: /content/pets-1/train/images\nval: /content/pets-1/valid/images\ntest: /content/pets-1/test/images",
        "train: pets-1/train/images\nval: pets-1/valid/images",
        "train: C:\\Users\\me\\pets-1\\train\\images\nval: C:\\Users\\me\\pets-1\\valid\\images",
        "path: /content/pets-1\ntrain: train/images\nval: valid/images\ntest: test/images",
        "path: /datasets\ntrain: pets-1/train/images\nval: pets-1/valid/images",
    ],
)
def test_folders_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], places: str) -> None:
    """As Roboflow's Python package and notebooks write them; a part called test may be missing."""
    root = tmp_path / "set"
    build(root, "{}/images", "{}/labels")
    (root / "val").rename(root / "valid")
    write(root / "data.yaml", f"{places}\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out", "--splits", '["train", "val"]')) == 0
    check(tmp_path / "out", "train", "a", "b")
    check(tmp_path / "out", "val", "c")
    assert "does not exist; " in capsys.readouterr().out


def test_folders_of_another_machine_that_may_be_one_are_refused(tmp_path: Path, user_error: Callable[..., str]) -> None:
    build(tmp_path / "set", "images", "labels")
    for number, (train, val) in enumerate((("/a/train/images", "/a/val/images"), ("images", "/a/val/images"))):
        write(tmp_path / "set" / "data.yaml", f"train: {train}\nval: {val}\nnames: [wide, tall]\n")
        message = user_error(main, line(tmp_path / "set", tmp_path / str(number)))
        assert "/images is neither a folder nor a .txt list of images; correct it, or take " in message


def test_no_folder_above_another_split_is_taken_for_a_lost_one(tmp_path: Path, user_error: Callable[..., str]) -> None:
    """Its images would be the training images too."""
    root = tmp_path / "set"
    build(root, "images/{}", "labels/{}")
    write(root / "data.yaml", "train: images/train\nval: /content/set/valid/images\nnames: [wide, tall]\n")
    assert "val: /content/set/valid/images is neither a folder" in user_error(main, line(root, tmp_path / "out"))


def test_images_listed_twice_or_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    build(root, "images/{}", "labels/{}")
    write(root / "data.yaml", "train: [images/train, images]\nval: images/val\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b", "c")
    out = capsys.readouterr().out
    assert f"train: 2 images changed: 2 listed more than once, read once (first: {root}/images/train/a.png)" in out
    assert f"1 image of val in train too (first: {root}/images/val/c.png)" in out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels/a.TXT", ROWS["a"], "images/a.png: has two label files, "),
        ("labels/a.png.txt", ROWS["a"], "images/a.png: has two label files, "),
        ("Labels/a.txt", ROWS["b"], "images/a.png: has two label files, "),
        ("data.yaml", "train: images\nnames: wide, tall\n", "names: expected a list, or numbers with names"),
        ("data.yaml", "train: images\nnames: [wide, [tall]]\n", "names: expected a list, or numbers with names"),
        ("data.yaml", "train: images\nnames: {a: wide, b: tall}\n", "names: the class numbers are not 0..1"),
        ("data.yaml", "train: images\nnames: [wide, '']\n", "class number 1 has an empty name"),
        ("data.yaml", 'train: images\nnames: [wide, "ta\\nll"]\n', "the class name 'ta\\nll' has control characters"),
        ("data.yaml", "train: images\nnames: [wide, tall]\nnc: 3\n", "nc is 3, but names has 2"),
        ("data.yaml", "train: {a: images}\nnames: [wide, tall]\n", "train: expected a folder, a list of folders"),
        ("data.yaml", "path: [a]\ntrain: images\nnames: [wide, tall]\n", "path: expected a path"),
        ("data.yaml", "train: images\ntrain: images\n", "key 'train' is given twice"),
    ],
)
def test_faults(tmp_path: Path, user_error: Callable[..., str], file: str, text: str, message: str) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    write(root / "data.yaml", "train: images\nnames: [wide, tall]\n")
    write(root / file, text)
    assert message in user_error(main, line(root, tmp_path / "out"))


def test_a_list_of_another_machine(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    write(root / "data.yaml", "train: list.txt\nnames: [wide, tall]\n")
    write(root / "list.txt", "/content/not_here/images/train/a.jpg\n")
    message = user_error(main, line(root, tmp_path / "out"))
    assert message.endswith("list.txt, line 1: no image /content/not_here/images/train/a.jpg")


def test_labels_in_another_folder_than_their_image(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    (root / "images" / "deeper").mkdir()
    (root / "images" / "a.png").rename(root / "images" / "deeper" / "a.png")
    write(root / "data.yaml", "train: images\nnames: [wide, tall]\n")
    message = user_error(main, line(root, tmp_path / "out"))
    assert "labels/a.txt: is not in a folder for the labels of images/deeper/a.png" in message.replace(f"{root}/", "")


def test_class_lists_have_to_agree(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "{}", "{}")
    write(root / "train" / "_darknet.labels", NAMES)
    write(root / "val" / "_darknet.labels", "tall\nwide\n")
    message = user_error(main, line(root, tmp_path / "out"))
    assert (
        message
        == f"{root}/val/_darknet.labels: names other classes than {root}/train/_darknet.labels; give --classes FILE"
    )
    write(tmp_path / "names.txt", NAMES)
    assert main(line(root, tmp_path / "out", "--classes", str(tmp_path / "names.txt"))) == 0
    check(tmp_path / "out", "val", "c")


@pytest.mark.parametrize("form", ["data.yaml", "obj.data"])
def test_a_split_that_is_not_there(
    tmp_path: Path, user_error: Callable[..., str], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Roboflow names a test set even if it wrote none. Without the training images, or half of a split, it is an error."""
    root = tmp_path / "set"
    build(root, "{}/images", "{}/labels")
    write(root / "obj.names", NAMES)
    if form == "obj.data":
        write(root / form, "train = train/images\nval = val/images\ntest = test/images\nnames = obj.names\n")
    else:
        write(root / form, "train: ../train/images\nval: ../val/images\ntest: ../test/images\nnames: [wide, tall]\n")
    assert main(line(root, tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b")
    check(tmp_path / "out", "val", "c")
    assert splits_of(tmp_path / "out").keys() == {"train", "val"}
    assert "test/images does not exist; test is not read" in capsys.readouterr().out
    assert "has no split 'test'" in user_error(main, line(root, tmp_path / "no", "--splits", '["test"]'))
    (root / form).unlink()
    for places in (
        "train: trian/images\nval: val/images",
        "train: train/images\nval: [val/images, more/images]",
        "val: vla/images",
        "train: train/images\nval: vla/images",
        "val: vla/images\ntest: test/images",
    ):
        write(root / "data.yaml", f"{places}\nnames: [wide, tall]\n")
        assert "/images is neither a folder nor a .txt list" in user_error(main, line(root, tmp_path / "no"))


def test_images_of_one_name(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    build(root, "images", "labels")
    save(root / "images" / "b.jpg")
    write(root / "data.yaml", "train: images\nnames: [wide, tall]\n")
    message = user_error(main, line(root, tmp_path / "out"))
    assert f"labels/b.txt: belongs to {root}/images/b.jpg and to {root}/images/b.png; remove one" in message
    (root / "labels" / "b.txt").rename(root / "labels" / "b.png.txt")
    assert main(line(root, tmp_path / "out")) == 0
    assert len(read(tmp_path / "out").images) == 4


def test_several_data_sets_in_a_folder(tmp_path: Path, user_error: Callable[..., str]) -> None:
    for name in ("one", "two"):
        build(tmp_path / "sets" / name, "images/{}", "labels/{}")
        write(tmp_path / "sets" / f"{name}.yaml", f"path: {name}\ntrain: images/train\nnames: [wide, tall]\n")
    assert "holds one.yaml, two.yaml; give one of these files" in user_error(
        main, line(tmp_path / "sets", tmp_path / "o")
    )
    (tmp_path / "sets" / "one.yaml").unlink()
    assert main(line(tmp_path / "sets", tmp_path / "out")) == 0
    check(tmp_path / "out", "train", "a", "b")
    (tmp_path / "sets" / "two.yaml").unlink()
    assert "holds one, two, each with splits; give one of them" in user_error(
        main, line(tmp_path / "sets", tmp_path / "o2")
    )


# ---- inputs of a run


def test_input_places(tmp_path: Path) -> None:
    root = tmp_path / "set"
    build(root, "Images/{}", "labels/{}")
    write(root / "list.txt", "Images/val/c.png\n")
    write(root / "data.yaml", "train: Images/train\nval: list.txt\ntest: nowhere\nnames: [wide, tall]\n")
    layout = find_yolo(root / "data.yaml")
    assert layout is not None
    places = {"Images/train", "labels/train", "list.txt", "Images/val", "labels/val"}
    assert input_places(layout) == {name: root / name for name in places}
    assert label_folders(root / "Images/train") == [root / "labels/train", root / "Images/train"]
    assert find_yolo(tmp_path / "absent.yaml") is None
