"""Box heads on regions of interest: N stages, each with its own head; one stage is Fast / Faster R-CNN, several are
Cascade R-CNN.

Sources: arXiv 1506.01497, 1612.03144 (levels), 1703.06870 (aligned pooling), 1712.00726 (stages); numbers and
normalisations as PaddleDetection@666f597f: background is the last logit, the box loss is L1 over positives divided by
all sampled RoIs, positives and negatives together. Later stages relabel the RoIs of the first instead of sampling anew,
and their objects are not appended again.

Losses divide by counts that depend on predictions. Such a count is of one micro-batch and summed over ranks by `total`;
since data-parallel training averages gradients over ranks, each rank's loss is multiplied by their number.

Shapes: B images, G objects, R RoIs of an image (some not valid), N = B * R, K classes (K + 1 logits in `logits_NK`),
D = K deltas a RoI or 1 if class-agnostic, later D detections of an image, C channels, F hidden features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_detect.models import assign, boxes, pooling, sampling
from stage2_detect.models.batch import Detections, ImageBatch, Targets
from stage2_detect.models.rpn import Proposals

_STREAM = 1  # of the sampling hash; the RPN has 0


@dataclass(frozen=True)
class BoxStage:
    """What one stage regresses to."""

    iou: float
    """RoIs at or above it are positive, all others negative."""
    weights: tuple[float, float, float, float]
    """Of the deltas."""
    loss_weight: float = 1.0


FASTER = (BoxStage(iou=0.5, weights=(10.0, 10.0, 5.0, 5.0)),)


class BoxHead(nn.Module):
    """Two fully connected layers, then K + 1 logits (background last) and 4 deltas for each class or for all together."""

    def __init__(self, *, features: int, hidden: int, classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.logits = nn.Linear(hidden, classes + 1)
        self.deltas = nn.Linear(hidden, 4 if class_agnostic else 4 * classes)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.logits, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """float32 logits [N, K + 1] and deltas [N, K or 1, 4]."""
        hidden_NF = F.relu(self.fc2(F.relu(self.fc1(pooled_NCHW.flatten(1)))))
        return self.logits(hidden_NF).float(), self.deltas(hidden_NF).float().unflatten(1, (-1, 4))


def _local(count: Tensor) -> Tensor:
    return count


class RoIHeads(nn.Module):
    """Proposals -> losses (`losses`) or detections (`detect`).

    Args:
        classes: K, without background.
        channels: of the feature maps.
        strides: of the feature maps that RoIs are pooled from, finest first; maps beyond them are ignored.
        stages: more than one needs `class_agnostic`.
        hidden: width of the fully connected layers.
        samples_per_image, positive_fraction: of the RoIs in the losses.
        random_sampling: False takes the first RoIs in index order.
        total: sums a scalar int64 count over ranks.
        world_size: number of ranks.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        stages: Sequence[BoxStage] = FASTER,
        class_agnostic: bool = False,
        hidden: int = 1024,
        pool_size: int = 7,
        samples_per_image: int = 512,
        positive_fraction: float = 0.25,
        random_sampling: bool = True,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        detections_per_image: int = 100,
        total: Callable[[Tensor], Tensor] = _local,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        assert class_agnostic or len(stages) == 1, "a later stage starts from one box a RoI, not from one a class"
        self.classes, self.stages, self.strides, self.pool_size = classes, tuple(stages), tuple(strides), pool_size
        self.samples_per_image, self.positive_fraction = samples_per_image, positive_fraction
        self.random_sampling = random_sampling
        self.score_threshold, self.nms_iou, self.detections_per_image = score_threshold, nms_iou, detections_per_image
        self.total, self.world_size = total, world_size
        self.heads = nn.ModuleList(
            BoxHead(features=channels * pool_size**2, hidden=hidden, classes=classes, class_agnostic=class_agnostic)
            for _ in stages
        )

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, sizes_B2: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box`; with several stages each has its number behind it, as `loss_cls_0`."""
        present_BG = targets.labels_BG >= 0
        rois_BR4 = torch.cat((proposals.boxes_BR4, targets.boxes_BG4), dim=1)
        valid_BR = torch.cat((proposals.valid_BR, present_BG), dim=1)
        losses: dict[str, Tensor] = {}
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            assigned = assign.assign(
                rois_BR4, targets.boxes_BG4, present_BG, positive_iou=stage.iou, negative_iou=stage.iou
            )
            positive_BR, objects_BR = valid_BR & (assigned.labels_BA == 1), assigned.objects_BA
            if number == 0:
                chosen = self._sample(positive_BR, valid_BR, targets.seeds_B)
                rois_BR4, objects_BR = boxes.take(rois_BR4, chosen.index_BS), objects_BR.gather(1, chosen.index_BS)
                valid_BR, positive_BR = chosen.valid_BS, chosen.positive_BS
            pooled = pooling.pool_rois(features, rois_BR4, valid_BR, strides=self.strides, size=self.pool_size)
            logits_NK, deltas_ND4 = head(pooled)
            loss_cls, loss_box = self._stage_losses(
                stage, logits_NK, deltas_ND4, rois_BR4, valid_BR, positive_BR, objects_BR, targets
            )
            suffix = f"_{number}" if len(self.stages) > 1 else ""
            losses[f"loss_cls{suffix}"], losses[f"loss_box{suffix}"] = loss_cls, loss_box
            if number + 1 < len(self.stages):
                rois_BR4 = self._refine(stage, deltas_ND4, rois_BR4, sizes_B2)
                valid_BR = valid_BR & (boxes.area(rois_BR4) > 0)
        return losses

    @torch.no_grad()
    def detect(self, features: Sequence[Tensor], proposals: Proposals, images: ImageBatch) -> list[Detections]:
        """What each image shows, in original coordinates."""
        # Valid proposals stand first: dropping the places that no image fills saves the heads' work.
        R = max(1, int(proposals.valid_BR.sum(dim=1).max()))
        rois_BR4, valid_BR = proposals.boxes_BR4[:, :R], proposals.valid_BR[:, :R]
        B = len(rois_BR4)
        scores = []
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True), start=1):
            pooled = pooling.pool_rois(features, rois_BR4, valid_BR, strides=self.strides, size=self.pool_size)
            logits_NK, deltas_ND4 = head(pooled)
            scores.append(logits_NK.softmax(dim=-1))
            if number < len(self.stages):
                rois_BR4 = self._refine(stage, deltas_ND4, rois_BR4, images.sizes_B2)
        # Each stage scored its own RoIs; the boxes are the last one's.
        scores_BRK = torch.stack(scores).mean(dim=0)[:, :-1].unflatten(0, (B, R)) * valid_BR[..., None]
        boxes_BRK4 = boxes.decode(deltas_ND4.unflatten(0, (B, R)), rois_BR4[:, :, None], stage.weights)
        boxes_BRK4 = boxes.clip(boxes_BRK4, images.sizes_B2).expand(-1, -1, self.classes, -1)
        return [
            self._select(boxes_RK4, scores_RK, size_2, scale)
            for boxes_RK4, scores_RK, size_2, scale in zip(
                boxes_BRK4, scores_BRK, images.sizes_B2, images.scales_B, strict=True
            )
        ]

    def _sample(self, positive_BR: Tensor, valid_BR: Tensor, seeds_B: Tensor) -> sampling.Sample:
        R = valid_BR.shape[1]
        labels_BR = torch.where(valid_BR, positive_BR.long(), -1)
        priority_BR = (
            sampling.hash_priority(seeds_B, R, _STREAM) if self.random_sampling else sampling.index_priority(seeds_B, R)
        )
        return sampling.sample(
            labels_BR, priority_BR, count=self.samples_per_image, positive_fraction=self.positive_fraction
        )

    def _stage_losses(
        self,
        stage: BoxStage,
        logits_NK: Tensor,
        deltas_ND4: Tensor,
        rois_BR4: Tensor,
        valid_BR: Tensor,
        positive_BR: Tensor,
        objects_BR: Tensor,
        targets: Targets,
    ) -> tuple[Tensor, Tensor]:
        if targets.labels_BG.shape[1] > 0:
            class_BR = torch.where(positive_BR, targets.labels_BG.gather(1, objects_BR), self.classes)
        else:
            class_BR = torch.full_like(objects_BR, self.classes)
        class_N = torch.where(valid_BR, class_BR, -1).flatten()
        entropy = F.cross_entropy(logits_NK, class_N, ignore_index=-1, reduction="sum")
        wanted_BR4 = boxes.encode(boxes.take(targets.boxes_BG4, objects_BR), rois_BR4, stage.weights)
        # The row of the object's class; where there is none any row does, its distance is not counted.
        row_N = class_N.clamp(0, deltas_ND4.shape[1] - 1)
        deltas_N4 = deltas_ND4[torch.arange(len(row_N), device=row_N.device), row_N]
        distance_N = (deltas_N4 - wanted_BR4.flatten(0, 1)).abs().sum(dim=-1)
        distance = torch.where(positive_BR.flatten(), distance_N, 0.0).sum()
        factor = stage.loss_weight * self.world_size / self.total(valid_BR.sum()).clamp(min=1)
        return entropy * factor, distance * factor

    def _refine(self, stage: BoxStage, deltas_N14: Tensor, rois_BR4: Tensor, sizes_B2: Tensor) -> Tensor:
        deltas_BR4 = deltas_N14.detach()[:, 0].view(rois_BR4.shape)
        return boxes.clip(boxes.decode(deltas_BR4, rois_BR4, stage.weights), sizes_B2)

    def _select(self, boxes_RK4: Tensor, scores_RK: Tensor, size_2: Tensor, scale: Tensor) -> Detections:
        roi_D, class_D = (scores_RK > self.score_threshold).nonzero(as_tuple=True)
        boxes_D4, scores_D = boxes_RK4[roi_D, class_D], scores_RK[roi_D, class_D]
        best_D = boxes.class_nms(boxes_D4, scores_D, class_D, self.nms_iou)[: self.detections_per_image]
        original_2 = (size_2 / scale + 0.5).floor()
        boxes_D4 = boxes.clip((boxes_D4[best_D] / scale)[None], original_2[None])[0]
        some_D = boxes.area(boxes_D4) > 0
        return Detections(boxes_D4[some_D], scores_D[best_D][some_D], class_D[best_D][some_D])
