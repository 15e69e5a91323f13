"""Anchors: boxes of fixed shapes around every cell of every pyramid level (arXiv 1506.01497, 1612.03144).

As in PaddleDetection@666f597f, cell (i, j) is centered at (j * stride, i * stride), i.e. offset 0, and sides are not
rounded. torchvision rounds half sides to whole pixels, truncates scaled sizes, and takes the distance of cells from the padded image's size, which
is no multiple of a coarse level's stride: 61 pixels in place of 64 for P6 of an image of 800. Anchors are float32 whatever the features are:
coordinates are computed in float64 and rounded once.

Shapes: A anchors in the order level, row, column, scale, ratio; C cells along one axis; S shapes per cell; B images, H rows, W columns.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Grids = Sequence[tuple[int, int]]
"""(rows, columns) of each level's feature map."""
AnchorGrid = Literal["exact", "torchvision"]


def grids_of(features: Sequence[Tensor]) -> Grids:
    """Return (rows, columns) of each map."""
    return [(feature.shape[-2], feature.shape[-1]) for feature in features]


def in_order(map_BCHW: Tensor, values: int) -> Tensor:
    """Reshape a head's map [B, S * values, H, W] to [B, H * W * S, values], the order of its level's anchors."""
    B, _, H, W = map_BCHW.shape
    return map_BCHW.view(B, -1, values, H, W).permute(0, 3, 4, 1, 2).reshape(B, -1, values)


def grid_anchors(
    grids: Grids,
    device: torch.device,
    *,
    strides: Sequence[int],
    sizes: Sequence[float],
    ratios: Sequence[float],
    scales: Sequence[float] = (1.0,),
    grid: AnchorGrid = "exact",
) -> Tensor:
    """Make the anchors [A, 4] of levels with these grids, on `device`, without an upload or a wait of the host.

    The result is shared between calls: do not write into it.

    Args:
        strides: pixels per cell of each level.
        sizes: side in pixels of each level's square anchor.
        ratios: height / width.
        scales: factors on `sizes`.
        grid: `torchvision` for its sides and distances; the first level's stride has to divide the padded image's sides.
    """
    if torch.compiler.is_exporting():  # grids can be symbols then, and nothing may be kept
        return _computed(grids, device, strides, sizes, ratios, scales, grid)
    return _cached(tuple(grids), device, tuple(strides), tuple(sizes), tuple(ratios), tuple(scales), grid)


@functools.lru_cache(maxsize=16)  # multi-scale training meets hundreds of grids of up to 4 MB
def _cached(
    grids: tuple[tuple[int, int], ...],
    device: torch.device,
    strides: tuple[int, ...],
    sizes: tuple[float, ...],
    ratios: tuple[float, ...],
    scales: tuple[float, ...],
    grid: AnchorGrid,
) -> Tensor:
    with torch.inference_mode(False):  # the next caller may be a training step
        return _computed(grids, device, strides, sizes, ratios, scales, grid)


def _computed(
    grids: Grids,
    device: torch.device,
    strides: Sequence[int],
    sizes: Sequence[float],
    ratios: Sequence[float],
    scales: Sequence[float],
    grid: AnchorGrid,
) -> Tensor:
    levels = []
    for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True):
        sides = [(size * scale, math.sqrt(ratio)) for scale in scales for ratio in ratios]
        x_step = y_step = stride
        if grid == "torchvision":
            sides = [(math.floor(side), root) for side, root in sides]
            y_step, x_step = (size * strides[0] // cells for size, cells in zip(grids[0], (rows, columns), strict=True))
        x_halves, y_halves = [side / root / 2 for side, root in sides], [side * root / 2 for side, root in sides]
        if grid == "torchvision":
            x_halves, y_halves = [round(half) for half in x_halves], [round(half) for half in y_halves]
        x1_CS, x2_CS = _axis(columns, x_step, x_halves, device)
        y1_CS, y2_CS = _axis(rows, y_step, y_halves, device)
        shape = (rows, columns, len(sides))
        corners = (x1_CS[None], y1_CS[:, None], x2_CS[None], y2_CS[:, None])
        levels.append(torch.stack([corner.expand(shape) for corner in corners], dim=-1).reshape(-1, 4))
    return torch.cat(levels)


def _axis(cells: int, stride: int, halves: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute where anchors with these half sides begin and end along one axis: float32 [C, S] each.

    An anchor's x depends on its column and shape alone, its y on its row and shape, so the arithmetic is on C numbers, and
    the half sides are scalars of the kernels, which need no upload.
    """
    # mps has no float64. What is copied there then are a few kilobytes per axis.
    float64_device = torch.device("cpu") if device.type == "mps" else device
    center_C = torch.arange(cells, dtype=torch.float64, device=float64_device) * stride
    start_CS = torch.stack([center_C - half for half in halves], dim=-1)
    end_CS = torch.stack([center_C + half for half in halves], dim=-1)
    return start_CS.to(torch.float32).to(device), end_CS.to(torch.float32).to(device)
