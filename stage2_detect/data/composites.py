"""Training images composed of several images: mosaic, mixup and copy-paste, as a function of (seed, image id, view).

Mosaic: four images around a drawn point, as in YOLOv4 (arXiv 2004.10934), at 0.4 to 1 times their size. Mixup: two images blended about half and
half, with the boxes of both at full weight (arXiv 1902.04103). Copy-paste (arXiv 2012.07177): drawn objects of another image over the image, cut
out by their masks, or by their boxes in a data set without masks; objects that become nearly hidden are dropped, and the boxes of partly hidden
ones with masks shrink to what remains. Every image that takes part is first augmented by itself (`views.py`).

Legend: C channels, H height, W width, M objects of a composed image, N objects of a source image.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssld.shared.images import stable_seed
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.data.coco import MIN_SIDE, CocoImage
from ssld.stage2_detect.data.colors import erase
from ssld.stage2_detect.data.views import LEAST_VISIBLE, ViewedImage, box_areas, view_matrix
from ssld.stage2_detect.models.mask_targets import ImageMasks, rasterize

_FILL = 114
"""grey level of the parts of a mosaic that no image covers, as in YOLOv4's code"""
_CENTER, _ZOOM = (0.3, 0.7), (0.4, 1.0)
_BLEND = 32.0  # both parameters of the beta distribution, as in ultralytics' mixup
_PASTED_SHARE = 0.5
_MOST_CELLS = 2**26
"""most pixels of the shapes that are compared at once, one byte each"""


