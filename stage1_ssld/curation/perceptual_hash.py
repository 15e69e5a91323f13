"""Perceptual hash of 64 bits: the hashes of copies that were resized, recompressed or slightly recolored differ in few bits.

Each bit records whether one of the low 8 x 8 frequencies of the cosine transform of the grey 32 x 32 image is above their median (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions", section 3.2.1, in the form of the `imagehash` package). It does not detect
rotations and strong crops; mirror images are detected by the hash of the mirror image.
"""

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_SIDE, _LOW = 32, 8
_GREY = (0.299, 0.587, 0.114)


def _cosines() -> Tensor:
    """First rows of the type-II cosine transform: [8,32] float64."""
    frequency, place = torch.arange(_LOW, dtype=torch.float64), torch.arange(_SIDE, dtype=torch.float64)
    return torch.cos(math.pi / _SIDE * (place[None, :] + 0.5) * frequency[:, None])


_COSINES = _cosines()
_BIT = [1 << number for number in range(_LOW * _LOW)]


def perceptual_hash(image_CHW: Tensor) -> tuple[int, int]:
    """Hash a uint8 image and its mirror image. An image of one color has hash 1, a black one 0."""
    small = F.resize(image_CHW, [_SIDE, _SIDE], antialias=True).double()
    grey = sum(weight * channel for weight, channel in zip(_GREY, small, strict=True))
    low = (_COSINES @ grey @ _COSINES.T).round(decimals=6)  # or rounding errors would decide bits of a uniform image
    mirrored = low.clone()
    mirrored[:, 1::2] *= -1
    return _bits(low), _bits(mirrored)


def _bits(low: Tensor) -> int:
    values = low.flatten()
    above = (values > values.sort().values[31:33].mean()).tolist()
    return sum(bit for bit, one in zip(_BIT, above, strict=True) if one)
