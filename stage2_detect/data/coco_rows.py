"""Checks of the rows of a COCO file: usable values, corrected values and faults. Training, evaluation and the data check share them.

A value with exactly one correct reading is read that way and counted as changed: 1.0 for an id of 1, the box of a polygon for a missing bbox. A value
without one is a fault, which stops training. This module drops no rows. Format: https://cocodataset.org/#format-data.

Legend: I images, N annotations.
"""

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np

from ssld.stage2_detect.data.segmentations import shape_box, turned_box

Id = int | str
Kind = Literal["image", "annotation", "category"]
MAX_COORDINATE = 1e9
MAX_AREA = MAX_COORDINATE**2
NOUNS: Mapping[Kind, str] = {"image": "image", "annotation": "box", "category": "class"}
"""nouns for the rows in a tally"""

# Causes of faults, which complete "3 annotations ...".
NO_ID = "without an id"
TWICE = "with an id that is given before"
NO_NAME = "without a name"
SAME_NAME = "with the name of another one"
NO_FILE = "without a file_name"
NO_SIZE = "without a width and height"
NO_IMAGE = "of an image that is not in the file"
NO_CATEGORY = "of a category that is not in the file"
NO_BOX = "without a bbox of four finite numbers"
ODD_CROWD = "with an iscrowd that is neither 0 nor 1"
FIXES: Mapping[tuple[Kind, str], str] = {
    ("image", NO_ID): "removes them",
    ("image", TWICE): "keeps one of several equal rows; removes different images with one id, and their boxes",
    ("image", NO_FILE): "removes them",
    ("image", NO_SIZE): "uses the sizes of the image files",
    ("annotation", NO_ID): "gives new ids",
    ("annotation", TWICE): "gives new ids",
    ("annotation", NO_IMAGE): "removes them",
    ("annotation", NO_CATEGORY): "removes them",
    ("annotation", NO_BOX): "removes them",
    ("annotation", ODD_CROWD): "sets it to 0",
}
"""what `ssld doctor --fix` does with the rows of a fault, in a copy of the file"""
# Causes of changes.
WHOLE_ID = "with an id like 1.0 for 1"
IMAGE_TYPE = "with an image_id that differs in type, number against text"
CATEGORY_TYPE = "with a category_id that differs in type, number against text"
ODD_NAME = "with a name that has control characters, or blanks at its ends"
UNUSED = "with the name of another one, but not used"
WHOLE_SIZE = "with a size like 640.0 for 640"
TEXT = "with numbers written as text"
NESTED = "with a list inside the bbox"
TURNED = "turned by a rotation in the attributes"
SHAPE_BOX = "with a segmentation, but without a bbox"
EMPTY_CROWD = "with an iscrowd of NaN"
ODD_AREA = "with an area that is no number above 0"

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CONTROL = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BYTE_ORDER_MARK = "\ufeff"


@dataclass
class Oddity:
    """Rows of one kind that share a cause.

    Attributes:
        kind: kind of the rows.
        cause: completes "3 annotations ...".
        sentence: full sentence about the first of the rows.
        values: position of a row -> values read in place of the file's; empty for a fault.
        names: ids of the rows, or their numbers in the list.
    """

    kind: Kind
    cause: str
    sentence: str
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ValidatedRows:
    """Values of the rows of a file, in file order; an unusable value is None, NaN or -1 and has an entry in `faults`.

    Attributes:
        faults, changes: in the order in which they were noted.
        category_ids, class_names, image_ids, file_names, annotation_ids: one per row; the second of two equal ids is None.
        unused: positions of categories that are left out.
        sizes_I2: float64, width and height; infinite if unknown.
        owners_N, labels_N: int64, positions of image and category.
        boxes_N4: float64 xywh.
        crowd_N: bool.
        areas_N: float64; width x height if the file gives no valid area.
    """

    faults: list[Oddity]
    changes: list[Oddity]
    category_ids: list[Id | None]
    class_names: list[str | None]
    unused: set[int]
    image_ids: list[Id | None]
    file_names: list[str | None]
    sizes_I2: np.ndarray
    annotation_ids: list[Id | None]
    owners_N: np.ndarray
    labels_N: np.ndarray
    boxes_N4: np.ndarray
    crowd_N: np.ndarray
    areas_N: np.ndarray