@dataclass(frozen=True, eq=False)
class Part:
    """Objects that a composed image took from one image."""

    index: int
    """position of the image among the records"""
    matrix_23: np.ndarray
    """float64 affine map from points of that image to points of the composed one"""
    kept_N: np.ndarray
    """int64: positions of these objects among those of the image"""
    window_4: np.ndarray | None = None
    """float64 xyxy part of the composed image that shows that image; None: all of it, in an image of one part"""


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the objects of a training image come from, in their order."""

    parts: tuple[Part, ...]
    pasted: int | None = None
    """position of the first pasted object; None: none is pasted"""

    @property
    def index(self) -> int:
        """Position among the records of the image that the composition began with."""
        return self.parts[0].index

    def labels(self, records: list[CocoImage]) -> np.ndarray:
        """Return the class of each object, int64 [M]."""
        labels_M: np.ndarray = np.concatenate([records[part.index].labels_N[part.kept_N] for part in self.parts])
        return labels_M

    def masks(self, records: list[CocoImage]) -> ImageMasks:
        """Return the masks of the objects."""
        shapes: list[Any] = []
        for part in self.parts:
            of_record = records[part.index].segmentations
            shapes += [of_record[index] for index in part.kept_N] if of_record is not None else []
        numbers = [len(part.kept_N) for part in self.parts]
        matrices = np.repeat(np.stack([part.matrix_23 for part in self.parts]), numbers, axis=0)
        windows = [part.window_4 for part in self.parts if part.window_4 is not None]
        return ImageMasks(
            tuple(shapes), matrices, np.repeat(np.stack(windows), numbers, axis=0) if windows else None, self.pasted
        )


class TrainingImage(NamedTuple):
    """One image of a training batch."""

    pixels_CHW: Tensor
    scale: float
    """size of the first part / its original size"""
    boxes_M4: np.ndarray
    """float32 xyxy boxes, in the order of the parts"""
    sources: Sources


Zoomed = Callable[[int, float], tuple[int, ViewedImage]]
"""view of an image by (position among the records, zoom), with the position of the image that was read instead if that one is unreadable"""


def compose(index: int, view_of: Zoomed, others: int, *, seed: int, number: int, record_of: Callable[[int], CocoImage],
            augment: AugmentConfig, compositions: bool) -> TrainingImage:  # fmt: skip
    """Return a training image of the record at `index`: alone, or composed with others as drawn; then erased as drawn.

    Args:
        index: position of the image among the records.
        view_of: makes the view of an image; see `Zoomed`.
        others: number of records, from the first on, that may be composed with it.
        seed, number: determine all draws together with the image id; the number is that of the view.
        record_of: returns the record at a position.
        augment: probabilities.
        compositions: whether compositions are drawn at all.
    """
    image_id = record_of(index).image_id
    draw = random.Random(stable_seed(seed, image_id, number, "compose"))
    chosen = draw.random()

    def other(zoom: float = 1.0) -> tuple[int, ViewedImage]:
        return view_of(draw.randrange(others), zoom)

    if not compositions or chosen >= augment.mosaic + augment.mixup + augment.copy_paste:
        made = _alone(*view_of(index, 1.0))
    elif chosen < augment.mosaic:
        made = mosaic(view_of(index, 1.0), [other(draw.uniform(*_ZOOM)) for _ in range(3)], draw)
    elif chosen < augment.mosaic + augment.mixup:
        made = mixup(view_of(index, 1.0), other(), draw.betavariate(_BLEND, _BLEND))
    else:
        made = copy_paste(view_of(index, 1.0), other(), draw, record_of)
    if augment.erasing:
        draw = random.Random(stable_seed(seed, image_id, number, "erase"))
        if draw.random() < augment.erasing:
            made = made._replace(pixels_CHW=erase(made.pixels_CHW, made.boxes_M4, draw))
    return made


def _alone(index: int, viewed: ViewedImage) -> TrainingImage:
    part = Part(index, view_matrix(viewed.view), viewed.kept_M)
    return TrainingImage(viewed.pixels_CHW, viewed.view.scale, viewed.boxes_M4, Sources((part,)))


def mosaic(first: tuple[int, ViewedImage], others: list[tuple[int, ViewedImage]], draw: random.Random) -> TrainingImage:
    """Return a mosaic of the size of the first view: four views in drawn places around a drawn point, each with its inner corner at that point."""
    height, width = first[1].pixels_CHW.shape[1:]
    middle_x, middle_y = (round(draw.uniform(*_CENTER) * side) for side in (width, height))
    canvas = torch.full_like(first[1].pixels_CHW, _FILL, memory_format=torch.contiguous_format)
    tiles = [
        (left, top, right, bottom)
        for top, bottom in ((0, middle_y), (middle_y, height))
        for left, right in ((0, middle_x), (middle_x, width))
    ]
    draw.shuffle(tiles)
    boxes, parts = [], []
    for (index, viewed), (left, top, right, bottom) in zip([first, *others], tiles, strict=True):
        high, wide = viewed.pixels_CHW.shape[1:]
        x, y = right - wide if left == 0 else left, bottom - high if top == 0 else top
        window = np.array([max(x, left), max(y, top), min(x + wide, right), min(y + high, bottom)])
        x1, y1, x2, y2 = window.tolist()
        canvas[:, y1:y2, x1:x2] = viewed.pixels_CHW[:, y1 - y : y2 - y, x1 - x : x2 - x]
        moved, kept = _clipped(viewed.boxes_M4 + np.array([x, y, x, y], dtype=np.float32), window)
        matrix = view_matrix(viewed.view) + np.array([[0, 0, x], [0, 0, y]])
        boxes.append(moved)
        parts.append(Part(index, matrix, viewed.kept_M[kept], window.astype(np.float64)))
    return TrainingImage(canvas, first[1].view.scale, np.concatenate(boxes), Sources(tuple(parts)))


def mixup(first: tuple[int, ViewedImage], second: tuple[int, ViewedImage], share: float) -> TrainingImage:
    """Return the first view with the second one blended in, from the top left corner on: `share` of the first one's pixels remain where both are."""
    pixels = first[1].pixels_CHW.clone()
    high, wide = (min(sides) for sides in zip(pixels.shape[1:], second[1].pixels_CHW.shape[1:], strict=True))
    both = share * pixels[:, :high, :wide].float() + (1 - share) * second[1].pixels_CHW[:, :high, :wide].float()
    pixels[:, :high, :wide] = both.round().to(torch.uint8)
    window = np.array([0, 0, wide, high])
    boxes, kept = _clipped(second[1].boxes_M4, window)
    parts = (
        Part(first[0], view_matrix(first[1].view), first[1].kept_M, _whole(pixels)),
        Part(second[0], view_matrix(second[1].view), second[1].kept_M[kept], window.astype(np.float64)),
    )
    return TrainingImage(pixels, first[1].view.scale, np.concatenate([first[1].boxes_M4, boxes]), Sources(parts))


