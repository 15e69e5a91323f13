"""RoIs pooled on their own level alone and put in their places, where their counts are on the host.

Shapes: N RoIs, C channels, S side of the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pool_by_level(pool: Callable[[int, Tensor], Tensor], rois_N5: Tensor, level_N: Tensor, levels: int) -> Tensor:
    """Features [N, C, S, S], `pool(level, some of the RoIs)` of each; zeros for RoIs whose level is `levels`."""
    order_N = level_N.argsort(stable=True)
    *places, rest = order_N.split(level_N.bincount(minlength=levels + 1).tolist())
    pooled = [pool(level, rois_N5[place]) for level, place in enumerate(places)]
    placed: Tensor = _Placed.apply(rest, places, *pooled)
    return placed


class _Placed(torch.autograd.Function):
    """Rows of several tensors put where they belong, zeros elsewhere: one copy instead of three, and one back."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, places: list[Tensor], *rows: Tensor) -> Tensor:
        ctx.places = places
        count = len(rest) + sum(map(len, places))
        placed = rows[0].new_empty((count, *rows[0].shape[1:]))
        for place, some in zip(places, rows, strict=True):
            placed.index_copy_(0, place, some)
        return placed.index_fill_(0, rest, 0.0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(slopes[0].index_select(0, place) for place in ctx.places)
