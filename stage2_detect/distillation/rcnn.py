"""Distillation of an R-CNN student from a teacher's feature maps and its classification of RoIs.

Three terms, on labeled and on unlabeled images alike:

`loss_pkd`, PKD (arXiv 2207.02039, equations 2 and 3): maps of equal stride, each channel brought to zero mean and unit
variance over the pixels of the batch that show an image, then half the mean squared error, which is 1 - Pearson's
correlation. Levels P2..P5 are summed; P6 is every second pixel of P5.

`loss_cwd`, CWD (arXiv 2011.13256): the same maps, each channel of an image as a distribution over its cells (`maps.py`).

`loss_roi_kd`: the teacher's first box head classifies RoIs of the student (those sampled for the student's own loss; on
unlabeled images its best proposals) from the teacher's maps. These probabilities are the targets of the student's first
box head: half the symmetric KL divergence, as in SSLD (arXiv 2103.05959), averaged over the RoIs of all ranks.

Images without labels are neither in the student's own losses nor in the counts that these are divided by.

Shapes: B images, C channels of the student, D of the teacher, H rows, W columns, R RoIs of an image, N = B * R, K
classes, later K + 1 with background, last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.stage2_detect.distillation.losses import roi_kd
from ssld.stage2_detect.distillation.maps import MapTerms
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.rcnn import RCNN

_LEVELS = 4


class DistilledRCNN(nn.Module):
    """A student under a teacher, with the contract of a detector: in train mode `model(images, targets)` -> the student's losses and
    `loss_pkd`, `loss_cwd`, `loss_roi_kd`, times their weights; in eval mode `model(images)` -> the student's detections.

    Images without labels come last in a batch; at least one image has labels.

    Args:
        student: detector to train; its own losses stay as they are.
        teacher: detector of the same classes in the same order; not part of this module's parameters, buffers or state.
        pkd_weight, cwd_weight, cwd_temperature: see `MapTerms`.
        roi_weight: factor on `loss_roi_kd`; 0 leaves it out.
        temperature: softmax temperature of `loss_roi_kd`.
    """

    def __init__(
        self,
        student: RCNN,
        teacher: FrozenDetector,
        *,
        pkd_weight: float = 6.0,
        cwd_weight: float = 0.0,
        cwd_temperature: float = 1.0,
        roi_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.roi_weight, self.temperature = roi_weight, temperature
        self.maps = MapTerms(
            student.pyramid.channels,
            teacher.channels,
            _LEVELS,
            pkd_weight=pkd_weight,
            cwd_weight=cwd_weight,
            cwd_temperature=cwd_temperature,
        )

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Compute losses in train mode, detections in eval mode."""
        if not self.training:
            detections: list[Detections] = self.student(images)
            return detections
        assert targets is not None, "training needs targets"
        features, teacher_features = self.student.features(images), self.teacher.features(images)
        sizes_B2, labeled = images.sizes_B2, count_labeled(targets)
        losses, (sampled, logits_NK) = self.student.losses(
            [maps[:labeled] for maps in features], sizes_B2[:labeled], targets.first(labeled), self.student.ranks
        )
        losses |= self.maps(features, teacher_features, self.student.pyramid.strides, sizes_B2)
        if self.roi_weight:
            rois = [(sampled.rois_BR4, sampled.valid_BR, logits_NK)]
            if labeled < len(sizes_B2):
                rois.append(self._unlabeled_rois([maps[labeled:] for maps in features], sizes_B2[labeled:]))
            losses["loss_roi_kd"] = self.roi_weight * self._roi_kd(teacher_features, rois)
        return losses

    def weights(self) -> dict[str, float]:
        """Return the factor of each term, by the name of its loss."""
        return {**self.maps.weights, "loss_roi_kd": self.roi_weight}

    def _unlabeled_rois(self, features: Sequence[Tensor], sizes_B2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's best proposals, as many as it samples from a labeled image, and its logits for them."""
        heads = self.student.roi_heads
        # A second NMS, for which a GPU is waited for: the RPN's losses and sums are those of the labeled images alone.
        proposals, _ = self.student.rpn(features, sizes_B2)
        rois_BR4, valid_BR = (part[:, : heads.samples_per_image] for part in (proposals.boxes_BR4, proposals.valid_BR))
        return rois_BR4, valid_BR, heads.classify(features, rois_BR4, valid_BR)

    def _roi_kd(self, teacher_features: Sequence[Tensor], rois: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        ranks, start = self.student.ranks, 0
        divergences, counts = [], []
        for rois_BR4, valid_BR, logits_NK in rois:  # parts of the batch, one after the other
            end = start + len(rois_BR4)
            teacher_NK = self.teacher.classify([maps[start:end] for maps in teacher_features], rois_BR4, valid_BR)
            divergences.append(roi_kd(logits_NK, teacher_NK, valid_BR.flatten(), self.temperature))
            counts.append(valid_BR.sum())
            start = end
        # As in the box heads' own losses: gradients are averaged over ranks, and the count covers all ranks.
        total = ranks.total(torch.stack(counts).sum()).clamp(min=1)
        return torch.stack(divergences).sum() * (ranks.world_size / total)


def count_labeled(targets: Targets) -> int:
    """Return the number of images with labels: they come first, and there is at least one."""
    if targets.labeled_B is None:
        return len(targets.seeds_B)
    flags = targets.labeled_B.tolist()
    count = sum(flags)
    assert flags == sorted(flags, reverse=True), "images without labels come last"
    assert count, "a batch needs an image with labels"
    return count
