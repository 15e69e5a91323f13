"""Read COCO JSON strictly into compact records; the only place that maps category ids to class indices 0..K-1.

Format: https://cocodataset.org/#format-data. Labels are positions in the file's `categories` list (its order, not the
order of the ids), and boxes follow PaddleDetection@666f597f `ppdet/data/source/coco.py`: rounded to 3 decimals, clipped
to the image, sides above 1e-5. Differences: images without objects may stay, ids may be strings, run-length encoded
masks are read, and an `area` of 0 does not remove a valid box. In evaluation nothing is dropped or clipped: the scorer
gets the boxes of the file, so that AP equals pycocotools' AP on the same file. Boxes that training drops are counted in a `Tally`, by
class and cause; `require_boxes` refuses a file with too many of them. Deliberately absent: keypoints, captions, panoptic segments.

Legend: N objects of one image.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.data.annotation_cache import PackedShapes, read_cached
from ssld.stage2_detect.data.coco_json import CocoTable, Convention, read_table
from ssld.stage2_detect.data.coco_rows import Id as Id
from ssld.stage2_detect.data.coco_rows import alike_names, clean_name
from ssld.stage2_detect.data.image_names import fitting_files, hint, missing_names, same_file
from ssld.stage2_detect.data.orientation import Orientation, find_orientation
from ssld.stage2_detect.data.segmentations import is_shape

MIN_SIDE = 1e-5
CROWD, FLAT, OUTSIDE, CLIPPED = "marked iscrowd", "without width or height", "outside the image", "clipped to the image"
"""reasons why training drops or changes boxes"""
_SUSPECT, _BULK = 0.1, 0.5
"""shares of suspicious boxes above which the log questions the box format, and above which training stops"""
_FAR = 0.05
"""share of an image's side by which a box has to reach over the border to be one of those that stop training"""
_ENOUGH = 20
"""number of boxes from which a pattern in all of them is no chance"""


@dataclass(frozen=True, slots=True, eq=False)
class CocoImage:
    """One image with its objects; `boxes_N4` is xyxy in pixels, `file_boxes_N4` the unchanged xywh of the JSON file."""

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
    """float64; width x height if the file gives no area"""
    file_boxes_N4: np.ndarray
    """float64 xywh"""
    annotation_ids: tuple[Id, ...]
    segmentations: Sequence[Any] | None
    """raw polygons or RLE, None for an annotation without; None if they were not requested"""
    convention: Convention = "upright"
    """form of the image to read if EXIF rotates it without a change of size"""


@dataclass(frozen=True)
class CocoData:
    """A COCO file: classes, images, and a record of dropped and changed boxes."""

    file: str
    training: bool
    class_names: tuple[str, ...]
    category_ids: tuple[Id, ...]
    """category id in the file of each class index"""
    images: list[CocoImage]
    tally: Tally = field(default_factory=Tally)
    """kept, dropped and changed boxes by class, images, classes"""
    counts: Counter[str] = field(default_factory=Counter)
    """counts of boxes: `boxes` (kept), and in the file `crowd`, `degenerate` (a side <= 1e-5), `outside`, `clipped`; of images: `empty` (without
    boxes), `empty_dropped`, `again` (files listed under a second id), `parted` (entries of files whose entries have different boxes)"""
    format_doubts: tuple["FormatDoubt", ...] = ()
    """reasons to suspect that the boxes are not x, y, width, height in pixels"""
    orientation: Orientation = field(default_factory=Orientation)
    """form (upright or as stored) in which the images are read"""

    @property
    def objects(self) -> int:
        """Number of boxes other than crowd regions: the objects to learn or to detect."""
        return self.counts["boxes"] - (0 if self.training else self.counts["crowd"])

    def describe(self) -> str:
        """Return one line for the log, without the content of `tally`."""
        counts = self.counts
        parts = [count(len(self.images), "image"), count(self.objects, "box"), count(len(self.class_names), "class")]
        if counts["empty"]:
            note = f" ({counts['empty_dropped']} dropped)" if counts["empty_dropped"] else ""
            parts.append(f"{count(counts['empty'], 'image')} without boxes{note}")
        if counts["again"]:
            parts.append(f"{count(counts['again'], 'image')} listed before under another id: each counts by itself")
        if not self.training:
            for kind, noun, plural in (
                ("crowd", "crowd region", "crowd regions"),
                ("degenerate", "empty box", "empty boxes"),
                ("outside", "box outside its image", "boxes outside their image"),
            ):
                if counts[kind]:
                    parts.append(f"{count(counts[kind], noun, plural)} kept, for scoring as COCO does")
            if counts["clipped"]:
                parts.append(
                    f"{count(counts['clipped'], 'box')} {'reaches' if counts['clipped'] == 1 else 'reach'} over the border"
                )
            if not self.objects:
                parts.append("no objects, so there will be no score")
        parts += [orientation] if (orientation := self.orientation.describe()) else []
        alike = [
            f"the classes {text} differ in capitals, spaces, dashes or underscores alone: one class?"
            for text in alike_names(self.class_names)
        ]
        return "; ".join([f"{self.file}: {', '.join(parts)}", *(doubt.text for doubt in self.format_doubts), *alike])


