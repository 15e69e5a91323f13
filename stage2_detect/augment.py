"""Geometry of one view of a detection image: multi-scale resize and horizontal flip, as a function of (seed, image
id, view).

Resize: PaddleDetection@666f597f `ppdet/data/transform/operators.py` `Resize(keep_ratio=True)`: one scale for both axes,
new size int(scale * size + 0.5), OpenCV's interpolation without antialiasing. `upsample_bicubic2d` on float pixels with
the exact scale equals OpenCV's to one grey level; torchvision's resize, PIL's, and torch's own uint8 kernel (30 levels
off on noise) do not. A view is drawn first and applied afterwards, so that boxes, and whatever else an image carries,
follow by the same numbers. Deliberately absent: colour, and AutoAugment.

Legend: C channels, H height, W width, N objects.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.images import stable_seed

_UPSAMPLE = {"bicubic": torch.ops.aten.upsample_bicubic2d, "bilinear": torch.ops.aten.upsample_bilinear2d}


@dataclass(frozen=True)
class View:
    """Where a view puts the image: first times `scale` to [height, width], then mirrored if `flip`. A point (x, y)
    goes to (x', y * scale) with x' = x * scale, or width - x * scale."""

    scale: float
    height: int
    width: int
    flip: bool = False


def fit_view(height: int, width: int, *, short_side: int, max_long: int) -> View:
    """The view of an image of [height, width] whose short side is `short_side`, or less where the long side would
    exceed `max_long`."""
    scale = min(short_side / min(height, width), max_long / max(height, width))
    return View(scale, max(int(scale * height + 0.5), 1), max(int(scale * width + 0.5), 1))


def draw_view(
    height: int,
    width: int,
    *,
    seed: int,
    image_id: int | str,
    view: int,
    short_sides: Sequence[int],
    max_long: int,
    flip: float,
) -> View:
    """A training view: short side drawn uniformly from `short_sides`, mirrored with probability `flip`.

    The same (seed, image id, view) gives the same draws in every process; the view number is the pass over the data.
    """
    draw = random.Random(stable_seed(seed, image_id, view))
    short_side = short_sides[draw.randrange(len(short_sides))]
    mirrored = draw.random() < flip
    fitted = fit_view(height, width, short_side=short_side, max_long=max_long)
    return View(fitted.scale, fitted.height, fitted.width, mirrored)


def view_image(image_CHW: Tensor, view: View, interpolation: str = "bicubic") -> Tensor:
    """uint8 [C, H, W] to uint8 [C, view.height, view.width]."""
    if image_CHW.shape[1:] != (view.height, view.width) or view.scale != 1:
        size = [view.height, view.width]
        resized = _UPSAMPLE[interpolation](image_CHW[None].float(), size, False, view.scale, view.scale)[0]
        image_CHW = resized.round_().clamp_(0, 255).to(torch.uint8)
    return image_CHW.flip(2) if view.flip else image_CHW


def view_boxes(boxes_N4: np.ndarray, view: View) -> np.ndarray:
    """float32 xyxy boxes of the image to boxes of the view, clipped to it; a box at the border may become empty."""
    boxes = boxes_N4 * np.float32(view.scale)
    limits = np.array([view.width, view.height, view.width, view.height], dtype=np.float32)
    boxes = boxes.clip(0, limits)
    if view.flip:
        boxes = np.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], axis=1)
    return boxes.astype(np.float32)
