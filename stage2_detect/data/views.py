"""Geometry of one view of a detection image: multi-scale resize or large-scale jitter, and horizontal flip, as a
function of (seed, image id, view).

Resize: PaddleDetection@666f597f `ppdet/data/transform/operators.py` `Resize(keep_ratio=True)`: one scale for both axes,
new size int(scale * size + 0.5), OpenCV's interpolation without antialiasing. Large-scale jitter: arXiv 2012.07177,
section 3. A view is drawn first and applied afterwards, so that boxes and masks follow the same numbers. Augmentation of
the decoded image comes before (`auto_augment.py`).

Legend: C channels, H height, W width, N objects, M objects that remain.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssld.shared.images import stable_seed
from ssld.stage2_detect.config import AugmentConfig, ResizeConfig
from ssld.stage2_detect.data.auto_augment import auto_augment
from ssld.stage2_detect.data.coco import MIN_SIDE

_UPSAMPLE = {"bicubic": torch.ops.aten.upsample_bicubic2d, "bilinear": torch.ops.aten.upsample_bilinear2d}


@dataclass(frozen=True)
class View:
    """Geometry of a view: the image is scaled by `scale`, cropped to the window [height, width] at (`top`, `left`), then
    mirrored if `flip`.

    A point (x, y) of the image goes to (x', y * scale - top), with x' = x * scale - left, or x' = width - (x * scale -
    left) if mirrored. Backwards: x = (x' + left) / scale, or (width - x' + left) / scale; y = (y' + top) / scale.
    """

    scale: float
    height: int
    width: int
    flip: bool = False
    top: int = 0
    left: int = 0


class ViewedImage(NamedTuple):
    """One training view of an image, with the boxes that remain in it."""

    pixels_CHW: Tensor
    view: View
    boxes_M4: np.ndarray
    kept_M: np.ndarray
    """int64: positions of these boxes among the N of the image; selects labels and masks"""


@dataclass(frozen=True)
class TrainingViews:
    """The whole augmentation of a run; see `draw_view`, `view_image` and `auto_augment` for the settings."""

    seed: int
    resize: ResizeConfig
    augment: AugmentConfig

    def of(self, image_CHW: Tensor, boxes_N4: np.ndarray, *, image_id: int | str, number: int) -> ViewedImage:
        """Return view `number` of a decoded image and its boxes; boxes outside the view are dropped."""
        height, width = image_CHW.shape[1:]
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
        kept = np.arange(len(boxes_N4))
        if augment.auto_augment:
            image_CHW, boxes_N4, kept = auto_augment(
                image_CHW, boxes_N4, seed=self.seed, image_id=image_id, view=number
            )
        boxes = view_boxes(boxes_N4, view)
        # Rounding the size can remove a sliver at the border, and a window any box.
        sound = ((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE).all(1)
        pixels_CHW = view_image(image_CHW, view, resize.interpolation, resize.kernel)
        return ViewedImage(pixels_CHW, view, boxes[sound], kept[sound])


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
    """Resize uint8 [C, H, W] to uint8 [C, view.height, view.width], interpolated without antialiasing.

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
    return image_CHW.flip(2) if view.flip else image_CHW


def view_boxes(boxes_N4: np.ndarray, view: View) -> np.ndarray:
    """Map float32 xyxy boxes of the image to the view and clip them; a box outside the view becomes empty."""
    offsets = np.array([view.left, view.top, view.left, view.top], dtype=np.float32)
    boxes = boxes_N4 * np.float32(view.scale) - offsets
    limits = np.array([view.width, view.height, view.width, view.height], dtype=np.float32)
    boxes = boxes.clip(0, limits)
    if view.flip:
        boxes = np.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], axis=1)
    return boxes.astype(np.float32)


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return height and width times `scale`, rounded half up, at least one pixel."""
    return max(int(scale * height + 0.5), 1), max(int(scale * width + 0.5), 1)