@dataclass(frozen=True, eq=False)
class ValidatedBoxes:
    """Boxes of a file as training reads them."""

    corners_N4: np.ndarray
    """float64 xyxy, rounded to 3 decimals"""
    clipped_N4: np.ndarray
    """`corners_N4` clipped to the image"""
    degenerate_N: np.ndarray
    """bool: a side <= 1e-5"""
    outside_N: np.ndarray
    """bool: no part of the box is inside the image"""


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
    """Read a COCO JSON file.

    Args:
        annotation_file: COCO JSON.
        image_folder: folder that `file_name` is relative to; every file must exist. None skips that check.
        training: drop crowd regions and unusable boxes; for evaluation everything is kept.
        keep_empty: in training, keep images without boxes.
        segmentations: keep the masks, which take most of the memory.
        class_names: classes and their order (those of a trained detector); the file must have the same names. None: those of the file.
        cache_annotations: use the cache of large annotation files and of image orientations (`annotation_cache.py`, `orientation.py`).

    Raises:
        UserError: any fault of the file, naming the file and the id.
    """
    file = str(annotation_file)
    table = (
        read_cached(file, segmentations=segmentations)
        if cache_annotations
        else read_table(file, segmentations=segmentations)
    )
    names, ids, label_of = _classes(file, table, class_names)
    paths = _paths(file, table.file_names, image_folder)
    labels_N = label_of[table.labels_N]
    limits_N2 = np.stack([table.widths_I, table.heights_I], 1).astype(np.float64)[table.owners_N]
    validated = validate_boxes(table.boxes_N4, limits_N2)
    unusable_N = validated.degenerate_N | validated.outside_N | table.crowd_N
    keep_N = ~unusable_N if training else np.ones_like(unusable_N)
    rows = _rows_of_images(table, keep_N)
    orientation = Orientation()
    if image_folder is not None:
        sizes = (table.widths_I, table.heights_I)
        orientation = find_orientation(file, paths, *sizes, stated=table.orientation, cache=cache_annotations)

    corners_N4 = np.concatenate([table.boxes_N4[:, :2], table.boxes_N4[:, :2] + table.boxes_N4[:, 2:]], 1)
    boxes_N4 = (validated.clipped_N4 if training else corners_N4).astype(np.float32)
    images = [
        _record(table, index, paths[index], image_rows, boxes_N4, labels_N, orientation.convention)
        for index, image_rows in enumerate(rows)
        if len(image_rows) or keep_empty or not training
    ]
    tally = _tally(table, validated, labels_N, names, training=training)
    if not images:
        lost = tally.bulk_loss()
        raise UserError(f"{file}: no image{' with a usable box' if rows else ''} in it{f': {lost}' if lost else ''}")
    counts = _counts(table, validated, keep_N, training=training)
    counts.update(empty=sum(not len(one) for one in rows), empty_dropped=len(rows) - len(images))
    doubts = tuple(format_doubts(validated, table.crowd_N, limits_N2))
    return CocoData(file, training, names, ids, images, tally, counts, doubts, orientation)


