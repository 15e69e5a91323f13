"""Images and objects of unequal size and number as batches: every way into a detector pads here.

Legend: B images of a batch, C channels, H height, W width, G objects (padded to the batch's most), N objects of an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssld.stage2_detect.models.batch import ImageBatch, Targets

PAD_MULTIPLE = 32
"""pixels; of both sides of a batch, so that a pyramid's maps halve without a rest"""


def padded_side(side: int) -> int:
    """The least multiple of `PAD_MULTIPLE` that holds a side."""
    return -(-side // PAD_MULTIPLE) * PAD_MULTIPLE


def pad_images(
    images: Sequence[Tensor],
    scales: Sequence[float],
    *,
    originals: Sequence[tuple[int, int]] | None = None,
    least_side: int = 1,
    canvas: tuple[int, int] | None = None,
) -> ImageBatch:
    """uint8 [3, H, W] images, at least one, in one batch, padded with zeros at the bottom and the right.

    Args:
        scales: size of each image / its original size.
        originals: (height, width) of the originals, where they are known.
        least_side: the batch's sides hold at least so many pixels.
        canvas: (height, width) of the batch, where a file was exported for one size.
    """
    sizes = [tuple(image.shape[1:]) for image in images]
    sides = canvas or [padded_side(max(least_side, *axis)) for axis in zip(*sizes, strict=True)]
    pixels_BCHW = torch.zeros(len(images), 3, *sides, dtype=torch.uint8)
    for place, image in zip(pixels_BCHW, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(
        pixels_BCHW,
        torch.tensor(sizes),
        torch.tensor(scales, dtype=torch.float32),
        None if originals is None else torch.tensor(originals),
    )


def pad_targets(objects: Sequence[tuple[np.ndarray, np.ndarray]], seeds: Sequence[int]) -> Targets:
    """(float32 boxes [N, 4], labels [N]) and the sampling's seed of each image as targets without masks."""
    most = max(len(labels) for _, labels in objects)
    boxes_BG4 = torch.zeros(len(objects), most, 4)
    labels_BG = torch.full((len(objects), most), -1, dtype=torch.int64)
    for row, (boxes, labels) in enumerate(objects):
        boxes_BG4[row, : len(boxes)] = torch.from_numpy(boxes)
        labels_BG[row, : len(labels)] = torch.from_numpy(labels)
    return Targets(boxes_BG4, labels_BG, torch.tensor(seeds, dtype=torch.int64))
