"""Sampling of the boxes of a loss: at most `count` per image, at most a fraction of them positive (arXiv 1506.01497,
section 3.1.3).

A box's priority is a hash of (seed of the image at this step, stream, index of the box), so a draw depends neither on
the device, nor on a generator's state, nor on the other images of the batch. The hash is the finalizer of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014) in wrapping int64 arithmetic. Where positives are too few, more negatives are sampled;
where both are too few, places of the sample are not valid.

Another priority is another way of sampling: `spread_priority` spreads negatives over bins of IoU.

Shapes: B images, A boxes, S places of the sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_ABOVE_ALL = 2**62


@dataclass(frozen=True)
class Sample:
    """Sampled boxes: positives first, then negatives, then places that are not valid."""

    index_BS: Tensor
    """int64 index of the box."""
    valid_BS: Tensor
    positive_BS: Tensor
    """bool; implies valid."""


def hash_priority(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Compute uniform int64 priorities [B, count] in 0..2**62-1; equal (seed, stream, index) give equal numbers. 0 <= stream."""
    index_A = torch.arange(1, count + 1, device=seeds_B.device)
    state_B1 = _mix(_mix(seeds_B) + stream)[:, None]
    return (_mix(state_B1 + index_A * _GOLDEN) >> 2) & (_ABOVE_ALL - 1)


def index_priority(seeds_B: Tensor, count: int) -> Tensor:
    """Compute priorities [B, count] that choose the first boxes in index order: for comparisons, not for training."""
    return torch.arange(count, 0, -1, device=seeds_B.device).expand(len(seeds_B), count)


@torch.no_grad()
def spread_priority(
    labels_BA: Tensor, ious_BA: Tensor, priority_BA: Tensor, *, count: int, positive_fraction: float, bins: int
) -> Tensor:
    """Compute priorities [B, A] with which `sample` draws an image's negatives evenly from bins of IoU (Libra R-CNN, arXiv
    1904.02701 section 3.1): each bin gives the same number as far as it has so many, and the rest comes from all bins.

    The bins divide 0 to the image's highest IoU, that of positives included, as in PaddleDetection@666f597f. Where the
    objects are among the boxes that is 1, and other bins fill the share of those above the threshold of a positive. A bin's
    share is that of the negatives that `sample` will draw; in PaddleDetection, of those it draws beside the most positives.

    Args:
        labels_BA: as for `sample`.
        ious_BA: of each box with its object; at most 0 for all boxes is an image without objects, with one bin.
        priority_BA: decides within a bin and among the rest; positives keep it.
        count, positive_fraction: as for `sample`.
    """
    negative_BA = labels_BA == 0
    drawn_B = (labels_BA == 1).sum(dim=1).clamp(max=int(count * positive_fraction))
    share_B1 = ((count - drawn_B) // bins)[:, None]
    highest_B1 = torch.where(labels_BA >= 0, ious_BA, 0.0).amax(dim=1, keepdim=True)
    highest_B1 = torch.where(highest_B1 > 0, highest_B1, 1.0)
    bin_BA = (ious_BA / highest_B1 * bins).floor().clamp(0, bins - 1).long()
    bin_BA = torch.where(negative_BA, bin_BA, bins)
    # The rank within the bin: sorted by priority, then stably by bin, less where the bin begins.
    order_BA = priority_BA.argsort(dim=1, descending=True, stable=True)
    order_BA = order_BA.gather(1, bin_BA.gather(1, order_BA).argsort(dim=1, stable=True))
    sizes_BK = torch.zeros_like(bin_BA[:, :1]).expand(-1, bins + 1).scatter_add(1, bin_BA, torch.ones_like(bin_BA))
    place_BA = torch.arange(bin_BA.shape[1], device=bin_BA.device).expand_as(bin_BA)
    place_BA = torch.zeros_like(bin_BA).scatter(1, order_BA, place_BA)
    rank_BA = place_BA - (sizes_BK.cumsum(dim=1) - sizes_BK).gather(1, bin_BA)
    # The upper half of the range is for the shares of the bins, the lower half for all others.
    spread_BA = torch.where(rank_BA < share_B1, _ABOVE_ALL >> 1, 0) + (priority_BA >> 1)
    return torch.where(negative_BA, spread_BA, priority_BA)


@torch.no_grad()
def sample(labels_BA: Tensor, priority_BA: Tensor, *, count: int, positive_fraction: float) -> Sample:
    """Sample the boxes of highest priority: up to `int(count * positive_fraction)` with label 1, then label 0 up to `count`.

    Args:
        labels_BA: 1 positive, 0 negative, -1 never chosen.
        priority_BA: int64 in 0..2**62-1.
    """
    places = labels_BA.shape[1]
    positive_key_BA = torch.where(labels_BA == 1, priority_BA, -1)
    most = min(int(count * positive_fraction), places)
    key_BP, index_BP = positive_key_BA.topk(most, dim=1)
    # One more top-k does the rest: sampled positives rank above every negative, and a box that must not be sampled has key -1.
    key_BA = torch.where(labels_BA == 0, priority_BA, -1)
    key_BA = key_BA.scatter(1, index_BP, torch.where(key_BP >= 0, key_BP + _ABOVE_ALL, key_BA.gather(1, index_BP)))
    key_BS, index_BS = key_BA.topk(min(count, places), dim=1)
    return Sample(index_BS, valid_BS=key_BS >= 0, positive_BS=key_BS >= _ABOVE_ALL)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign, unlike torch's own shift."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
