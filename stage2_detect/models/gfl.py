"""GFL: class scores trained towards the IoU, and box sides as distributions over distances (arXiv 2006.04388).

Behavior as of HikariTJU/LD@4287990c (an mmdetection fork); options for what PaddleDetection@666f597f does differently. One square anchor per cell,
of 8 strides, centered at the cell's first pixel: ATSS assigns it to an object, and distances are measured from its center.

Losses are divided by counts of one micro-batch, summed over ranks.

Shapes: B images, G objects (padded), A anchors of all levels, K classes, E = reg_max + 1 bins of a distance, 4 distances: left, top, right, bottom.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import box_losses, boxes, focal_losses
from ssld.stage2_detect.models.anchors import Grids, grid_anchors
from ssld.stage2_detect.models.assign import Assignment
from ssld.stage2_detect.models.atss import Thresholds, assign_atss
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.dense_head import DenseHead

_FILLED = 32  # in pixels; sides of a padded image are multiples of it
_ANCHOR_STRIDES = 8  # side of an anchor, in strides
_BELOW_LAST_BIN = 0.1  # target distances are at most reg_max minus this


class GFL(nn.Module):
    """Feature maps -> losses or scored boxes.

    Args:
        classes: K.
        channels: width of the feature maps.
        strides: pixels per cell of the maps, finest first.
        reg_max: largest distance, in strides.
        convolutions: number per tower of the head.
        tower_bias: whether the convolutions of the head's towers have a bias, as in PaddleDetection.
        unbiased_std: use the unbiased standard deviation in ATSS; PaddleDetection's is biased.
        ignore_padding: exclude anchors beyond the image from its assignment and losses, so that the targets of a cell do not depend on the other
            images of the batch; in PaddleDetection they are candidates and negatives.
        weight_floor: smallest divisor of the box losses, the sum of the positives' scores; 1 in PaddleDetection.
        box_weight, dfl_weight: factors on `loss_box` and `loss_dfl`; dfl_weight 0 leaves `loss_dfl` out.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        reg_max: int = 16,
        convolutions: int = 4,
        tower_bias: bool = False,
        unbiased_std: bool = True,
        ignore_padding: bool = True,
        weight_floor: float = 1e-6,
        box_weight: float = 2.0,
        dfl_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.classes, self.strides, self.reg_max = classes, tuple(strides), reg_max
        self.unbiased_std, self.ignore_padding, self.weight_floor = unbiased_std, ignore_padding, weight_floor
        self.box_weight, self.dfl_weight = box_weight, dfl_weight
        self.head = DenseHead(
            classes=classes,
            channels=channels,
            anchors_per_cell=1,
            box_values=4 * (reg_max + 1),
            levels=len(strides),
            convolutions=convolutions,
            norm=True,
            tower_bias=tower_bias,
            level_scales=True,
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute float32 logits [B, A, K], and logits [B, A, 4, E] of the distances in strides."""
        logits_BAK, bins_BAD = self.head(features)
        return logits_BAK, bins_BAD.unflatten(-1, (4, self.reg_max + 1))

    def anchors(self, grids: Grids, device: torch.device) -> Tensor:
        """Make the anchors [A, 4] of levels with these grids."""
        sizes = [_ANCHOR_STRIDES * stride for stride in self.strides]
        return grid_anchors(grids, device, strides=self.strides, sizes=sizes, ratios=(1.0,))

    def valid(self, grids: Grids, sizes_B2: Tensor) -> Tensor | None:
        """Mark the anchors whose center lies in the image, which is padded to multiples of 32 px as in the reference: bool [B, A]; None: all."""
        if not self.ignore_padding:
            return None
        anchors_A4 = self.anchors(grids, sizes_B2.device)
        x_A, y_A = ((anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2).unbind(-1)
        filled_B2 = (sizes_B2 + _FILLED - 1) // _FILLED * _FILLED
        return (y_A < filled_B2[:, :1]) & (x_A < filled_B2[:, 1:])

    def assign(self, grids: Grids, sizes_B2: Tensor, targets: Targets) -> tuple[Assignment, Thresholds]:
        """Assign an object to each anchor; label -1 marks anchors that are ignored."""
        anchors_A4 = self.anchors(grids, sizes_B2.device)
        present_BG = targets.labels_BG >= 0
        counts = [rows * columns for rows, columns in grids]
        valid_BA = self.valid(grids, sizes_B2)
        assigned, thresholds = assign_atss(
            anchors_A4, counts, targets.boxes_BG4, present_BG, valid_BA=valid_BA, unbiased_std=self.unbiased_std
        )
        if valid_BA is not None:
            assigned = replace(assigned, labels_BA=assigned.labels_BA.masked_fill(~valid_BA, -1))
        return assigned, thresholds

    def losses(
        self,
        outputs: tuple[Tensor, Tensor],
        grids: Grids,
        sizes_B2: Tensor,
        targets: Targets,
        ranks: Ranks = ONE_RANK,
        assigned: Assignment | None = None,
    ) -> dict[str, Tensor]:
        """Compute `loss_cls` (quality focal), `loss_box` (GIoU) and `loss_dfl` from the outputs of `forward`.

        Args:
            assigned: result of `assign`, if the caller has it already.
        """
        logits_BAK, bins_BA4E = outputs
        if assigned is None:
            assigned, _ = self.assign(grids, sizes_B2, targets)
        positive_BA = assigned.labels_BA == 1
        centers_A2, stride_A = self._cells(grids, logits_BAK.device)
        objects_BA4 = boxes.take(targets.boxes_BG4, assigned.objects_BA)
        # In strides from this line on: IoU does not change, and the numbers stay small.
        target_BA4 = (objects_BA4 - centers_A2.repeat(1, 2)) / stride_A[:, None]
        sides_BA4 = torch.cat((-target_BA4[..., :2], target_BA4[..., 2:]), dim=-1)
        # Where there is no object the weight is 0, and any finite box serves. Losses are computed at all anchors: selecting
        # the positives would make the host wait for a GPU.
        sides_BA4 = torch.where(positive_BA[..., None], sides_BA4, 1.0)
        target_BA4 = _around_origin(sides_BA4)
        predicted_BA4 = _around_origin(focal_losses.expected_distance(bins_BA4E))

        iou_BA = boxes.paired_iou(predicted_BA4.detach(), target_BA4)
        class_BA = targets.labels_of(assigned.objects_BA).clamp(min=0)
        quality_BA1 = torch.where(positive_BA, iou_BA, 0.0)[..., None]
        quality_BAK = torch.zeros_like(logits_BAK).scatter_(-1, class_BA[..., None], quality_BA1)
        qfl_BA = focal_losses.quality_focal_loss(logits_BAK, quality_BAK).sum(dim=-1)
        positives = ranks.total(positive_BA.sum(dim=1).clamp(min=1).sum()).clamp(min=1)
        loss_cls = torch.where(assigned.labels_BA >= 0, qfl_BA, 0.0).sum() * ranks.world_size / positives

        weight_BA = torch.where(positive_BA, self.scores(logits_BAK), 0.0)
        factor = ranks.world_size / ranks.total(weight_BA.sum()).clamp(min=self.weight_floor)
        giou_BA = box_losses.generalized_iou(predicted_BA4, target_BA4, box_losses.TORCHVISION_EPSILON)
        losses = {
            "loss_cls": loss_cls,
            "loss_box": self.box_weight * factor * torch.where(positive_BA, weight_BA * giou_BA, 0.0).sum(),
        }
        if self.dfl_weight:
            limit = self.reg_max - _BELOW_LAST_BIN
            dfl_BA = focal_losses.distribution_focal_loss(bins_BA4E, sides_BA4.clamp(0, limit)).mean(dim=-1)
            losses["loss_dfl"] = self.dfl_weight * factor * torch.where(positive_BA, weight_BA * dfl_BA, 0.0).sum()
        return losses

    @staticmethod
    def scores(logits_BAK: Tensor) -> Tensor:
        """Compute the best class's score [B, A] of every anchor, without gradient: the weight of a positive in the box losses."""
        return logits_BAK.detach().amax(dim=-1).sigmoid()

    def decode(self, values_BN4E: Tensor, index_BN: Tensor, grids: Grids) -> Tensor:
        """Decode boxes [B, N, 4] in pixels of the anchors `index_BN` from the logits of their distances."""
        centers_A2, stride_A = self._cells(grids, index_BN.device)
        distances_BN4 = focal_losses.expected_distance(values_BN4E) * stride_A[index_BN][..., None]
        centers_BN2 = centers_A2[index_BN]
        return torch.cat((centers_BN2 - distances_BN4[..., :2], centers_BN2 + distances_BN4[..., 2:]), dim=-1)

    def _cells(self, grids: Grids, device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute centers [A, 2] and strides [A] of the anchors."""
        anchors_A4 = self.anchors(grids, device)
        return (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2, (anchors_A4[:, 2] - anchors_A4[:, 0]) / _ANCHOR_STRIDES


def _around_origin(distances_4: Tensor) -> Tensor:
    """Make boxes [..., 4] with sides at these distances (left, top, right, bottom) from the origin."""
    return torch.cat((-distances_4[..., :2], distances_4[..., 2:]), dim=-1)
