"""Anchors: boxes of fixed shapes around every cell of every pyramid level (arXiv 1506.01497, 1612.03144).

As PaddleDetection@666f597f has them: cell (i, j) is centred at (j * stride, i * stride), i.e. offset 0, and sides are
not rounded. torchvision differs in both: it rounds sides and derives strides from padded sizes. Anchors are float32
whatever the features are.

Shapes: A anchors in the order level, row, column, ratio.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Grids = Sequence[tuple[int, int]]
"""(rows, columns) of each level's feature map."""


def grids_of(features: Sequence[Tensor]) -> Grids:
    """(rows, columns) of each map."""
    return [(feature.shape[-2], feature.shape[-1]) for feature in features]


def grid_anchors(
    grids: Grids, device: torch.device, *, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float]
) -> Tensor:
    """Anchors [A, 4] of levels with these grids: `sizes[l]` pixels is the side of level l's square, `ratios` are height
    / width.

    The result is shared between calls: do not write into it.
    """
    if torch.compiler.is_exporting():  # grids can be symbols then, and nothing may be kept
        return _computed(grids, device, strides, sizes, ratios)
    return _cached(tuple(grids), device, tuple(strides), tuple(sizes), tuple(ratios))


@functools.lru_cache(maxsize=16)  # multi-scale training meets hundreds of grids of up to 4 MB
def _cached(
    grids: tuple[tuple[int, int], ...],
    device: torch.device,
    strides: tuple[int, ...],
    sizes: tuple[float, ...],
    ratios: tuple[float, ...],
) -> Tensor:
    with torch.inference_mode(False):  # the next caller may be a training step
        return _computed(grids, device, strides, sizes, ratios)


def _computed(
    grids: Grids, device: torch.device, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float]
) -> Tensor:
    levels = []
    for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True):
        root_R = torch.tensor(ratios, dtype=torch.float64).sqrt()
        half_R2 = torch.stack((size / root_R, size * root_R), dim=-1) / 2
        y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
        centre_YX12 = torch.stack((x, y), dim=-1).unsqueeze(-2)
        levels.append(torch.cat((centre_YX12 - half_R2, centre_YX12 + half_R2), dim=-1).reshape(-1, 4))
    return torch.cat(levels).to(torch.float32).to(device)
