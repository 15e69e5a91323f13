"""Features of RoIs from a pyramid, each RoI on the level of its size (arXiv 1612.03144 equation 1).

By default aligned, with as many samples a bin as the bin has pixels, as PaddleDetection's releases 2.0-2.7. Strides are
given; torchvision's MultiScaleRoIAlign derives them from un-padded sizes, wrongly for many, and always pools without
alignment.

Shapes: B images, R RoIs of an image, N = B * R, L levels, C channels, S side of the output.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssld.stage2_detect.models import boxes, kernels
from ssld.stage2_detect.models.kernels.roi_align import pool_by_level, roi_align

_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16  # a RoI of 224 px belongs to the level of stride 16
_NOWHERE = -1e6  # so far outside that a RoI there reads no pixel and pools zeros


def roi_levels(rois_BR4: Tensor, strides: Sequence[int]) -> Tensor:
    """Index [B, R] of the map that each RoI is pooled from; strides double from one to the next."""
    first = (_CANONICAL_STRIDE // strides[0]).bit_length() - 1
    side_BR = boxes.area(rois_BR4).sqrt()
    return torch.floor(first + torch.log2(side_BR / _CANONICAL_SIDE + 1e-8)).clamp(0, len(strides) - 1).long()


def pool_rois(
    features: Sequence[Tensor],
    rois_BR4: Tensor,
    valid_BR: Tensor,
    *,
    strides: Sequence[int],
    size: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """float32 features [N, C, size, size] of the RoIs, in their order; zeros for those that are not valid.

    Args:
        features: one map a stride; further ones are ignored.
        sampling_ratio, aligned: see `roi_align`.
    """
    B, R = valid_BR.shape
    image_BR = torch.arange(B, device=rois_BR4.device, dtype=rois_BR4.dtype)[:, None].expand(B, R)
    rois_N5 = torch.cat((image_BR[..., None], rois_BR4), dim=-1).flatten(0, 1)
    level_N = torch.where(valid_BR, roi_levels(rois_BR4, strides), len(strides)).flatten()

    def pool(level: int, rois: Tensor) -> Tensor:
        feature, scale = features[level].float(), 1 / strides[level]
        return roi_align(feature, rois, size, scale, sampling_ratio=sampling_ratio, aligned=aligned)

    by_level = pool_by_level if kernels.on_host(rois_N5) else _pool_on_all_levels
    return by_level(pool, rois_N5, level_N, len(strides))


def _pool_on_all_levels(pool: Callable[[int, Tensor], Tensor], rois_N5: Tensor, level_N: Tensor, levels: int) -> Tensor:
    """Every RoI on all levels, but outside of those that are not its own: no shape depends on a value, so the host
    never waits for a GPU.
    """
    pooled = []
    for level in range(levels):
        own_N1 = (level_N == level)[:, None]
        pooled.append(pool(level, torch.cat((rois_N5[:, :1], torch.where(own_N1, rois_N5[:, 1:], _NOWHERE)), dim=1)))
    return functools.reduce(torch.add, pooled)