def _rows_of_images(table: CocoTable, keep_N: np.ndarray) -> list[np.ndarray]:
    """Return the rows of the kept objects of each image, in the order of the file."""
    kept = np.flatnonzero(keep_N)
    kept = kept[np.argsort(table.owners_N[kept], kind="stable")]
    bounds = np.searchsorted(table.owners_N[kept], np.arange(len(table.image_ids) + 1))
    return [kept[start:end] for start, end in pairwise(bounds)]


def _record(
    table: CocoTable,
    index: int,
    path: str,
    rows: np.ndarray,
    boxes_N4: np.ndarray,
    labels_N: np.ndarray,
    convention: Convention,
) -> CocoImage:
    """Return the image at `index` with the objects in these rows; `boxes_N4` and `labels_N` are those of all objects of the file."""
    return CocoImage(
        image_id=table.image_ids[index],
        path=path,
        width=int(table.widths_I[index]),
        height=int(table.heights_I[index]),
        boxes_N4=boxes_N4[rows],
        labels_N=labels_N[rows],
        crowd_N=table.crowd_N[rows],
        areas_N=table.areas_N[rows],
        file_boxes_N4=table.boxes_N4[rows],
        annotation_ids=tuple(table.annotation_ids[row] for row in rows),
        segmentations=None if table.segmentations is None else _pick(table.segmentations, rows),
        convention=convention,
    )


def _counts(table: CocoTable, validated: ValidatedBoxes, keep_N: np.ndarray, *, training: bool) -> Counter[str]:
    """Count the boxes and the files of `CocoData.counts`, all but the empty images."""
    ignored_N = table.crowd_N & training
    sound_N = ~validated.degenerate_N & ~validated.outside_N
    same = same_file(table.file_names)
    return Counter(
        boxes=int(keep_N.sum()),
        crowd=int(table.crowd_N.sum()),
        degenerate=int((validated.degenerate_N & ~ignored_N).sum()),
        outside=int((validated.outside_N & ~ignored_N).sum()),
        clipped=int(((validated.clipped_N4 != validated.corners_N4).any(1) & keep_N & sound_N).sum()),
        again=sum(len(group) - 1 for group in same),
        parted=entries_with_other_boxes(same, table.owners_N, table.labels_N, table.boxes_N4),
    )


def _tally(
    table: CocoTable, validated: ValidatedBoxes, labels_N: np.ndarray, class_names: Sequence[str], *, training: bool
) -> Tally:
    """Return the images, the boxes that training drops or changes, and the rows that were changed when the file was read, by cause."""
    tally = Tally()
    tally.keep("image", len(table.image_ids))
    if training:
        tally_boxes(tally, validated, table.crowd_N, labels_N, class_names, table.annotation_ids)
    else:
        crowd = int(table.crowd_N.sum())
        tally.keep("box", len(labels_N) - crowd)
        if crowd:
            tally.keep("crowd region", crowd)
    for noun, cause, number, first in table.changes:
        tally.change(noun, cause, first, number)
    return tally


def require_boxes(data: CocoData, *, allow_loss: bool) -> CocoData:
    """Return `data` (read with training=True) if enough of its boxes are usable; raises UserError otherwise.

    `allow_loss` accepts any share of dropped boxes below 1, boxes that look like another format, and entries of one file with different boxes.
    """
    if not data.tally.kept("box"):
        raise UserError(f"{data.file}: {loss_of(data.tally)}")
    data.tally.check(data.file, allow_loss=allow_loss)
    require_format(data, allow_loss=allow_loss)
    if not allow_loss and is_bulk(data.counts["parted"], data.tally.kept("image")):
        raise UserError(
            f"{data.file}: {parted_text(data.counts['parted'], data.tally.kept('image'))}; `ssld doctor --fix DIR` writes a copy with one entry "
            "for each file"
        )
    return data


def require_format(data: CocoData, *, allow_loss: bool) -> None:
    """Raise UserError if most boxes look like another format than x, y, width, height in pixels, unless `allow_loss`."""
    doubt = next((one for one in data.format_doubts if one.bulk), None)
    if doubt and not allow_loss:
        raise UserError(
            f"{data.file}: {doubt.text}; correct the file, or set data.allow_loss: true to use them as they are"
        )


