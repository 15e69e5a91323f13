"""The RPN's head at single anchors only.

Its loss uses a few hundred anchors of maps of tens of thousands of cells. Values and gradients at these are those of the
whole maps, at a hundredth of the work, since the gradient is zero at all other anchors. That saves two thirds of the head's
time in training, and its activations. Shapes do not depend on values.

Shapes: B images, S anchors of an image, N = B * S, C channels, D channels behind a convolution, P pixels of one level's
maps of all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.stage2_detect.models import kernels
from ssld.stage2_detect.models.anchors import Grids, grids_of


def pays(samples_per_image: int, grids: Grids) -> bool:
    """Return whether the anchors' 3x3 neighborhoods have fewer cells than the maps, and the fast forms are on."""
    return kernels.enabled() and 9 * samples_per_image < sum(rows * columns for rows, columns in grids)


def head_at(
    features: Sequence[Tensor],
    index_BS: Tensor,
    *,
    conv: nn.Conv2d,
    objectness: nn.Conv2d,
    deltas: nn.Conv2d,
) -> tuple[Tensor, Tensor]:
    """Compute float32 logits [B, S] and deltas [B, S, 4] of the anchors with these indices (in the order level, row, column,
    ratio), by the layers of an `RPNHead`.
    """
    B, S = index_BS.shape
    cells_BS = cells_of(index_BS, grids_of(features), objectness.out_channels)
    patches_NC = patches(features, cells_BS.level, cells_BS.row, cells_BS.column)
    hidden_ND = F.relu(F.linear(patches_NC, flat_weight(conv.weight), conv.bias))
    logits = F.linear(hidden_ND, objectness.weight.flatten(1), objectness.bias).view(B, S, -1)
    moves = F.linear(hidden_ND, deltas.weight.flatten(1), deltas.bias).view(B, S, -1, 4)
    ratio_BS1 = cells_BS.ratio[..., None]
    deltas_BS4 = moves.gather(2, ratio_BS1[..., None].expand(-1, -1, -1, 4)).squeeze(2)
    return logits.gather(2, ratio_BS1).squeeze(2).float(), deltas_BS4.float()


@dataclass(frozen=True)
class Cells:
    """Positions of single anchors, int64 [B, S] each."""

    level: Tensor
    row: Tensor
    column: Tensor
    ratio: Tensor


def cells_of(index_BS: Tensor, grids: Grids, ratios: int) -> Cells:
    """Compute the positions of anchors from their indices; `grids` are the (rows, columns) of the levels."""
    level_BS, begin_BS, width_BS = torch.zeros_like(index_BS), torch.zeros_like(index_BS), torch.ones_like(index_BS)
    begin = 0
    for level, (rows, columns) in enumerate(grids):
        reached_BS = index_BS >= begin
        level_BS = torch.where(reached_BS, level, level_BS)
        begin_BS = torch.where(reached_BS, begin, begin_BS)
        width_BS = torch.where(reached_BS, columns, width_BS)
        begin += rows * columns * ratios
    cell_BS = (index_BS - begin_BS) // ratios
    return Cells(level_BS, cell_BS // width_BS, cell_BS % width_BS, (index_BS - begin_BS) % ratios)


def patches(features: Sequence[Tensor], level_BS: Tensor, row_BS: Tensor, column_BS: Tensor) -> Tensor:
    """Gather the 3x3 neighborhoods [N, 9 * C] of these cells, each from its level's map, with zeros outside of the map.

    Ordered row, column, channel, so that a convolution's weight [D, C, 3, 3] becomes `flat_weight(weight)`.
    """
    B, C = features[0].shape[:2]
    step = torch.arange(-1, 2, device=level_BS.device)
    image_B1 = torch.arange(B, device=level_BS.device)[:, None]
    row_BS3, column_BS3 = row_BS[..., None] + step, column_BS[..., None] + step
    gathered: Tensor | None = None
    for level, feature in enumerate(features):
        H, W = feature.shape[-2:]
        table_PC = feature.permute(0, 2, 3, 1).reshape(-1, C)
        row_inside, column_inside = (row_BS3 >= 0) & (row_BS3 < H), (column_BS3 >= 0) & (column_BS3 < W)
        inside_BS33 = row_inside[..., None] & column_inside[..., None, :] & (level_BS == level)[..., None, None]
        line_BS3 = image_B1[..., None] * H + row_BS3
        pixel_BS33 = torch.where(inside_BS33, line_BS3[..., None] * W + column_BS3[..., None, :], 0)
        values = F.embedding(pixel_BS33, table_PC)
        gathered = torch.where(inside_BS33[..., None], values, 0.0 if gathered is None else gathered)
    assert gathered is not None
    return gathered.flatten(2).flatten(0, 1)


def flat_weight(weight_DC33: Tensor) -> Tensor:
    """Reshape a convolution's weight to [D, 9 * C], in the order of `patches`."""
    return weight_DC33.permute(0, 2, 3, 1).flatten(1)
