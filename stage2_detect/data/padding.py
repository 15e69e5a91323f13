"""Padding of images and targets to batches, shared by all loaders.

Legend: B images of a batch, C channels, H height, W width, G objects (padded to the largest number in the batch), N objects of an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssld.stage2_detect.models.batch import ImageBatch, Targets

PAD_MULTIPLE = 32
"""factor of both sides of a batch in pixels, so that the maps of a pyramid halve without a remainder"""


def padded_side(side: int) -> int:
    """Round a side up to a multiple of `PAD_MULTIPLE`."""
    return -(-side // PAD_MULTIPLE) * PAD_MULTIPLE


def pad_images(
    images: Sequence[Tensor],
    scales: Sequence[float],
    *,
    originals: Sequence[tuple[int, int]] | None = None,
    least_side: int = 1,
    canvas: tuple[int, int] | None = None,
) -> ImageBatch:
    """Pad images to one batch with zeros at the bottom and the right.

    Args:
        images: uint8 [3, H, W], at least one.
        scales: size of each image / its original size.
        originals: (height, width) of the original images, if known.
        least_side: smallest side of the batch, in pixels.
        canvas: fixed (height, width) of the batch, for a file exported for one size.
    """
    sizes = [tuple(image.shape[1:]) for image in images]
    sides = canvas or [padded_side(max(least_side, *axis)) for axis in zip(*sizes, strict=True)]
    pixels_BCHW = torch.zeros(len(images), 3, *sides, dtype=torch.uint8)
    for padded, image in zip(pixels_BCHW, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(
        pixels_BCHW,
        torch.tensor(sizes),
        torch.tensor(scales, dtype=torch.float32),
        None if originals is None else torch.tensor(originals),
    )


def pad_targets(objects: Sequence[tuple[np.ndarray, np.ndarray]], seeds: Sequence[int]) -> Targets:
    """Pad the objects of each image to targets without masks.

    Args:
        objects: per image float32 boxes [N, 4] as (x1, y1, x2, y2) in pixels of the batch, and int64 labels [N] in 0..K-1.
        seeds: one integer per image, which decides which anchors and RoIs are sampled for the losses.
    """
    most = max(len(labels) for _, labels in objects)
    boxes_BG4 = torch.zeros(len(objects), most, 4)
    labels_BG = torch.full((len(objects), most), -1, dtype=torch.int64)
    for row, (boxes, labels) in enumerate(objects):
        boxes_BG4[row, : len(boxes)] = torch.from_numpy(boxes)
        labels_BG[row, : len(labels)] = torch.from_numpy(labels)
    return Targets(boxes_BG4, labels_BG, torch.tensor(seeds, dtype=torch.int64))