def parted_text(parted: int, images: int) -> str:
    """Return a clause on `counts["parted"]` of a file with this number of images."""
    return (
        f"{parted:,} of its {count(images, 'image')} are entries of a file that has further entries with other boxes: each would be trained on "
        "without the boxes of the others"
    )


def is_bulk(number: int, total: int) -> bool:
    """Whether a number is more than half of a total, which stops training as a large loss does."""
    return number > _BULK * total


def loss_of(tally: Tally) -> str | None:
    """Return the reason why training refuses a file with this tally of boxes; None if it accepts the file."""
    lost = tally.bulk_loss()
    if tally.kept("box"):
        return lost
    return f"no box to train on{f': {lost}' if lost else ''}"


def validate_boxes(file_boxes_N4: np.ndarray, sizes_N2: np.ndarray) -> ValidatedBoxes:
    """Convert and check finite xywh boxes in images of `sizes_N2` (width, height)."""
    corners_N4 = np.concatenate([file_boxes_N4[:, :2], file_boxes_N4[:, :2] + file_boxes_N4[:, 2:]], 1).round(3)
    clipped_N4 = corners_N4.clip(0, np.concatenate([sizes_N2, sizes_N2], 1))
    degenerate_N = ((corners_N4[:, 2:] - corners_N4[:, :2]) <= MIN_SIDE).any(1)
    outside_N = ~degenerate_N & ((clipped_N4[:, 2:] - clipped_N4[:, :2]) <= MIN_SIDE).any(1)
    return ValidatedBoxes(corners_N4, clipped_N4, degenerate_N, outside_N)


def tally_boxes(
    tally: Tally,
    validated: ValidatedBoxes,
    crowd_N: np.ndarray,
    labels_N: np.ndarray,
    class_names: Sequence[str],
    annotation_ids: Sequence[Any],
) -> None:
    """Count kept, dropped and clipped boxes of training, by class and cause."""
    flat_N, outside_N = validated.degenerate_N & ~crowd_N, validated.outside_N & ~crowd_N
    kept_N = ~(validated.degenerate_N | validated.outside_N | crowd_N)
    for label, number in enumerate(np.bincount(labels_N[kept_N], minlength=len(class_names)).tolist()):
        tally.keep("box", number, group=class_names[label])
    for cause, dropped_N in ((CROWD, crowd_N), (FLAT, flat_N), (OUTSIDE, outside_N)):
        places = np.flatnonzero(dropped_N)
        labels, first, numbers = np.unique(labels_N[places], return_index=True, return_counts=True)
        for one in np.argsort(first):  # the tally names the first dropped box of all classes
            name = f"annotation {annotation_ids[places[first[one]]]!r}"
            tally.drop("box", cause, name, int(numbers[one]), group=class_names[labels[one]])
    clipped = np.flatnonzero((validated.clipped_N4 != validated.corners_N4).any(1) & kept_N)
    if len(clipped):
        tally.change("box", CLIPPED, f"annotation {annotation_ids[clipped[0]]!r}", len(clipped))


@dataclass(frozen=True)
class FormatDoubt:
    """A reason to suspect that boxes are not x, y, width, height in pixels."""

    text: str
    bulk: bool
    """whether it concerns so many boxes that training stops"""


