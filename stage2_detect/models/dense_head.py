"""The head that one-stage detectors share: two towers of convolutions over every pyramid level, one output map for classes and one for boxes.

Sources: arXiv 1708.02002 section 4 (RetinaNet: no norm) and 2006.04388 (GFL: GroupNorm and a learned factor per level).

Shapes: B images, C channels, H height, W width, A anchors of all levels in the order level, row, column, shape; K classes, D box values per anchor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.stage2_detect.models.anchors import in_order
from ssld.stage2_detect.models.norms import group_norm

_PRIOR = 0.01  # initial probability of every class


class DenseHead(nn.Module):
    """Class logits and box values of every anchor; the same weights serve every level.

    Args:
        classes: K; there is no background.
        channels: width of the maps and of the towers.
        anchors_per_cell: number of anchors per cell.
        box_values: D.
        levels: number of maps; used with `level_scales` only.
        convolutions: number per tower.
        norm: whether GroupNorm follows every convolution of the towers.
        tower_bias: whether these convolutions have a bias.
        level_scales: whether box values are multiplied by a learned factor per level.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        anchors_per_cell: int,
        box_values: int,
        levels: int = 5,
        convolutions: int = 4,
        norm: bool,
        tower_bias: bool,
        level_scales: bool,
    ) -> None:
        super().__init__()
        self.classes, self.box_values, self.anchors_per_cell = classes, box_values, anchors_per_cell
        self.class_tower = _tower(channels, convolutions, norm=norm, bias=tower_bias)
        self.box_tower = _tower(channels, convolutions, norm=norm, bias=tower_bias)
        self.logits = nn.Conv2d(channels, anchors_per_cell * classes, 3, padding=1)
        self.boxes = nn.Conv2d(channels, anchors_per_cell * box_values, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.logits.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]
        self.scales = nn.Parameter(torch.ones(levels)) if level_scales else None

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute float32 logits [B, A, K] and box values [B, A, D]."""
        logits, values = [], []
        for level, feature_BCHW in enumerate(features):
            logits.append(in_order(self.logits(self.class_tower(feature_BCHW)), self.classes).float())
            flat_BAD = in_order(self.boxes(self.box_tower(feature_BCHW)), self.box_values).float()
            values.append(flat_BAD if self.scales is None else flat_BAD * self.scales[level])
        return torch.cat(logits, dim=1), torch.cat(values, dim=1)


def _tower(channels: int, convolutions: int, *, norm: bool, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias))
        if norm:
            layers.append(group_norm(channels))
        # In place: the backward passes of convolution and GroupNorm do not need their outputs.
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
