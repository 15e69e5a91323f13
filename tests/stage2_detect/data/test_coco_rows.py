"""Checks of COCO files: training and the data check read, count and refuse the same rows, on files with every kind of damage."""

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.check.annotations import check_rows
from ssld.stage2_detect.data.check.images import check_images
from ssld.stage2_detect.data.coco import CocoData, read_coco, require_boxes, require_format, require_masks
from ssld.stage2_detect.data.coco_rows import ODD_NAME, clean_name
from ssld.stage2_detect.data.image_names import fitting_files, missing_names

Content = dict[str, Any]
NAN = float("nan")


def content() -> Content:
    """Six images; of `wide` there are six boxes, of `tall` three, and one crowd."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in range(1, 7)]
    boxes: list[Content] = [
        {"id": number, "image_id": 1 + number % 6, "category_id": 1 + (number % 3 == 0), "bbox": [4, 5, 30, 20], "area": 600, "iscrowd": 0}
        for number in range(1, 10)
    ]  # fmt: skip
    boxes.append({"id": 10, "image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1})
    for row in boxes:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    categories = [{"id": 1, "name": "wide"}, {"id": 2, "name": "tall"}]
    return {"images": images, "annotations": boxes, "categories": categories}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with empty image files, which these tests never open."""
    for number in range(1, 7):
        (tmp_path / f"{number}.png").touch()
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Callable[..., CocoData]:
    def write_and_read(data: Content, *, training: bool = True, **options: Any) -> CocoData:
        (folder / "data.json").write_text(json.dumps(data))
        return read_coco(folder / "data.json", folder, training=training, **options)

    return write_and_read


def box(data: CocoData, annotation_id: Any = 1) -> list[float]:
    for image in data.images:
        if annotation_id in image.annotation_ids:
            actual: list[float] = image.file_boxes_N4[image.annotation_ids.index(annotation_id)].tolist()
            return actual
    raise AssertionError


def floats(data: Content) -> None:
    for part in ("images", "annotations"):
        for row in data[part]:
            row |= {key: float(row[key]) for key in ("id", "image_id", "category_id") if key in row}


def without_boxes(data: Content) -> None:
    for row, missing in zip(data["annotations"], [None, [], NAN, "", [NAN] * 4, [None] * 4, 0, 0, 0, 0], strict=True):
        row["bbox"] = missing
        if missing == 0:
            del row["bbox"]


