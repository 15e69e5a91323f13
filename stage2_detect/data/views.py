"""One view of a detection image: multi-scale resize or large-scale jitter, crop, flips, quarter turns and colors, as a
function of (seed, image id, view).

Resize: PaddleDetection@666f597f `ppdet/data/transform/operators.py` `Resize(keep_ratio=True)`: one scale for both axes,
new size int(scale * size + 0.5), OpenCV's interpolation without antialiasing. Large-scale jitter: arXiv 2012.07177,
section 3. A view is drawn first and applied afterwards, so that boxes and masks follow the same numbers. AutoAugment of
the decoded image comes before (`auto_augment.py`), colors come afterwards (`colors.py`); `composites.py` makes one image
of several.

Legend: C channels, H height, W width, N objects, M objects that remain.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssld.shared.images import stable_seed
from ssld.stage2_detect.augment_config import AugmentConfig, StrongViewConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.auto_augment import auto_augment
from ssld.stage2_detect.data.coco import MIN_SIDE
from ssld.stage2_detect.data.colors import erase, recolor

_UPSAMPLE = {"bicubic": torch.ops.aten.upsample_bicubic2d, "bilinear": torch.ops.aten.upsample_bilinear2d}


LEAST_VISIBLE = 0.3
"""share of a box's area that has to remain after a crop or in a mosaic; of an object, after others were pasted over it"""
_CROP_AREA, _CROP_RATIO, _CROP_TRIES = (0.3, 1.0), 4 / 3, 10


@dataclass(frozen=True)
class View:
    """Geometry of a view: the image is scaled by `scale`, cropped to the window [height, width] at (`top`, `left`), mirrored
    if `flip`, mirrored vertically if `vertical`, then turned by `turns` x 90 degrees counterclockwise.

    A point (x, y) of the image goes to (x * scale - left, y * scale - top); then x' = width - x' if mirrored and y' = height -
    y' if mirrored vertically; then each turn moves (x', y') to (y', w - x'), where w is the width before that turn.
    """

    scale: float
    height: int
    width: int
    flip: bool = False
    top: int = 0
    left: int = 0
    vertical: bool = False
    turns: int = 0
    cropped: bool = False
    """whether the window is a drawn crop: objects of which little remains are then dropped"""


class ViewedImage(NamedTuple):
    """One training view of an image, with the boxes that remain in it."""

    pixels_CHW: Tensor
    view: View
    boxes_M4: np.ndarray
    kept_M: np.ndarray
    """int64: positions of these boxes among the N of the image; selects labels and masks"""


