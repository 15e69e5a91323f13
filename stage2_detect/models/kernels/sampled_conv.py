"""A 3x3 convolution at a few places of feature maps instead of everywhere.

For a loss that looks at a few hundred places of maps of tens of thousands, the values and gradients are those of the
whole convolution, at a hundredth of the work: everywhere else its gradient is zero. Shapes do not depend on values.

Shapes: B images, S places of an image, N = B * S, C channels, P pixels of one level's maps of all images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def patches(features: Sequence[Tensor], level_BS: Tensor, row_BS: Tensor, column_BS: Tensor) -> Tensor:
    """The 3x3 neighbourhoods [N, 9 * C] of these cells, each on its level's map, with zeros outside of the map.

    Ordered row, column, channel, so that a convolution's weight [D, C, 3, 3] becomes `flat_weight(weight)`.
    """
    B, C = features[0].shape[:2]
    step = torch.arange(-1, 2, device=level_BS.device)
    image_B1 = torch.arange(B, device=level_BS.device)[:, None]
    row_BS3, column_BS3 = row_BS[..., None] + step, column_BS[..., None] + step
    found: Tensor | None = None
    for level, feature in enumerate(features):
        H, W = feature.shape[-2:]
        table_PC = feature.permute(0, 2, 3, 1).reshape(-1, C)
        row_inside, column_inside = (row_BS3 >= 0) & (row_BS3 < H), (column_BS3 >= 0) & (column_BS3 < W)
        inside_BS33 = row_inside[..., None] & column_inside[..., None, :] & (level_BS == level)[..., None, None]
        line_BS3 = image_B1[..., None] * H + row_BS3
        pixel_BS33 = torch.where(inside_BS33, line_BS3[..., None] * W + column_BS3[..., None, :], 0)
        values = F.embedding(pixel_BS33, table_PC)
        found = torch.where(inside_BS33[..., None], values, 0.0 if found is None else found)
    assert found is not None
    return found.flatten(2).flatten(0, 1)


def flat_weight(weight_DC33: Tensor) -> Tensor:
    """[D, 9 * C] in the order of `patches`."""
    return weight_DC33.permute(0, 2, 3, 1).flatten(1)
