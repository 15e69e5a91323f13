"""COCO JSON: the content of an annotation file, checked, as a few arrays and lists; and detections as COCO's results.

Formats: https://cocodataset.org/#format-data and #format-results. Every fault of a file is a `UserError` that names the file and the id.

Legend: I images, N annotations of the file, or detections of an image.
"""

import gc
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.files import atomically

if TYPE_CHECKING:  # data are checked and converted without torch
    from ssld.stage2_detect.models.batch import Detections

Id = int | str
Convention = Literal["upright", "stored"]
"""which form of an image that EXIF turns the boxes are for"""
ORIENTATION_KEY = "image_orientation"
"""of `info`: our own, beside COCO's keys"""
MAX_COORDINATE = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class CocoTable:
    """A COCO file in file order."""

    class_names: list[str]
    category_ids: list[Id]
    image_ids: list[Id]
    file_names: list[str]
    widths_I: np.ndarray
    """int64"""
    heights_I: np.ndarray
    """int64"""
    annotation_ids: list[Id]
    owners_N: np.ndarray
    """int64: position of the image"""
    labels_N: np.ndarray
    """int64: position in `class_names`"""
    boxes_N4: np.ndarray
    """float64 xywh"""
    crowd_N: np.ndarray
    """bool"""
    areas_N: np.ndarray
    """float64; width x height where the file has none"""
    segmentations: Sequence[Any] | None
    """raw polygons or RLE (None where an annotation has none), when asked for"""
    orientation: Convention | None = None
    """what the file says of its images (`stated_orientation`)"""


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside, Python's garbage collector rests: it would go through millions of new objects, which hold no cycles, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collector()
def read_table(file: str, *, segmentations: bool) -> CocoTable:
    """Reads and checks a file. Raises UserError for any fault."""
    data = _load(file)
    names, category_ids = _classes(file, data["categories"])
    rows, annotations = data["images"], data["annotations"]
    image_ids = _ids(file, "image", rows, "id", unique=True)
    widths, heights = (_sizes(file, rows, image_ids, key) for key in ("width", "height"))
    file_names = _file_names(file, rows)
    annotation_ids = _ids(file, "annotation", annotations, "id", unique=True)
    position, label_of = ({one: index for index, one in enumerate(ids)} for ids in (image_ids, category_ids))
    owners = _look_up(file, annotations, annotation_ids, "image_id", position, "image")
    labels = _look_up(file, annotations, annotation_ids, "category_id", label_of, "category")
    boxes = _boxes(file, annotations, annotation_ids)
    crowd = _crowd_flags(file, annotations, annotation_ids)
    areas = _areas(file, annotations, annotation_ids, boxes)
    masks = [row.get("segmentation") for row in annotations] if segmentations else None
    return CocoTable(
        class_names=names,
        category_ids=category_ids,
        image_ids=image_ids,
        file_names=file_names,
        widths_I=np.array(widths, dtype=np.int64),
        heights_I=np.array(heights, dtype=np.int64),
        annotation_ids=annotation_ids,
        owners_N=owners,
        labels_N=labels,
        boxes_N4=boxes,
        crowd_N=crowd,
        areas_N=areas,
        segmentations=masks,
        orientation=stated_orientation(file, data),
    )


def stated_orientation(file: str, content: Mapping[str, Any]) -> Convention | None:
    """`info.image_orientation` of a file; None where it has none. Raises UserError for another value than upright and stored."""
    info = content.get("info")
    value: Any = info.get(ORIENTATION_KEY) if isinstance(info, dict) else None
    if value is not None and value not in get_args(Convention):
        raise UserError(
            f"{file}: info.{ORIENTATION_KEY} is {value!r}, expected one of {', '.join(get_args(Convention))}"
        )
    return value


def with_orientation(content: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    """The content of a COCO file that says which form of its images its boxes are for."""
    info = content.get("info")
    return {**content, "info": {**(info if isinstance(info, dict) else {}), ORIENTATION_KEY: convention}}


def write_results(detections: "Mapping[Id, Detections]", category_ids: Sequence[Id], path: Path) -> None:
    """Writes COCO's results format with the file's own image and category ids; the file appears whole or not at all."""
    with atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        between = "["
        for image_id, found in detections.items():
            # By image: as one text, a hundred masks of each of 5,000 images take half a gigabyte.
            for row in result_rows(image_id, found, category_ids):
                file.write(between + json.dumps(row, allow_nan=False))
                between = ", "
        file.write("[]" if between == "[" else "]")


def result_rows(image_id: Id, found: "Detections", category_ids: Sequence[Id]) -> Iterator[dict[str, Any]]:
    """The detections of an image as COCO's results have them; boxes as x, y, width, height to a thousandth of a pixel."""
    corners_N4 = found.boxes_N4.double().cpu().numpy()
    boxes = np.concatenate([corners_N4[:, :2], corners_N4[:, 2:] - corners_N4[:, :2]], 1).round(3).tolist()
    columns = zip(boxes, found.scores_N.tolist(), found.labels_N.tolist(), strict=True)
    for index, (box, score, label) in enumerate(columns):
        category_id = category_ids[label]
        row = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(f"{score:.9g}")}
        if found.masks is not None:
            row["segmentation"] = _as_text(found.masks[index])
        yield row


