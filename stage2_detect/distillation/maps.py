"""Terms that compare a student's feature pyramid with its teacher's, for any kind of detector: PKD and CWD, summed over the levels.

Where the widths of the pyramids differ, a 1x1 convolution per level, an adapter, projects the student's maps to the teacher's width; it trains with
the student and is dropped with the teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.stage2_detect.distillation.losses import channel_wise, inside_maps, pkd


class MapTerms(nn.Module):
    """`loss_pkd` (arXiv 2207.02039) and `loss_cwd` (arXiv 2011.13256) over the levels of two pyramids.

    Args:
        channels, teacher_channels: widths of the pyramids.
        levels: number of levels to compare, from the finest one on.
        pkd_weight, cwd_weight: factors on the terms; 0 leaves a term out.
        cwd_temperature: softmax temperature of `loss_cwd`.

    Attributes:
        adapters: one per level if the widths differ and a term is on, else empty.
    """

    def __init__(
        self,
        channels: int,
        teacher_channels: int,
        levels: int,
        *,
        pkd_weight: float,
        cwd_weight: float,
        cwd_temperature: float,
    ) -> None:
        super().__init__()
        self.levels, self.cwd_temperature = levels, cwd_temperature
        self.weights = {"loss_pkd": pkd_weight, "loss_cwd": cwd_weight}
        needed = channels != teacher_channels and any(self.weights.values())
        self.adapters = nn.ModuleList(nn.Conv2d(channels, teacher_channels, 1) for _ in range(levels * needed))

    def forward(
        self, features: Sequence[Tensor], teacher_features: Sequence[Tensor], strides: Sequence[int], sizes_B2: Tensor
    ) -> dict[str, Tensor]:
        """Compute the terms that are on, times their weights.

        Args:
            features, teacher_features: maps [B, C, H, W] and [B, D, H, W] per level, on the same images.
            strides: pixels per cell of each level.
            sizes_B2: height and width of each image without its padding.
        """
        terms: dict[str, list[Tensor]] = {name: [] for name, weight in self.weights.items() if weight}
        for level in range(self.levels if terms else 0):
            maps, teacher_maps = features[level], teacher_features[level]
            maps = self.adapters[level](maps) if self.adapters else maps
            inside_BHW = inside_maps(sizes_B2, maps, strides[level])
            if "loss_pkd" in terms:
                terms["loss_pkd"].append(pkd(maps, teacher_maps, inside_BHW))
            if "loss_cwd" in terms:
                pair = (maps.flatten(2).mT, teacher_maps.flatten(2).mT)
                terms["loss_cwd"].append(channel_wise(*pair, inside_BHW.flatten(1), self.cwd_temperature))
        return {name: self.weights[name] * torch.stack(values).sum() for name, values in terms.items()}
