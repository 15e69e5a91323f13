"""A detector in training under a moving teacher, its own average, on labeled and unlabeled images.

Labeled images have the detector's own losses. The teacher sees the weak view of an unlabeled image, the detector the strong view: the same pixels at
the same places in other colors, so that boxes and cells of one are those of the other. Losses on unlabeled images are normalized by themselves and
multiplied by `weight`. In the burn-in there are no unlabeled images.

R-CNN: the teacher's confident detections are pseudo-boxes (Unbiased Teacher, arXiv 2102.09480): the RPN learns them, and RoIs are sampled from them.
Classes: by default the teacher's probabilities for these RoIs, from its own maps (half the symmetric KL divergence, as `loss_roi_kd` in `rcnn.py`;
later stages of a cascade learn the classes of the pseudo-boxes). Sides: of boxes whose sides are certain (`pseudo_boxes.py`). No mask is learned.

GFL and RetinaNet: no pseudo-boxes, but the teacher's scores at all anchors, by quality focal loss (Dense Teacher, arXiv 2207.02541; outside of the
learning region the target is the teacher's score too, where the paper has 0) or by ADL (`adl.py`), and its boxes at the anchors with its highest
scores, by GIoU, weighted by these scores. The sum of these scores over all ranks divides both losses, except ADL, which has its own divisor.

`measured` tells how the teacher does: `pseudo_boxes`, boxes per image from the thresholds on; `certain_boxes`, those among them whose sides are
learned; `agreement`, of the regions that teacher or detector take for an object, the share that both give the same class; 0 where there is none.

Shapes: B images, R RoIs of an image, N = B * R, A anchors, M anchors of the learning region, K classes (K + 1 logits of RoIs, background last).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import for_sums
from ssld.stage2_detect.distill_config import ADLConfig, MovingTeacherConfig
from ssld.stage2_detect.distillation import pseudo_boxes
from ssld.stage2_detect.distillation.adl import adaptive_loss
from ssld.stage2_detect.distillation.losses import roi_kd
from ssld.stage2_detect.distillation.rcnn import count_labeled
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models import box_losses, boxes, focal_losses, postprocess
from ssld.stage2_detect.models.anchors import grids_of
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.rcnn import RCNN


class SemiSupervised(nn.Module):
    """A detector under its moving teacher, with the contract of a detector: in train mode `model(images, targets, weak)` -> the detector's losses on
    labeled images, and `loss_unlabeled_...`; in eval mode `model(images)` -> the detector's detections.

    Args:
        student: detector to train.
        teacher: its average; not part of this module's parameters, buffers or state.
        config: settings.
        thresholds_K: score of each class from which a detection is a pseudo-box, on the CPU.

    Attributes:
        measured: numbers about the teacher in the last forward pass, equal on every rank; empty without unlabeled images.
    """

    def __init__(
        self, student: Detector, teacher: FrozenDetector, config: MovingTeacherConfig, thresholds_K: Tensor
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.config = student, teacher, config
        self._thresholds_K = thresholds_K
        self._weight = config.unlabeled_weight(dense=isinstance(student, DenseDetector))
        self.measured: dict[str, Tensor] = {}

    def forward(
        self, images: ImageBatch, targets: Targets | None = None, weak: ImageBatch | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Compute losses in train mode, detections in eval mode.

        Args:
            images: the labeled images, then the strong views of the unlabeled ones.
            targets: those of `images`; `labeled_B` marks the labeled ones.
            weak: the weak views of the unlabeled images, padded to the size of `images`; None: there are none.
        """
        self.measured = {}
        if not self.training or weak is None:
            own: dict[str, Tensor] | list[Detections] = self.student(images, targets)
            return own
        assert targets is not None, "training needs targets"
        features, sizes_B2, labeled = self.student.features(images), images.sizes_B2, count_labeled(targets)
        losses, _ = self.student.losses(
            [maps[:labeled] for maps in features], sizes_B2[:labeled], targets.first(labeled), self.student.ranks
        )
        unlabeled, seeds_B = [maps[labeled:] for maps in features], targets.seeds_B[labeled:]
        teacher_features = self.teacher.features(weak)
        if isinstance(self.student, RCNN):
            terms = self._rcnn(self.student, unlabeled, teacher_features, weak, seeds_B)
        else:
            terms = self._dense(self.student, unlabeled, teacher_features, weak)
        return losses | {
            f"loss_unlabeled_{name.removeprefix('loss_')}": self._weight * term for name, term in terms.items()
        }

    def _rcnn(
        self,
        student: RCNN,
        features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        weak: ImageBatch,
        seeds_B: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the losses of an R-CNN on unlabeled images from its maps of the strong views and the teacher's of the weak ones."""
        ranks, heads, sizes_B2 = student.ranks, student.roi_heads, weak.sizes_B2
        pseudo = pseudo_boxes.pseudo_targets(self.teacher.detect(teacher_features, weak), self._thresholds_K, seeds_B)
        pseudo = replace(pseudo, regressed_BG=self._certain(teacher_features, pseudo, sizes_B2))
        losses, (sampled, logits_NK) = student.losses(features, sizes_B2, pseudo, ranks, masks=False)
        valid_N = sampled.valid_BR.flatten()
        teacher_NK = self.teacher.classify(teacher_features, sampled.rois_BR4, sampled.valid_BR)
        if self.config.soft:
            factor = heads.stages[0].loss_weight * ranks.world_size / ranks.total(valid_N.sum()).clamp(min=1)
            name = "loss_cls_0" if len(heads.stages) > 1 else "loss_cls"
            losses[name] = factor * roi_kd(logits_NK, teacher_NK, valid_N)
        class_N, teacher_class_N = logits_NK.argmax(dim=-1), teacher_NK.argmax(dim=-1)
        either_N = valid_N & ((class_N < heads.classes) | (teacher_class_N < heads.classes))
        present_BG = pseudo.labels_BG >= 0
        certain_BG = present_BG if pseudo.regressed_BG is None else present_BG & pseudo.regressed_BG
        counts = {"pseudo_boxes": present_BG.sum(), "certain_boxes": certain_BG.sum()}
        self._measure(len(sizes_B2), either_N, either_N & (class_N == teacher_class_N), counts)
        return losses

    def _certain(self, teacher_features: Sequence[Tensor], pseudo: Targets, sizes_B2: Tensor) -> Tensor | None:
        """Mark the pseudo-boxes whose sides are certain: bool [B, G]; None: all."""
        copies, (B, G) = self.config.box_jitter, pseudo.labels_BG.shape
        if not copies or not G:
            return None
        rois_BGJ4 = pseudo_boxes.shifted(pseudo.boxes_BG4, pseudo.seeds_B, copies)
        rois_BR4 = boxes.clip(rois_BGJ4.flatten(1, 2), sizes_B2)
        labels_BR = pseudo.labels_BG[..., None].expand(-1, -1, copies).flatten(1)
        refined_BRD4 = self.teacher.refine(teacher_features, rois_BR4, labels_BR >= 0, sizes_B2)
        refined_BR4 = pseudo_boxes.of_class(refined_BRD4, labels_BR)
        return pseudo_boxes.spread(refined_BR4.view(B, G, copies, 4), pseudo.boxes_BG4) < self.config.box_spread

    def _dense(
        self, student: DenseDetector, features: Sequence[Tensor], teacher_features: Sequence[Tensor], weak: ImageBatch
    ) -> dict[str, Tensor]:
        """Compute the losses of a one-stage detector on unlabeled images from its maps of the strong views and the teacher's of the weak ones."""
        head, ranks, grids = student.dense, student.ranks, grids_of(features)
        (logits_BAK, values), (teacher_BAK, teacher_values) = head(features), self.teacher.outputs(teacher_features)
        counted_BA = torch.ones_like(logits_BAK[..., 0], dtype=torch.bool)
        if isinstance(head, GFL) and (valid_BA := head.valid(grids, weak.sizes_B2)) is not None:
            counted_BA = valid_BA
        scores_BAK = teacher_BAK.sigmoid()
        best_BA = torch.where(counted_BA, scores_BAK.amax(dim=-1), 0.0)
        weight_BM, index_BM = best_BA.topk(math.ceil(self.config.dense_share * best_BA.shape[1]), dim=1)
        factor = ranks.world_size / ranks.total(weight_BM.sum()).clamp(min=1)
        if self.config.dense_loss == "adaptive":
            term = self.config.adl or ADLConfig()
            loss_cls = adaptive_loss(term, logits_BAK, teacher_BAK, counted_BA, ranks)
        else:
            quality_BA = focal_losses.quality_focal_loss(logits_BAK, scores_BAK).sum(dim=-1)
            loss_cls = factor * torch.where(counted_BA, quality_BA, 0.0).sum()
        row_B1 = torch.arange(len(index_BM), device=index_BM.device)[:, None]
        boxes_BM4 = head.decode(values[row_B1, index_BM], index_BM, grids)
        teacher_BM4 = head.decode(teacher_values[row_B1, index_BM], index_BM, grids)
        giou_BM = box_losses.generalized_iou(boxes_BM4, teacher_BM4, box_losses.TORCHVISION_EPSILON)
        scores_BMK, teacher_scores_BMK = logits_BAK.detach().sigmoid()[row_B1, index_BM], scores_BAK[row_B1, index_BM]
        self._measure_dense(student, scores_BMK, teacher_scores_BMK, boxes.clip(teacher_BM4, weak.sizes_B2))
        return {"loss_cls": loss_cls, "loss_box": factor * (weight_BM * giou_BM).sum()}

    def _measure_dense(
        self, student: DenseDetector, scores_BMK: Tensor, teacher_BMK: Tensor, teacher_boxes_BM4: Tensor
    ) -> None:
        """Set `measured` from the scores of both at the anchors of the learning region, and the teacher's boxes there."""
        found = postprocess.select(
            teacher_boxes_BM4[:, :, None],
            teacher_BMK,
            threshold=float(self._thresholds_K.min()) / 2,  # `select` takes the scores above it
            nms=postprocess.NMS(iou=student.nms_iou),
            most=student.detections_per_image,
        )
        # The boxes are counted, not sampled: any seeds will do.
        seeds_B = torch.zeros(len(teacher_BMK), dtype=torch.int64, device=teacher_BMK.device)
        pseudo = pseudo_boxes.pseudo_targets(found, self._thresholds_K, seeds_B)
        thresholds_K = self._thresholds_K.to(teacher_BMK.device)
        (best_BM, class_BM), (teacher_best_BM, teacher_class_BM) = (
            one.max(dim=-1) for one in (scores_BMK, teacher_BMK)
        )
        is_object_BM = best_BM >= thresholds_K[class_BM]
        is_teachers_BM = teacher_best_BM >= thresholds_K[teacher_class_BM]
        same_BM = is_object_BM & is_teachers_BM & (class_BM == teacher_class_BM)
        counts = {"pseudo_boxes": (pseudo.labels_BG >= 0).sum()}
        self._measure(len(teacher_BMK), is_object_BM | is_teachers_BM, same_BM, counts)

    def _measure(self, images: int, either: Tensor, same: Tensor, counts: Mapping[str, Tensor]) -> None:
        """Set `measured` from this rank's regions that either takes for an object, those that both give the same class, and numbers of boxes."""
        ranks = self.student.ranks
        totals = for_sums(ranks.total(torch.stack([either.sum(), same.sum(), *counts.values()])))
        per_image = totals[2:] / (images * ranks.world_size)
        self.measured = dict(zip(counts, per_image, strict=True)) | {"agreement": totals[1] / totals[0].clamp(min=1)}
