"""What a stage-1 loader hands to the loop: views, labels where there are any, and stored soft labels where they come from a store.

B images of a batch, m classes kept in a store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -1


class StoredAnswer(NamedTuple):
    """A teacher's stored answer to one view.

    classes_m: class numbers, the likeliest first; log_probs_m float32: their log-probabilities; log_rest: that of all other classes together,
    -inf when there are none (m = K).
    """

    classes_m: np.ndarray
    log_probs_m: np.ndarray
    log_rest: float


@dataclass(frozen=True)
class SoftLabels:
    """Stored answers of a batch: classes_Bm int64, log_probs_Bm float32, log_rest_B float32 (see StoredAnswer)."""

    classes_Bm: Tensor
    log_probs_Bm: Tensor
    log_rest_B: Tensor

    def to(self, device: torch.device) -> "SoftLabels":
        """Copy without waiting where the loader pinned the memory."""
        return SoftLabels(
            *(part.to(device, non_blocking=True) for part in (self.classes_Bm, self.log_probs_Bm, self.log_rest_B))
        )

    def pin_memory(self) -> "SoftLabels":
        """Called by the loader."""
        return SoftLabels(self.classes_Bm.pin_memory(), self.log_probs_Bm.pin_memory(), self.log_rest_B.pin_memory())


@dataclass(frozen=True)
class Batch:
    """pixels_BCHW uint8 views, labels_B int64 (NO_LABEL where unlabelled), keys of the images, locations of images that could not be read, and,
    from a store, the teacher's answers."""

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
    """One item of a batch: pixels_CHW is None when the image, and those that would replace it, cannot be read; `unreadable` names them."""

    pixels_CHW: Tensor | None
    label: int
    key: str
    unreadable: list[str]
    answer: StoredAnswer | None = None


def collate(views: Sequence[View]) -> Batch:
    """Stack views, planar; those that could not be read are left out."""
    readable = [view for view in views if view.pixels_CHW is not None]
    pixels = [view.pixels_CHW for view in readable if view.pixels_CHW is not None]
    answers = [view.answer for view in readable if view.answer is not None]
    soft = None
    if answers:
        soft = SoftLabels(
            torch.from_numpy(np.stack([answer.classes_m for answer in answers]).astype(np.int64)),
            torch.from_numpy(np.stack([answer.log_probs_m for answer in answers]).astype(np.float32)),
            torch.tensor([answer.log_rest for answer in answers], dtype=torch.float32),
        )
    return Batch(
        torch.stack(pixels).contiguous() if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
        torch.tensor([view.label for view in readable], dtype=torch.int64),
        [view.key for view in readable],
        [location for view in views for location in view.unreadable],
        soft,
    )