def _as_text(code: dict[str, Any]) -> dict[str, Any]:
    """An RLE whose counts are text, as in JSON."""
    counts = code["counts"]
    return {"size": list(code["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _load(file: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a COCO data set: expected an object, found a {type(data).__name__}")
    for key in ("images", "annotations", "categories"):
        if key not in data:
            raise UserError(
                f"{file} is not a COCO data set: it has no key {key!r} (it has: {', '.join(map(repr, data)) or 'none'})"
            )
        if not isinstance(data[key], list) or not all(isinstance(row, dict) for row in data[key]):
            raise UserError(f"{file} is not a COCO data set: {key!r} is not a list of objects")
    return data


def _classes(file: str, rows: list[dict]) -> tuple[list[str], list[Id]]:
    ids = _ids(file, "category", rows, "id", unique=True)
    names: list[Any] = [row.get("name") for row in rows]
    for name, category_id in zip(names, ids, strict=True):
        if not isinstance(name, str):
            raise UserError(f"{file}: category {category_id!r} has no name")
    if not names:
        raise UserError(f"{file}: 'categories' is empty")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{file}: two categories are called {twice[0]!r}")
    return names, ids


def _ids(file: str, what: str, rows: list[dict], key: str, *, unique: bool) -> list[Any]:
    values = [row.get(key) for row in rows]
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            owner = f"{what} {rows[index]['id']!r}" if key != "id" else f"{what} number {index + 1}"
            raise UserError(
                f"{file}: {owner} has no {key}"
                if value is None
                else f"{file}: {owner} has {key} {value!r}, not an integer or a string"
            )
    if unique and len(set(values)) < len(values):
        raise UserError(f"{file}: {what} id {Counter(values).most_common(1)[0][0]!r} occurs more than once")
    return values


def _look_up(
    file: str, rows: list[dict], annotation_ids: list[Id], key: str, known: dict[Id, int], what: str
) -> np.ndarray:
    values = _ids(file, "annotation", rows, key, unique=False)
    found = [known.get(value, -1) for value in values]
    if -1 in found:
        index = found.index(-1)
        value = values[index]
        other: Id = str(value) if isinstance(value, int) else int(value) if value.isdecimal() else value
        hint = f" (but {other!r} is: numbers and strings differ)" if other != value and other in known else ""
        raise UserError(
            f"{file}: annotation {annotation_ids[index]!r} has {key} {value!r}, which is no {what} of the file{hint}"
        )
    return np.array(found, dtype=np.int64)


def _sizes(file: str, rows: list[dict], image_ids: list[Id], key: str) -> list[int]:
    values = [row.get(key) for row in rows]
    for value, image_id in zip(values, image_ids, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or value != value // 1:
            fault = f"no {key}" if value is None else f"{key} {value!r}, not a positive integer"
            raise UserError(f"{file}: image {image_id!r} has {fault}")
    return [int(value) for value in values]  # type: ignore[arg-type]


def _file_names(file: str, rows: list[dict]) -> list[str]:
    for row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise UserError(f"{file}: image {row['id']!r} has no file_name")
    return [row["file_name"] for row in rows]


def _boxes(file: str, rows: list[dict], annotation_ids: list[Id]) -> np.ndarray:
    try:
        boxes = np.asarray([row["bbox"] for row in rows]).reshape(len(rows), 4)
        sound = boxes.dtype.kind in "iuf" or not len(rows)
    except (KeyError, ValueError):
        sound = False
    if not sound or not (np.abs(boxes) < MAX_COORDINATE).all():
        for row, annotation_id in zip(rows, annotation_ids, strict=True):
            box: Any = row.get("bbox")
            numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
            if not numbers or not all(abs(value) < MAX_COORDINATE for value in box):  # NaN compares as False
                raise UserError(
                    f"{file}: annotation {annotation_id!r} has bbox {box!r}, "
                    "expected four finite numbers [x, y, width, height]"
                )
    return boxes.astype(np.float64)


def _crowd_flags(file: str, rows: list[dict], annotation_ids: list[Id]) -> np.ndarray:
    flags = [row.get("iscrowd") or 0 for row in rows]
    for flag, annotation_id in zip(flags, annotation_ids, strict=True):
        if flag not in (0, 1):
            raise UserError(f"{file}: annotation {annotation_id!r} has iscrowd {flag!r}, expected 0 or 1")
    return np.array(flags, dtype=bool)


def _areas(file: str, rows: list[dict], annotation_ids: list[Id], file_boxes: np.ndarray) -> np.ndarray:
    areas = (file_boxes[:, 2] * file_boxes[:, 3]).tolist()
    for index, row in enumerate(rows):
        area = row.get("area")
        if area is None:
            continue
        if isinstance(area, bool) or not isinstance(area, int | float) or not math.isfinite(area):
            raise UserError(f"{file}: annotation {annotation_ids[index]!r} has area {area!r}, not a finite number")
        areas[index] = area
    return np.array(areas, dtype=np.float64)
