"""Items and batches of the stage-1 loaders: views, labels where there are any, soft labels where they come from a store.

B images of a batch.
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
    """pixels_BCHW uint8 views, labels_B int64 (NO_LABEL where unlabeled), keys of the images, locations of images that could not be read, and,
    from a store, the teacher's soft labels."""

    pixels_BCHW: Tensor
    labels_B: Tensor
    keys: list[str]
    unreadable: list[str]
    soft: SoftLabels | None = None

    def pin_memory(self) -> "Batch":
        """Called by the loader, which knows no other way into a class of ours."""
        soft = self.soft.pin_memory() if self.soft else None
        return Batch(self.pixels_BCHW.pin_memory(), self.labels_B.pin_memory(), self.keys, self.unreadable, soft)


class View(NamedTuple):
    """One item of a batch: pixels_CHW is None when the image, and those that would replace it, cannot be read; `unreadable` names them; `soft` is the
    record of its soft label in a store."""

    pixels_CHW: Tensor | None
    label: int
    key: str
    unreadable: list[str]
    soft: np.void | None = None


def collate(views: Sequence[View]) -> Batch:
    """Stack views, planar; those that could not be read are left out."""
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