def validate_rows(content: Mapping[str, list[dict[str, Any]]]) -> ValidatedRows:
    """Check the three lists of a file; accepts any content of the rows."""
    images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
    notes = _Notes()
    category_ids = _ids(notes, "category", categories)
    class_names = _class_names(notes, categories)
    image_ids = _ids(notes, "image", images)
    sizes_I2 = _sizes(notes, images)
    file_names = _file_names(notes, images)
    annotation_ids = _ids(notes, "annotation", annotations)
    owners_N = _look_up(notes, annotations, "image", image_ids, NO_IMAGE, IMAGE_TYPE)
    labels_N = _look_up(notes, annotations, "category", category_ids, NO_CATEGORY, CATEGORY_TYPE)
    unused = _unused(notes, categories, class_names, set(labels_N.tolist()))
    boxes_N4 = _around_turned(notes, annotations, _boxes(notes, annotations, owners_N, sizes_I2))
    crowd_N = _crowd_flags(notes, annotations)
    areas_N = _areas(notes, annotations, boxes_N4)
    return ValidatedRows(
        faults=list(notes.faults.values()),
        changes=list(notes.changes.values()),
        category_ids=category_ids,
        class_names=class_names,
        unused=unused,
        image_ids=image_ids,
        file_names=file_names,
        sizes_I2=sizes_I2,
        annotation_ids=annotation_ids,
        owners_N=owners_N,
        labels_N=labels_N,
        boxes_N4=boxes_N4,
        crowd_N=crowd_N,
        areas_N=areas_N,
    )


def changes_of(rows: ValidatedRows) -> list[tuple[str, str, int, str]]:
    """Return (noun, cause, number, name of the first) of each change, for a tally."""
    return [(NOUNS[one.kind], one.cause, len(one.names), f"{one.kind} {one.names[0]}") for one in rows.changes]


def clean_name(name: str) -> str:
    """Clean a name: control characters, line breaks and lone surrogates become single spaces; spaces at both ends are removed."""
    name = name.strip()
    if name.isprintable():
        return name
    odd = [letter == _BYTE_ORDER_MARK or unicodedata.category(letter) in _CONTROL for letter in name]
    if not any(odd):
        return name
    return " ".join("".join(" " if bad else letter for letter, bad in zip(name, odd, strict=True)).split())


def plain_name(name: str) -> str:
    """Return a name without capitals, spaces, dashes and underscores."""
    return "".join(letter for letter in name.casefold() if letter not in " -_")


def alike_names(names: Sequence[str]) -> list[str]:
    """Describe the groups of names that differ in capitals, spaces, dashes or underscores alone: `'cat' and 'Cat'`."""
    groups = defaultdict(list)
    for name in names:
        groups[plain_name(name)].append(repr(name))
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def is_id(value: Any) -> bool:
    """Whether a value is an integer or a string, and so a valid id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


class _Notes:
    """Faults and changes by kind of row and cause."""

    def __init__(self) -> None:
        self.faults: dict[tuple[Kind, str], Oddity] = {}
        self.changes: dict[tuple[Kind, str], Oddity] = {}

    def fault(self, kind: Kind, rows: Sequence[dict[str, Any]], index: int, cause: str, predicate: str) -> None:
        """Note a fault of a row; `predicate` completes "annotation 7 ..."."""
        self._add(self.faults, kind, rows, index, cause, predicate)

    def change(
        self, kind: Kind, rows: Sequence[dict[str, Any]], index: int, cause: str, values: dict[str, Any]
    ) -> None:
        """Note that `values` are read in place of a row's own."""
        self._add(self.changes, kind, rows, index, cause, cause).values.setdefault(index, {}).update(values)

    def _add(
        self,
        table: dict[Any, Oddity],
        kind: Kind,
        rows: Sequence[dict[str, Any]],
        index: int,
        cause: str,
        predicate: str,
    ) -> Oddity:
        name = row_name(rows, index)
        if (kind, cause) not in table:
            table[kind, cause] = Oddity(kind, cause, f"{kind} {name} {predicate}")
        oddity = table[kind, cause]
        if index not in oddity.values:  # a row may have two odd values
            oddity.values[index] = {}
            oddity.names.append(name)
        return oddity


