"""COCO files that can be read and are doubtful all the same: boxes of another format, entries of one file, classes, images without objects."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.check.annotations import check_rows
from ssld.stage2_detect.data.coco import CocoData, require_boxes, require_format
from tests.stage2_detect.six_images import content

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
    for owners, level in ((1, "warning"), (3, "warning"), (5, "note")):
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
