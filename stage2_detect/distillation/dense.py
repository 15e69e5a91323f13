"""Distillation of a one-stage student from a teacher with the same head, by the method of that head: `LD` for GFL, `ADL` for RetinaNet.

For either, PKD and CWD compare feature maps at all cells (`maps.py`), and CWD the class maps of a level: each class and anchor is a channel, a
distribution over the cells of an image.

Shapes: B images, A anchors of all levels, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from ssld.stage2_detect.distillation.adl import ADL
from ssld.stage2_detect.distillation.ld import LD
from ssld.stage2_detect.distillation.losses import channel_wise, inside_maps
from ssld.stage2_detect.distillation.maps import MapTerms
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.dense import DenseDetector, HeadPass, OneStageHead
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.retinanet import RetinaNet

_METHODS: tuple[type[LD | ADL], ...] = (LD, ADL)


class DistilledDense(nn.Module):
    """A student under a teacher, with the contract of a detector: in train mode `model(images, targets)` -> the student's losses and those of the
    terms; in eval mode `model(images)` -> the student's detections.

    Args:
        student: detector to train; its own losses stay as they are.
        teacher: detector of the same classes and anchors; not part of this module's parameters, buffers or state.
        terms: `LDConfig` for a GFL student, `ADLConfig` for a RetinaNet.
        pkd_weight, cwd_weight: factors on `loss_pkd` and `loss_cwd`, over P3..P7; see `MapTerms`.
        cwd_class_weight: factor on `loss_cwd_class`, over the class maps of P3..P7; 0 leaves it out.
        cwd_temperature: softmax temperature of both CWD terms.

    Raises:
        UserError: the teacher's head is of another kind, or has other anchors or bins; or imitation is on and its maps have another width.
    """

    def __init__(
        self,
        student: DenseDetector,
        teacher: FrozenDetector,
        terms: LDConfig | ADLConfig,
        *,
        pkd_weight: float = 0.0,
        cwd_weight: float = 0.0,
        cwd_class_weight: float = 0.0,
        cwd_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.method = _method(student, terms)
        _require_same_head(student, teacher, self.method)
        if isinstance(terms, LDConfig) and terms.imitation_weight and student.pyramid.channels != teacher.channels:
            raise UserError(
                f"distill.ld.imitation_weight: the teacher's maps have {teacher.channels} channels, the student's {student.pyramid.channels}; "
                "give both the same model.fpn_channels, or use distill.pkd_weight or cwd_weight, which adapt them"
            )
        self.student, self.teacher, self._head_weights = student, teacher, terms.weights
        self.cwd_class_weight, self.cwd_temperature = cwd_class_weight, cwd_temperature
        self.maps = MapTerms(
            student.pyramid.channels,
            teacher.channels,
            len(student.pyramid.strides),
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
        student_pass = HeadPass(features, self.student.dense(features))
        teacher_pass = HeadPass(teacher_features, self.teacher.outputs(teacher_features))
        sizes_B2 = images.sizes_B2
        losses = self.method.losses(student_pass, teacher_pass, sizes_B2, targets)
        if self.cwd_class_weight:
            inside = [
                inside_maps(sizes_B2, maps, stride).flatten(1)
                for maps, stride in zip(features, self.student.pyramid.strides, strict=True)
            ]
            divergence = class_divergence(
                student_pass.outputs[0], teacher_pass.outputs[0], inside, self.cwd_temperature
            )
            losses["loss_cwd_class"] = self.cwd_class_weight * divergence
        losses |= self.maps(features, teacher_features, self.student.pyramid.strides, sizes_B2)
        return losses

    def weights(self) -> dict[str, float]:
        """Return the factor of each term, by the name of its loss."""
        return {**self._head_weights, **self.maps.weights, "loss_cwd_class": self.cwd_class_weight}


def _method(student: DenseDetector, terms: LDConfig | ADLConfig) -> LD | ADL:
    """Return the losses between the heads."""
    head = student.dense
    if isinstance(head, GFL) and isinstance(terms, LDConfig):
        return LD(terms, head, student.ranks)
    assert isinstance(head, RetinaNet), "LD is for GFL, ADL for RetinaNet"
    assert isinstance(terms, ADLConfig), "LD is for GFL, ADL for RetinaNet"
    return ADL(terms, head, student.ranks)


def class_divergence(logits_BAK: Tensor, teacher_BAK: Tensor, inside: Sequence[Tensor], temperature: float) -> Tensor:
    """Compute the sum over the levels of `channel_wise` of the class logits, where each class of each anchor of a cell is a channel; `inside` marks
    the cells of each level that show the image, bool [B, P]."""
    B, A, K = logits_BAK.shape
    counts = [level_BP.shape[1] for level_BP in inside]
    per_cell = A // sum(counts)
    levels = zip(
        *(one.split([per_cell * count for count in counts], dim=1) for one in (logits_BAK, teacher_BAK)),
        inside,
        strict=True,
    )
    terms = [
        channel_wise(student.reshape(B, -1, per_cell * K), teacher.reshape(B, -1, per_cell * K), level_BP, temperature)
        for student, teacher, level_BP in levels
    ]
    return torch.stack(terms).sum()


def _require_same_head(student: DenseDetector, teacher: FrozenDetector, method: LD | ADL) -> None:
    """Raise UserError unless both have the same kind of head with equal anchors and bins."""
    start = f"distill.teacher: {teacher.facts.get('file')}:"
    student_head, model = student.dense, teacher.model
    teacher_head = model.dense if isinstance(model, DenseDetector) else model
    if type(teacher_head) is not type(student_head):
        name = teacher.facts.get("kind", type(teacher_head).__name__)
        instead = [f"; {one.instead}" for one in _METHODS if isinstance(teacher_head, one.head_type)]
        raise UserError(f"{start} it is a {name} detector, and {method.needs}{''.join(instead)}")
    assert isinstance(teacher_head, OneStageHead)
    if isinstance(student_head, GFL) and isinstance(teacher_head, GFL) and student_head.reg_max != teacher_head.reg_max:
        raise UserError(
            f"{start} its distances have reg_max {teacher_head.reg_max}, the student's {student_head.reg_max}; "
            f"set model.gfl.reg_max to {teacher_head.reg_max}"
        )
    grids = [(2, 2)] * len(student_head.strides)
    student_anchors, teacher_anchors = (
        head.anchors(grids, torch.device("cpu")) for head in (student_head, teacher_head)
    )
    if student_anchors.shape != teacher_anchors.shape or not torch.allclose(student_anchors, teacher_anchors):
        raise UserError(f"{start} its anchors are not the student's; only equal ones can be compared")
