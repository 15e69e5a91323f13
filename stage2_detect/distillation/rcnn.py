"""A teacher detector teaches an R-CNN student through its feature maps and its classification of regions.

Two terms, on labeled and on unlabeled images alike:

`loss_pkd`, PKD (arXiv 2207.02039, equations 2 and 3): maps of equal stride, each channel brought to zero mean and unit
variance over the pixels of the batch that show an image, then half the mean squared error, which is 1 - Pearson's
correlation. Levels P2..P5 are summed; P6 is every second pixel of P5. Where the widths differ, a 1x1 convolution a level
takes the student's maps to the teacher's width; it trains with the student and is dropped with the teacher.

`loss_roi_kd`: the teacher's first box head classifies the regions of the student (those it sampled for its own loss; on
unlabeled images its best proposals) from its own maps, and the student's first box head is to give the same
probabilities: SSLD's half of the symmetric KL divergence (arXiv 2103.05959), averaged over the regions of all ranks.

An image without labels has no part in the student's own losses, nor in the counts that they are divided by.

Shapes: B images, C channels of the student, D of the teacher, H rows, W columns, R regions of an image, N = B * R, K
classes, later K + 1 with background, last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.stage2_detect.distillation.losses import adapters, pyramid_correlation, roi_kd
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.rcnn import RCNN

_LEVELS = 4


class DistilledRCNN(nn.Module):
    """A student under a teacher, with the contract of a detector: in train mode `model(images, targets)` -> the student's losses and
    `loss_pkd`, `loss_roi_kd`, times their weights; in eval mode `model(images)` -> the student's detections.

    Images without labels come last in a batch, and at least one has labels.

    Args:
        student: its own losses stay as they are.
        teacher: of the same classes, in the student's order; no part of this module's parameters, buffers or state.
        pkd_weight, roi_weight: 0 leaves a term out.
        temperature: of `loss_roi_kd`.

    Attributes:
        adapters: one a level where the teacher's maps have another width and `loss_pkd` is on, else empty.
    """

    def __init__(
        self,
        student: RCNN,
        teacher: FrozenDetector,
        *,
        pkd_weight: float = 6.0,
        roi_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.pkd_weight, self.roi_weight, self.temperature = pkd_weight, roi_weight, temperature
        self.adapters = adapters(student.pyramid.channels, teacher.channels, _LEVELS if pkd_weight else 0)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """See the class."""
        if not self.training:
            detections: list[Detections] = self.student(images)
            return detections
        assert targets is not None, "training needs targets"
        features, guides = self.student.features(images), self.teacher.features(images)
        sizes_B2, labeled = images.sizes_B2, count_labeled(targets)
        losses, sampled, logits_NK = self.student.losses(
            [maps[:labeled] for maps in features], sizes_B2[:labeled], targets.first(labeled), self.student.ranks
        )
        if self.pkd_weight:
            losses["loss_pkd"] = self.pkd_weight * pyramid_correlation(
                features[:_LEVELS], guides, self.adapters, self.student.pyramid.strides, sizes_B2
            )
        if self.roi_weight:
            regions = [(sampled.rois_BR4, sampled.valid_BR, logits_NK)]
            if labeled < len(sizes_B2):
                regions.append(self._unlabeled_regions([maps[labeled:] for maps in features], sizes_B2[labeled:]))
            losses["loss_roi_kd"] = self.roi_weight * self._roi_kd(guides, regions)
        return losses

    def weights(self) -> dict[str, float]:
        """Of the terms, by the name of their losses."""
        return {"loss_pkd": self.pkd_weight, "loss_roi_kd": self.roi_weight}

    def _unlabeled_regions(self, features: Sequence[Tensor], sizes_B2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's best proposals, as many as it samples of a labeled image, and its logits for them."""
        heads = self.student.roi_heads
        proposals, _ = self.student.rpn(features, sizes_B2)
        rois_BR4, valid_BR = (part[:, : heads.samples_per_image] for part in (proposals.boxes_BR4, proposals.valid_BR))
        return rois_BR4, valid_BR, heads.classify(features, rois_BR4, valid_BR)

    def _roi_kd(self, guides: Sequence[Tensor], regions: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        ranks, start = self.student.ranks, 0
        divergences, counts = [], []
        for rois_BR4, valid_BR, logits_NK in regions:  # of consecutive images of the batch
            end = start + len(rois_BR4)
            teacher_NK = self.teacher.classify([maps[start:end] for maps in guides], rois_BR4, valid_BR)
            divergences.append(roi_kd(logits_NK, teacher_NK, valid_BR.flatten(), self.temperature))
            counts.append(valid_BR.sum())
            start = end
        # As the box heads' own losses: gradients are averaged over ranks, the count is of all of them.
        total = ranks.total(torch.stack(counts).sum()).clamp(min=1)
        return torch.stack(divergences).sum() * (ranks.world_size / total)


def count_labeled(targets: Targets) -> int:
    """How many images of the batch have labels: they come first, and there is at least one."""
    if targets.labeled_B is None:
        return len(targets.seeds_B)
    flags = targets.labeled_B.tolist()
    count = sum(flags)
    assert flags == sorted(flags, reverse=True), "images without labels come last"
    assert count, "a batch needs an image with labels"
    return count
