"""Region proposal network over a pyramid, batched over images (arXiv 1506.01497, 1612.03144).

Behaves as PaddleDetection@666f597f: both losses are sums over the sampled anchors divided by `samples_per_image` times
the images, whatever was in fact sampled; the box loss is plain L1; proposals smaller than a pixel are dropped before
suppression. No anchor is excluded for reaching over the image's border or into the padding. Absent: several anchor
sizes on a level.

Shapes: B images, G objects, A anchors of all levels in the order level, row, column, ratio, N candidates, R proposals,
S sampled anchors, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.stage2_detect.models import anchors, assign, boxes, sampling
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.kernels import sampled_conv

_STREAM = 0  # of the sampling hash; the RoI heads use others
_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Proposals:
    """Boxes that may hold an object, best first."""

    boxes_BR4: Tensor
    """float32, inside the un-padded images; without gradient."""
    valid_BR: Tensor
    """bool: images with fewer proposals than R have padding at the end."""


class RPNHead(nn.Module):
    """Objectness and deltas for every anchor of one level; the same weights serve every level."""

    def __init__(self, *, channels: int, anchors_per_cell: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, feature_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, ratios, H, W] and deltas [B, ratios * 4, H, W]."""
        hidden_BCHW = F.relu(self.conv(feature_BCHW))
        return self.objectness(hidden_BCHW), self.deltas(hidden_BCHW)

    def at(self, features: Sequence[Tensor], cells_BS: "Cells") -> tuple[Tensor, Tensor]:
        """float32 logits [B, S] and deltas [B, S, 4] of single anchors, the values of `forward` there."""
        B, S = cells_BS.level.shape
        patches = sampled_conv.patches(features, cells_BS.level, cells_BS.row, cells_BS.column)
        hidden = F.relu(F.linear(patches, sampled_conv.flat_weight(self.conv.weight), self.conv.bias))
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias).view(B, S, -1)
        deltas = F.linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).view(B, S, -1, 4)
        ratio_BS1 = cells_BS.ratio[..., None]
        deltas_BS4 = deltas.gather(2, ratio_BS1[..., None].expand(-1, -1, -1, 4)).squeeze(2)
        return logits.gather(2, ratio_BS1).squeeze(2).float(), deltas_BS4.float()


@dataclass(frozen=True)
class Cells:
    """Where single anchors sit, int64 [B, S] each."""

    level: Tensor
    row: Tensor
    column: Tensor
    ratio: Tensor


