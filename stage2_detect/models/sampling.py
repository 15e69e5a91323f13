"""Which boxes take part in a loss: at most `count` an image, at most a fraction of them positive (arXiv 1506.01497,
section 3.1.3).

A box's priority is a hash of (seed of the image at this step, stream, index of the box), so a draw depends neither on
the device, nor on a generator's state, nor on the other images of the batch. The hash is the finaliser of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014) in wrapping int64 arithmetic. A shortage of positives goes to the negatives; a
shortage of both leaves places that are not valid.

Another way of choosing (say, spread over IoU bins) is another function that returns a `Sample`.

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
    """Chosen boxes: positives first, then negatives, then places that are not valid."""

    index_BS: Tensor
    """int64 index of the box."""
    valid_BS: Tensor
    positive_BS: Tensor
    """bool; implies valid."""


def hash_priority(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Uniform int64 priorities [B, count] in 0..2**62-1; equal (seed, stream, index) give equal numbers. 0 <= stream."""
    index_A = torch.arange(1, count + 1, device=seeds_B.device)
    state_B1 = _mix(_mix(seeds_B) + stream)[:, None]
    return (_mix(state_B1 + index_A * _GOLDEN) >> 2) & (_ABOVE_ALL - 1)


def index_priority(seeds_B: Tensor, count: int) -> Tensor:
    """Priorities [B, count] that choose the first boxes in index order: for comparisons, not for training."""
    return torch.arange(count, 0, -1, device=seeds_B.device).expand(len(seeds_B), count)


@torch.no_grad()
def sample(labels_BA: Tensor, priority_BA: Tensor, *, count: int, positive_fraction: float) -> Sample:
    """The boxes of highest priority: up to `int(count * positive_fraction)` with label 1, then label 0 up to `count`.

    Args:
        labels_BA: 1 positive, 0 negative, -1 never chosen.
        priority_BA: int64 in 0..2**62-1.
    """
    places = labels_BA.shape[1]
    positive_key_BA = torch.where(labels_BA == 1, priority_BA, -1)
    most = min(int(count * positive_fraction), places)
    key_BP, index_BP = positive_key_BA.topk(most, dim=1)
    # One more top-k does the rest: chosen positives stand above every negative, and what must not be chosen has no key.
    key_BA = torch.where(labels_BA == 0, priority_BA, -1)
    key_BA = key_BA.scatter(1, index_BP, torch.where(key_BP >= 0, key_BP + _ABOVE_ALL, key_BA.gather(1, index_BP)))
    key_BS, index_BS = key_BA.topk(min(count, places), dim=1)
    return Sample(index_BS, valid_BS=key_BS >= 0, positive_BS=key_BS >= _ABOVE_ALL)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
