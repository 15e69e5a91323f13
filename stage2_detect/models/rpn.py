"""Region proposal network over a pyramid, batched over images (arXiv 1506.01497, 1612.03144).

Behavior as of PaddleDetection@666f597f: both losses are sums over the sampled anchors divided by `samples_per_image`
times the number of images, also where fewer were sampled; the box loss is plain L1; proposals smaller than a pixel are
dropped before NMS. Anchors that reach over the image's border or into the padding are included. With other settings as torchvision's: smooth L1,
losses divided by the number of sampled anchors, smaller proposals, several convolutions.

Shapes: B images, G objects, A anchors of all levels in the order level, row, column, scale, ratio, N candidates, R proposals,
S sampled anchors, K shapes per cell, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.stage2_detect.models import anchors, assign, boxes, sampling
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.kernels import sparse_rpn
from ssld.stage2_detect.models.kernels.nms import nms_masks

_STREAM = 0  # stream of the sampling hash; the RoI heads use 1
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

    def __init__(self, *, channels: int, anchors_per_cell: int, convolutions: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.more_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convolutions - 1))
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (self.conv, *self.more_convs, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B, K, H, W] and deltas [B, K * 4, H, W]."""
        hidden_BCHW = F.relu(self.conv(feature_BCHW))
        for conv in self.more_convs:
            hidden_BCHW = F.relu(conv(hidden_BCHW))
        return self.objectness(hidden_BCHW), self.deltas(hidden_BCHW)


