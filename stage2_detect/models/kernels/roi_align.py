"""RoIAlign (arXiv 1703.06870, section 3) on the CPU as weighted sums of whole pixels, and each RoI on its own level alone.

torchvision's kernel reads four values for every sample and every channel, on one thread. Here the samples of a bin are
first merged into one weight a pixel - a bin's samples form a grid, so its weights are the product of a column and a row
of weights - and a bin is then a weighted sum of rows of the channels-last map, which `embedding_bag` does on all
threads with vector instructions. Its gradient is the transposed sum, every pixel collecting from its bins, so no two
threads write to one place and the result does not depend on their number. Values differ from torchvision's kernel by
the order of summation only, about 1e-6 of the largest. On other devices it is torchvision's.

Shapes: B images, C channels, H rows, W columns, N RoIs, S side of the output, M = N * S * S bins, P = B * H * W pixels,
E pairs of a bin and a pixel with a weight, K pixels of a bin along one axis.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align as torchvision_roi_align

from ssld.stage2_detect.models import kernels

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]
_CHUNK = 1024  # RoIs whose pairs are listed at once; bounds temporaries, changes no value


def roi_align(
    feature_BCHW: Tensor, rois_N5: Tensor, size: int, scale: float, *, sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """Pool features [N, C, size, size] of the RoIs (image, x1, y1, x2, y2), as `torchvision.ops.roi_align`.

    Differentiable in the feature. Fastest from a float32 map in channels-last memory, and returns that on the CPU.

    Args:
        scale: pixels of the map for one of the RoIs' coordinates, 1 / stride.
        sampling_ratio: samples along a side of a bin; 0 takes as many as the bin has pixels, rounded up.
        aligned: moves RoIs by half a pixel of the map, so that pixels are points at their centers; without it RoIs are
            at least one pixel wide too.
    """
    if not kernels.on_host(feature_BCHW):
        return torchvision_roi_align(feature_BCHW, rois_N5, size, scale, sampling_ratio, aligned)
    _, C, H, W = feature_BCHW.shape
    table_PC = feature_BCHW.permute(0, 2, 3, 1).reshape(-1, C)
    rois = rois_N5.detach().numpy()
    parts = [
        _pairs(rois[i : i + _CHUNK], H, W, size, scale, sampling_ratio, aligned)
        for i in range(0, max(len(rois), 1), _CHUNK)
    ]
    pixel_E, weight_E, count_M = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    sums_MC: Tensor = _WeightedSums.apply(table_PC, pixel_E, weight_E.to(table_PC.dtype), count_M)
    return sums_MC.view(-1, size, size, C).permute(0, 3, 1, 2)


def pool_by_level(pool: Callable[[int, Tensor], Tensor], rois_N5: Tensor, level_N: Tensor, levels: int) -> Tensor:
    """Pool each RoI by `pool(level, RoIs of the level)` to [N, C, S, S]; zeros for RoIs whose level is `levels`."""
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


class _WeightedSums(torch.autograd.Function):
    """Row m of the result is the weighted sum of the next `count_M[m]` listed rows of the table."""

    @staticmethod
    def forward(ctx: Any, table_PC: Tensor, pixel_E: Tensor, weight_E: Tensor, count_M: Tensor) -> Tensor:
        ctx.save_for_backward(pixel_E, weight_E, count_M)
        ctx.pixels = len(table_PC)
        return _sums(table_PC, pixel_E, weight_E, count_M)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope_MC: Tensor) -> tuple[Tensor, None, None, None]:
        pixel_E, weight_E, count_M = ctx.saved_tensors
        # Sorted by pixel and place at once: one key a pair, for which NumPy's sort is fifty times faster than torch's.
        key_E = (pixel_E.numpy().astype(np.int64) << 32) | np.arange(len(pixel_E))
        key_E.sort()
        order_E = key_E & 0xFFFFFFFF
        bin_E = np.repeat(np.arange(len(count_M), dtype=np.int32), count_M.numpy())[order_E]
        weight_E = weight_E.numpy()[order_E]
        count_P = np.bincount(pixel_E.numpy(), minlength=ctx.pixels)
        sums_PC = _sums(slope_MC.contiguous(), *map(torch.from_numpy, (bin_E, weight_E, count_P)))
        return sums_PC, None, None, None


def _sums(table: Tensor, index_E: Tensor, weight_E: Tensor, counts: Tensor) -> Tensor:
    ends = F.pad(counts.cumsum(0), (1, 0)).to(index_E.dtype)
    return F.embedding_bag(index_E, table, ends, mode="sum", per_sample_weights=weight_E, include_last_offset=True)


# Below is NumPy, on one thread: hundreds of small steps, for each of which torch's threads would wait for one another.


def _pairs(
    rois_N5: _Floats, H: int, W: int, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> tuple[NDArray[np.int32], _Floats, _Ints]:
    """Compute pixels and weights of all pairs, bin by bin, and the number of pairs of each bin."""
    start_N4 = rois_N5[:, 1:] * np.float32(scale) - np.float32(0.5 if aligned else 0.0)
    side_N2 = start_N4[:, 2:] - start_N4[:, :2]
    if not aligned:
        side_N2 = side_N2.clip(min=1)
    x_NS, columns_NS, weight_x_NSK = _axis(start_N4[:, 0], side_N2[:, 0], W, size, sampling_ratio)
    y_NS, rows_NS, weight_y_NSK = _axis(start_N4[:, 1], side_N2[:, 1], H, size, sampling_ratio)
    # The rows of all bins, bin by bin and top to bottom: T of them; then the pixels of every row.
    rows_M = np.repeat(rows_NS[:, :, None], size, axis=2).ravel()
    columns_M = np.repeat(columns_NS[:, None, :], size, axis=1).ravel()
    bin_T = np.repeat(np.arange(len(rows_M)), rows_M)
    row_T = np.arange(len(bin_T)) - (rows_M.cumsum() - rows_M)[bin_T]
    line_T = bin_T // size  # its row of bins: place in [N, S]
    column_T = line_T // size * size + bin_T % size  # its column of bins: place in [N, S]
    width_T = columns_M[bin_T]
    before_T = width_T.cumsum() - width_T
    top_NS = rois_N5[:, :1].astype(np.int64) * H + y_NS
    first_T = (top_NS.ravel()[line_T] + row_T) * W + x_NS.ravel()[column_T]
    weight_T = weight_y_NSK.reshape(-1)[line_T * weight_y_NSK.shape[-1] + row_T]
    place_E = np.arange(width_T.sum())
    pixel_E = np.repeat((first_T - before_T).astype(np.int32), width_T) + place_E.astype(np.int32)
    weight_E = weight_x_NSK.reshape(-1)[np.repeat(column_T * weight_x_NSK.shape[-1] - before_T, width_T) + place_E]
    return pixel_E, weight_E * np.repeat(weight_T, width_T), rows_M * columns_M


def _axis(
    start_N: _Floats, side_N: _Floats, limit: int, size: int, sampling_ratio: int
) -> tuple[_Ints, _Ints, _Floats]:
    """Compute, along one axis, the first pixel [N, S] of each bin, its number of pixels, and their weights [N, S, K]."""
    bin_N11 = (side_N / np.float32(size))[:, None, None]
    samples_N11 = np.full_like(bin_N11, sampling_ratio) if sampling_ratio else np.ceil(bin_N11).clip(min=0)
    divisor_N11 = samples_N11.clip(min=1)
    sample_G = np.arange(max(samples_N11.max(initial=0), 1), dtype=np.float32)
    bin_S1 = np.arange(size, dtype=np.float32)[:, None]
    at_NSG = start_N[:, None, None] + bin_S1 * bin_N11 + (sample_G + np.float32(0.5)) * bin_N11 / divisor_N11
    # Samples up to a pixel outside count as on the border; farther ones as zero.
    used_NSG = (sample_G < samples_N11) & (at_NSG >= -1) & (at_NSG <= limit)
    at_NSG = at_NSG.clip(0, limit - 1)
    low_NSG = np.floor(at_NSG)
    part_NSG = at_NSG - low_NSG
    first_NS = np.where(used_NSG, low_NSG, limit).min(axis=2)
    last_NS = np.where(used_NSG, low_NSG + (part_NSG > 0), -1).max(axis=2)
    count_NS = (last_NS - first_NS + 1).clip(min=0).astype(np.int64)
    K = max(count_NS.max(initial=0), 1)
    weight_NSK = np.zeros((*count_NS.shape, K + 1), dtype=np.float32)  # and one for an upper neighbor without weight
    n_N1, s_S = np.arange(len(start_N))[:, None], np.arange(size)
    offset_NSG = (low_NSG - first_NS[..., None]).clip(0, K - 1).astype(np.int64)
    share_NSG = used_NSG / divisor_N11
    for g in range(len(sample_G)):
        weight_NSK[n_N1, s_S, offset_NSG[..., g]] += share_NSG[..., g] * (1 - part_NSG[..., g])
        weight_NSK[n_N1, s_S, offset_NSG[..., g] + 1] += share_NSG[..., g] * part_NSG[..., g]
    return first_NS.astype(np.int64), count_NS, weight_NSK
