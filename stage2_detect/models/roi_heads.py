"""Box heads on regions of interest: N stages, each with its own head; one stage is Fast / Faster R-CNN, several are
Cascade R-CNN.

Sources: arXiv 1506.01497, 1612.03144 (levels), 1703.06870 (aligned pooling), 1712.00726 (stages); numbers and divisors as
in PaddleDetection@666f597f: background is the last logit, the box loss is a sum over positives divided by all sampled
RoIs, positives and negatives together. Later stages relabel the RoIs of the first in place of sampling again.

Losses are divided by counts that depend on predictions: counts of one micro-batch, summed over ranks.

Shapes: B images, G objects, R RoIs of an image (some not valid), N = B * R, K classes (K + 1 logits in `logits_NK`),
D = K boxes per RoI, or 1 if class-agnostic, C channels, F hidden features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import assign, boxes, kernels, pooling, postprocess, sampling
from ssld.stage2_detect.models.batch import Detections, Targets
from ssld.stage2_detect.models.box_losses import L1, BoxLoss
from ssld.stage2_detect.models.norms import Norm, RoIConvolutions
from ssld.stage2_detect.models.rpn import Proposals

_STREAM = 1  # stream of the sampling hash; the RPN uses 0


@dataclass(frozen=True)
class BoxStage:
    """Regression target and loss weight of one stage."""

    positive_iou: float
    """IoU from which a RoI is positive; all others are negative."""
    delta_weights: tuple[float, float, float, float]
    """Factors on the deltas of x, y, width, height."""
    loss_weight: float = 1.0


FASTER = (BoxStage(positive_iou=0.5, delta_weights=(10.0, 10.0, 5.0, 5.0)),)


@dataclass(frozen=True)
class SampledRoIs:
    """RoIs of one stage's losses, and their objects. Those of the first stage are also used by the mask head and by distillation."""

    rois_BR4: Tensor
    """float32, in coordinates of the network's input; without gradient."""
    valid_BR: Tensor
    """bool: False is padding."""
    positive_BR: Tensor
    """bool; implies valid."""
    objects_BR: Tensor
    """int64 index of the RoI's object in the targets; meaningful for positives only."""


