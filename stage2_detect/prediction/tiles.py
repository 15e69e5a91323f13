"""Detection of large images in tiles: the windows of an image, and merging of their detections.

The whole image is a window too, for objects that are larger than a tile; this follows SAHI (arXiv 2202.06934, section 3), merging does not. Two boxes
of different windows are one object if they agree in the region that both windows cover. So an object that is complete in two windows becomes one
box, as with NMS, and so do an object and a piece of it that a tile's border cut off, or several pieces. A small object in front of a larger one
is kept, unlike with SAHI's intersection over the smaller area. Boxes of one window are not compared: the detector's NMS has done so.

Legend: N detections in all windows of an image, W windows.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_codec
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoImage
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.boxes import pairwise_intersection
from ssld.stage2_detect.models.mask_targets import decode_rle

SAME = 0.5
"""IoU in the common region from which two boxes are one object"""
MOST_WINDOWS = 100_000
"""tiles of an image"""
_NEAR = 0.01  # of a tile's side: a box that ends so near an inner border was cut by it
_BLOCK = 400_000  # pairs of boxes that are compared at once


class Window(NamedTuple):
    """Rectangle of an image, in its pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image_CHW: Tensor) -> Tensor:
        """Return the window's pixels, a view."""
        return image_CHW[:, self.top : self.top + self.height, self.left : self.left + self.width]


class ImageWindow(NamedTuple):
    """Window of an image; `record` is the image: a `CocoImage`, a frame of a video, or an image given to `predict`."""

    record: Any
    window: Window


def window_batches(
    records: Iterable[Any], batch_size: int, tile: int | None, overlap: float
) -> Iterator[list[ImageWindow]]:
    """Yield batches of the windows of all images, in order. The records have `width` and `height`."""
    windows = (
        ImageWindow(record, window)
        for record in records
        for window in windows_of(record.width, record.height, tile, overlap)
    )
    while batch := list(itertools.islice(windows, batch_size)):
        yield batch


def pixels_of_window(item: ImageWindow) -> Tensor:
    """Return uint8 [3, H, W] of a window whose record has `pixels_CHW`."""
    return item.window.of(item.record.pixels_CHW)


class FileWindows:
    """Decodes windows of image files; called with an `ImageWindow`. Raises `UnreadableImage` or `UserError`."""

    def __init__(self) -> None:
        self._most_pixels = Image.MAX_IMAGE_PIXELS  # as the main process has it
        self._last: tuple[str, Tensor] | None = None  # successive windows are mostly of the same image

    def __call__(self, item: ImageWindow) -> Tensor:
        """Return uint8 [3, H, W]."""
        record: CocoImage = item.record
        if self._last is None or self._last[0] != record.path:
            Image.MAX_IMAGE_PIXELS = self._most_pixels
            self._last = (record.path, load_record(record))
        return item.window.of(self._last[1])


def windows_of(width: int, height: int, tile: int | None, overlap: float = 0.0) -> list[Window]:
    """List the windows of an image: all of it and, if a side exceeds `tile` pixels, square tiles of this side.

    Tiles overlap by `overlap`, a share of their side, or a little more. Raises UserError for more than `MOST_WINDOWS` of them.
    """
    whole = Window(0, 0, width, height)
    if tile is None or max(width, height) <= tile:
        return [whole]
    wide, high = min(tile, width), min(tile, height)
    tiles = _steps(width, tile, overlap) * _steps(height, tile, overlap)
    if tiles > MOST_WINDOWS:
        raise UserError(
            f"tile {tile}, overlap {overlap:g}: make {tiles:,} tiles of an image of {width} x {height} pixels; set larger tiles or a smaller overlap"
        )
    return [
        whole,
        *(
            Window(left, top, wide, high)
            for top in _starts(height, tile, overlap)
            for left in _starts(width, tile, overlap)
        ),
    ]


def merged_windows(parts: Sequence[tuple[Window, Detections]], width: int, height: int) -> Detections:
    """Merge the detections of all windows of an image of [height, width], best first, in the image's pixels.

    Of boxes of one object, the best one that no inner border cut is kept. If all were cut, they become one box around them, with the highest score.
    """
    if len(parts) == 1 and parts[0][0] == (0, 0, width, height):
        return parts[0][1]
    shifts = [torch.tensor([window.left, window.top] * 2, dtype=torch.float32) for window, _ in parts]
    boxes_N4 = torch.cat([one.boxes_N4 + shift for (_, one), shift in zip(parts, shifts, strict=True)])
    scores_N = torch.cat([one.scores_N for _, one in parts])
    labels_N = torch.cat([one.labels_N for _, one in parts])
    counts_W = torch.tensor([len(one.scores_N) for _, one in parts])
    window_N = torch.arange(len(parts)).repeat_interleave(counts_W)
    windows_W4 = torch.tensor([(w.left, w.top, w.left + w.width, w.top + w.height) for w, _ in parts]).double()
    cut_N = _cut(boxes_N4.double(), windows_W4[window_N], width, height)
    groups = []
    for label in labels_N.unique():
        index_M = (labels_N == label).nonzero()[:, 0]
        # Boxes that are not cut come first, by score; sorts are stable.
        index_M = index_M[scores_N[index_M].argsort(descending=True, stable=True)]
        index_M = index_M[cut_N[index_M].long().argsort(stable=True)]
        same = _same(boxes_N4[index_M].double(), window_N[index_M], windows_W4)
        groups += [index_M[group].tolist() for group in _groups(same, cut_N[index_M])]
    groups.sort(key=lambda group: (-float(scores_N[group[0]]), group[0]))
    corners = [torch.cat((boxes_N4[g, :2].amin(0), boxes_N4[g, 2:].amax(0))) for g in groups]
    first = torch.tensor([group[0] for group in groups], dtype=torch.int64)
    masks: list[Any] | None = None
    if all(one.masks is not None for _, one in parts):
        codes = [(window, code) for window, one in parts for code in one.masks or []]
        masks = [_joined([codes[n] for n in group], width, height) for group in groups]
    together_N4 = torch.stack(corners) if corners else boxes_N4[:0]
    return Detections(together_N4, scores_N[first], labels_N[first], masks)


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """List the starts of tiles along a side: evenly spread, the last tile ends at the image's border."""
    steps = _steps(side, tile, overlap) - 1
    return [round(number * (side - tile) / steps) if steps else 0 for number in range(steps + 1)]


