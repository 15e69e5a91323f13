"""Views of an image: what student and teacher both see. uint8 [3,H,W] in, uint8 [3,S,S] out, so that little travels to the device."""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F


def train_view(
    image_CHW: Tensor, *, size: int, area: tuple[float, float], ratio: tuple[float, float], flip: float
) -> Tensor:
    """RandomResizedCrop and horizontal flip, drawn from torch's global generator (see `shared.images.seeded_view`).

    Args:
        size: side of the view in pixels.
        area: smallest and largest part of the image that the crop covers.
        ratio: narrowest and widest crop, width / height.
        flip: probability of a flip.
    """
    top, left, height, width = RandomResizedCrop.get_params(image_CHW, list(area), list(ratio))
    view = F.resized_crop(image_CHW, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=True)
    return F.horizontal_flip(view) if torch.rand(()) < flip else view


def val_view(image_CHW: Tensor, *, size: int, crop: float) -> Tensor:
    """The short side resized to size / crop, then the central square of `size` pixels."""
    height, width = image_CHW.shape[-2:]
    short = max(size, round(size / crop))
    scale = short / min(height, width)
    resized = F.resize(
        image_CHW,
        [max(short, round(height * scale)), max(short, round(width * scale))],
        InterpolationMode.BILINEAR,
        antialias=True,
    )
    return F.center_crop(resized, [size, size])
