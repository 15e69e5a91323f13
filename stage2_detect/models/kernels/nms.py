"""Greedy NMS of many rows of boxes at once, each row by itself.

On the CPU the rows run side by side on threads, each by torchvision's kernel. On a GPU that kernel makes the host wait once
per row, and one call over all rows moved apart compares all pairs of rows too: 0.6 GB and a serial scan of 70,000 boxes for
8 images. So there all rows advance in rounds. In a round a box is dropped if a better one that is still kept overlaps it. A
box is settled after as many rounds as the longest chain of better boxes, each overlapping the next, that ends in it; when a
round changes nothing, what is kept is what greedy NMS keeps. Chains of an RPN are 6 to 15 long, so the host waits once.
Exact ties of IoU and a threshold that float32 rounds may differ from the CPU.

Shapes: B rows, N boxes per row.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from ssld.stage2_detect.models import boxes, kernels

_ROUNDS = 16  # between two looks at whether a round still changes anything


def nms_masks(
    boxes_BN4: Sequence[Tensor], scores_BN: Sequence[Tensor], valid_BN: Sequence[Tensor], iou: float
) -> list[Tensor]:
    """Mark the boxes that greedy NMS keeps, in several batches of different N.

    Args:
        boxes_BN4: float32, of each batch.
        scores_BN: finite; the higher of two overlapping boxes is kept, of equal ones the first.
        valid_BN: bool; boxes that are not valid are neither kept nor drop others.
        iou: overlap above which the worse box is dropped.

    Returns:
        bool [B, N] of each batch.
    """
    # Boxes that are not valid rank last: they meet only boxes that are already decided.
    ranked_BN = [scores.masked_fill(~valid, -torch.inf) for scores, valid in zip(scores_BN, valid_BN, strict=True)]
    if kernels.enabled() and not kernels.on_host(boxes_BN4[0]):
        return _in_rounds(boxes_BN4, ranked_BN, valid_BN, iou)
    rows = [pair for pairs in zip(boxes_BN4, ranked_BN, strict=True) for pair in zip(*pairs, strict=True)]
    if kernels.enabled() and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # the kernel itself has one, and no lock
            kept = list(threads.map(lambda row: nms(*row, iou), rows))
    else:
        kept = [nms(*row, iou) for row in rows]
    masks = [torch.zeros_like(valid) for valid in valid_BN]
    for mask_N, index in zip((mask_N for mask_BN in masks for mask_N in mask_BN), kept, strict=True):
        mask_N[index] = True
    return [mask & valid for mask, valid in zip(masks, valid_BN, strict=True)]


def _in_rounds(
    boxes_BN4: Sequence[Tensor], ranked_BN: Sequence[Tensor], valid_BN: Sequence[Tensor], iou: float
) -> list[Tensor]:
    """Run NMS of all rows in rounds, see the module."""
    orders_BN = [ranked.argsort(dim=1, descending=True, stable=True) for ranked in ranked_BN]
    sorted_BN4 = [boxes.take(batch, order) for batch, order in zip(boxes_BN4, orders_BN, strict=True)]
    threshold = _rounded_down(iou)
    # [B, better, worse]: only a better box drops a worse one.
    drops_BNN = [(boxes.pairwise_iou(batch, batch) > threshold).triu_(1) for batch in sorted_BN4]
    allowed_BN = [valid.gather(1, order) for valid, order in zip(valid_BN, orders_BN, strict=True)]
    kept_BN, settled = allowed_BN, False
    while not settled:
        for _ in range(_ROUNDS):
            before_BN = kept_BN
            kept_BN = [
                allowed & ~(drops & kept[:, :, None]).any(dim=1)
                for drops, allowed, kept in zip(drops_BNN, allowed_BN, before_BN, strict=True)
            ]
        unchanged = [(before == kept).all() for before, kept in zip(before_BN, kept_BN, strict=True)]
        settled = bool(torch.stack(unchanged).all())  # the one wait: how long the chains are follows from values
    return [torch.zeros_like(kept).scatter(1, order, kept) for kept, order in zip(kept_BN, orders_BN, strict=True)]


def _rounded_down(iou: float) -> float:
    """Return the largest float32 number that is at most `iou`.

    The kernel of the CPU compares in float64, but torch rounds a number to the type of the tensor that it is compared with: an IoU
    of exactly 3/5 is above 0.6 there, and would not be here.
    """
    nearest = np.float32(iou)
    return float(nearest if float(nearest) <= iou else np.nextafter(nearest, np.float32(-np.inf)))
