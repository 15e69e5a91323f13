"""Norms behind the convolutions of pyramid and heads.

A frozen BatchNorm is the body's: it normalizes by its running statistics and is never trained. A BatchNorm in training measures the RoIs that
exist, not the padding of an image with fewer of them.

Shapes: N RoIs, C channels, H height, W width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ssld.stage2_detect.models.freezing import ConstantBatchNorm2d

Norm = Literal["none", "batch", "group"]
_GROUPS = 32


def norm_layer(kind: Norm, *, frozen: bool) -> Callable[[int], nn.Module] | None:
    """Return what makes a norm for a number of channels, as torchvision's `norm_layer`; None for no norm.

    Args:
        frozen: whether a BatchNorm is never trained; GroupNorm always is.
    """
    if kind == "none":
        return None
    if kind == "group":
        return group_norm
    return partial(_batch_norm, frozen=frozen)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm of 32 groups, of fewer for channels that are few or no multiple of 32."""
    groups = math.gcd(_GROUPS, channels)
    if groups == channels:
        groups //= 2  # a group of one channel is 0 on a map of one cell, and torch refuses it
    return nn.GroupNorm(groups, channels)


def _batch_norm(channels: int, *, frozen: bool) -> nn.BatchNorm2d:
    return ConstantBatchNorm2d(channels).eval().requires_grad_(False) if frozen else nn.BatchNorm2d(channels)


class RoIConvolutions(nn.Module):
    """3x3 convolutions on pooled RoIs, each followed by its norm and ReLU; base of the heads that have them.

    Args:
        channels: width of the input.
        hidden: width of the convolutions.
        convolutions: their number.
        norm: norm after each; convolutions without it have a bias.
        freeze_norm: see `norm_layer`.
    """

    def __init__(self, *, channels: int, hidden: int, convolutions: int, norm: Norm, freeze_norm: bool) -> None:
        super().__init__()
        make = norm_layer(norm, frozen=freeze_norm)
        widths = [channels, *[hidden] * convolutions]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=make is None) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(make(hidden) for _ in self.convs) if make else None
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def convolve(self, pooled_NCHW: Tensor, valid_N: Tensor | None = None) -> Tensor:
        """Compute the maps [N, hidden, H, W]; with `valid_N` (bool) those of other RoIs mean nothing."""
        measuring = [norm for norm in self.norms or () if isinstance(norm, nn.BatchNorm2d) and norm.training]
        if valid_N is None or not measuring or bool(valid_N.all()):
            return self._convolve(pooled_NCHW)
        if not bool(valid_N.any()):
            # Nothing to measure: by the running statistics, so that all parameters have a gradient, of zero.
            return self._with_running_statistics(pooled_NCHW, measuring)
        maps_NCHW = self._convolve(pooled_NCHW[valid_N])
        return maps_NCHW.new_zeros((len(valid_N), *maps_NCHW.shape[1:])).index_put(
            (valid_N.nonzero()[:, 0],), maps_NCHW
        )

    def _convolve(self, maps_NCHW: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs):
            maps_NCHW = conv(maps_NCHW)
            maps_NCHW = F.relu(self.norms[number](maps_NCHW) if self.norms else maps_NCHW)
        return maps_NCHW

    def _with_running_statistics(self, maps_NCHW: Tensor, norms: Sequence[nn.Module]) -> Tensor:
        for norm in norms:
            norm.eval()
        try:
            return self._convolve(maps_NCHW)
        finally:
            for norm in norms:
                norm.train()
