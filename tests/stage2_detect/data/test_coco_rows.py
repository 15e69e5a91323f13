"""Checks of the rows of COCO files: training and the data check read, count and refuse the same rows, on files with every kind of damage."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.check.annotations import check_rows
from ssld.stage2_detect.data.check.images import check_images
from ssld.stage2_detect.data.coco import CocoData, require_boxes, require_masks
from ssld.stage2_detect.data.coco_rows import ODD_NAME, TURNED, clean_name
from tests.stage2_detect.six_images import Content, content

NAN = float("nan")
RIGHT_ANGLE = {"occluded": False, "rotation": 90.0}


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
    ("turned", lambda d: d["annotations"][0].update(bbox=[9, 0, 20, 30], segmentation=[], attributes=RIGHT_ANGLE), {"box": {TURNED: 1}}),
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


def test_a_turned_rectangle_is_read_as_the_box_around_it(read: Callable[..., CocoData], folder: Path) -> None:
    """CVAT writes the rectangle before its turn. A corrected copy is not turned again, a segmentation fits its bbox as it is.

    An attribute of another tool may have this name too: the page of a document that is to be turned, for example.
    """
    whole = content()
    rows = whole["annotations"]
    rows[0] |= {"bbox": [20, 14, 24, 10], "segmentation": [], "attributes": {"occluded": False, "rotation": 330.0}}
    rows[1]["attributes"] = {"occluded": False, "rotation": 30.0}
    for row, rotation in zip(rows[2:6], (0.0, "left", float("inf"), 180.0), strict=True):
        row |= {"segmentation": [], "attributes": {"occluded": False, "rotation": rotation}}
    rows[6] |= {"segmentation": [], "attributes": {"rotation": 90}}
    width, height = 24 * 3**0.5 / 2 + 5, 12 + 10 * 3**0.5 / 2
    expected = [32 - width / 2, 19 - height / 2, width, height]
    first = read(whole)
    boxes = {
        one: box for image in first.images for one, box in zip(image.annotation_ids, image.file_boxes_N4, strict=True)
    }
    assert boxes[1].tolist() == pytest.approx(expected, abs=1e-3)
    assert all(boxes[one].tolist() == [4, 5, 30, 20] for one in range(2, 8))
    assert first.tally.changed("box", TURNED) == first.tally.changed("box") == 1
    copy_of_it = read(check_rows("train", folder / "data.json", folder).repair.apply(whole))
    (copied,) = (image for image in copy_of_it.images if 1 in image.annotation_ids)
    assert copied.file_boxes_N4[copied.annotation_ids.index(1)].tolist() == boxes[1].tolist()
    assert not copy_of_it.tally.changed("box")


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