class BoxHead(RoIConvolutions):
    """Convolutions, one or two fully connected layers, then K + 1 logits (background last) and 4 deltas for each class or for all together."""

    def __init__(
        self,
        *,
        channels: int,
        pool_size: int,
        hidden: int,
        convolutions: int,
        fully_connected: int,
        norm: Norm,
        freeze_norm: bool,
        classes: int,
        class_agnostic: bool,
    ) -> None:
        super().__init__(
            channels=channels, hidden=channels, convolutions=convolutions, norm=norm, freeze_norm=freeze_norm
        )
        self.fc1 = nn.Linear(channels * pool_size**2, hidden)
        self.fc2 = nn.Linear(hidden, hidden) if fully_connected == 2 else None
        self.logits = nn.Linear(hidden, classes + 1)
        self.deltas = nn.Linear(hidden, 4 if class_agnostic else 4 * classes)
        connected = [layer for layer in (self.fc1, self.fc2) if layer is not None]
        for layer in connected:
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (*connected, self.logits, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled_NCHW: Tensor, valid_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute float32 logits [N, K + 1] and deltas [N, K or 1, 4]; with `valid_N` (bool) those of other RoIs mean nothing."""
        hidden_NF = F.relu(self.fc1(self.convolve(pooled_NCHW, valid_N).flatten(1)))
        if self.fc2 is not None:
            hidden_NF = F.relu(self.fc2(hidden_NF))
        return self.logits(hidden_NF).float(), self.deltas(hidden_NF).float().unflatten(1, (-1, 4))


class RoIHeads(pooling.PoolsRoIs, nn.Module):
    """Proposals -> losses (`losses`) or detections (`detect_network`).

    Args:
        classes: K, without background.
        channels: width of the feature maps.
        strides: pixels per cell of the feature maps that RoIs are pooled from, finest first; further maps are ignored.
        stages: more than one needs `class_agnostic`.
        class_agnostic: predict one box per RoI in place of one per class.
        add_gt_each_stage: append the objects to the RoIs of later stages, as to those of the first.
        score_rois: RoIs that each stage scores in evaluation, its own or the last stage's.
        average_of: what is averaged over the stages in evaluation, probabilities of the classes or logits.
        hidden: width of the fully connected layers.
        convolutions, fully_connected: number of convolutions (of the maps' width) and of fully connected layers.
        norm, freeze_norm: norm after the convolutions, see `norms.norm_layer`.
        pool_size, sampling_ratio, aligned: see `pooling.pool_rois`.
        samples_per_image: RoIs per image in the losses.
        positive_fraction: largest share of positives among them.
        sampling: `random`; `first` takes RoIs in index order; `libra` spreads negatives over `libra_bins` bins of IoU.
        box_loss: loss of the deltas.
        score_threshold, nms, detections_per_image: see `postprocess.select`.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        stages: Sequence[BoxStage] = FASTER,
        class_agnostic: bool = False,
        add_gt_each_stage: bool = False,
        score_rois: Literal["own", "last"] = "own",
        average_of: Literal["probabilities", "logits"] = "probabilities",
        hidden: int = 1024,
        convolutions: int = 0,
        fully_connected: int = 2,
        norm: Norm = "none",
        freeze_norm: bool = False,
        pool_size: int = 7,
        sampling_ratio: int = 0,
        aligned: bool = True,
        samples_per_image: int = 512,
        positive_fraction: float = 0.25,
        sampling: Literal["random", "first", "libra"] = "random",
        libra_bins: int = 3,
        box_loss: BoxLoss = L1,
        score_threshold: float = 0.05,
        nms: postprocess.NMS = postprocess.HARD,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        assert class_agnostic or len(stages) == 1, (
            "several stages need class_agnostic: a later stage starts from one box per RoI"
        )
        self.classes, self.stages, self.strides, self.pool_size = classes, tuple(stages), tuple(strides), pool_size
        self.add_gt_each_stage, self.score_rois, self.average_of = add_gt_each_stage, score_rois, average_of
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        self.samples_per_image, self.positive_fraction = samples_per_image, positive_fraction
        self.sampling, self.libra_bins = sampling, libra_bins
        self.box_loss = box_loss
        self.score_threshold, self.nms, self.detections_per_image = score_threshold, nms, detections_per_image
        self.heads = nn.ModuleList(
            BoxHead(
                channels=channels,
                pool_size=pool_size,
                hidden=hidden,
                convolutions=convolutions,
                fully_connected=fully_connected,
                norm=norm,
                freeze_norm=freeze_norm,
                classes=classes,
                class_agnostic=class_agnostic,
            )
            for _ in stages
        )

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> SampledRoIs:
        """Sample the RoIs of the first stage's losses from the proposals and the objects; each image's positives come first."""
        rois_BR4, valid_BR = _with_objects(proposals.boxes_BR4, proposals.valid_BR, targets)
        assigned = self._assign(self.stages[0], rois_BR4, targets)
        positive_BR = valid_BR & (assigned.labels_BA == 1)
        chosen = self._choose(positive_BR, valid_BR, assigned.ious_BA, targets.seeds_B)
        return SampledRoIs(
            boxes.take(rois_BR4, chosen.index_BS),
            chosen.valid_BS,
            chosen.positive_BS,
            assigned.objects_BA.gather(1, chosen.index_BS),
        )

    def losses(
        self,
        features: Sequence[Tensor],
        sampled: SampledRoIs,
        sizes_B2: Tensor,
        targets: Targets,
        ranks: Ranks = ONE_RANK,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses of all stages.

        Returns:
            `loss_cls` and `loss_box`, with several stages each followed by its number, as `loss_cls_0`; and the first
            stage's float32 logits [N, K + 1] of the sampled RoIs, with gradient.
        """
        rois_BR4, valid_BR = sampled.rois_BR4, sampled.valid_BR
        losses: dict[str, Tensor] = {}
        logits: list[Tensor] = []
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if number > 0:
                sampled = self._relabel(stage, rois_BR4, valid_BR, targets)
            rois_BR4, valid_BR = sampled.rois_BR4, sampled.valid_BR
            logits_NK, deltas_ND4 = head(self._pool(features, rois_BR4, valid_BR), valid_BR.flatten())
            logits.append(logits_NK)
            loss_cls, loss_box = self._stage_losses(stage, logits_NK, deltas_ND4, sampled, targets, ranks)
            suffix = f"_{number}" if len(self.stages) > 1 else ""
            losses[f"loss_cls{suffix}"], losses[f"loss_box{suffix}"] = loss_cls, loss_box
            if number + 1 < len(self.stages):
                rois_BR4 = self._refine(stage, deltas_ND4, rois_BR4, sizes_B2)
                valid_BR = valid_BR & (boxes.area(rois_BR4) > 0)
        return losses, logits[0]

    def classify(self, features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor) -> Tensor:
        """Compute float32 logits [N, K + 1] of the first stage for given RoIs, in coordinates of the network's input; those
        of RoIs that are not valid are meaningless.
        """
        logits_NK: Tensor = self.heads[0](self._pool(features, rois_BR4, valid_BR), valid_BR.flatten())[0]
        return logits_NK

    @torch.no_grad()
    def detect_network(self, features: Sequence[Tensor], proposals: Proposals, sizes_B2: Tensor) -> list[Detections]:
        """Detections of each image, in coordinates of the network's input, on the CPU: one copy from the device per batch."""
        if kernels.on_host(proposals.valid_BR):
            # Valid proposals stand first: dropping the places that no image fills saves the heads' work. A GPU would have to be
            # waited for to know how many these are.
            R = max(1, int(proposals.valid_BR.sum(dim=1).max()))
            proposals = Proposals(proposals.boxes_BR4[:, :R], proposals.valid_BR[:, :R])
        boxes_BRD4, scores_BRK = self.score(features, proposals, sizes_B2)
        return postprocess.select(
            boxes_BRD4, scores_BRK, threshold=self.score_threshold, nms=self.nms, most=self.detections_per_image
        )

    @torch.no_grad()
    def score(self, features: Sequence[Tensor], proposals: Proposals, sizes_B2: Tensor) -> tuple[Tensor, Tensor]:
        """Compute boxes [B, R, D, 4] inside the images and scores [B, R, K] of proposals; scores are 0 for those that are not valid."""
        rois_BR4, valid_BR = proposals.boxes_BR4, proposals.valid_BR
        B, R = valid_BR.shape
        logits = []
        for number, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True), start=1):
            pooled_NCHW = self._pool(features, rois_BR4, valid_BR)
            logits_NK, deltas_ND4 = head(pooled_NCHW)
            logits.append(logits_NK)
            if number < len(self.stages):
                rois_BR4 = self._refine(stage, deltas_ND4, rois_BR4, sizes_B2)
        if self.score_rois == "last":
            logits[:-1] = [head(pooled_NCHW)[0] for head in self.heads[:-1]]
        # Whichever RoIs were scored, the boxes are the last stage's.
        if self.average_of == "logits":
            scores_NK = torch.stack(logits).mean(dim=0).softmax(dim=-1)
        else:
            scores_NK = torch.stack([logits_NK.softmax(dim=-1) for logits_NK in logits]).mean(dim=0)
        scores_BRK = scores_NK[:, :-1].unflatten(0, (B, R)) * valid_BR[..., None]
        boxes_BRD4 = boxes.decode(deltas_ND4.unflatten(0, (B, R)), rois_BR4[:, :, None], stage.delta_weights)
        return boxes.clip(boxes_BRD4, sizes_B2), scores_BRK

    def _assign(self, stage: BoxStage, rois_BR4: Tensor, targets: Targets) -> assign.Assignment:
        return assign.assign(
            rois_BR4,
            targets.boxes_BG4,
            targets.labels_BG >= 0,
            positive_iou=stage.positive_iou,
            negative_iou=stage.positive_iou,
        )

    def _relabel(self, stage: BoxStage, rois_BR4: Tensor, valid_BR: Tensor, targets: Targets) -> SampledRoIs:
        """Return the RoIs of a later stage, which are not sampled again, with objects by its own IoU."""
        if self.add_gt_each_stage:
            rois_BR4, valid_BR = _with_objects(rois_BR4, valid_BR, targets)
        assigned = self._assign(stage, rois_BR4, targets)
        return SampledRoIs(rois_BR4, valid_BR, valid_BR & (assigned.labels_BA == 1), assigned.objects_BA)

    def _choose(self, positive_BR: Tensor, valid_BR: Tensor, ious_BR: Tensor, seeds_B: Tensor) -> sampling.Sample:
        R = valid_BR.shape[1]
        count, fraction = self.samples_per_image, self.positive_fraction
        labels_BR = torch.where(valid_BR, positive_BR.long(), -1)
        if self.sampling == "first":
            return sampling.sample(
                labels_BR, sampling.index_priority(seeds_B, R), count=count, positive_fraction=fraction
            )
        priority_BR = sampling.hash_priority(seeds_B, R, _STREAM)
        if self.sampling == "libra":
            priority_BR = sampling.spread_priority(
                labels_BR, ious_BR, priority_BR, count=count, positive_fraction=fraction, bins=self.libra_bins
            )
        return sampling.sample(labels_BR, priority_BR, count=count, positive_fraction=fraction)

    def _stage_losses(
        self,
        stage: BoxStage,
        logits_NK: Tensor,
        deltas_ND4: Tensor,
        sampled: SampledRoIs,
        targets: Targets,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of the classes and of the boxes of one stage from its outputs for the sampled RoIs."""
        valid_BR, positive_BR, objects_BR = sampled.valid_BR, sampled.positive_BR, sampled.objects_BR
        class_BR = torch.where(positive_BR, targets.labels_of(objects_BR), self.classes)
        class_N = torch.where(valid_BR, class_BR, -1).flatten()
        entropy = F.cross_entropy(logits_NK, class_N, ignore_index=-1, reduction="sum")
        target_BR4 = boxes.encode(boxes.take(targets.boxes_BG4, objects_BR), sampled.rois_BR4, stage.delta_weights)
        # The row of the object's class. For RoIs that are not positive the deltas are replaced by a perfect prediction before
        # the loss: an infinite gradient, multiplied by the zero of `where`, would be NaN.
        row_N = class_N.clamp(0, deltas_ND4.shape[1] - 1)
        deltas_N4 = deltas_ND4[torch.arange(len(row_N), device=row_N.device), row_N]
        positive_N = targets.fits(positive_BR, objects_BR).flatten()
        deltas_N4 = torch.where(positive_N[:, None], deltas_N4, 0.0)
        target_N4 = torch.where(positive_N[:, None], target_BR4.flatten(0, 1), 0.0)
        distance = torch.where(positive_N, self.box_loss(deltas_N4, target_N4, stage.delta_weights), 0.0).sum()
        factor = stage.loss_weight * ranks.world_size / ranks.total(valid_BR.sum()).clamp(min=1)
        box_factor = factor
        if self.box_loss.normalization == "positives":
            box_factor = factor * self.classes / ranks.total(positive_BR.sum()).clamp(min=1)
        return entropy * factor, distance * box_factor

    def _refine(self, stage: BoxStage, deltas_N14: Tensor, rois_BR4: Tensor, sizes_B2: Tensor) -> Tensor:
        deltas_BR4 = deltas_N14.detach()[:, 0].view(rois_BR4.shape)
        return boxes.clip(boxes.decode(deltas_BR4, rois_BR4, stage.delta_weights), sizes_B2)


def _with_objects(rois_BR4: Tensor, valid_BR: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Append the objects to the RoIs."""
    return torch.cat((rois_BR4, targets.boxes_BG4), dim=1), torch.cat((valid_BR, targets.labels_BG >= 0), dim=1)
