"""RoIAlign over a pyramid (arXiv 1612.03144 equation 1, 1703.06870), each RoI on the level of its size.

Aligned, with as many samples a bin as the bin has pixels, as PaddleDetection's releases 2.0-2.7. Strides are given;
torchvision's MultiScaleRoIAlign derives them from un-padded sizes, wrongly for many, and always pools without
alignment.

Shapes: B images, R RoIs of an image, N = B * R, L levels, C channels, S side of the output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from stage2_detect.models import boxes

_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16  # a RoI of 224 px belongs to the level of stride 16


def roi_levels(rois_BR4: Tensor, strides: Sequence[int]) -> Tensor:
    """Index [B, R] of the map that each RoI is pooled from; strides double from one to the next."""
    first = (_CANONICAL_STRIDE // strides[0]).bit_length() - 1
    side_BR = boxes.area(rois_BR4).sqrt()
    return torch.floor(first + torch.log2(side_BR / _CANONICAL_SIDE + 1e-8)).clamp(0, len(strides) - 1).long()


def pool_rois(
    features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor, *, strides: Sequence[int], size: int
) -> Tensor:
    """float32 features [N, C, size, size] of the RoIs, in their order; zeros for those that are not valid."""
    B, R = valid_BR.shape
    image_BR = torch.arange(B, device=rois_BR4.device, dtype=rois_BR4.dtype)[:, None].expand(B, R)
    rois_N5 = torch.cat((image_BR[..., None], rois_BR4), dim=-1).flatten(0, 1)
    L = len(strides)
    level_N = torch.where(valid_BR, roi_levels(rois_BR4, strides), L).flatten()
    # Sorted by level, so that one transfer of L + 1 counts to the host serves all levels.
    order_N = level_N.argsort(stable=True)
    *level_rois, rest = rois_N5[order_N].split(level_N.bincount(minlength=L + 1).tolist())
    pooled = [
        roi_align(feature.float(), rois, size, 1 / stride, sampling_ratio=0, aligned=True)
        for feature, rois, stride in zip(features, level_rois, strides, strict=False)
    ]
    pooled.append(pooled[0].new_zeros((len(rest), *pooled[0].shape[1:])))
    return torch.cat(pooled)[order_N.argsort()]