def format_doubts(validated: ValidatedBoxes, crowd_N: np.ndarray, sizes_N2: np.ndarray) -> list[FormatDoubt]:
    """Return reasons to suspect that boxes are not x, y, width, height in pixels of images of `sizes_N2`; each concerns over a tenth of them."""
    corners_N4 = validated.corners_N4
    sound_N = ~(validated.degenerate_N | crowd_N)
    sides_N2 = corners_N4[:, 2:] - corners_N4[:, :2]
    beyond_N4 = np.abs(corners_N4 - validated.clipped_N4)
    over_N = sound_N & (beyond_N4 > 1).any(1)  # a pixel is rounding
    # Boxes around whole images reach over the border by some pixels: no other format.
    far_N = over_N & (beyond_N4 > _FAR * np.tile(sizes_N2, 2)).any(1)
    first_N = sound_N & (corners_N4 >= 0).all(1) & (sides_N2 <= 1).all(1)
    first_N &= (corners_N4[:, :2] <= 1).all(1) & (sizes_N2 > 2).all(1)
    # Of corners the second is always the larger one; of x, y, width, height that is so for large objects alone.
    like_corners = bool((sides_N2 > corners_N4[:, :2])[sound_N].all())
    total, over, far, first = (int(which_N.sum()) for which_N in (sound_N, over_N, far_N, first_N))
    doubts = []
    if over > _SUSPECT * total:
        text = f"{over:,} of the {count(total, 'box')} reach over the border: corners (x1, y1, x2, y2) instead of x, y, width, height?"
        probable = is_bulk(far, total) or (like_corners and total >= _ENOUGH and far > _SUSPECT * total)
        doubts.append(FormatDoubt(text, probable))
    if first > _SUSPECT * total:
        text = f"{first:,} of the {count(total, 'box')} have no number above 1: shares of the image instead of pixels?"
        doubts.append(FormatDoubt(text, is_bulk(first, total)))
    return doubts


def entries_with_other_boxes(
    same: Sequence[Sequence[int]], owners_N: np.ndarray, labels_N: np.ndarray, boxes_N4: np.ndarray
) -> int:
    """Return how many images belong to a group of entries of one file whose boxes are not equal.

    Args:
        same: groups of positions of images (`same_file`).
        owners_N, labels_N, boxes_N4: position of the image, class, and xywh of every box.
    """
    objects: dict[int, set[tuple[float, ...]]] = {index: set() for group in same for index in group}
    if not objects:
        return 0
    for owner, label, box in zip(owners_N.tolist(), labels_N.tolist(), boxes_N4.tolist(), strict=True):
        if owner in objects:
            objects[owner].add((label, *box))
    return sum(len(group) for group in same if any(objects[index] != objects[group[0]] for index in group))


def require_masks(data: CocoData) -> CocoData:
    """Return `data` (read with segmentations=True) if every object has a usable shape; raises UserError with the first annotation ids otherwise."""
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
            "with masks needs: polygons of at least three points, or RLE of the image's size; or use a kind without masks, such as faster_rcnn"
        )
    return data


def _pick(shapes: Sequence[Any], positions: np.ndarray) -> Sequence[Any]:
    return shapes.pick(positions) if isinstance(shapes, PackedShapes) else tuple(shapes[i] for i in positions)


def _classes(
    file: str, table: CocoTable, expected: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[Id, ...], np.ndarray]:
    """Return (names, category ids, index of each class of the file) in the order of `expected`, else of the file."""
    names = table.class_names
    if expected is None:
        return tuple(names), tuple(table.category_ids), np.arange(len(names))
    expected = [clean_name(name) for name in expected]  # names of the file were cleaned too
    _compare_names(file, names, expected)
    index = {name: label for label, name in enumerate(expected)}
    ids = dict(zip(names, table.category_ids, strict=True))
    return tuple(expected), tuple(ids[name] for name in expected), np.array([index[name] for name in names])


def _compare_names(file: str, names: Sequence[str], expected: Sequence[str]) -> None:
    extra, missing = ([name for name in a if name not in b] for a, b in ((names, expected), (expected, names)))
    if extra or missing:
        parts = [
            f"{title}: {', '.join(some[:10])}{' ...' if len(some) > 10 else ''}"
            for title, some in (("unknown", extra), ("missing", missing))
            if some
        ]
        raise UserError(
            f"{file}: its {len(names)} classes differ from the {len(expected)} classes of the detector; {'; '.join(parts)}"
        )


def _paths(file: str, names: list[str], image_folder: str | Path | None) -> list[str]:
    if image_folder is None:
        return names
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} does not exist")
    if missing := missing_names(image_folder, names):
        first = names[missing[0]]
        fix = "; `ssld doctor --fix DIR` writes a copy with the names of the files"
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {file} are missing; the first is {printable(os.path.join(image_folder, first))}"
            f"{hint(image_folder, [names[index] for index in missing])}{fix if fitting_files(image_folder, names, missing) else ''}"
        )
    return [os.path.join(image_folder, name) for name in names]
