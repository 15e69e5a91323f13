"""COCO JSON read strictly into light records; category ids become class indices 0..K-1 here and nowhere else.

Format: https://cocodataset.org/#format-data. Labels are positions in the file's `categories` list (its order, not the
order of the ids), and boxes follow PaddleDetection@666f597f `ppdet/data/source/coco.py`: rounded to 3 decimals, clipped
to the image, sides above 1e-5. Unlike there, images may stay without objects, ids may be strings, run-length encoded
masks are read, and an `area` of 0 does not remove a sound box. In evaluation nothing is dropped or clipped: the scorer
sees the boxes as the file has them, so that AP equals pycocotools' on the same file. Deliberately absent: keypoints,
captions, panoptic segments.

Legend: N objects of one image.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_codec

from shared.errors import UserError

Id = int | str
MIN_SIDE = 1e-5
MAX_COORDINATE = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class CocoImage:
    """One image with its objects; `boxes_N4` is xyxy in pixels, `file_boxes_N4` xywh exactly as the JSON has it."""

    image_id: Id
    path: str
    width: int
    height: int
    boxes_N4: np.ndarray
    """float32 xyxy; clipped to the image in training, as in the file in evaluation"""
    labels_N: np.ndarray
    """int64 class indices"""
    crowd_N: np.ndarray
    """bool; always False in training"""
    areas_N: np.ndarray
    """float64; width x height where the file has none"""
    file_boxes_N4: np.ndarray
    """float64 xywh"""
    annotation_ids: tuple[Id, ...]
    segmentations: tuple[Any, ...] | None
    """raw polygons or RLE (None where an annotation has none), when asked for"""


@dataclass(frozen=True)
class CocoData:
    """A COCO file: classes, images, and what reading it dropped or changed."""

    file: str
    training: bool
    class_names: tuple[str, ...]
    category_ids: tuple[Id, ...]
    """the file's id of each class index"""
    images: list[CocoImage]
    counts: Counter[str] = field(default_factory=Counter)
    """boxes: `boxes` kept, `crowd`, `degenerate` (a side <= 1e-5), `outside`, `clipped`; images: `empty` (without a
    box), `empty_dropped`"""
    odd_boxes: tuple[Id, ...] = ()
    """the first annotation ids behind `degenerate` and `outside`"""

    def describe(self) -> str:
        """One line for the log."""
        count = self.counts
        dropped = "dropped" if self.training else "kept, for scoring as COCO does"
        parts = [f"{len(self.images)} images", f"{count['boxes']} boxes", f"{len(self.class_names)} classes"]
        if count["empty"]:
            note = f" ({count['empty_dropped']} dropped)" if count["empty_dropped"] else ""
            parts.append(f"{count['empty']} images without boxes{note}")
        for kind, what in (
            ("crowd", "crowd regions"),
            ("degenerate", "empty boxes"),
            ("outside", "boxes outside their image"),
        ):
            if count[kind]:
                parts.append(f"{count[kind]} {what} {dropped}")
        if count["clipped"]:
            parts.append(f"{count['clipped']} boxes reach over the border{', clipped' if self.training else ''}")
        if self.odd_boxes:
            parts.append(f"first odd annotation ids: {', '.join(map(str, self.odd_boxes))}")
        return f"{self.file}: " + ", ".join(parts)