def _steps(side: int, tile: int, overlap: float) -> int:
    """Number of tiles along a side."""
    return 1 + max(0, -(-(side - tile) // max(1, int(tile * (1 - overlap)))))


def _cut(boxes_N4: Tensor, windows_N4: Tensor, width: int, height: int) -> Tensor:
    """Whether each box ends at a border of its window that is not a border of the image: bool [N]."""
    image_4 = torch.tensor([0, 0, width, height], dtype=torch.float64)
    inner_N4 = windows_N4 != image_4
    sides_N2 = windows_N4[:, 2:] - windows_N4[:, :2]
    return (((boxes_N4 - windows_N4).abs() <= _NEAR * sides_N2.repeat(1, 2)) & inner_N4).any(1)


def _same(boxes_N4: Tensor, window_N: Tensor, windows_W4: Tensor) -> list[np.ndarray]:
    """List for each box the boxes of other windows that are the same object.

    The part of a box that another window covers is its intersection with that window. Boxes of tiles are compared in blocks, only with boxes that
    overlap them in x: memory grows with the size of a block, not with the square of the number of boxes.
    """
    same: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(boxes_N4)
    widths_N = (windows_W4[:, 2] - windows_W4[:, 0])[window_N]
    whole = (widths_N > widths_N.amin()).nonzero()[:, 0] if len(widths_N) else window_N  # boxes of the whole image
    tiled = (widths_N == widths_N.amin()).nonzero()[:, 0] if len(widths_N) else window_N
    tiled = tiled[boxes_N4[tiled, 0].argsort(stable=True)]
    lefts, rights = boxes_N4[tiled, 0].contiguous(), boxes_N4[tiled, 2].contiguous()
    reach = rights.cummax(0).values if len(tiled) else rights  # how far right the boxes up to one go

    def compare(own_B: Tensor, near_M: Tensor) -> None:
        windows_B4, windows_M4 = windows_W4[window_N[own_B]], windows_W4[window_N[near_M]]
        both_BM = pairwise_intersection(boxes_N4[own_B], boxes_N4[near_M])
        covered_BM = pairwise_intersection(boxes_N4[own_B], windows_M4)
        covered_BM += pairwise_intersection(windows_B4, boxes_N4[near_M])
        same_BM = both_BM / (covered_BM - both_BM).clamp(min=1e-9) > SAME
        same_BM &= window_N[own_B][:, None] != window_N[near_M]
        for box, row_M in zip(own_B.tolist(), same_BM, strict=True):
            same[box] = near_M[row_M].numpy()

    first = 0
    while first < len(tiled):
        begin = int(torch.searchsorted(reach, lefts[first]))
        last = first
        end = first
        while last < len(tiled):
            further = max(end, int(torch.searchsorted(lefts, rights[last])), last + 1)
            if last > first and (last + 1 - first) * (further - begin + len(whole)) > _BLOCK:
                break
            last, end = last + 1, further
        compare(tiled[first:last], torch.cat((tiled[begin:end], whole)))
        first = last
    everything = torch.arange(len(boxes_N4))
    for part in whole.split(max(1, _BLOCK // max(1, len(everything)))):
        compare(part, everything)
    return same


def _groups(same: Sequence[np.ndarray], cut_N: Tensor) -> Iterator[list[int]]:
    """Yield the positions of boxes that become one, the best first. Boxes are given in order of priority, cut ones last."""
    cut = cut_N.numpy()
    left = np.ones(len(cut), dtype=bool)
    for number in range(len(cut)):
        if not left[number]:
            continue
        taken = {number, *(n for n in same[number].tolist() if left[n])}
        new = taken if cut[number] else set()  # a long object lies in a row of tiles: pieces of pieces
        while new:
            new = {n for one in new for n in same[one].tolist() if left[n]} - taken
            taken |= new
        left[list(taken)] = False
        yield [number, *sorted(taken - {number})] if cut[number] else [number]


def _joined(pieces: Sequence[tuple[Window, Any]], width: int, height: int) -> Any:
    """Join masks of windows into one COCO RLE of the image's size."""
    shape_HW = np.zeros((height, width), dtype=np.uint8, order="F")
    for window, code in pieces:
        part_HW = shape_HW[window.top : window.top + window.height, window.left : window.left + window.width]
        part_HW |= decode_rle(code).astype(np.uint8)
    return mask_codec.encode(shape_HW)