@dataclass(frozen=True)
class TrainingViews:
    """The augmentation of single images of a run; see `draw_view`, `view_image`, `recolor` and `auto_augment` for the settings."""

    seed: int
    resize: ResizeConfig
    augment: AugmentConfig

    def of(
        self, image_CHW: Tensor, boxes_N4: np.ndarray, *, image_id: int | str, number: int, zoom: float = 1.0
    ) -> ViewedImage:
        """Return view `number` of a decoded image and its boxes, `zoom` times as large as drawn; boxes outside the view are dropped."""
        height, width = image_CHW.shape[1:]
        resize, augment = self.resize, self.augment
        view = self.geometry(height, width, boxes_N4, image_id=image_id, number=number)
        if zoom != 1:
            view = _zoomed(view, height, width, zoom)
        kept = np.arange(len(boxes_N4))
        if augment.auto_augment:
            image_CHW, boxes_N4, kept = auto_augment(
                image_CHW, boxes_N4, seed=self.seed, image_id=image_id, view=number
            )
        boxes = view_boxes(boxes_N4, view)
        # Rounding the size can remove a sliver at the border, and a window any box.
        sound = ((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE).all(1)
        if view.cropped:
            sound &= box_areas(boxes) >= LEAST_VISIBLE * box_areas(boxes_N4) * view.scale**2
        pixels_CHW = view_image(image_CHW, view, resize.interpolation, resize.kernel)
        pixels_CHW = recolor(pixels_CHW, augment, random.Random(stable_seed(self.seed, image_id, number, "colors")))
        return ViewedImage(pixels_CHW, view, boxes[sound], kept[sound])

    def geometry(self, height: int, width: int, boxes_N4: np.ndarray, *, image_id: int | str, number: int) -> View:
        """Draw the geometry of view `number` of an image of [height, width] with these boxes."""
        resize, augment = self.resize, self.augment
        view = draw_view(
            height,
            width,
            seed=self.seed,
            image_id=image_id,
            view=number,
            train_short_sides=resize.train_short_sides,
            train_long_side=resize.train_long_side,
            flip=resize.flip,
            large_scale_jitter=augment.large_scale_jitter,
        )
        if augment.crop or augment.vertical_flip or augment.quarter_turns:
            view = self._turned(self._cropped(view, height, width, boxes_N4, image_id, number), image_id, number)
        return view

    def _cropped(
        self, view: View, height: int, width: int, boxes_N4: np.ndarray, image_id: int | str, number: int
    ) -> View:
        """Return the view zoomed to a drawn window in which objects remain, if this view is to be cropped and such a window is found."""
        draw = random.Random(stable_seed(self.seed, image_id, number, "crop"))
        if draw.random() >= self.augment.crop:
            return view
        for _ in range(_CROP_TRIES):
            area, ratio = draw.uniform(*_CROP_AREA), _CROP_RATIO ** draw.uniform(-1, 1)
            high, wide = (
                min(round(height * math.sqrt(area / ratio)), height),
                min(round(width * math.sqrt(area * ratio)), width),
            )
            top, left = draw.randint(0, height - high), draw.randint(0, width - wide)
            short_side = min(view.height, view.width)
            fitted = fit_view(max(high, 1), max(wide, 1), short_side=short_side, long_side=self.resize.train_long_side)
            sides = _scaled(height, width, fitted.scale)
            found = replace(
                fitted,
                height=min(fitted.height, sides[0]),
                width=min(fitted.width, sides[1]),
                flip=view.flip,
                cropped=True,
            )
            found = replace(
                found,
                top=min(round(top * fitted.scale), sides[0] - found.height),
                left=min(round(left * fitted.scale), sides[1] - found.width),
            )
            visible = box_areas(view_boxes(boxes_N4, found)) >= LEAST_VISIBLE * box_areas(boxes_N4) * fitted.scale**2
            if visible.any() or not len(boxes_N4):
                return found
        return view

    def _turned(self, view: View, image_id: int | str, number: int) -> View:
        """Return the view mirrored vertically and turned as drawn."""
        draw = random.Random(stable_seed(self.seed, image_id, number, "turns"))
        vertical = draw.random() < self.augment.vertical_flip
        turns = draw.randint(1, 3) if draw.random() < self.augment.quarter_turns else 0
        return replace(view, vertical=vertical, turns=turns)


def strong_view(pixels_CHW: Tensor, strong: StrongViewConfig, *, seed: int, image_id: int | str, number: int) -> Tensor:
    """Return the strong view of an unlabeled image from its weak one, uint8 [C, H, W]: other colors and an erased rectangle, at the same places."""
    pixels_CHW = recolor(pixels_CHW, strong, random.Random(stable_seed(seed, image_id, number, "colors")))
    draw = random.Random(stable_seed(seed, image_id, number, "erase"))
    return erase(pixels_CHW, np.zeros((0, 4)), draw) if draw.random() < strong.erasing else pixels_CHW


def fit_view(height: int, width: int, *, short_side: int, long_side: int) -> View:
    """Return the view of an image of [height, width] with short side `short_side`, or smaller if the long side would exceed
    `long_side`."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return View(scale, *_scaled(height, width, scale))


def draw_view(
    height: int,
    width: int,
    *,
    seed: int,
    image_id: int | str,
    view: int,
    train_short_sides: Sequence[int],
    train_long_side: int,
    flip: float,
    large_scale_jitter: tuple[float, float] | None = None,
) -> View:
    """Draw a training view: short side drawn uniformly from `train_short_sides`, mirrored with probability `flip`.

    With `large_scale_jitter` the scale is drawn uniformly between its two numbers instead, where 1 fits the image into the
    square of side `train_long_side`; a larger image is cropped at a random position. Draws depend only on (seed, image id,
    view), in every process; the view number is the pass over the data.
    """
    draw = random.Random(stable_seed(seed, image_id, view))
    if large_scale_jitter is None:
        short_side = train_short_sides[draw.randrange(len(train_short_sides))]
        mirrored = draw.random() < flip
        return replace(fit_view(height, width, short_side=short_side, long_side=train_long_side), flip=mirrored)
    scale = draw.uniform(*large_scale_jitter) * train_long_side / max(height, width)
    mirrored = draw.random() < flip
    sides = _scaled(height, width, scale)
    top, left = (draw.randint(0, max(side - train_long_side, 0)) for side in sides)
    return View(scale, min(sides[0], train_long_side), min(sides[1], train_long_side), mirrored, top, left)


def view_image(image_CHW: Tensor, view: View, interpolation: str = "bicubic", kernel: str = "reference") -> Tensor:
    """Resize uint8 [C, H, W] to uint8 [C, view.height, view.width], or with both swapped after an odd number of turns; interpolated
    without antialiasing.

    Kernel `reference` is `upsample_bicubic2d` on float pixels with the exact scale, rounded and clamped: OpenCV's result
    to one grey level (torchvision's and PIL's are not). `fast` is torch's kernel for uint8 pixels, about ten times
    faster on a CPU with AVX2. It differs from `reference` by one level at most if bilinear. If bicubic it rounds and
    clamps between its two passes: a difference of 0.2 levels in the mean on photographs, up to 30 at sharp edges near black
    or white, and never above 67, since the row weights' overshoot (3/16 of 255) is clamped and multiplied by column weights
    of sum 1.375.
    """
    sides = _scaled(image_CHW.shape[1], image_CHW.shape[2], view.scale)
    if image_CHW.shape[1:] != sides or view.scale != 1:
        upsample = _UPSAMPLE[interpolation]
        if kernel == "fast":
            # The vectorized kernel needs channels-last memory, which decoded images have.
            pixels = image_CHW[None].contiguous(memory_format=torch.channels_last)
            image_CHW = upsample(pixels, sides, False, view.scale, view.scale)[0]
        else:
            resized = upsample(image_CHW[None].float(), sides, False, view.scale, view.scale)[0]
            image_CHW = resized.round_().clamp_(0, 255).to(torch.uint8)
    image_CHW = image_CHW[:, view.top : view.top + view.height, view.left : view.left + view.width]
    mirrored = [axis for axis, wanted in ((2, view.flip), (1, view.vertical)) if wanted]
    image_CHW = image_CHW.flip(mirrored) if mirrored else image_CHW
    return image_CHW.rot90(view.turns, (1, 2)) if view.turns else image_CHW


def view_boxes(boxes_N4: np.ndarray, view: View) -> np.ndarray:
    """Map float32 xyxy boxes of the image to the view and clip them; a box outside the view becomes empty."""
    offsets = np.array([view.left, view.top, view.left, view.top], dtype=np.float32)
    boxes = boxes_N4 * np.float32(view.scale) - offsets
    limits = np.array([view.width, view.height, view.width, view.height], dtype=np.float32)
    boxes = boxes.clip(0, limits)
    if view.flip:
        boxes = np.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], axis=1)
    if view.vertical:
        boxes = np.stack([boxes[:, 0], view.height - boxes[:, 3], boxes[:, 2], view.height - boxes[:, 1]], axis=1)
    height, width = view.height, view.width
    for _ in range(view.turns):
        boxes = np.stack([boxes[:, 1], width - boxes[:, 2], boxes[:, 3], width - boxes[:, 0]], axis=1)
        height, width = width, height
    return boxes.astype(np.float32)


def view_matrix(view: View) -> np.ndarray:
    """Return the affine map from points of the image to points of the view, float64 [2, 3]."""
    matrix_33 = np.array([[view.scale, 0, -view.left], [0, view.scale, -view.top], [0, 0, 1]])
    if view.flip:
        matrix_33 = np.array([[-1.0, 0, view.width], [0, 1, 0], [0, 0, 1]]) @ matrix_33
    if view.vertical:
        matrix_33 = np.array([[1.0, 0, 0], [0, -1, view.height], [0, 0, 1]]) @ matrix_33
    height, width = view.height, view.width
    for _ in range(view.turns):
        matrix_33 = np.array([[0.0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix_33
        height, width = width, height
    return matrix_33[:2]


def box_areas(boxes_N4: np.ndarray) -> np.ndarray:
    """Return the areas of xyxy boxes, [N]."""
    areas_N: np.ndarray = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1)
    return areas_N


def _zoomed(view: View, height: int, width: int, zoom: float) -> View:
    """Return the same view of an image of [height, width] at `zoom` times the size."""
    sides = _scaled(height, width, view.scale * zoom)
    high, wide = (max(int(side * zoom + 0.5), 1) for side in (view.height, view.width))
    top, left = int(view.top * zoom), int(view.left * zoom)
    return replace(
        view,
        scale=view.scale * zoom,
        height=min(high, sides[0] - top),
        width=min(wide, sides[1] - left),
        top=top,
        left=left,
    )


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return height and width times `scale`, rounded half up, at least one pixel."""
    return max(int(scale * height + 0.5), 1), max(int(scale * width + 0.5), 1)
