"""RoI features from a pyramid, each RoI pooled from the level that fits its size (arXiv 1612.03144 equation 1).

By default aligned, with as many samples per bin as the bin has pixels, as PaddleDetection's releases 2.0-2.7. Strides are
given; torchvision's MultiScaleRoIAlign derives them from un-padded sizes, wrongly for many, and always pools without
alignment.

Shapes: B images, R RoIs per image, N = B * R, L levels, C channels, S side of the output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from ssld.stage2_detect.models import boxes, kernels
from ssld.stage2_detect.models.kernels.roi_align import pool_by_level, roi_align

_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16  # a RoI of 224 px belongs to the level of stride 16
_NOWHERE = -1e6  # so far outside that a RoI there reads no pixel and pools zeros
_CHUNK = 512  # RoIs per chunk on a GPU: 25 MB of 256 channels at 7 x 7, beside the result


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
    """Pool features of RoIs: float32 [N, C, size, size] in the RoIs' order, zeros for those that are not valid.

    Args:
        features: one map per stride; further ones are ignored.
        sampling_ratio, aligned: see `roi_align`.
    """
    B, R = valid_BR.shape
    image_BR = torch.arange(B, device=rois_BR4.device, dtype=rois_BR4.dtype)[:, None].expand(B, R)
    rois_N5 = torch.cat((image_BR[..., None], rois_BR4), dim=-1).flatten(0, 1)
    level_N = torch.where(valid_BR, roi_levels(rois_BR4, strides), len(strides)).flatten()
    maps = [feature.float() for feature in features[: len(strides)]]

    def pool(level: int, rois: Tensor) -> Tensor:
        return roi_align(maps[level], rois, size, 1 / strides[level], sampling_ratio=sampling_ratio, aligned=aligned)

    if kernels.on_host(rois_N5):
        return pool_by_level(pool, rois_N5, level_N, len(strides))
    if torch.onnx.is_in_onnx_export():
        scales = [1 / stride for stride in strides]
        placed: Tensor = onnx_pool_rois(maps, rois_N5, level_N, scales, size, sampling_ratio, aligned)
        return placed
    if torch.compiler.is_exporting():  # the number of RoIs is a symbol, so there are no chunks
        return _pool_on_all_levels(pool, rois_N5, level_N, len(strides))
    # torchvision's CUDA kernel copies a channels_last map in each call, here per chunk.
    for level, feature in enumerate(maps):
        maps[level] = feature.contiguous()
    options = (size, tuple(1 / stride for stride in strides), sampling_ratio, aligned)
    pooled: Tensor = _PooledInChunks.apply(pool, rois_N5, level_N, options, *maps)
    return pooled


class PoolsRoIs:
    """A head that pools its features from a pyramid; see `pool_rois` for its attributes."""

    strides: tuple[int, ...]
    pool_size: int
    sampling_ratio: int
    aligned: bool

    def _pool(self, features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor) -> Tensor:
        return pool_rois(
            features,
            rois_BR4,
            valid_BR,
            strides=self.strides,
            size=self.pool_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )


@torch.library.custom_op("ssld::pool_rois", mutates_args=())
def onnx_pool_rois(
    maps: list[Tensor],
    rois_N5: Tensor,
    level_N: Tensor,
    scales: list[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each RoI on its own level alone, as an operator that is not traced into: `deploy/writing.py` writes it in ONNX, whose shapes may depend
    on values. Pooling on all levels costs a pass over the result per level there.
    """

    def pool(level: int, rois: Tensor) -> Tensor:
        return torchvision_roi_align(maps[level], rois, size, scales[level], sampling_ratio, aligned)

    return pool_by_level(pool, rois_N5, level_N, len(maps)).contiguous()


@onnx_pool_rois.register_fake
def _(
    maps: list[Tensor],
    rois_N5: Tensor,
    level_N: Tensor,
    scales: list[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return maps[0].new_empty((rois_N5.shape[0], maps[0].shape[1], size, size))


def _pool_on_all_levels(pool: Callable[[int, Tensor], Tensor], rois_N5: Tensor, level_N: Tensor, levels: int) -> Tensor:
    """Pool every RoI on all levels, but outside of the map on those that are not its own: no shape depends on a value, so the
    host does not wait for a GPU.
    """
    pooled: Tensor | float = 0.0
    for level in range(levels):
        # Not a sum: a runtime may pool NaN from the RoIs outside, which have no area.
        own_N111 = (level_N == level)[:, None, None, None]
        pooled = torch.where(own_N111, pool(level, _on_level(rois_N5, level_N, level)), pooled)
    assert isinstance(pooled, Tensor)
    return pooled


def _on_level(rois_N5: Tensor, level_N: Tensor, level: int) -> Tensor:
    """RoIs of which those of other levels lie outside of the map."""
    own_N1 = (level_N == level)[:, None]
    return torch.cat((rois_N5[:, :1], torch.where(own_N1, rois_N5[:, 1:], _NOWHERE)), dim=1)


class _PooledInChunks(torch.autograd.Function):
    """`_pool_on_all_levels` a chunk of RoIs at a time: the memory of one result, not of one per level.

    Its backward pass has no chunks: each level needs all slopes, and makes one gradient of its map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pool: Callable[[int, Tensor], Tensor],
        rois_N5: Tensor,
        level_N: Tensor,
        options: tuple[int, tuple[float, ...], int, bool],
        *maps: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rois_N5, level_N)
        ctx.options, ctx.shapes = options, [feature.shape for feature in maps]
        size = options[0]
        pooled = maps[0].new_empty((len(rois_N5), maps[0].shape[1], size, size))
        for rows, rois, level in zip(pooled.split(_CHUNK), rois_N5.split(_CHUNK), level_N.split(_CHUNK), strict=True):
            rows.copy_(_pool_on_all_levels(pool, rois, level, len(maps)))
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        rois_N5, level_N = ctx.saved_tensors
        size, scales, sampling_ratio, aligned = ctx.options
        # The operator by which torchvision's roi_align has its gradient.
        gradients = [
            torch.ops.torchvision._roi_align_backward(
                slopes[0], _on_level(rois_N5, level_N, level), scale, size, size, *shape, sampling_ratio, aligned
            )
            for level, (scale, shape) in enumerate(zip(scales, ctx.shapes, strict=True))
        ]
        return None, None, None, None, *gradients