TYPES = "that differs in type, number against text"
ONE_ANSWER: list[tuple[str, Callable[[Content], Any], dict[str, dict[str, int]]]] = [
    ("float ids", floats, {"image": {"with an id like 1.0 for 1": 6}, "box": {"with an id like 1.0 for 1": 10}}),
    ("float image id", lambda d: d["annotations"][0].update(image_id=2.0), {"box": {"with an id like 1.0 for 1": 1}}),
    ("float category", lambda d: d["categories"][0].update(id=1.0), {"class": {"with an id like 1.0 for 1": 1}}),
    ("text for a number", lambda d: d["annotations"][0].update(image_id="2"), {"box": {f"with an image_id {TYPES}": 1}}),
    ("float as text", lambda d: d["annotations"][0].update(category_id="1.0"), {"box": {f"with a category_id {TYPES}": 1}}),
    ("number for text", lambda d: d["categories"][0].update(id="1"), {"box": {f"with a category_id {TYPES}": 7}}),
    ("float sizes", lambda d: d["images"][0].update(width=64.0, height=48.0), {"image": {"with a size like 640.0 for 640": 1}}),
    ("sizes as text", lambda d: d["images"][0].update(width="64"), {"image": {"with numbers written as text": 1}}),
    ("no boxes", without_boxes, {"box": {"with a segmentation, but without a bbox": 10}}),
    ("nested", lambda d: d["annotations"][0].update(bbox=[[4, 5, 30, 20]]), {"box": {"with a list inside the bbox": 1}}),
    ("pairs", lambda d: d["annotations"][0].update(bbox=[[4, 5], [30, 20]]), {"box": {"with a list inside the bbox": 1}}),
    ("box as text", lambda d: d["annotations"][0].update(bbox="[4, 5, 30, 20]"), {"box": {"with numbers written as text": 1}}),
    ("numbers as text", lambda d: d["annotations"][0].update(bbox=["4", "5.0", "3e1", 20]), {"box": {"with numbers written as text": 1}}),
    ("crowd as text", lambda d: d["annotations"][0].update(iscrowd="0"), {"box": {"with numbers written as text": 1}}),
    ("crowd NaN", lambda d: d["annotations"][0].update(iscrowd=NAN), {"box": {"with an iscrowd of NaN": 1}}),
    ("area below 0", lambda d: d["annotations"][0].update(area=-600), {"box": {"with an area that is no number above 0": 1}}),
    ("area 0", lambda d: d["annotations"][0].update(area=0), {"box": {"with an area that is no number above 0": 1}}),
    ("area in words", lambda d: d["annotations"][0].update(area="large"), {"box": {"with an area that is no number above 0": 1}}),
    ("area NaN", lambda d: d["annotations"][0].update(area=NAN), {"box": {"with an area that is no number above 0": 1}}),
    ("huge area", lambda d: d["annotations"][0].update(area=10**400), {"box": {"with an area that is no number above 0": 1}}),
    ("unused double", lambda d: d["categories"].insert(0, {"id": 0, "name": "wide"}), {"class": {"with the name of another one, but not used": 1}}),
    ("line break in a name", lambda d: d["categories"][0].update(name="\ufeffwide\r\n"), {"class": {ODD_NAME: 1}}),
    ("blanks around a name", lambda d: d["categories"][0].update(name=" wide\u3000"), {"class": {ODD_NAME: 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "changed"), [case[1:] for case in ONE_ANSWER], ids=[case[0] for case in ONE_ANSWER])
@pytest.mark.parametrize("training", [True, False])
def test_values_with_one_correct_reading_are_read_and_counted(
    read: Callable[..., CocoData], folder: Path, damage: Callable[[Content], Any], changed: Any, training: bool
) -> None:
    whole = content()
    expected = read(whole, training=training)
    damage(whole)
    actual = read(whole, training=training, class_names=expected.class_names)
    record = actual.tally.record()
    counted = {
        noun: {cause: entry["count"] for cause, entry in part["changed"].items()}
        for noun, part in record.items()
        if part["changed"]
    }
    assert counted == changed
    assert all(cause in actual.tally.describe() for causes in changed.values() for cause in causes)
    assert actual.class_names == expected.class_names == ("wide", "tall")
    for one, other in zip(actual.images, expected.images, strict=True):
        assert (one.image_id, one.width, one.height) == (other.image_id, other.width, other.height)
        assert one.annotation_ids == other.annotation_ids
        for name in ("boxes_N4", "labels_N", "crowd_N", "areas_N", "file_boxes_N4"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    check = check_rows("train", folder / "data.json", folder)
    assert not [one for one in check.findings if one.level == "fault"]
    reported = [one for one in check.findings if one.level == "warning"]
    for causes in changed.values():
        for cause, number in causes.items():
            assert any(one.text.startswith(f"{number} ") and cause in one.text and one.fix for one in reported), cause


def test_numbers_and_texts_that_could_be_two_ids_are_not_guessed(read: Callable[..., CocoData]) -> None:
    whole = content()
    whole["images"].append(whole["images"][0] | {"id": "1"})
    data = read(whole)
    assert (len(data.images[0].annotation_ids), len(data.images[6].annotation_ids)) == (1, 0)
    assert not data.tally.changed("box")
    odd: list[Any] = ["01", " 1", "1x", 1.5, True, [1], {}]
    for value in odd:
        whole = content()
        whole["annotations"][0]["image_id"] = value
        with pytest.raises(UserError, match=r"annotation 1 has image_id"):
            read(whole)


@pytest.mark.parametrize(
    ("bbox", "area"),
    [
        ([[4, 5], [34, 25]], 600),
        ([[4, 5], [30, 20]], None),
        ([4, 5, 30], 600),
        ({"x": 4}, 600),
        ("4 5 30 20", 600),
        ([True, 5, 30, 20], 600),
        ([4, 5, 30, NAN], 600),
    ],
)
def test_ambiguous_boxes_are_refused(read: Callable[..., CocoData], bbox: Any, area: Any) -> None:
    whole = content()
    whole["annotations"][2] |= {"bbox": bbox, "area": area}
    with pytest.raises(UserError, match=r"data\.json: annotation 3 has bbox .*, expected four finite numbers"):
        read(whole)


def test_categories_of_one_name_that_are_both_used_are_refused(read: Callable[..., CocoData]) -> None:
    whole = content()
    whole["categories"].append({"id": 3, "name": "wide\n"})
    assert read(whole).category_ids == (1, 2)
    whole["annotations"][0]["category_id"] = 3
    with pytest.raises(UserError, match="two categories are called 'wide'"):
        read(whole)


@pytest.mark.parametrize(
    ("name", "clean"),
    [("a b", "a b"), ("größe", "größe"), ("a\tb\n", "a b"), ("\x1b[31mred", "[31mred"), ("\u2028", ""), ("x\ud800", "x"), ("\ufeffa", "a")],
)  # fmt: skip
def test_names_on_one_line(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_names_of_a_detector_are_compared_as_they_are_read(read: Callable[..., CocoData]) -> None:
    assert read(content(), training=False, class_names=["tall\n", "wide"]).category_ids == (2, 1)


@pytest.mark.parametrize("part", ["train", "val"])
def test_masks_are_required_of_the_same_objects(read: Callable[..., CocoData], folder: Path, part: str) -> None:
    """Training checks the rows that it trains on, evaluation checks all rows."""
    for number in range(10):
        whole = content()
        whole["annotations"][4]["bbox"] = [70, 0, 5, 5]
        del whole["annotations"][number]["segmentation"]
        try:
            refused = not require_masks(read(whole, training=part == "train", segmentations=True))
        except UserError:
            refused = True
        check = check_rows(part, folder / "data.json", folder, masks=True)
        assert any(one.level == "fault" for one in check.findings) == refused == (part == "val" or number not in (4, 9))


ALL = "no box to train on: all boxes would be left out:"
CROWD = "1 marked iscrowd (first: annotation 10)"


@pytest.mark.parametrize(
    ("chosen", "values", "sentence"),
    [
        (slice(None), {"iscrowd": 1}, f"{ALL} 10 marked iscrowd (first: annotation 1)"),
        (slice(9), {"bbox": [70, 0, 5, 5]}, f"{ALL} {CROWD}, 9 outside the image (first: annotation 1)"),
        (
            slice(2, 9, 3),
            {"iscrowd": 1},
            "all boxes of class 'tall' would be left out: 3 marked iscrowd (first: annotation 3)",
        ),
        (
            slice(5),
            {"bbox": [1, 1, 0, 5]},
            f"6 of the 10 boxes would be left out: {CROWD}, 5 without width or height (first: annotation 1)",
        ),
        (slice(0), {}, "no box to train on"),
    ],
    ids=["crowds", "outside", "class", "half", "none"],
)
def test_bulk_loss_stops_training_and_is_a_fault(
    read: Callable[..., CocoData], folder: Path, chosen: slice, values: Content, sentence: str
) -> None:
    whole = content()
    for row in whole["annotations"][chosen]:
        row |= values
    whole["annotations"] = whole["annotations"] if values else []
    data = read(whole)
    with pytest.raises(UserError) as error:
        require_boxes(data, allow_loss=False)
    assert str(error.value).startswith(f"{folder / 'data.json'}: {sentence}")
    assert f"fault: {sentence}: training stops" in [
        f"{one.level}: {one.text}" for one in check_rows("train", folder / "data.json", folder).findings
    ]
    allowed = check_rows("train", folder / "data.json", folder, allow_loss=True)
    if data.tally.kept("box"):
        assert "data.allow_loss: true" in str(error.value)
        assert require_boxes(data, allow_loss=True) is data
        assert f"{sentence}: training continues with the remaining boxes" in [one.text for one in allowed.findings]
    else:
        with pytest.raises(UserError, match="no box to train on"):
            require_boxes(data, allow_loss=True)
        assert any(one.level == "fault" for one in allowed.findings)
        with pytest.raises(UserError, match="no image with a usable box"):
            read(whole, keep_empty=False)


VALUES: list[Any] = [
    None, True, 0, 1, 2, 3, -1, 1.0, 2.5, NAN, float("inf"), 10**30, 10**400, "1", "2.0", "x", "", [], {}, [1], [4, 5, 30, 20],
    [[4, 5, 30, 20]], [[4, 5], [30, 20]], [60, 40, 30, 30], [70, 0, 5, 5], [4, 5, 0, 9], ["4", 5, 30, 20], "[1, 2, 3, 4]", [0] * 4, "wide", "tall\n",
    "\t", "1.png",
    "./2.png", "gone.png", [[4, 5, 34, 5, 34, 25]], {"size": [48, 64], "counts": [100, 20, 2952]}, {"size": [1, 1], "counts": "1"},
]  # fmt: skip
KEYS: dict[str, dict[str, list[Any]]] = {  # unusual values, some of which have a correct reading
    "images": {"id": [7, "1", 2.0], "file_name": ["1.png", "./2.png"], "width": [64.0, "64", 40], "height": [48.0, 10]},
    "annotations": {
        "id": [11.0, 12, "a"],
        "image_id": [1.0, "1", 2],
        "category_id": [1.0, "2", 1],
        "bbox": [[60, 40, 30, 30], [70, 0, 5, 5], [4, 5, 0, 9], None, [[4, 5, 30, 20]]],
        "area": [0, -5, None, NAN, "600"],
        "iscrowd": [1, "1", True, 0.0],
        "segmentation": [None, []],
    },
    "categories": {"id": [1.0, "1"], "name": ["wide\n", "other"]},
}


def mutated(seed: int) -> Content:
    draw = random.Random(seed)
    whole = content()
    kind = draw.random() < 0.6
    for _ in range(draw.choice([1, 1, 2, 3, 6])):
        part = draw.choice(["images", "annotations", "annotations", "annotations", "categories"])
        rows = whole[part]
        if not rows:
            continue
        row, key, act = draw.choice(rows), draw.choice(list(KEYS[part])), draw.random()
        if kind:
            row[key] = copy.deepcopy(draw.choice(KEYS[part][key]))
        elif act < 0.06:
            rows.remove(row)
        elif act < 0.12:
            rows.append(copy.deepcopy(row) | draw.choice([{}, {"id": 77}, {"id": 0}]))
        elif act < 0.25:
            row.pop(key, None)
        else:
            row[key] = copy.deepcopy(draw.choice(VALUES))
    if draw.random() < 0.1:
        for row in whole["annotations"]:
            row[draw.choice(["iscrowd", "image_id"])] = draw.choice([1, 1.0, "1"])
    return whole


def test_training_and_the_data_check_agree_on_damaged_files(read: Callable[..., CocoData], folder: Path) -> None:
    """Training refuses a file exactly if the check reports a fault; both count the rows of an accepted file alike."""
    refused = trained = dropped = changed = 0
    for seed in range(1000):
        whole = mutated(seed)
        (folder / "data.json").write_text(json.dumps(whole))
        check = check_rows("train", folder / "data.json", folder)
        check_images(check, quick=True)
        faults = [one.text for one in check.findings if one.level == "fault"]
        data, why = None, ""
        try:
            data = require_boxes(read(whole), allow_loss=False)
        except UserError as error:
            why = str(error)
        assert bool(faults) == bool(why), (seed, faults, why)
        assert "\n" not in why
        if data is None:
            refused += 1
            continue
        trained += 1
        record = data.tally.record()
        assert check.tally.record() == record, seed
        assert check.statistics["boxes"] == data.counts["boxes"]
        for noun, causes in record.items():
            for cause, entry in causes["dropped"].items():
                dropped += 1
                assert any(
                    one.text.startswith(f"{entry['count']} {noun}") and cause in one.text for one in check.findings
                ), (seed, cause)
            for cause, entry in causes["changed"].items():
                changed += cause != "clipped to the image"
                if cause != "clipped to the image":
                    assert any(
                        one.text.startswith(f"{entry['count']} ") and cause in one.text for one in check.findings
                    )
    assert min(refused, trained, dropped, changed) > 200  # the damage is of both kinds


@pytest.mark.parametrize(
    ("file", "name", "look"),
    [
        ("größe.png", "gro\u0308ße.png", " (its letters are composed differently, as in Unicode NFC and NFD)"),
        ("sub/a b.png", "sub\\a%20b.png", ""),
        ("a%20b.png", "a b.png", ""),
        ("Photo.JPG", "photo.jpg", ""),
        ("photo.JPEG", "photo.jpg", ""),
        ("7a-photo.png", "..\\media\\upload\\1\\7a-photo.png", ""),
        ("photo.png", "C:/data/images/photo.png", ""),
        ("deeper/photo.png", "photo.png", ""),
    ],
)
def test_the_hint_names_the_file_that_fits(
    read: Callable[..., CocoData], folder: Path, file: str, name: str, look: str
) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    whole = content()
    whole["images"][3]["file_name"] = name
    with pytest.raises(UserError) as error:
        read(whole)
    hint = f"; did you mean {file!r}{look}?"
    assert (
        str(error.value)
        == f"1 of the 6 images of {folder / 'data.json'} are missing; the first is {folder}/{name}{hint}; {COPY}"
    )
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    (fault,) = [one for one in check.findings if one.level == "fault"]
    assert fault.text.endswith(f"({name}): training stops{hint}")
    assert fault.fix == "writes the names of the files"
    assert check.repair.image_values == {3: {"file_name": file}}
    assert not check.repair.drop_images


COPY = "`ssld doctor --fix DIR` writes a copy with the names of the files"


def test_the_hint_is_on_the_first_that_something_fits(read: Callable[..., CocoData], folder: Path) -> None:
    (folder / "photo.JPG").touch()
    whole = content()
    whole["images"][1]["file_name"], whole["images"][3]["file_name"] = "gone.png", "photo.jpg"
    with pytest.raises(
        UserError, match=r"2 of the 6 images .*gone\.png; did you mean 'photo\.JPG' for 'photo\.jpg'\?; `ssld doctor"
    ):
        read(whole)
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    (fault,) = [one for one in check.findings if one.level == "fault"]
    assert fault.fix == "writes the names of the files, removes 1 image without one"
    assert check.repair.image_values == {3: {"file_name": "photo.JPG"}}
    assert check.repair.drop_images == {1: "not in the folder"}


@pytest.mark.parametrize(
    ("files", "names", "expected"),
    [
        # Exports of Windows, with absolute paths, of a web server, and of a folder above or below.
        (["a/1.jpg", "b/1.jpg"], ["a\\1.jpg", "b\\1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.jpg", "b/1.jpg"], ["C:\\Users\\me\\img\\a\\1.jpg", "C:\\Users\\me\\img\\b\\1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.jpg", "2.jpg"], ["/data/local-files/?d=img/a/1.jpg", "/data/local-files/?d=img/2.jpg"], ["a/1.jpg", "2.jpg"]),
        (["x 1.JPG", "2.jpg"], ["https://host/img/x%201.jpg", "2.jpg"], ["x 1.JPG", None]),
        (["a/1.jpg", "b/2.jpg"], ["1.png", "img/b/2.jpg"], ["a/1.jpg", "b/2.jpg"]),
        # One name fits two files, two names fit one file, or a file that the data set lists already.
        (["a/1.jpg", "b/1.jpg", "2.jpg"], ["1.jpg", "./2.JPG"], None),
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"], None),
        (["1.jpg"], ["a/1.jpg", "1.jpg"], None),
        # Cameras number their images alike: an image in a folder of another name may be another image.
        (["b/1.jpg", "2.jpg"], ["a/1.jpg", "img/2.jpg"], None),
    ],
)  # fmt: skip
def test_files_that_are_meant(
    tmp_path: Path, files: list[str], names: list[str], expected: list[str | None] | None
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = fitting_files(tmp_path, names, missing_names(tmp_path, names))
    assert found == {index: file for index, file in enumerate(expected or []) if file}


def test_no_hint_where_two_files_would_fit(read: Callable[..., CocoData], folder: Path) -> None:
    for name in ("PHOTO.png", "Photo.png"):
        (folder / name).touch()
    whole = content()
    whole["images"][3]["file_name"] = "photo.png"
    with pytest.raises(UserError, match=r"photo\.png$"):
        read(whole)


def test_a_folder_in_place_of_an_image_is_missing_for_both(read: Callable[..., CocoData], folder: Path) -> None:
    (folder / "4.png").unlink()
    (folder / "4.png").mkdir()
    with pytest.raises(UserError, match="1 of the 6 images"):
        read(content())
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    assert any("1 image of 6 not in" in one.text for one in check.findings)


def test_a_file_under_two_ids_is_reported(read: Callable[..., CocoData], folder: Path) -> None:
    whole = content()
    whole["images"][4]["file_name"] = ".//1.png"
    data = read(whole)
    assert len(data.images) == 6
    assert "1 image listed before under another id: each counts by itself" in data.describe()
    check = check_rows("train", folder / "data.json", folder)
    assert any("1 image listed more than once, under other ids (1.png)" in one.text for one in check.findings)
    assert check.statistics["together"] == [[1, 5]]


CORNERS = [[33, 5, 61, 21], [7, 19, 23, 35], [35, 8, 57, 29], [16, 21, 38, 46], [32, 34, 46, 47]]


@pytest.mark.parametrize(
    ("boxes", "doubt"),
    [
        (CORNERS, "10 of the 10 boxes reach over the border: corners (x1, y1, x2, y2) instead of x, y, width, height?"),
        ([[0.1, 0.2, 0.5, 0.5], [0.5, 0.5, 0.4, 0.3]], "10 of the 10 boxes have no number above 1: shares of the image instead of pixels?"),
        ([[4, 5, 60.4, 43.2], [4, 5, 30, 20]], ""),
        ([[4, 5, 30, 20]], ""),
    ],
    ids=["corners", "shares", "rounding", "sound"],
)  # fmt: skip
def test_boxes_of_another_format_are_suspected(
    read: Callable[..., CocoData], folder: Path, boxes: list[list[float]], doubt: str
) -> None:
    whole = content()
    for number, row in enumerate(whole["annotations"]):
        row |= {"bbox": boxes[number % len(boxes)], "iscrowd": 0, "segmentation": []}
    assert (doubt or "instead of") in read(whole).describe() or not doubt
    data = read(whole)
    assert bool(data.format_doubts) == bool(doubt)
    check = check_rows("train", folder / "data.json", folder)
    faults = [one.text for one in check.findings if one.level == "fault"]
    assert faults == ([f"{doubt}: training stops"] if doubt else [])
    for checked in (require_boxes, require_format):  # of training and of evaluation images
        if doubt:
            with pytest.raises(UserError, match=re.escape(f"data.json: {doubt}; correct the file")):
                checked(data, allow_loss=False)
        checked(data, allow_loss=bool(doubt))
    check = check_rows("train", folder / "data.json", folder, allow_loss=True)
    warnings = [one.text for one in check.findings if one.level == "warning" and "given twice" not in one.text]
    assert warnings == ([doubt] if doubt else [])
    assert any("bbox" in values for values in check.repair.annotation_values.values()) == (boxes[0][2] == 60.4)


def test_some_boxes_over_the_border_stop_training_only_if_all_look_like_corners(
    read: Callable[..., CocoData], folder: Path
) -> None:
    def levels(boxes: list[list[int]]) -> list[str]:
        whole = content()
        whole["annotations"] = [
            {"id": number, "image_id": 1 + number % 6, "category_id": 1, "bbox": box, "iscrowd": 0}
            for number, box in enumerate(boxes)
        ]
        data = read(whole)
        found = [
            one for one in check_rows("train", folder / "data.json", folder).findings if "border: corners" in one.text
        ]
        assert [doubt.bulk for doubt in data.format_doubts] == [one.level == "fault" for one in found]
        return [one.level for one in found]

    over = [[20, 15, 50, 40]] * 5
    assert levels([*over, *[[2, 3, 9, 8]] * 16]) == ["fault"]  # every second corner is beyond the first
    assert levels([*over, *[[2, 3, 9, 8]] * 4, *[[30, 20, 9, 8]] * 12]) == ["warning"]  # sides smaller than the corner
    assert levels([*over, *[[2, 3, 9, 8]] * 8]) == ["warning"]  # too few to tell
    assert levels([*over, *[[2, 3, 9, 8]] * 46]) == []
    width, height = (content()["images"][0][side] for side in ("width", "height"))
    assert levels([[1, 1, width + 1, height + 1]] * 30) == ["warning"]  # around whole images, two pixels too large


def test_entries_of_one_file_with_other_boxes_stop_training_in_bulk(
    read: Callable[..., CocoData], folder: Path
) -> None:
    def levels(names: list[str], boxes: list[tuple[int, int]]) -> list[str]:
        """Images of these names, and boxes given by (image, x)."""
        rows = [{"id": index, "file_name": name, "width": 64, "height": 48} for index, name in enumerate(names)]
        annotations = [
            {"id": index, "image_id": owner, "category_id": 1, "bbox": [x, 5, 20, 20]}
            for index, (owner, x) in enumerate(boxes)
        ]
        data = read({"images": rows, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]})
        found = [one for one in check_rows("train", folder / "data.json", folder).findings if "listed more" in one.text]
        if any(one.level == "fault" for one in found):
            with pytest.raises(UserError, match="are entries of a file that has further entries with other"):
                require_boxes(data, allow_loss=False)
        else:
            require_boxes(data, allow_loss=False)
        require_boxes(data, allow_loss=True)
        return [one.level for one in found]

    # A table with a row per box, converted with an image per row.
    assert levels(["1.png", "1.png", "./1.png", "2.png"], [(0, 1), (1, 2), (2, 3), (3, 4)]) == ["fault"]
    # Images repeated with the same boxes, to be seen more often.
    assert levels(["1.png", "1.png", "1.png", "2.png"], [(0, 1), (1, 1), (2, 1), (3, 4)]) == ["warning"]
    assert levels(["1.png", "1.png", "2.png", "3.png"], [(0, 1), (1, 2), (2, 3), (3, 4)]) == ["warning"]
    assert levels(["1.png", "2.png"], [(0, 1), (1, 2)]) == []


def test_classes_that_differ_in_spelling_alone_are_questioned(read: Callable[..., CocoData], folder: Path) -> None:
    for names, expected in ((["traffic light", "Traffic_Light"], 1), (["wide", "tall"], 0)):
        whole = content()
        whole["categories"] = [{"id": index, "name": name} for index, name in enumerate(names, 1)]
        question = f"the classes {names[0]!r} and {names[1]!r} differ in capitals, spaces, dashes or underscores alone"
        assert read(whole).describe().count(question) == expected
        findings = check_rows("train", folder / "data.json", folder).findings
        assert [one.level for one in findings if question in one.text] == ["warning"] * expected


def test_many_images_without_objects_are_a_warning(folder: Path) -> None:
    for owners, level in ((1, "warning"), (3, "note")):
        whole = content()
        for row in whole["annotations"]:
            row["image_id"] = 1 + row["id"] % owners
        (folder / "data.json").write_text(json.dumps(whole))
        findings = check_rows("train", folder / "data.json", folder).findings
        found = [one for one in findings if "without objects" in one.text]
        assert [one.level for one in found] == [level]
        assert found[0].text.count("are they labeled at all?") == (level == "warning")


def test_a_large_share_of_crowds_is_a_warning(folder: Path) -> None:
    whole = content()
    whole["annotations"][2]["iscrowd"] = 1  # a third of `tall`
    (folder / "data.json").write_text(json.dumps(whole))
    levels = [
        (one.level, one.text)
        for one in check_rows("train", folder / "data.json", folder).findings
        if "iscrowd" in one.text
    ]
    assert [level for level, _ in levels] == ["warning"]
    assert levels[0][1].endswith("they are 33 % of 'tall': meant as single objects?")
    whole["annotations"][2]["iscrowd"] = 0
    (folder / "data.json").write_text(json.dumps(whole))
    assert [
        one.level for one in check_rows("train", folder / "data.json", folder).findings if "iscrowd" in one.text
    ] == ["note"]


def test_an_evaluation_set_without_objects(read: Callable[..., CocoData], folder: Path) -> None:
    whole = content()
    for row in whole["annotations"]:
        row["iscrowd"] = 1
    assert "no objects, so there will be no score" in read(whole, training=False).describe()
    assert "no score" not in read(content(), training=False).describe()
    (folder / "data.json").write_text(json.dumps(whole))
    faults = [one.text for one in check_rows("val", folder / "data.json", folder).findings if one.level == "fault"]
    assert faults == ["no objects: evaluation gives no score"]