def cells_of(index_BS: Tensor, grids: anchors.Grids, ratios: int) -> Cells:
    """Takes anchor numbers apart; `grids` are the (rows, columns) of the levels."""
    level_BS, begin_BS, width_BS = torch.zeros_like(index_BS), torch.zeros_like(index_BS), torch.ones_like(index_BS)
    begin = 0
    for level, (rows, columns) in enumerate(grids):
        here_BS = index_BS >= begin
        level_BS = torch.where(here_BS, level, level_BS)
        begin_BS = torch.where(here_BS, begin, begin_BS)
        width_BS = torch.where(here_BS, columns, width_BS)
        begin += rows * columns * ratios
    cell_BS = (index_BS - begin_BS) // ratios
    return Cells(level_BS, cell_BS // width_BS, cell_BS % width_BS, (index_BS - begin_BS) % ratios)


class RPN(nn.Module):
    """Features -> proposals and, with targets, the two losses.

    Args:
        channels: of every feature map.
        strides, anchor_sizes: pixels, one a level.
        anchor_ratios: height / width.
        positive_iou, negative_iou: of the assignment; between the two an anchor is ignored.
        samples_per_image: anchors in the losses, and the losses' divisor.
        random_sampling: False takes the first anchors in index order.
        train_pre_nms, test_pre_nms: candidates a level before suppression.
        train_post_nms, test_post_nms: proposals an image over all levels.
        min_size: pixels; a proposal with a smaller side is dropped.
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        anchor_sizes: Sequence[float] = (32.0, 64.0, 128.0, 256.0, 512.0),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        samples_per_image: int = 256,
        positive_fraction: float = 0.5,
        random_sampling: bool = True,
        nms_iou: float = 0.7,
        train_pre_nms: int = 2000,
        train_post_nms: int = 1000,
        test_pre_nms: int = 1000,
        test_post_nms: int = 1000,
        min_size: float = 1.0,
    ) -> None:
        super().__init__()
        self.head = RPNHead(channels=channels, anchors_per_cell=len(anchor_ratios))
        self.strides, self.anchor_sizes, self.anchor_ratios = tuple(strides), tuple(anchor_sizes), tuple(anchor_ratios)
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.samples_per_image, self.positive_fraction = samples_per_image, positive_fraction
        self.random_sampling = random_sampling
        self.nms_iou, self.min_size = nms_iou, min_size
        self.train_nms, self.test_nms = (train_pre_nms, train_post_nms), (test_pre_nms, test_post_nms)

    def forward(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals for images of (height, width) `sizes_B2`, and `loss_rpn_cls`, `loss_rpn_box` where there are
        targets.
        """
        grids = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        # The losses look at few anchors. Where those are few beside the maps, the maps need no gradient: it comes from
        # the head at these anchors alone, which saves two thirds of the head's time and its activations.
        sparse = 9 * self.samples_per_image < sum(rows * columns for rows, columns in grids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets is not None and not sparse):
            maps = [self.head(feature) for feature in features]
        # Geometry and losses in float32: bf16 moves a box by up to a hundredth of its coordinate.
        logits = [_flatten(scores, 1).squeeze(-1).float() for scores, _ in maps]
        deltas = [_flatten(deltas, 4).float() for _, deltas in maps]
        anchors_A4 = anchors.grid_anchors(
            grids,
            sizes_B2.device,
            strides=self.strides,
            sizes=self.anchor_sizes,
            ratios=self.anchor_ratios,
        )
        proposals = self._propose(logits, deltas, anchors_A4, sizes_B2)
        if targets is None:
            return proposals, {}
        chosen, objects_BS4 = self._sample(anchors_A4, targets)
        if sparse:
            logits_BS, deltas_BS4 = self.head.at(features, cells_of(chosen.index_BS, grids, len(self.anchor_ratios)))
        else:
            logits_BS = torch.cat(logits, dim=1).gather(1, chosen.index_BS)
            deltas_BS4 = boxes.take(torch.cat(deltas, dim=1), chosen.index_BS)
        wanted_BS4 = boxes.encode(objects_BS4, anchors_A4[chosen.index_BS], _WEIGHTS)
        objectness_BS = F.binary_cross_entropy_with_logits(logits_BS, chosen.positive_BS.float(), reduction="none")
        distance_BS = (deltas_BS4 - wanted_BS4).abs().sum(dim=-1)
        # `where` over all places keeps every head in the graph, so that a batch without objects gives zero gradients
        # instead of none.
        divisor = self.samples_per_image * len(sizes_B2)
        return proposals, {
            "loss_rpn_cls": torch.where(chosen.valid_BS, objectness_BS, 0.0).sum() / divisor,
            "loss_rpn_box": torch.where(chosen.positive_BS, distance_BS, 0.0).sum() / divisor,
        }

    @torch.no_grad()
    def _propose(self, logits: list[Tensor], deltas: list[Tensor], anchors_A4: Tensor, sizes_B2: Tensor) -> Proposals:
        pre_nms, post_nms = self.train_nms if self.training else self.test_nms
        level_anchors = anchors_A4.split([level.shape[1] for level in logits])
        candidates, scores, valid = [], [], []
        for logits_BL, deltas_BL4, anchors_L4 in zip(logits, deltas, level_anchors, strict=True):
            scores_BN, index_BN = logits_BL.topk(min(pre_nms, logits_BL.shape[1]), dim=1)
            deltas_BN4 = boxes.take(deltas_BL4, index_BN)
            boxes_BN4 = boxes.clip(boxes.decode(deltas_BN4, anchors_L4[index_BN], _WEIGHTS), sizes_B2)
            candidates.append(boxes_BN4)
            scores.append(scores_BN)
            valid.append(((boxes_BN4[..., 2:] - boxes_BN4[..., :2]) >= self.min_size).all(dim=-1))
        kept_BN = torch.cat(boxes.nms_masks(candidates, scores, valid, self.nms_iou), dim=1)
        scores_BN = torch.cat(scores, dim=1).masked_fill(~kept_BN, -torch.inf)
        boxes_BN4 = torch.cat(candidates, dim=1)
        scores_BR, index_BR = scores_BN.topk(min(post_nms, scores_BN.shape[1]), dim=1)
        return Proposals(boxes.take(boxes_BN4, index_BR), scores_BR > -torch.inf)

    @torch.no_grad()
    def _sample(self, anchors_A4: Tensor, targets: Targets) -> tuple[sampling.Sample, Tensor]:
        """The anchors of the losses, and the object of each [B, S, 4]."""
        assigned = assign.assign(
            anchors_A4.expand(len(targets.seeds_B), -1, -1),
            targets.boxes_BG4,
            targets.labels_BG >= 0,
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=True,
        )
        A = len(anchors_A4)
        priority_BA = (
            sampling.hash_priority(targets.seeds_B, A, _STREAM)
            if self.random_sampling
            else sampling.index_priority(targets.seeds_B, A)
        )
        chosen = sampling.sample(
            assigned.labels_BA, priority_BA, count=self.samples_per_image, positive_fraction=self.positive_fraction
        )
        return chosen, boxes.take(targets.boxes_BG4, assigned.objects_BA.gather(1, chosen.index_BS))


def _flatten(map_BCHW: Tensor, values: int) -> Tensor:
    """[B, ratios * values, H, W] -> [B, H * W * ratios, values], the order of the anchors."""
    B, _, H, W = map_BCHW.shape
    return map_BCHW.view(B, -1, values, H, W).permute(0, 3, 4, 1, 2).reshape(B, -1, values)