def row_name(rows: Sequence[dict[str, Any]], index: int) -> str:
    """Return the name of a row in messages: its id, or its number in the list."""
    row_id = rows[index].get("id")
    return repr(row_id) if id_of(row_id) is not None else f"number {index + 1}"


def id_of(value: Any) -> Id | None:
    """Return the id that a value stands for (1 for 1.0); None for a value that is no id."""
    if is_id(value):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _number(value: Any) -> float | None:
    """Return a finite number, parsed if the value is text; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < math.inf else None


def _ids(notes: _Notes, kind: Kind, rows: list[dict[str, Any]]) -> list[Id | None]:
    values = [row.get("id") for row in rows]
    if not set(map(type, values)) <= {int, str}:
        for index, value in enumerate(values):
            values[index] = exact = id_of(value)
            if exact is None:
                predicate = "has no id" if value is None else f"has id {value!r}, not an integer or a string"
                notes.fault(kind, rows, index, NO_ID, predicate)
            elif exact is not value:
                notes.change(kind, rows, index, WHOLE_ID, {"id": exact})
    if len(set(values)) < len(values):
        earlier: set[Id | None] = set()
        for index, value in enumerate(values):
            if value is not None and value in earlier:
                notes.fault(kind, rows, index, TWICE, "has an id that occurs more than once")
                values[index] = None
            earlier.add(value)
    return values


def _class_names(notes: _Notes, rows: list[dict[str, Any]]) -> list[str | None]:
    names: list[str | None] = []
    for index, row in enumerate(rows):
        given = row.get("name")
        name = clean_name(given) if isinstance(given, str) else ""
        names.append(name or None)
        if not name:
            notes.fault("category", rows, index, NO_NAME, "has no name")
        elif name != given:
            notes.change("category", rows, index, ODD_NAME, {"name": name})
    return names


def _unused(notes: _Notes, rows: list[dict[str, Any]], names: Sequence[str | None], used: set[int]) -> set[int]:
    """Return the positions of categories that share the name of another and have no annotations.

    Several categories of one name that all have annotations are a fault; if none has annotations, the first one is kept.
    """
    positions = defaultdict(list)
    for index, name in enumerate(names):
        if name is not None:
            positions[name].append(index)
    unused: set[int] = set()
    for name, same_name in positions.items():
        kept = [index for index in same_name if index in used] or same_name[:1]
        for index in kept[1:]:
            notes.fault(
                "category", rows, index, SAME_NAME, f"has the name of another: two categories are called {name!r}"
            )
        for index in same_name:
            if index not in kept:
                notes.change("category", rows, index, UNUSED, {})
                unused.add(index)
    return unused


def _sizes(notes: _Notes, rows: list[dict[str, Any]]) -> np.ndarray:
    columns = []
    for key in ("width", "height"):
        values = [row.get(key) for row in rows]
        if not set(map(type, values)) <= {int} or not all(0 < value < MAX_COORDINATE for value in values):  # type: ignore[operator]
            values = [_size(notes, rows, index, key, value) for index, value in enumerate(values)]
        columns.append(values)
    return np.array(columns, dtype=np.float64).T.reshape(len(rows), 2)


def _size(notes: _Notes, rows: list[dict[str, Any]], index: int, key: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 < number < MAX_COORDINATE or number != number // 1:
        predicate = f"has no {key}" if value is None else f"has {key} {value!r}, not a positive integer"
        notes.fault("image", rows, index, NO_SIZE, predicate)
        return math.inf
    if type(value) is not int:
        notes.change("image", rows, index, TEXT if isinstance(value, str) else WHOLE_SIZE, {key: int(number)})
    return number


def _file_names(notes: _Notes, rows: list[dict[str, Any]]) -> list[str | None]:
    names: list[str | None] = []
    for index, row in enumerate(rows):
        name = row.get("file_name")
        names.append(name if isinstance(name, str) and name else None)
        if names[-1] is None:
            notes.fault("image", rows, index, NO_FILE, "has no file_name")
    return names


def _look_up(
    notes: _Notes,
    rows: list[dict[str, Any]],
    noun: Literal["image", "category"],
    ids: Sequence[Id | None],
    missing: str,
    other_type: str,
) -> np.ndarray:
    """Return the position of each row's image or category, int64 [N]; -1, with a fault, if there is none."""
    key = f"{noun}_id"
    known = {one: index for index, one in enumerate(ids) if one is not None}
    values = [row.get(key) for row in rows]
    if set(map(type, values)) <= {int, str}:
        positions = [known.get(value, -1) for value in values]  # type: ignore[arg-type]
        if -1 not in positions:
            return np.array(positions, dtype=np.int64)
    positions = [-1] * len(rows)
    for index, value in enumerate(values):
        exact = id_of(value)
        if exact is None:
            predicate = f"has no {key}" if value is None else f"has {key} {value!r}, not an integer or a string"
            notes.fault("annotation", rows, index, missing, predicate)
        elif exact in known:
            positions[index] = known[exact]
            if exact is not value:
                notes.change("annotation", rows, index, WHOLE_ID, {key: exact})
        elif (other := _other_type(exact)) in known:
            positions[index] = known[other]
            notes.change("annotation", rows, index, other_type, {key: other})
        else:
            notes.fault("annotation", rows, index, missing, f"has {key} {value!r}, which is no {noun} of the file")
    return np.array(positions, dtype=np.int64)