def read_coco(
    annotation_file: str | Path,
    image_folder: str | Path | None,
    *,
    training: bool,
    keep_empty: bool = True,
    segmentations: bool = False,
    class_names: Sequence[str] | None = None,
) -> CocoData:
    """Reads a COCO JSON file; every fault of the file is a `UserError` that names the file and the id.

    `training` drops crowds and unusable boxes, and with `keep_empty=False` the images that have no box then; evaluation
    keeps everything. `image_folder` is what `file_name` is relative to, and all files must be there; None skips that
    check. `segmentations` keeps the masks, which take most of the memory. `class_names` fixes the classes and their
    order (those of a trained detector); the file must have the same names.
    """
    file = str(annotation_file)
    data = _load(file)
    names, ids = _classes(file, data["categories"], class_names)
    label_of = {category_id: label for label, category_id in enumerate(ids)}
    rows, annotations = data["images"], data["annotations"]

    image_ids = _ids(file, "image", rows, "id", unique=True)
    widths, heights = (_sizes(file, rows, image_ids, key) for key in ("width", "height"))
    paths = _paths(file, rows, image_folder)

    annotation_ids = _ids(file, "annotation", annotations, "id", unique=True)
    position = {image_id: index for index, image_id in enumerate(image_ids)}
    owners = _look_up(file, annotations, annotation_ids, "image_id", position, "image")
    labels = _look_up(file, annotations, annotation_ids, "category_id", label_of, "category")
    file_boxes = _boxes(file, annotations, annotation_ids)
    crowd = _crowd_flags(file, annotations, annotation_ids)
    areas = _areas(file, annotations, annotation_ids, file_boxes)

    unrounded = np.concatenate([file_boxes[:, :2], file_boxes[:, :2] + file_boxes[:, 2:]], 1)
    corners = unrounded.round(3)
    limits = np.array([widths, heights, widths, heights], dtype=np.float64).T[owners].reshape(-1, 4)
    clipped = corners.clip(0, limits)
    degenerate = ((corners[:, 2:] - corners[:, :2]) <= MIN_SIDE).any(1)
    outside = ~degenerate & ((clipped[:, 2:] - clipped[:, :2]) <= MIN_SIDE).any(1)
    odd = np.flatnonzero((degenerate | outside) & ~(crowd & training))
    keep = ~(degenerate | outside | crowd) if training else np.ones(len(crowd), dtype=bool)
    boxes = (clipped if training else unrounded).astype(np.float32)

    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(owners[kept], kind="stable")]  # grouped by image, in file order inside
    bounds = np.searchsorted(owners[kept], np.arange(len(rows) + 1))
    images = []
    for index, image_id in enumerate(image_ids):
        mine = kept[bounds[index] : bounds[index + 1]]
        if training and not keep_empty and not len(mine):
            continue
        masks = tuple(annotations[i].get("segmentation") for i in mine) if segmentations else None
        ids_here = tuple(annotation_ids[i] for i in mine)
        arrays = (boxes[mine], labels[mine], crowd[mine], areas[mine], file_boxes[mine])
        images.append(CocoImage(image_id, paths[index], widths[index], heights[index], *arrays, ids_here, masks))

    counts = Counter(
        boxes=len(kept),
        crowd=int(crowd.sum()),
        degenerate=int((degenerate & ~(crowd & training)).sum()),
        outside=int((outside & ~(crowd & training)).sum()),
        clipped=int(((clipped != corners).any(1) & keep & ~degenerate & ~outside).sum()),
        empty=int((np.diff(bounds) == 0).sum()),
        empty_dropped=len(rows) - len(images),
    )
    if not images:
        raise UserError(f"{file}: no image{' with a usable box' if rows else ''} in it")
    return CocoData(file, training, names, ids, images, counts, tuple(annotation_ids[i] for i in odd[:3]))


def segmentation_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Bool [height, width] of one object's polygons, uncompressed RLE or compressed RLE; raises `ValueError` for
    anything else."""
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64).ravel().tolist() for polygon in segmentation]
        if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise ValueError("a polygon needs at least three x, y pairs")
        code = mask_codec.merge(mask_codec.frPyObjects(polygons, height, width))
    elif isinstance(segmentation, dict) and "counts" in segmentation and "size" in segmentation:
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"RLE of size {segmentation['size']} for an image of height {height} and width {width}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts, default=0) < 0:
                raise ValueError(f"RLE counts sum to {sum(counts)}, not to {height} x {width}")
            code = mask_codec.frPyObjects(segmentation, height, width)
        elif counts:  # pycocotools returns uninitialised memory for an empty code
            code = {"size": [height, width], "counts": counts}
        else:
            raise ValueError("RLE without counts")
    else:
        raise ValueError("a segmentation is a list of polygons or a dict with size and counts")
    with warnings.catch_warnings():
        # pycocotools 2.0.11 under NumPy 2: __array__ without `copy`
        warnings.simplefilter("ignore", DeprecationWarning)
        return mask_codec.decode(code).astype(bool)


def _load(file: str) -> dict[str, list[dict]]:
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


def _classes(file: str, rows: list[dict], wanted: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[Id, ...]]:
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
    if wanted is None:
        return tuple(names), tuple(ids)
    _compare_names(file, names, wanted)
    return tuple(wanted), tuple(ids[names.index(name)] for name in wanted)


def _compare_names(file: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    extra, missing = ([name for name in a if name not in b] for a, b in ((names, wanted), (wanted, names)))
    if extra or missing:
        parts = [
            f"{what}: {', '.join(some[:10])}{' ...' if len(some) > 10 else ''}"
            for what, some in (("unknown", extra), ("missing", missing))
            if some
        ]
        raise UserError(
            f"{file}: its {len(names)} classes differ from the {len(wanted)} that the detector is for; {'; '.join(parts)}"
        )


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


def _paths(file: str, rows: list[dict], image_folder: str | Path | None) -> list[str]:
    for row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise UserError(f"{file}: image {row['id']!r} has no file_name")
    if image_folder is None:
        return [row["file_name"] for row in rows]
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} does not exist")
    paths = [os.path.join(image_folder, row["file_name"]) for row in rows]
    present: dict[str, set[str]] = {}  # one listing a folder instead of one system call an image
    missing = []
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in present:
            present[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if name not in present[parent]:
            missing.append(path)
    if missing:
        raise UserError(f"{len(missing)} of the {len(paths)} images of {file} are missing; the first is {missing[0]}")
    return paths


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
