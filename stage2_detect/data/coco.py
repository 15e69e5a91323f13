"""COCO JSON read strictly into light records; category ids become class indices 0..K-1 here and nowhere else.

Format: https://cocodataset.org/#format-data. Labels are positions in the file's `categories` list (its order, not the
order of the ids), and boxes follow PaddleDetection@666f597f `ppdet/data/source/coco.py`: rounded to 3 decimals, clipped
to the image, sides above 1e-5. Unlike there, images may stay without objects, ids may be strings, run-length encoded
masks are read, and an `area` of 0 does not remove a sound box. In evaluation nothing is dropped or clipped: the scorer
sees the boxes as the file has them, so that AP equals pycocotools' on the same file. Deliberately absent: keypoints,
captions, panoptic segments.

Legend: N objects of one image.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.wording import count
from ssld.stage2_detect.data.annotation_cache import PackedShapes, read_cached
from ssld.stage2_detect.data.coco_json import CocoTable, Convention, read_table
from ssld.stage2_detect.data.coco_json import Id as Id
from ssld.stage2_detect.data.orientation import Orientation, find_orientation

MIN_SIDE = 1e-5


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
    segmentations: Sequence[Any] | None
    """raw polygons or RLE (None where an annotation has none), when asked for"""
    convention: Convention = "upright"
    """how it is read if EXIF turns it without a change of size"""


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
    orientation: Orientation = field(default_factory=Orientation)
    """which way up its images are read"""

    def describe(self) -> str:
        """One line for the log."""
        found = self.counts
        dropped = "dropped" if self.training else "kept, for scoring as COCO does"
        parts = [count(len(self.images), "image"), count(found["boxes"], "box"), count(len(self.class_names), "class")]
        if found["empty"]:
            note = f" ({found['empty_dropped']} dropped)" if found["empty_dropped"] else ""
            parts.append(f"{count(found['empty'], 'image')} without boxes{note}")
        for kind, what, plural in (
            ("crowd", "crowd region", "crowd regions"),
            ("degenerate", "empty box", "empty boxes"),
            ("outside", "box outside its image", "boxes outside their image"),
        ):
            if found[kind]:
                parts.append(f"{count(found[kind], what, plural)} {dropped}")
        if found["clipped"]:
            over = "reaches" if found["clipped"] == 1 else "reach"
            parts.append(
                f"{count(found['clipped'], 'box')} {over} over the border{', clipped' if self.training else ''}"
            )
        if self.odd_boxes:
            parts.append(f"first odd annotation ids: {', '.join(map(str, self.odd_boxes))}")
        parts += [orientation] if (orientation := self.orientation.describe()) else []
        return f"{self.file}: " + ", ".join(parts)


def read_coco(
    annotation_file: str | Path,
    image_folder: str | Path | None,
    *,
    training: bool,
    keep_empty: bool = True,
    segmentations: bool = False,
    class_names: Sequence[str] | None = None,
    cache_annotations: bool = False,
) -> CocoData:
    """Reads a COCO JSON file; every fault of the file is a `UserError` that names the file and the id.

    `training` drops crowds and unusable boxes, and with `keep_empty=False` the images that have no box then; evaluation
    keeps everything. `image_folder` is what `file_name` is relative to, and all files must be there; None skips that
    check. `segmentations` keeps the masks, which take most of the memory. `class_names` fixes the classes and their
    order (those of a trained detector); the file must have the same names. `cache_annotations` keeps the content of a large file, and which way up
    its images are, for the next time (`annotation_cache.py`, `orientation.py`).
    """
    file = str(annotation_file)
    table = (
        read_cached(file, segmentations=segmentations)
        if cache_annotations
        else read_table(file, segmentations=segmentations)
    )
    names, ids, label_of = _classes(file, table, class_names)
    image_ids, annotation_ids, owners = table.image_ids, table.annotation_ids, table.owners_N
    paths = _paths(file, table.file_names, image_folder)
    labels, file_boxes, crowd, areas = label_of[table.labels_N], table.boxes_N4, table.crowd_N, table.areas_N
    masks = table.segmentations

    unrounded = np.concatenate([file_boxes[:, :2], file_boxes[:, :2] + file_boxes[:, 2:]], 1)
    limits = np.stack([table.widths_I, table.heights_I], 1).astype(np.float64)[owners]
    judged = judge_boxes(file_boxes, limits)
    corners, clipped, degenerate, outside = judged.corners_N4, judged.clipped_N4, judged.degenerate_N, judged.outside_N
    odd = np.flatnonzero((degenerate | outside) & ~(crowd & training))
    keep = ~(degenerate | outside | crowd) if training else np.ones(len(crowd), dtype=bool)
    boxes = (clipped if training else unrounded).astype(np.float32)

    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(owners[kept], kind="stable")]  # grouped by image, in file order inside
    bounds = np.searchsorted(owners[kept], np.arange(len(image_ids) + 1))
    widths, heights = table.widths_I.tolist(), table.heights_I.tolist()
    orientation = Orientation()
    if image_folder is not None:
        sizes = (table.widths_I, table.heights_I)
        orientation = find_orientation(file, paths, *sizes, stated=table.orientation, cache=cache_annotations)
    images = []
    for index, image_id in enumerate(image_ids):
        mine = kept[bounds[index] : bounds[index + 1]]
        if training and not keep_empty and not len(mine):
            continue
        shapes = None if masks is None else _pick(masks, mine)
        ids_here = tuple(annotation_ids[i] for i in mine)
        arrays = (boxes[mine], labels[mine], crowd[mine], areas[mine], file_boxes[mine])
        whole = (image_id, paths[index], widths[index], heights[index])
        images.append(CocoImage(*whole, *arrays, ids_here, shapes, orientation.convention))

    counts = Counter(
        boxes=len(kept),
        crowd=int(crowd.sum()),
        degenerate=int((degenerate & ~(crowd & training)).sum()),
        outside=int((outside & ~(crowd & training)).sum()),
        clipped=int(((clipped != corners).any(1) & keep & ~degenerate & ~outside).sum()),
        empty=int((np.diff(bounds) == 0).sum()),
        empty_dropped=len(image_ids) - len(images),
    )
    if not images:
        raise UserError(f"{file}: no image{' with a usable box' if image_ids else ''} in it")
    odd_boxes = tuple(annotation_ids[i] for i in odd[:3])
    return CocoData(file, training, names, ids, images, counts, odd_boxes, orientation)


@dataclass(frozen=True, eq=False)
class JudgedBoxes:
    """What training makes of the boxes of a file."""

    corners_N4: np.ndarray
    """float64 xyxy, rounded to 3 decimals"""
    clipped_N4: np.ndarray
    """the same, clipped to the image"""
    degenerate_N: np.ndarray
    """bool: a side <= 1e-5"""
    outside_N: np.ndarray
    """bool: nothing of the box is inside the image"""


def judge_boxes(file_boxes_N4: np.ndarray, sizes_N2: np.ndarray) -> JudgedBoxes:
    """Judges finite xywh boxes in images of `sizes_N2` (width, height)."""
    corners_N4 = np.concatenate([file_boxes_N4[:, :2], file_boxes_N4[:, :2] + file_boxes_N4[:, 2:]], 1).round(3)
    clipped_N4 = corners_N4.clip(0, np.concatenate([sizes_N2, sizes_N2], 1))
    degenerate_N = ((corners_N4[:, 2:] - corners_N4[:, :2]) <= MIN_SIDE).any(1)
    outside_N = ~degenerate_N & ((clipped_N4[:, 2:] - clipped_N4[:, :2]) <= MIN_SIDE).any(1)
    return JudgedBoxes(corners_N4, clipped_N4, degenerate_N, outside_N)


def require_masks(data: CocoData) -> CocoData:
    """`data`, read with `segmentations=True`, when every object has a shape that can be used; else a `UserError` with the first annotation ids."""
    without: list[Id] = []
    for record in data.images:
        shapes = record.segmentations
        for index, annotation_id in enumerate(record.annotation_ids):
            if shapes is None or not is_shape(shapes[index], record.height, record.width):
                without.append(annotation_id)
    if without:
        total = sum(len(record.annotation_ids) for record in data.images)
        first = ", ".join(repr(annotation_id) for annotation_id in without[:3])
        raise UserError(
            f"{data.file}: {len(without)} of {total} objects have no usable segmentation (first annotation ids: {first}), which a detector "
            "with masks needs: polygons of at least three points, or RLE of the image's size; or take a kind without masks, as faster_rcnn"
        )
    return data


def is_shape(segmentation: Any, height: int, width: int) -> bool:
    """Whether a segmentation has the form of polygons or of RLE for an image of this size."""
    try:
        if isinstance(segmentation, list):
            return bool(segmentation) and all(
                len(polygon) >= 6 and len(polygon) % 2 == 0 and math.isfinite(sum(polygon)) for polygon in segmentation
            )
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            return False
        if isinstance(counts, str):
            counts = _run_lengths(counts)
        return sum(counts) == height * width and min(counts) >= 0
    except (TypeError, KeyError, IndexError):  # cut off, not made of numbers, or of something else altogether
        return False


def _run_lengths(code: str) -> list[int]:
    """Run lengths of a compressed RLE (pycocotools' `rleFrString`), which does not say when a code is damaged but reads on beyond it.

    Six bits a character from "0" on: five of value, lowest first, and one that says whether more follow; from the fourth run on values are
    differences to the last but one. Raises IndexError for a code that breaks off.
    """
    runs: list[int] = []
    place = 0
    while place < len(code):
        value = shift = 0
        more = True
        while more:
            bits = ord(code[place]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            place, shift = place + 1, shift + 5
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _pick(shapes: Sequence[Any], positions: np.ndarray) -> Sequence[Any]:
    return shapes.pick(positions) if isinstance(shapes, PackedShapes) else tuple(shapes[i] for i in positions)


def _classes(
    file: str, table: CocoTable, wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[Id, ...], np.ndarray]:
    """(names, category ids, index of each class of the file) in the order that is wanted."""
    names = table.class_names
    if wanted is None:
        return tuple(names), tuple(table.category_ids), np.arange(len(names))
    _compare_names(file, names, wanted)
    index = {name: label for label, name in enumerate(wanted)}
    ids = dict(zip(names, table.category_ids, strict=True))
    return tuple(wanted), tuple(ids[name] for name in wanted), np.array([index[name] for name in names])


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


def _paths(file: str, names: list[str], image_folder: str | Path | None) -> list[str]:
    if image_folder is None:
        return names
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} does not exist")
    paths = [os.path.join(image_folder, name) for name in names]
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