class RPN(nn.Module):
    """Features -> proposals and, with targets, the two losses.

    Args:
        channels: width of every feature map.
        strides: pixels per cell, one per level.
        anchor_sizes: side of the square anchor in pixels, one per level.
        anchor_ratios: height / width.
        anchor_scales: factors on `anchor_sizes`.
        anchor_grid: see `anchors.grid_anchors`.
        convolutions: number of convolutions of the head.
        positive_iou, negative_iou: IoU from which an anchor is positive, and below which it is negative; between the two it
            is ignored.
        samples_per_image: anchors per image in the losses.
        positive_fraction: largest share of positives among them.
        sampling: `random`; `first` takes anchors in index order.
        smooth_l1_beta: distance at which the square part of the box loss ends; 0 is plain L1.
        normalization: divisor of the losses: `samples_per_image` times the number of images, or the number of anchors `sampled` in this batch.
        nms_iou: overlap with a better proposal of the same level above which a proposal is dropped.
        pre_nms_top_n_train, pre_nms_top_n_test: candidates per level before NMS.
        post_nms_top_n_train, post_nms_top_n_test: proposals per image over all levels.
        min_size: pixels; a proposal with a smaller side is dropped.
        score_threshold: a proposal of lower objectness, in 0..1, is dropped.
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        anchor_sizes: Sequence[float] = (32.0, 64.0, 128.0, 256.0, 512.0),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_scales: Sequence[float] = (1.0,),
        anchor_grid: anchors.AnchorGrid = "exact",
        convolutions: int = 1,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        samples_per_image: int = 256,
        positive_fraction: float = 0.5,
        sampling: Literal["random", "first"] = "random",
        smooth_l1_beta: float = 0.0,
        normalization: Literal["samples_per_image", "sampled"] = "samples_per_image",
        nms_iou: float = 0.7,
        pre_nms_top_n_train: int = 2000,
        post_nms_top_n_train: int = 1000,
        pre_nms_top_n_test: int = 1000,
        post_nms_top_n_test: int = 1000,
        min_size: float = 1.0,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = RPNHead(
            channels=channels, anchors_per_cell=len(anchor_scales) * len(anchor_ratios), convolutions=convolutions
        )
        self.strides, self.anchor_sizes, self.anchor_ratios = tuple(strides), tuple(anchor_sizes), tuple(anchor_ratios)
        self.anchor_scales, self.anchor_grid = tuple(anchor_scales), anchor_grid
        self.smooth_l1_beta, self.normalization, self.score_threshold = smooth_l1_beta, normalization, score_threshold
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.samples_per_image, self.positive_fraction = samples_per_image, positive_fraction
        self.sampling, self.nms_iou, self.min_size = sampling, nms_iou, min_size
        self.pre_nms_top_n_train, self.post_nms_top_n_train = pre_nms_top_n_train, post_nms_top_n_train
        self.pre_nms_top_n_test, self.post_nms_top_n_test = pre_nms_top_n_test, post_nms_top_n_test

    def forward(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Compute proposals for images of (height, width) `sizes_B2` and, with targets, `loss_rpn_cls` and `loss_rpn_box`."""
        grids = anchors.grids_of(features)
        # The losses use few anchors. If these are computed once more with gradients, the maps need none.
        sparse = not self.head.more_convs and sparse_rpn.pays(self.samples_per_image, grids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets is not None and not sparse):
            maps = [self.head(feature) for feature in features]
        # Geometry and losses in float32: bf16 moves a box by up to a hundredth of its coordinate.
        logits = [anchors.in_order(scores, 1).squeeze(-1).float() for scores, _ in maps]
        deltas = [anchors.in_order(deltas, 4).float() for _, deltas in maps]
        anchors_A4 = self.anchors(grids, sizes_B2.device)
        proposals = self._propose(logits, deltas, anchors_A4, sizes_B2)
        if targets is None:
            return proposals, {}
        chosen, objects_BS = self._sample(anchors_A4, targets)
        objects_BS4 = boxes.take(targets.boxes_BG4, objects_BS)
        if sparse:
            logits_BS, deltas_BS4 = sparse_rpn.head_at(
                features,
                chosen.index_BS,
                conv=self.head.conv,
                objectness=self.head.objectness,
                deltas=self.head.deltas,
            )
        else:
            logits_BS = torch.cat(logits, dim=1).gather(1, chosen.index_BS)
            deltas_BS4 = boxes.take(torch.cat(deltas, dim=1), chosen.index_BS)
        target_BS4 = boxes.encode(objects_BS4, anchors_A4[chosen.index_BS], _WEIGHTS)
        objectness_BS = F.binary_cross_entropy_with_logits(logits_BS, chosen.positive_BS.float(), reduction="none")
        distance_BS = F.smooth_l1_loss(deltas_BS4, target_BS4, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        # `where` over all samples keeps every head in the graph: a batch without objects gives zero gradients, not None.
        divisor: int | Tensor = self.samples_per_image * len(sizes_B2)
        if self.normalization == "sampled":
            divisor = chosen.valid_BS.sum().clamp(min=1)
        return proposals, {
            "loss_rpn_cls": torch.where(chosen.valid_BS, objectness_BS, 0.0).sum() / divisor,
            "loss_rpn_box": torch.where(targets.fits(chosen.positive_BS, objects_BS), distance_BS, 0.0).sum() / divisor,
        }

    def anchors(self, grids: anchors.Grids, device: torch.device) -> Tensor:
        """Make the anchors [A, 4] of levels with these grids."""
        return anchors.grid_anchors(
            grids,
            device,
            strides=self.strides,
            sizes=self.anchor_sizes,
            ratios=self.anchor_ratios,
            scales=self.anchor_scales,
            grid=self.anchor_grid,
        )

    def _counts(self) -> tuple[int, int]:
        """Return the number of proposals per level before NMS, and per image after it."""
        if self.training:
            return self.pre_nms_top_n_train, self.post_nms_top_n_train
        return self.pre_nms_top_n_test, self.post_nms_top_n_test

    @torch.no_grad()
    def _propose(self, logits: list[Tensor], deltas: list[Tensor], anchors_A4: Tensor, sizes_B2: Tensor) -> Proposals:
        pre_nms, post_nms = self._counts()
        level_anchors = anchors_A4.split([level.shape[1] for level in logits])
        candidates, scores, valid = [], [], []
        for logits_BL, deltas_BL4, anchors_L4 in zip(logits, deltas, level_anchors, strict=True):
            scores_BN, index_BN = logits_BL.topk(min(pre_nms, logits_BL.shape[1]), dim=1)
            deltas_BN4 = boxes.take(deltas_BL4, index_BN)
            boxes_BN4 = boxes.clip(boxes.decode(deltas_BN4, anchors_L4[index_BN], _WEIGHTS), sizes_B2)
            candidates.append(boxes_BN4)
            scores.append(scores_BN)
            large_BN = ((boxes_BN4[..., 2:] - boxes_BN4[..., :2]) >= self.min_size).all(dim=-1)
            valid.append(large_BN & (scores_BN.sigmoid() >= self.score_threshold))
        kept_BN = torch.cat(nms_masks(candidates, scores, valid, self.nms_iou), dim=1)
        scores_BN = torch.cat(scores, dim=1).masked_fill(~kept_BN, -torch.inf)
        boxes_BN4 = torch.cat(candidates, dim=1)
        scores_BR, index_BR = scores_BN.topk(min(post_nms, scores_BN.shape[1]), dim=1)
        return Proposals(boxes.take(boxes_BN4, index_BR), scores_BR > -torch.inf)

    @torch.no_grad()
    def _sample(self, anchors_A4: Tensor, targets: Targets) -> tuple[sampling.Sample, Tensor]:
        """Sample the anchors of the losses; also return the index of each one's object, int64 [B, S]."""
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
            if self.sampling == "random"
            else sampling.index_priority(targets.seeds_B, A)
        )
        chosen = sampling.sample(
            assigned.labels_BA, priority_BA, count=self.samples_per_image, positive_fraction=self.positive_fraction
        )
        return chosen, assigned.objects_BA.gather(1, chosen.index_BS)