def _other_type(value: Id) -> Id:
    """Convert an id between number and text: 7 to "7", "7" and "7.0" to 7, but not "007", which may be a name."""
    if isinstance(value, int):
        return str(value)
    whole = re.sub(r"\.0+$", "", value)
    return int(whole) if re.fullmatch(r"0|-?[1-9]\d{0,18}", whole, re.ASCII) else value


def _boxes(notes: _Notes, rows: list[dict[str, Any]], owners_N: np.ndarray, sizes_I2: np.ndarray) -> np.ndarray:
    boxes: list[Any] = [row.get("bbox") for row in rows]
    fours = all(type(box) is list and len(box) == 4 for box in boxes)
    if fours and set(map(type, chain.from_iterable(boxes))) <= {int, float}:
        table = np.array(boxes).reshape(len(rows), 4)
        if table.dtype.kind in "iuf" and (np.abs(table) < MAX_COORDINATE).all():
            return table.astype(np.float64)
    table = np.full((len(rows), 4), np.nan)
    for index, row in enumerate(rows):
        owner = int(owners_N[index])
        width, height = sizes_I2[owner] if owner >= 0 else (math.inf, math.inf)
        box, cause = _box(row, width, height)
        if box is None:
            predicate = f"has bbox {_short(row.get('bbox'))}, expected four finite numbers [x, y, width, height]"
            notes.fault("annotation", rows, index, NO_BOX, predicate)
            continue
        table[index] = box
        if cause:
            notes.change("annotation", rows, index, cause, {"bbox": box})
    return table


def _around_turned(notes: _Notes, rows: list[dict[str, Any]], boxes_N4: np.ndarray) -> np.ndarray:
    """Return the boxes, with the box around each turned rectangle: CVAT writes it before the turn, and `rotation` in degrees beside `occluded`."""
    for index, row in enumerate(rows):
        attributes = given if isinstance(given := row.get("attributes"), dict) else {}
        degrees = _number(attributes.get("rotation")) if "occluded" in attributes else None
        if degrees and degrees % 180 and (boxes_N4[index, 2:] > 0).all() and not row.get("segmentation"):
            boxes_N4[index] = box = turned_box(boxes_N4[index].tolist(), degrees)
            unturned = {**attributes, "rotation": 0}  # so that a corrected copy is not turned again
            notes.change("annotation", rows, index, TURNED, {"bbox": box, "attributes": unturned})
    return boxes_N4


