"""Checks of one COCO file by itself: ids, sizes, boxes, classes. What needs the pictures is in `images.py`.

Legend: N annotations whose image, class and box can be read; I images, in file order.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.wording import count, some
from ssld.stage2_detect.data.check.findings import (
    Finding,
    Level,
    Repair,
    first_ids,
    is_id,
    is_number,
    read_content,
)
from ssld.stage2_detect.data.coco import is_shape, judge_boxes
from ssld.stage2_detect.data.coco_json import MAX_COORDINATE

TINY_SIDE = 4.0
"""objects with a shorter side than this have too few pixels to be told from noise"""
FEW = 10
"""classes with fewer boxes than this are hard to learn and to score"""


@dataclass
class FileCheck:
    """A COCO file while it is checked."""

    name: str
    """train or val"""
    file: Path
    folder: Path
    """of its pictures"""
    content: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    repair: Repair = field(default_factory=Repair)
    image_of: dict[Any, int] = field(default_factory=dict)
    """position of the image of an id"""
    class_of: dict[Any, str] = field(default_factory=dict)
    """name of the class of an id"""
    boxes_of: Counter[str] = field(default_factory=Counter)
    """boxes of each class that are trained on"""
    statistics: dict[str, Any] = field(default_factory=dict)
    """numbers for whoever chooses settings: see `_measure`"""

    def add(self, level: Level, text: str, fix: str | None = None) -> None:
        self.findings.append(Finding(level, self.file.name, text, fix))


def check_rows(name: str, file: Path, folder: Path, *, masks: bool = False) -> FileCheck:
    """Everything about a file that can be said without looking at a picture, for a detector with `masks` or without.

    Raises UserError where it is no COCO file at all.
    """
    check = FileCheck(name, file, folder, read_content(file))
    _check_images(check)
    _check_categories(check)
    rows = _check_annotations(check)
    _check_boxes(check, rows, masks=masks)
    return check


def _check_images(check: FileCheck) -> None:
    rows = check.content["images"]
    nameless, twice, listed, unsized = [], [], [], []
    seen: dict[str, Any] = {}
    for index, row in enumerate(rows):
        image_id, name = row.get("id"), row.get("file_name")
        if not is_id(image_id) or not isinstance(name, str) or not name:
            nameless.append(index)
        elif image_id in check.image_of:
            twice.append(index)
        else:
            check.image_of[image_id] = index
            if name in seen:
                listed.append((index, seen[name]))
            seen.setdefault(name, image_id)
            if not all(is_number(row.get(key)) and row[key] > 0 and row[key] == row[key] // 1 for key in _SIZE):
                unsized.append(index)
    check.repair.drop_images.update(nameless, twice)
    if nameless:
        text = f"{count(len(nameless), 'image')} without id or file_name (first: number {nameless[0] + 1} of the list): training stops"
        check.add("fault", text, "leaves them out")
    if twice:
        ids = some([rows[index]["id"] for index in twice])
        check.add(
            "fault", f"{count(len(twice), 'image id')} given again ({ids}): training stops", "keeps the first of each"
        )
    if listed:
        names = some([rows[index]["file_name"] for index, _ in listed])
        check.add(
            "warning",
            f"{count(len(listed), 'picture')} listed more than once, under other ids ({names}): each is trained on as "
            "if the others' boxes were not there",
            "puts their boxes together under the first id",
        )
        _merge_images(check, listed)
    if unsized:
        names = some([rows[index]["file_name"] for index in unsized])
        check.add(
            "fault",
            f"{count(len(unsized), 'image')} without a width and height ({names}): training stops",
            "takes the pictures' sizes",
        )
        for index in unsized:
            check.repair.image_values[index] = {}  # filled in from the picture


_SIZE = ("width", "height")


def _merge_images(check: FileCheck, listed: list[tuple[int, Any]]) -> None:
    first_of = {check.content["images"][index]["id"]: first for index, first in listed}
    check.repair.drop_images.update(index for index, _ in listed)
    for index, row in enumerate(check.content["annotations"]):
        if is_id(row.get("image_id")) and row["image_id"] in first_of:
            check.repair.set_annotation(index, image_id=first_of[row["image_id"]])


def _check_categories(check: FileCheck) -> None:
    rows = check.content["categories"]
    names = [row.get("name") for row in rows]
    ids = [row.get("id") for row in rows]
    if not rows:
        check.add("fault", "'categories' is empty: training stops")
    for row in rows:
        if not is_id(row.get("id")) or not isinstance(row.get("name"), str):
            check.add("fault", f"category {row!r} without id or name: training stops")
        else:
            check.class_of.setdefault(row["id"], row["name"])
    for what, values in (("id", ids), ("name", names)):
        again = [value for value, times in Counter(map(repr, values)).items() if times > 1]
        if again:
            check.add("fault", f"{count(len(again), f'category {what}')} given twice ({some(again)}): training stops")


def _check_annotations(check: FileCheck) -> list[int]:
    """Positions of the annotations whose image, class and box can be read."""
    rows = check.content["annotations"]
    sound: list[int] = []
    faults: dict[str, list[int]] = {kind: [] for kind in (*_WHAT, "id")}
    seen: set[Any] = set()
    numbers = [row["id"] for row in rows if isinstance(row.get("id"), int) and not isinstance(row["id"], bool)]
    free = max(numbers, default=0) + 1
    for index, row in enumerate(rows):
        if not is_id(row.get("id")) or row["id"] in seen:
            faults["id"].append(index)
            check.repair.set_annotation(index, id=free)
            free += 1
        else:
            seen.add(row["id"])
        places = {key: _look_up(row.get(f"{key}_id"), known) for key, known in _known(check)}
        for key, value in places.items():
            if value is None:
                faults[key].append(index)
            elif value != row[f"{key}_id"]:
                faults[f"{key} type"].append(index)
                check.repair.set_annotation(index, **{f"{key}_id": value})
        box = row.get("bbox")
        readable = isinstance(box, list) and len(box) == 4 and all(is_number(value, MAX_COORDINATE) for value in box)
        if not readable:
            faults["box"].append(index)
        elif None not in places.values():
            sound.append(index)
        if (row.get("iscrowd") or 0) not in (0, 1):
            faults["crowd"].append(index)
            check.repair.set_annotation(index, iscrowd=0)
        if row.get("area") is not None and not is_number(row["area"]):
            faults["area"].append(index)
            check.repair.set_annotation(index, area=box[2] * box[3] if readable else None)
    for kind, (what, fix) in _WHAT.items():
        if faults[kind]:
            ids = first_ids([rows[index].get("id") for index in faults[kind]])
            check.add("fault", f"{count(len(faults[kind]), 'annotation')} {what} ({ids}): training stops", fix)
    if faults["id"]:
        ids = some([rows[index].get("id") for index in faults["id"]])
        text = f"{count(len(faults['id']), 'annotation')} without an id of {'its' if len(faults['id']) == 1 else 'their'} own ({ids})"
        check.add("fault", f"{text}: training stops", "gives new ids")
    for kind in ("image", "category", "box"):
        check.repair.drop_annotations.update(faults[kind])
    return sound


_WHAT = {
    "image": ("of an image that is not in the file", "leaves them out"),
    "category": ("of a category that is not in the file", "leaves them out"),
    "image type": ("with an image_id that differs in type, number against text", "takes the type of the images"),
    "category type": (
        "with a category_id that differs in type, number against text",
        "takes the type of the categories",
    ),
    "box": ("without a bbox of four finite numbers", "leaves them out"),
    "crowd": ("with an iscrowd that is neither 0 nor 1", "takes 0"),
    "area": ("with an area that is not a finite number", "takes width x height"),
}


def _known(check: FileCheck) -> Iterator[tuple[str, dict[Any, Any]]]:
    yield "image", check.image_of
    yield "category", check.class_of


def _look_up(value: Any, known: dict[Any, Any]) -> Any:
    """The id as the file has it, perhaps of the other type; None where it has none like it."""
    if not is_id(value):
        return None
    if value in known:
        return value
    other: Any = str(value) if isinstance(value, int) else int(value) if value.isdecimal() else value
    return other if other in known else None


def _check_boxes(check: FileCheck, rows: list[int], *, masks: bool) -> None:
    """Judges boxes as training does, and counts and measures those that are left."""
    annotations, images = check.content["annotations"], check.content["images"]
    values = [{**annotations[index], **check.repair.annotation_values.get(index, {})} for index in rows]
    owners = [check.image_of[row["image_id"]] for row in values]
    unsized = set(check.repair.image_values)
    boxes_N4 = np.array([row["bbox"] for row in values], dtype=np.float64).reshape(-1, 4)
    sizes = [[np.inf, np.inf] if owner in unsized else [images[owner][key] for key in _SIZE] for owner in owners]
    judged = judge_boxes(boxes_N4, np.array(sizes, dtype=np.float64).reshape(-1, 2))
    crowd_N = np.array([bool(row.get("iscrowd")) for row in values], dtype=bool)
    unusable_N = judged.degenerate_N | judged.outside_N
    clipped_N = (judged.clipped_N4 != judged.corners_N4).any(1) & ~unusable_N & ~crowd_N
    ids = [row.get("id") for row in values]

    def report(mask_N: np.ndarray, level: Level, what: str, then: str, fix: str | None) -> None:
        places = np.flatnonzero(mask_N)
        if len(places):
            ids_here = first_ids([ids[place] for place in places])
            check.add(level, f"{count(len(places), 'box')} {what} ({ids_here}): {then}", fix)

    dropped = "training drops them" if check.name == "train" else "never found, so missed in every score"
    report(judged.degenerate_N & ~crowd_N, "warning", "without width or height", dropped, "leaves them out")
    report(judged.outside_N & ~crowd_N, "warning", "outside the image", dropped, "leaves them out")
    report(clipped_N, "note", "reaching over the border", "training clips them", "clips them")
    again_N = _duplicates(values, judged.corners_N4) & ~unusable_N & ~crowd_N
    report(again_N, "warning", "given twice", "trained on twice, and one is missed in every score", "keeps one")
    usable_N = ~unusable_N & ~crowd_N
    sides_N2 = judged.clipped_N4[:, 2:] - judged.clipped_N4[:, :2]
    tiny_N = usable_N & (sides_N2.min(1, initial=np.inf) < TINY_SIDE)
    report(tiny_N, "note", f"with a side below {TINY_SIDE:g} pixels", "hardly to be found at any size", None)
    report(crowd_N, "note", "marked iscrowd", "not trained on; neither found nor missed in scores", None)
    shapes = [row.get("segmentation") for row in values]
    if masks or any(shapes):  # files of boxes alone have none
        bad = [
            owner not in unsized and not is_shape(shape, images[owner]["height"], images[owner]["width"])
            for owner, shape in zip(owners, shapes, strict=True)
        ]
        shapeless_N = usable_N & np.array(bad, dtype=bool)
        then = "training a detector with masks stops" + ("" if masks else "; others do not look at it")
        report(shapeless_N, "fault" if masks else "warning", "without a usable segmentation", then, None)
    for place in np.flatnonzero((unusable_N & ~crowd_N) | again_N):
        check.repair.drop_annotations.add(rows[place])
    for place in np.flatnonzero(clipped_N & ~again_N):
        left, top, right, bottom = (round(float(value), 3) for value in judged.clipped_N4[place])
        box = [left, top, round(right - left, 3), round(bottom - top, 3)]
        area = {} if annotations[rows[place]].get("segmentation") else {"area": box[2] * box[3]}
        check.repair.set_annotation(rows[place], bbox=box, **area)
    check.boxes_of.update(check.class_of[values[place]["category_id"]] for place in np.flatnonzero(usable_N))
    unused = int((~usable_N).sum()) + len(annotations) - len(rows)
    used_I = np.bincount(np.array(owners, dtype=np.int64)[usable_N], minlength=len(images))
    _measure(check, used_I, sides_N2[usable_N], np.array(owners, dtype=np.int64)[usable_N], unused)


def _duplicates(rows: list[dict[str, Any]], corners_N4: np.ndarray) -> np.ndarray:
    """Boxes of the same image and class at the same place, to a tenth of a pixel, but for the first of each."""
    seen: set[Any] = set()
    again = np.zeros(len(rows), dtype=bool)
    for index, (row, corners) in enumerate(zip(rows, corners_N4.round(1).tolist(), strict=True)):
        key = (row["image_id"], row["category_id"], *corners, bool(row.get("iscrowd")))
        again[index] = key in seen
        seen.add(key)
    return again


def _measure(check: FileCheck, used_I: np.ndarray, sides_N2: np.ndarray, owners_N: np.ndarray, dropped: int) -> None:
    """The closing lines on a file, and the numbers that `FileCheck.statistics` hands on."""
    rows = check.content["images"]
    empty = [index for index in check.image_of.values() if not used_I[index]]
    if empty:
        shown = some([str(rows[index]["file_name"]) for index in empty])
        text = f"{count(len(empty), 'image')} without objects ({shown})"
        then = ": trained on as such; data.keep_empty: false leaves them out" if check.name == "train" else ""
        check.add("note", f"{text}{then}")
    if not check.boxes_of:
        check.add("fault", "no box that can be trained on")
    names = list(dict.fromkeys(check.class_of.values()))
    none = [name for name in names if not check.boxes_of[name]]
    few = [f"{name} {check.boxes_of[name]}" for name in names if 0 < check.boxes_of[name] < FEW]
    if none and check.boxes_of:
        check.add(
            "warning" if check.name == "train" else "note",
            f"{count(len(none), 'class')} without any box ({some(none)})",
        )
    if few:
        check.add("note", f"{count(len(few), 'class')} with fewer than {FEW} boxes ({some(few)})")
    short = {
        index: min(rows[index][key] for key in _SIZE) for index in check.image_of.values() if _is_sized(rows[index])
    }
    long = {index: max(rows[index][key] for key in _SIZE) for index in short}
    relative = [
        float(side) / short[owner]
        for side, owner in zip(np.sqrt(sides_N2.prod(1)), owners_N.tolist(), strict=True)
        if owner in short
    ]
    check.statistics = {
        "images": len(check.image_of),
        "boxes": len(sides_N2),
        "dropped": dropped,
        "classes": {name: check.boxes_of[name] for name in names},
        "short_side": float(np.median(list(short.values()))) if short else None,
        "long_side": float(np.median(list(long.values()))) if long else None,
        "object_sizes": [round(float(value), 4) for value in np.percentile(relative, (5, 25, 50, 75, 95))]
        if relative
        else None,
        "most_boxes": int(used_I.max(initial=0)),
    }


def _is_sized(row: dict[str, Any]) -> bool:
    return all(is_number(row.get(key)) and row[key] > 0 for key in _SIZE)
