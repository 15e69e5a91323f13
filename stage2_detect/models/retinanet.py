"""RetinaNet: focal loss on every anchor and class, box regression at the positives (arXiv 1708.02002).

Behavior as of PaddleDetection@666f597f (nine anchors per cell, plain L1, low-quality matches); options for what the Detectron configuration of SAD
does differently (smooth L1, a minimum IoU of low-quality matches).

Shapes: B images, G objects (padded), A anchors of all levels, K classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import box_losses, boxes, focal_losses
from ssld.stage2_detect.models.anchors import AnchorGrid, Grids, grid_anchors
from ssld.stage2_detect.models.assign import Assignment
from ssld.stage2_detect.models.assign import assign as assign_max_iou
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.dense_head import DenseHead

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # delta weights
_OCTAVE = 4  # side of a level's smallest square anchor, in strides
_SCALES = tuple(2 ** (third / 3) for third in range(3))


class RetinaNet(nn.Module):
    """Feature maps -> losses or scored boxes.

    Args:
        classes: K; there is no background.
        channels: width of the feature maps.
        strides: pixels per cell of the maps, finest first.
        ratios: height / width of the anchors.
        convolutions: number per tower of the head.
        tower_norm: use GroupNorm in the head's towers, whose convolutions then have no bias, as in torchvision's `retinanet_resnet50_fpn_v2`.
        positive_iou, negative_iou: IoU from which an anchor is positive, and below which it is negative; between the two it is ignored.
        low_quality_iou: least IoU with which an object's best anchor is positive although it is below `positive_iou`.
        alpha, gamma: parameters of the focal loss.
        smooth_l1_beta: distance at which the square part of the L1 box loss ends; 0 is plain L1.
        box_loss: `l1` between deltas, or `giou`, 1 - GIoU of the boxes.
        normalization: divisor of the losses: positives of the `batch`, over all ranks; or of each `image`, the mean over images.
        anchor_grid: see `anchors.grid_anchors`.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        convolutions: int = 4,
        tower_norm: bool = False,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        low_quality_iou: float = 0.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_loss: Literal["l1", "giou"] = "l1",
        normalization: Literal["batch", "image"] = "batch",
        anchor_grid: AnchorGrid = "exact",
    ) -> None:
        super().__init__()
        self.classes, self.strides, self.ratios = classes, tuple(strides), tuple(ratios)
        self.positive_iou, self.negative_iou, self.low_quality_iou = positive_iou, negative_iou, low_quality_iou
        self.alpha, self.gamma, self.smooth_l1_beta = alpha, gamma, smooth_l1_beta
        self.box_loss, self.normalization, self.anchor_grid = box_loss, normalization, anchor_grid
        self.head = DenseHead(
            classes=classes,
            channels=channels,
            anchors_per_cell=len(_SCALES) * len(ratios),
            box_values=4,
            levels=len(strides),
            convolutions=convolutions,
            norm=tower_norm,
            tower_bias=not tower_norm,
            level_scales=False,
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute float32 logits [B, A, K] and deltas [B, A, 4]."""
        logits_BAK, deltas_BA4 = self.head(features)
        return logits_BAK, deltas_BA4

    def anchors(self, grids: Grids, device: torch.device) -> Tensor:
        """Make the anchors [A, 4] of levels with these grids; in a cell, the ratios of each scale are adjacent."""
        return grid_anchors(
            grids,
            device,
            strides=self.strides,
            sizes=[_OCTAVE * stride for stride in self.strides],
            ratios=self.ratios,
            scales=_SCALES,
            grid=self.anchor_grid,
        )

    def assign(self, grids: Grids, sizes_B2: Tensor, targets: Targets) -> Assignment:
        """Assign an object to each anchor; label -1 marks anchors that are ignored."""
        anchors_A4 = self.anchors(grids, sizes_B2.device)
        assigned = assign_max_iou(
            anchors_A4.expand(len(sizes_B2), -1, -1),
            targets.boxes_BG4,
            targets.labels_BG >= 0,
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=True,
        )
        weak_BA = (assigned.labels_BA == 1) & (assigned.ious_BA < self.low_quality_iou)
        return replace(assigned, labels_BA=torch.where(weak_BA, 0, assigned.labels_BA))

    def losses(
        self,
        outputs: tuple[Tensor, Tensor],
        grids: Grids,
        sizes_B2: Tensor,
        targets: Targets,
        ranks: Ranks = ONE_RANK,
        assigned: Assignment | None = None,
    ) -> dict[str, Tensor]:
        """Compute `loss_cls` and `loss_box` from the outputs of `forward`, each a sum divided as `normalization` says.

        Args:
            assigned: result of `assign`, if the caller has it already.
        """
        logits_BAK, deltas_BA4 = outputs
        if assigned is None:
            assigned = self.assign(grids, sizes_B2, targets)
        positive_BA = assigned.labels_BA == 1
        label_BA = torch.where(positive_BA, targets.labels_of(assigned.objects_BA), -1)
        focal_BA = focal_losses.focal_loss(logits_BAK, label_BA, alpha=self.alpha, gamma=self.gamma).sum(dim=-1)
        references_BA4 = self.anchors(grids, logits_BAK.device).expand_as(deltas_BA4)
        objects_BA4 = boxes.take(targets.boxes_BG4, assigned.objects_BA)
        if self.box_loss == "giou":
            # Elsewhere a perfect prediction, whose gradient is finite; the zero of `where` times an infinite one would be NaN.
            objects_BA4 = torch.where(positive_BA[..., None], objects_BA4, references_BA4)
            deltas_BA4 = torch.where(positive_BA[..., None], deltas_BA4, 0.0)
            predicted_BA4 = boxes.decode(deltas_BA4, references_BA4, _WEIGHTS)
            distance_BA = box_losses.generalized_iou(predicted_BA4, objects_BA4, box_losses.TORCHVISION_EPSILON)
        else:
            deltas = boxes.encode(objects_BA4, references_BA4, _WEIGHTS)
            distance_BA = F.smooth_l1_loss(deltas_BA4, deltas, beta=self.smooth_l1_beta, reduction="none").sum(dim=-1)
        sums_2B = torch.stack(
            (
                torch.where(assigned.labels_BA >= 0, focal_BA, 0.0).sum(dim=1),
                torch.where(positive_BA, distance_BA, 0.0).sum(dim=1),
            )
        )
        if self.normalization == "image":
            loss_cls, loss_box = (sums_2B / positive_BA.sum(dim=1).clamp(min=1)).mean(dim=1)
        else:
            loss_cls, loss_box = sums_2B.sum(dim=1) * ranks.world_size / ranks.total(positive_BA.sum()).clamp(min=1)
        return {"loss_cls": loss_cls, "loss_box": loss_box}

    def decode(self, values_BN4: Tensor, index_BN: Tensor, grids: Grids) -> Tensor:
        """Decode boxes [B, N, 4] in pixels of the anchors `index_BN` from their deltas."""
        return boxes.decode(values_BN4, self.anchors(grids, index_BN.device)[index_BN], _WEIGHTS)
