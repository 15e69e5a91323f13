"""Soft labels: the teacher's probabilities for one view of an image, as a record of a store and as tensors of a batch.

A record (`record_layout`) holds the m most likely classes with their log-probabilities, and the log-probability of all other classes together, in one
bucket: 44 bytes at m = 10 in fp16. Log-probabilities are stored because rounding probabilities to fp16 changes the loss by up to 24 %. The bucket for
the rest keeps losses finite, and zero where student and teacher agree. FKD (arXiv 2112.01528) and TinyViT (arXiv 2207.10666) also store truncated
soft labels, with the tail spread evenly.

B images, K classes, m stored classes, M compared logits: K of a live teacher, or m + 1 buckets of a store (m if m = K).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssld.shared.errors import UserError

_SMALLEST = -6e4
"""Smallest log-probability, within the range of fp16."""


class StoredSoftLabels(Protocol):
    """Store of soft labels by image and view.

    Attributes:
        views: number of views per image.
        seed: seed of the views.
    """

    views: int
    seed: int

    def record(self, source: int, row: int, view: int) -> np.void:
        """Record of one view. Raises UnreadableImage for an image that has none."""
        ...


# ---- records of a store


def record_layout(top: int, classes: int, precision: str) -> np.dtype[Any]:
    """Layout of a record: rest float32; classes [m], most likely first; log_probs [m] in `precision`. `top` is m, `classes` K."""
    number = np.uint16 if classes <= 1 << 16 else np.uint32
    value = np.float16 if precision == "fp16" else np.float32
    return np.dtype([("rest", np.float32), ("classes", number, (top,)), ("log_probs", value, (top,))])


def encode(logits_BK: Tensor, top: int, layout: np.dtype[Any]) -> np.ndarray:
    """Encode a teacher's logits as records [B]; the rest is -inf if all classes are stored.

    Raises UserError for logits that are not finite.
    """
    log_probs_BK = F.log_softmax(logits_BK.float(), dim=-1)
    finite_B1 = torch.isfinite(log_probs_BK).all(-1, keepdim=True)
    log_probs_BK = log_probs_BK.clamp(min=_SMALLEST)
    best = log_probs_BK.topk(top, dim=-1)
    rest_B1 = log_probs_BK.scatter(-1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
    # One copy to the host, which waits for the device once: all columns as the bits of int32.
    columns = [finite_B1.int(), rest_B1.view(torch.int32), best.indices.int(), best.values.view(torch.int32)]
    finite_B1, rest_B1, class_Bm, log_probs_Bm = torch.cat(columns, dim=1).cpu().split([1, 1, top, top], dim=1)
    if not finite_B1.all():
        raise UserError("teacher: its logits are not finite; set teacher.precision: fp32, or check its weights")
    records = np.empty(len(logits_BK), layout)
    records["classes"] = class_Bm.numpy()
    records["log_probs"] = log_probs_Bm.contiguous().view(torch.float32).numpy()
    records["rest"] = rest_B1.contiguous().view(torch.float32)[:, 0].numpy()
    return records


def missing_record(layout: np.dtype[Any]) -> np.ndarray:
    """Placeholder record of an unreadable image: its rest is NaN."""
    missing = np.zeros((), layout)
    missing["rest"] = np.nan
    return missing


# ---- tensors of a batch


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels of a batch.

    Attributes:
        logits_BM: the teacher's logits over all classes, or log-probabilities over the buckets of a store.
        classes_Bm: int64, classes of the first m buckets, most likely first; None if the M are all classes in order.
    """

    logits_BM: Tensor
    classes_Bm: Tensor | None = None

    @classmethod
    def of_records(cls, records: Sequence[np.void]) -> "SoftLabels":
        """Stack records of one store."""
        records_B = np.stack(records)
        log_probs_BM = records_B["log_probs"].astype(np.float32)
        if not np.isneginf(records_B["rest"]).all():  # without all classes there is a rest
            log_probs_BM = np.concatenate([log_probs_BM, records_B["rest"][:, None]], axis=1)
        return cls(torch.from_numpy(log_probs_BM), torch.from_numpy(records_B["classes"].astype(np.int64)))

    @property
    def first_B(self) -> Tensor:
        """Most likely class of each image: [B]."""
        return self.logits_BM.argmax(-1) if self.classes_Bm is None else self.classes_Bm[:, 0]

    def comparable(self, logits_BK: Tensor) -> Tensor:
        """Student logits to compare with `logits_BM`: unchanged, or as log-probabilities [B,M] float32 over the same buckets."""
        if self.classes_Bm is None:
            return logits_BK
        log_probs_BK = F.log_softmax(logits_BK.float(), dim=-1)
        kept_Bm = log_probs_BK.gather(-1, self.classes_Bm)
        if self.classes_Bm.shape[-1] == log_probs_BK.shape[-1]:
            return kept_Bm
        others_BK = log_probs_BK.scatter(-1, self.classes_Bm, float("-inf"))
        return torch.cat([kept_Bm, others_BK.logsumexp(-1, keepdim=True)], dim=-1)

    def to(self, device: torch.device) -> "SoftLabels":
        """Copy to the device, without waiting if the memory is pinned."""
        classes = None if self.classes_Bm is None else self.classes_Bm.to(device, non_blocking=True)
        return SoftLabels(self.logits_BM.to(device, non_blocking=True), classes)

    def pin_memory(self) -> "SoftLabels":
        """Pin the tensors; the data loader calls it."""
        classes = None if self.classes_Bm is None else self.classes_Bm.pin_memory()
        return SoftLabels(self.logits_BM.pin_memory(), classes)