def _box(row: dict[str, Any], width: float, height: float) -> tuple[list[float] | None, str]:
    """Return (x, y, width, height of an object, or None if unknown; cause of a change, or "")."""
    given = row.get("bbox")
    if _is_missing(given):
        rows_columns = (int(height), int(width)) if max(height, width) < math.inf else (-1, -1)
        return _bounded(shape_box(row.get("segmentation"), *rows_columns)), SHAPE_BOX
    cause = ""
    if isinstance(given, str):
        try:
            given, cause = json.loads(given), TEXT
        except (ValueError, RecursionError):
            return None, ""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
        given, cause = given[0], NESTED
    elif isinstance(given, list) and len(given) == 2 and all(isinstance(pair, list) for pair in given):
        # Two pairs may also be two corners; the area decides.
        given, cause = [*given[0], *given[1]], NESTED
        sides = [number for value in given[2:] if (number := _number(value)) is not None]
        area = _number(row.get("area"))
        if area is None or len(sides) != 2 or abs(math.prod(sides) - area) > 1:
            return None, ""
    if not isinstance(given, list) or len(given) != 4:
        return None, ""
    numbers = [_number(value) for value in given]
    if any(isinstance(value, str) for value in given):
        cause = TEXT
    return _bounded(numbers), cause


def _bounded(numbers: Sequence[float | None] | None) -> list[float] | None:
    if numbers is None:
        return None
    known = [value for value in numbers if value is not None and abs(value) < MAX_COORDINATE]
    return known if len(known) == 4 else None


def _is_missing(box: Any) -> bool:
    """Whether a bbox is missing: None, an empty string or list, or NaN, which tables write into empty cells."""
    if isinstance(box, list):
        return all(value is None or value != value for value in box)
    return box is None or box == "" or box != box


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _crowd_flags(notes: _Notes, rows: list[dict[str, Any]]) -> np.ndarray:
    flags = [row.get("iscrowd") or 0 for row in rows]
    if not set(map(type, flags)) <= {int, bool} or not set(flags) <= {0, 1}:
        for index, flag in enumerate(flags):
            number = _number(flag) if not isinstance(flag, bool) else int(flag)
            if flag != flag:  # NaN, which tables write into empty cells
                notes.change("annotation", rows, index, EMPTY_CROWD, {"iscrowd": 0})
            elif number not in (0, 1):
                notes.fault("annotation", rows, index, ODD_CROWD, f"has iscrowd {_short(flag)}, expected 0 or 1")
            elif isinstance(flag, str):
                notes.change("annotation", rows, index, TEXT, {"iscrowd": int(number)})
            flags[index] = number == 1
    return np.array(flags, dtype=bool)


def _areas(notes: _Notes, rows: list[dict[str, Any]], boxes_N4: np.ndarray) -> np.ndarray:
    filled_N = boxes_N4[:, 2] * boxes_N4[:, 3]
    values = [row.get("area") for row in rows]
    numbers: list[float | None] = list(values)
    if not set(map(type, values)) <= {int, float, type(None)} or any(
        type(value) is int and abs(value) > MAX_AREA for value in values
    ):
        numbers = [_number(value) for value in values]
        numbers = [None if number is None or abs(number) > MAX_AREA else number for number in numbers]
        for index, number in enumerate(numbers):
            if number is not None and isinstance(values[index], str):
                notes.change("annotation", rows, index, TEXT, {"area": number})
    areas_N = np.array(numbers, dtype=np.float64)  # None becomes NaN
    odd_N = ~((areas_N > 0) & np.isfinite(areas_N))
    areas_N[~np.isfinite(areas_N)] = np.nan
    for index in np.flatnonzero(odd_N).tolist():
        # An object without width or height has no area: not a change.
        if values[index] is not None and (filled_N[index] > 0 or np.isnan(areas_N[index])):
            notes.change("annotation", rows, index, ODD_AREA, {"area": _plain(filled_N[index])})
    return np.where(odd_N & ((filled_N > 0) | np.isnan(areas_N)), filled_N, areas_N)


def _plain(value: float) -> float | None:
    """Convert a number for JSON: whole numbers to int, NaN (unknown box) to None."""
    number = float(value)
    return None if math.isnan(number) else int(number) if number.is_integer() else number
