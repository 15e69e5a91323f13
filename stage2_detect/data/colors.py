"""Changes of the colors of a training image: brightness, contrast, saturation, hue, blur, and an erased rectangle; no box moves.

The kernels are those of torchvision.transforms.v2, but for the hue; every number is drawn by the caller's generator.

Legend: C channels, H height, W width, M objects.
"""

import math
import random

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from ssld.stage2_detect.augment_config import AugmentConfig, StrongViewConfig

_BLUR = (0.1, 2.0)  # standard deviation in pixels
_ERASED_AREA, _ERASED_RATIO, _MOST_HIDDEN, _TRIES = (0.02, 0.15), 3.0, 0.5, 10


def recolor(pixels_CHW: Tensor, augment: AugmentConfig | StrongViewConfig, draw: random.Random) -> Tensor:
    """Change brightness, contrast, saturation and hue of a uint8 image, then blur it, each as `augment` says."""
    for name in ("brightness", "contrast", "saturation"):
        if limit := getattr(augment, name):
            change = getattr(kernels, f"adjust_{name}")
            pixels_CHW = change(pixels_CHW, draw.uniform(1 - limit, 1 + limit))
    if augment.hue:
        pixels_CHW = shift_hue(pixels_CHW, draw.uniform(-augment.hue, augment.hue))
    if augment.blur and draw.random() < augment.blur and min(pixels_CHW.shape[1:]) > 1:
        sigma = draw.uniform(*_BLUR)
        # Beyond three standard deviations the kernel is almost zero; a reflected border cannot exceed the image.
        half = min(math.ceil(3 * sigma), min(pixels_CHW.shape[1:]) - 1)
        pixels_CHW = kernels.gaussian_blur(pixels_CHW, [2 * half + 1] * 2, [sigma] * 2)
    return pixels_CHW


def shift_hue(pixels_CHW: Tensor, shift: float) -> Tensor:
    """Shift the hue of a uint8 image by a share of the color circle, within one level of torchvision's `adjust_hue`, in a third of its time.

    With hue h in 0..6, chroma C and least channel m of a pixel, red is m + C * clamp(|h - 3| - 1), green m + C * clamp(2 - |h - 2|) and blue
    m + C * clamp(2 - |h - 4|), clamped to 0..1.
    """
    red, green, blue = pixels_CHW.float()
    most = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = most - least
    inverse = chroma.clamp(min=1).reciprocal_()  # of a grey pixel the numerators are 0
    hue = torch.where(most == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4))
    hue = torch.where(most == red, (green - blue).mul_(inverse), hue).add_(6 * shift).remainder_(6)
    shares = (hue - 3).abs_().sub_(1), (hue - 2).abs_().neg_().add_(2), (hue - 4).abs_().neg_().add_(2)
    # As torchvision's conversion from 0..1 to uint8: times 255.999, then rounded down.
    channels = [share.clamp_(0, 1).mul_(chroma).add_(least).mul_(255.999 / 255).to(torch.uint8) for share in shares]
    return torch.stack(channels)


def erase(pixels_CHW: Tensor, boxes_M4: np.ndarray, draw: random.Random) -> Tensor:
    """Fill a drawn rectangle of a uint8 image with its mean color; after ten rectangles that hide more than half of a box, none."""
    height, width = pixels_CHW.shape[1:]
    for _ in range(_TRIES):
        area, ratio = draw.uniform(*_ERASED_AREA) * height * width, _ERASED_RATIO ** draw.uniform(-1, 1)
        high, wide = min(round(math.sqrt(area / ratio)), height), min(round(math.sqrt(area * ratio)), width)
        top, left = draw.randint(0, height - high), draw.randint(0, width - wide)
        low = np.maximum(boxes_M4[:, :2], [left, top])
        high_end = np.minimum(boxes_M4[:, 2:], [left + wide, top + high])
        hidden = (high_end - low).clip(0).prod(1)
        if (hidden <= _MOST_HIDDEN * (boxes_M4[:, 2:] - boxes_M4[:, :2]).prod(1)).all():
            mean_C = pixels_CHW.sum((1, 2)) // (height * width)
            pixels_CHW = pixels_CHW.clone()
            pixels_CHW[:, top : top + high, left : left + wide] = mean_C[:, None, None]
            break
    return pixels_CHW