def copy_paste(
    first: tuple[int, ViewedImage],
    second: tuple[int, ViewedImage],
    draw: random.Random,
    record_of: Callable[[int], CocoImage],
) -> TrainingImage:
    """Return the first view with about half of the second one's objects pasted over it where they are in the second view."""
    (below, one), (above, two) = first, second
    height, width = one.pixels_CHW.shape[1:]
    high, wide = (min(sides) for sides in zip((height, width), two.pixels_CHW.shape[1:], strict=True))
    boxes, kept = _clipped(two.boxes_M4, np.array([0, 0, wide, high]))
    drawn = np.array([draw.random() < _PASTED_SHARE for _ in kept], dtype=bool)
    boxes, kept = boxes[drawn], kept[drawn]
    if not len(kept):
        return _alone(below, one)
    over_HW = np.zeros((height, width), dtype=bool)
    visible = np.zeros(len(kept), dtype=bool)
    for some, shapes in _shapes(record_of(above), two, two.kept_M[kept], (high, wide), boxes):
        visible[some] = shapes.any((1, 2))
        over_HW[:high, :wide] |= shapes.any(0)
    boxes, kept = boxes[visible], kept[visible]
    pasted = torch.from_numpy(over_HW[:high, :wide])
    pixels = one.pixels_CHW.clone()
    pixels[:, :high, :wide] = torch.where(pasted, two.pixels_CHW[:, :high, :wide], pixels[:, :high, :wide])
    remaining, left = _remaining(record_of(below), one, over_HW)
    parts = (
        Part(below, view_matrix(one.view), one.kept_M[left], _whole(pixels)),
        Part(above, view_matrix(two.view), two.kept_M[kept], np.array([0.0, 0.0, wide, high])),
    )
    return TrainingImage(pixels, one.view.scale, np.concatenate([remaining, boxes]), Sources(parts, pasted=len(left)))


def _shapes(
    record: CocoImage, viewed: ViewedImage, objects: np.ndarray, sides: tuple[int, int], boxes_M4: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (which objects, their pixels): bool [m, H, W] of m objects of an image in its view; their boxes if the image has no masks."""
    high, wide = sides
    # Masks are rasterized in a square grid over the whole view, one pixel a cell; a few at a time, since an image may have thousands of objects.
    side = max(high, wide)
    most = max(1, _MOST_CELLS // (side * side))
    matrix_23 = view_matrix(viewed.view)
    for start in range(0, len(objects), most):
        some = slice(start, min(start + most, len(objects)))
        count = some.stop - start
        if record.segmentations is None:
            shapes = np.zeros((count, high, wide), dtype=bool)
            for shape_HW, (x1, y1, x2, y2) in zip(shapes, boxes_M4[some].round().astype(int).tolist(), strict=True):
                shape_HW[y1:y2, x1:x2] = True
        else:
            masks = ImageMasks(
                tuple(record.segmentations[index] for index in objects[some]),
                np.broadcast_to(matrix_23, (count, 2, 3)),
            )
            square = np.tile(np.array([[0.0, 0.0, side, side]]), (count, 1))
            shapes = rasterize([masks], np.zeros(count, int), np.arange(count), square, side)[:, :high, :wide]
        yield some, shapes


def _remaining(record: CocoImage, viewed: ViewedImage, over_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (boxes of the objects of a view that remain under pasted pixels, their positions)."""
    boxes = viewed.boxes_M4.copy()
    left = np.ones(len(boxes), dtype=bool)
    for some, shapes in _shapes(record, viewed, viewed.kept_M, over_HW.shape, viewed.boxes_M4):
        areas = shapes.sum((1, 2))
        shapes = shapes & ~over_HW
        share = shapes.sum((1, 2)) / areas.clip(1)
        left[some] = (share >= LEAST_VISIBLE) | (areas == 0)
        if record.segmentations is None:
            continue
        for offset in np.flatnonzero(left[some] & (share < 1) & (areas > 0)):
            rows, columns = np.nonzero(shapes[offset])
            box_4 = boxes[some.start + offset]
            box_4[:2] = np.maximum(box_4[:2], [columns.min(), rows.min()])
            box_4[2:] = np.minimum(box_4[2:], [columns.max() + 1, rows.max() + 1])
    return boxes[left], np.flatnonzero(left)


def _whole(pixels_CHW: Tensor) -> np.ndarray:
    """Return the window of all of an image."""
    height, width = pixels_CHW.shape[1:]
    return np.array([0.0, 0.0, width, height])


def _clipped(boxes_N4: np.ndarray, window_4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (boxes clipped to a window, without those of which too little remains; positions of these boxes)."""
    clipped = boxes_N4.clip(window_4[[0, 1, 0, 1]], window_4[[2, 3, 2, 3]]).astype(np.float32)
    kept = ((clipped[:, 2:] - clipped[:, :2]) > MIN_SIDE).all(1) & (
        box_areas(clipped) >= LEAST_VISIBLE * box_areas(boxes_N4)
    )
    return clipped[kept], np.flatnonzero(kept)
