"""A soft label: the teacher's probabilities for one view of an image, as a record of a store and as tensors of a batch.

A record (`record_layout`) holds the m likeliest classes with their log-probabilities, and the log-probability of all others together, in one bucket:
44 bytes at m = 10 in fp16. Log-probabilities and not probabilities: in fp16 the latter lose up to 24 % of the loss. One bucket for the rest, so that
the losses stay finite, and zero where student and teacher agree. FKD (arXiv 2112.01528) and TinyViT (arXiv 2207.10666) store truncated soft labels
too, with the tail spread evenly.

B images, K classes, m classes kept, M what is compared: K logits of a live teacher, or m + 1 buckets of a store (m where m = K).
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
"""Log-probability that fp16 still holds."""


class StoredSoftLabels(Protocol):
    """Soft labels by image and view, as training views ask for them.

    Attributes:
        views: number of views per image; seed: that they follow from.
    """

    views: int
    seed: int

    def record(self, source: int, row: int, view: int) -> np.void:
        """The soft label of one view. Raises UnreadableImage for an image that has none."""
        ...


# ---- as stored


def record_layout(top: int, classes: int, precision: str) -> np.dtype[Any]:
    """The layout of a record: rest float32; classes [m], the likeliest first; log_probs [m] in `precision`. `top` is m, `classes` K."""
    number = np.uint16 if classes <= 1 << 16 else np.uint32
    value = np.float16 if precision == "fp16" else np.float32
    return np.dtype([("rest", np.float32), ("classes", number, (top,)), ("log_probs", value, (top,))])


def encode(logits_BK: Tensor, top: int, layout: np.dtype[Any]) -> np.ndarray:
    """Records [B] of a teacher's logits. The rest is -inf where all classes are kept.

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
        raise UserError("teacher: logits that are not finite; set teacher.precision: fp32, or fix its weights")
    records = np.empty(len(logits_BK), layout)
    records["classes"] = class_Bm.numpy()
    records["log_probs"] = log_probs_Bm.contiguous().view(torch.float32).numpy()
    records["rest"] = rest_B1.contiguous().view(torch.float32)[:, 0].numpy()
    return records


def missing_record(layout: np.dtype[Any]) -> np.ndarray:
    """The placeholder for an unreadable image: its rest is NaN."""
    missing = np.zeros((), layout)
    missing["rest"] = np.nan
    return missing


# ---- as tensors


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels of a batch.

    Attributes:
        logits_BM: of the teacher: logits over all classes, or log-probabilities over the buckets of a store.
        classes_Bm: int64, the classes of the first m buckets, the likeliest first; None where the M are all classes in their order.
    """

    logits_BM: Tensor
    classes_Bm: Tensor | None = None

    @classmethod
    def of_records(cls, records: Sequence[np.void]) -> "SoftLabels":
        """Of the records of one store."""
        records_B = np.stack(records)
        log_probs_BM = records_B["log_probs"].astype(np.float32)
        if not np.isneginf(records_B["rest"]).all():  # all classes are kept: no rest
            log_probs_BM = np.concatenate([log_probs_BM, records_B["rest"][:, None]], axis=1)
        return cls(torch.from_numpy(log_probs_BM), torch.from_numpy(records_B["classes"].astype(np.int64)))

    @property
    def first_B(self) -> Tensor:
        """The likeliest class of each image."""
        return self.logits_BM.argmax(-1) if self.classes_Bm is None else self.classes_Bm[:, 0]

    def comparable(self, logits_BK: Tensor) -> Tensor:
        """A student's logits over the same M: as they are, or log-probabilities [B,M] float32 over the buckets."""
        if self.classes_Bm is None:
            return logits_BK
        log_probs_BK = F.log_softmax(logits_BK.float(), dim=-1)
        kept_Bm = log_probs_BK.gather(-1, self.classes_Bm)
        if self.classes_Bm.shape[-1] == log_probs_BK.shape[-1]:
            return kept_Bm
        others_BK = log_probs_BK.scatter(-1, self.classes_Bm, float("-inf"))
        return torch.cat([kept_Bm, others_BK.logsumexp(-1, keepdim=True)], dim=-1)

    def to(self, device: torch.device) -> "SoftLabels":
        """Copy without waiting where the loader pinned the memory."""
        classes = None if self.classes_Bm is None else self.classes_Bm.to(device, non_blocking=True)
        return SoftLabels(self.logits_BM.to(device, non_blocking=True), classes)

    def pin_memory(self) -> "SoftLabels":
        """Called by the loader."""
        classes = None if self.classes_Bm is None else self.classes_Bm.pin_memory()
        return SoftLabels(self.logits_BM.pin_memory(), classes)
