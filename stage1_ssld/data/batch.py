"""Batch types of stage 1: views, labels of labeled images, soft labels from a store.

B images in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssld.stage1_ssld.data.soft_labels import SoftLabels

NO_LABEL = -1


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch.

    Attributes:
        pixels_BCHW: uint8 views.
        labels_B: int64 class numbers, NO_LABEL where unlabeled.
        keys: names of the images.
        unreadable: locations of images that could not be read.
        soft: the teacher's soft labels from a store; None without a store.
    """

    pixels_BCHW: Tensor
    labels_B: Tensor
    keys: list[str]
    unreadable: list[str]
    soft: SoftLabels | None = None

    def pin_memory(self) -> "Batch":
        """Pin the tensors; the data loader calls it, as it does for any batch type with this method."""
        soft = self.soft.pin_memory() if self.soft else None
        return Batch(self.pixels_BCHW.pin_memory(), self.labels_B.pin_memory(), self.keys, self.unreadable, soft)


class View(NamedTuple):
    """One item of a batch.

    Attributes:
        pixels_CHW: uint8 view; None if neither the image nor its replacements could be read.
        label: class number, NO_LABEL where unlabeled.
        key: name of the image.
        unreadable: locations of the images that could not be read.
        soft: record of its soft label in a store.
    """

    pixels_CHW: Tensor | None
    label: int
    key: str
    unreadable: list[str]
    soft: np.void | None = None


def collate(views: Sequence[View]) -> Batch:
    """Stack views into contiguous [B,3,H,W]; unreadable ones are left out."""
    readable = [view for view in views if view.pixels_CHW is not None]
    pixels = [view.pixels_CHW for view in readable if view.pixels_CHW is not None]
    soft = [view.soft for view in readable if view.soft is not None]
    return Batch(
        torch.stack(pixels).contiguous() if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
        torch.tensor([view.label for view in readable], dtype=torch.int64),
        [view.key for view in readable],
        [location for view in views for location in view.unreadable],
        SoftLabels.of_records(soft) if soft else None,
    )
