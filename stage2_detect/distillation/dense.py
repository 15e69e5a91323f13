"""Distillation of a one-stage student from a teacher with the same head: LD for GFL, adaptive distillation for RetinaNet.

LD (arXiv 2102.12252; HikariTJU/LD@4287990c, ld_head.py) compares the heads' logits on the same batch: distributions of distances and classes at the
student's positives (main) and at the cells around them or all negatives (VLR). ADL (arXiv 1901.00366;
Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa) compares classes at every anchor that is not ignored. Imitation compares feature maps at
chosen cells, also on levels without positives, which the released code leaves out. For either kind, PKD and CWD compare feature maps at all cells
(`maps.py`), and CWD the class maps of a level: each class and anchor is a channel, a distribution over the cells of an image.

In the released code of LD, sums over the images of a process are not divided, so the strength of the terms depends on their number: `reference`.
`global` is twice the mean over the images of the global batch: equal to `reference` at two images per process, on any number of ranks.

Shapes: B images, A anchors of all levels, K classes, E bins of a distance, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.shared.errors import UserError
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.distillation.losses import (
    adaptive_distillation,
    adaptive_normalizer,
    channel_wise,
    inside_maps,
    localization_distillation,
    soft_divergence,
)
from ssld.stage2_detect.distillation.maps import MapTerms
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.anchors import Grids, grids_of
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.dense import DenseDetector, Outputs
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.retinanet import RetinaNet

_SIDES = 4
_RELEASED_IMAGES = 2  # images per process at which `global` equals `reference`


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
        assert isinstance(student.dense, GFL if isinstance(terms, LDConfig) else RetinaNet), (
            "LD is for GFL, ADL for RetinaNet"
        )
        _require_same_head(student, teacher)
        if isinstance(terms, LDConfig) and terms.imitation_weight and student.pyramid.channels != teacher.channels:
            raise UserError(
                f"distill.ld.imitation_weight: the teacher's maps have {teacher.channels} channels, the student's {student.pyramid.channels}; "
                "give both the same model.fpn_channels, or use distill.pkd_weight or cwd_weight, which adapt them"
            )
        self.student, self.teacher, self.terms = student, teacher, terms
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
        head, terms = self.student.dense, self.terms
        outputs, teacher_outputs = head(features), self.teacher.outputs(teacher_features)
        grids, sizes_B2 = grids_of(features), images.sizes_B2
        losses: dict[str, Tensor] = {}
        if isinstance(head, GFL) and isinstance(terms, LDConfig):
            losses = losses_under_ld(
                terms, head, outputs, teacher_outputs, grids, sizes_B2, targets, self.student.ranks
            )
            if terms.imitation_weight:
                cells_BA = imitated_cells(terms, head, outputs, teacher_outputs, grids, sizes_B2, targets)
                error = _map_error(features, teacher_features, cells_BA, terms, self.student.ranks)
                losses["loss_imitation"] = terms.imitation_weight * error
        elif isinstance(head, RetinaNet) and isinstance(terms, ADLConfig):
            losses = losses_under_adl(
                terms, head, outputs, teacher_outputs, grids, sizes_B2, targets, self.student.ranks
            )
        if self.cwd_class_weight:
            inside = [
                inside_maps(sizes_B2, maps, stride).flatten(1)
                for maps, stride in zip(features, self.student.pyramid.strides, strict=True)
            ]
            divergence = class_divergence(outputs[0], teacher_outputs[0], inside, self.cwd_temperature)
            losses["loss_cwd_class"] = self.cwd_class_weight * divergence
        losses |= self.maps(features, teacher_features, self.student.pyramid.strides, sizes_B2)
        return losses

    def weights(self) -> dict[str, float]:
        """Return the factor of each term, by the name of its loss."""
        if isinstance(self.terms, ADLConfig):
            return {"loss_adl": self.terms.weight, **self._map_weights()}
        terms = self.terms
        return {
            "loss_ld": terms.ld_weight,
            "loss_ld_vlr": terms.ld_vlr_weight,
            "loss_kd": terms.kd_weight,
            "loss_kd_vlr": terms.kd_vlr_weight,
            "loss_imitation": terms.imitation_weight,
            **self._map_weights(),
        }

    def _map_weights(self) -> dict[str, float]:
        return {**self.maps.weights, "loss_cwd_class": self.cwd_class_weight}


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


def losses_under_ld(
    terms: LDConfig,
    head: GFL,
    outputs: Outputs,
    teacher_outputs: Outputs,
    grids: Grids,
    sizes_B2: Tensor,
    targets: Targets,
    ranks: Ranks = ONE_RANK,
) -> dict[str, Tensor]:
    """Compute the head's own losses and the terms of LD from the student's outputs and the teacher's, without those of feature maps."""
    assigned, thresholds = head.assign(grids, sizes_B2, targets)
    losses = head.losses(outputs, grids, sizes_B2, targets, ranks, assigned)
    (logits_BAK, bins_BA4E), (teacher_BAK, teacher_BA4E) = outputs, teacher_outputs
    positive_BA = assigned.labels_BA == 1
    region_BA = torch.zeros_like(assigned.ious_BA)
    if (terms.ld_vlr_weight or terms.kd_vlr_weight) and terms.valuable_region == "negatives":
        region_BA = regions.negatives(assigned.labels_BA, head.scores(logits_BAK))
    elif terms.ld_vlr_weight or terms.kd_vlr_weight:
        region_BA = regions.valuable_region(
            head.anchors(grids, sizes_B2.device),
            targets.boxes_BG4,
            thresholds.region_BG,
            valid_BA=head.valid(grids, sizes_B2),
            gamma=terms.gamma,
            overlap=terms.overlap,
        )
    factor = 1.0 if terms.normalization == "reference" else _RELEASED_IMAGES / len(logits_BAK)
    if terms.ld_weight or terms.ld_vlr_weight:
        ld_BA = localization_distillation(bins_BA4E, teacher_BA4E, terms.ld_temperature)
        if terms.ld_weight:
            score_BA = torch.where(positive_BA, head.scores(logits_BAK), 0.0)
            losses["loss_ld"] = terms.ld_weight * factor * (score_BA * ld_BA).sum()
        if terms.ld_vlr_weight:
            losses["loss_ld_vlr"] = terms.ld_vlr_weight / _SIDES * factor * (region_BA * ld_BA).sum()
    if terms.kd_weight or terms.kd_vlr_weight:
        kd_BA = soft_divergence(logits_BAK, teacher_BAK, terms.kd_temperature)
        if terms.kd_weight:
            losses["loss_kd"] = terms.kd_weight * _level_means(kd_BA, positive_BA, grids, terms, ranks)
        if terms.kd_vlr_weight:
            losses["loss_kd_vlr"] = terms.kd_vlr_weight * _level_means(kd_BA, region_BA > 0, grids, terms, ranks)
    return losses


def losses_under_adl(
    term: ADLConfig,
    head: RetinaNet,
    outputs: Outputs,
    teacher_outputs: Outputs,
    grids: Grids,
    sizes_B2: Tensor,
    targets: Targets,
    ranks: Ranks = ONE_RANK,
) -> dict[str, Tensor]:
    """Compute the head's own losses and `loss_adl` from the student's outputs and the teacher's."""
    assigned = head.assign(grids, sizes_B2, targets)
    losses = head.losses(outputs, grids, sizes_B2, targets, ranks, assigned)
    if not term.weight:
        return losses
    return losses | {"loss_adl": adaptive_loss(term, outputs[0], teacher_outputs[0], assigned.labels_BA >= 0, ranks)}


def adaptive_loss(
    term: ADLConfig, logits_BAK: Tensor, teacher_BAK: Tensor, counted_BA: Tensor, ranks: Ranks = ONE_RANK
) -> Tensor:
    """Compute ADL times its weight: a sum over the anchors that `counted_BA` marks, divided by the teacher's probabilities at all anchors."""
    loss_BAK = adaptive_distillation(logits_BAK, teacher_BAK, beta=term.beta, gamma=term.gamma, form=term.form)
    # As in the released code, ignored anchors are not in the sum, but they are in the divisor.
    total = torch.where(counted_BA, loss_BAK.sum(dim=-1), 0.0).sum()
    mass = adaptive_normalizer(teacher_BAK)
    if term.normalization == "global":
        total, mass = total * ranks.world_size, ranks.total(mass)
    return term.weight * total / mass.clamp(min=1)


def imitated_cells(
    terms: LDConfig,
    head: GFL,
    outputs: Outputs,
    teacher_outputs: Outputs,
    grids: Grids,
    sizes_B2: Tensor,
    targets: Targets,
) -> Tensor:
    """Mark the cells at which the student's maps imitate the teacher's: bool [B, A]."""
    valid_BA = head.valid(grids, sizes_B2)
    if terms.imitated_cells == "gi":
        index_BA = torch.arange(outputs[0].shape[1], device=sizes_B2.device).expand(len(sizes_B2), -1)
        return regions.general_instances(
            outputs[0],
            teacher_outputs[0],
            head.decode(outputs[1], index_BA, grids),
            head.decode(teacher_outputs[1], index_BA, grids),
            [rows * columns for rows, columns in grids],
            valid_BA=valid_BA,
        )
    region = regions.inside_objects if terms.imitated_cells == "inside" else regions.fine_grained
    anchors_A4 = head.anchors(grids, sizes_B2.device)
    return region(anchors_A4, targets.boxes_BG4, targets.labels_BG >= 0, valid_BA=valid_BA)


def _map_error(
    features: Sequence[Tensor], teacher_features: Sequence[Tensor], cells_BA: Tensor, terms: LDConfig, ranks: Ranks
) -> Tensor:
    """Compute the sum over the levels of the mean squared error of maps of equal width at the chosen cells."""
    errors = [
        (maps.float() - teacher_maps.float()).square().mean(dim=1)
        for maps, teacher_maps in zip(features, teacher_features, strict=True)
    ]
    errors_BA = torch.cat([error.flatten(1) for error in errors], dim=1)
    return _level_means(errors_BA, cells_BA, grids_of(features), terms, ranks)


def _level_means(values_BA: Tensor, chosen_BA: Tensor, grids: Grids, terms: LDConfig, ranks: Ranks) -> Tensor:
    """Compute the sum over the levels of the mean of the chosen values; `global` counts those of all ranks."""
    counts = [rows * columns for rows, columns in grids]
    sums = torch.stack([part.sum() for part in torch.where(chosen_BA, values_BA, 0.0).split(counts, dim=1)])
    chosen = torch.stack([part.sum() for part in chosen_BA.split(counts, dim=1)])
    if terms.normalization == "reference":
        return (sums / chosen.clamp(min=1)).sum()
    return (sums * ranks.world_size / ranks.total(chosen).clamp(min=1)).sum()


def _require_same_head(student: DenseDetector, teacher: FrozenDetector) -> None:
    """Raise UserError unless both have the same kind of head with equal anchors and bins."""
    start = f"distill.teacher: {teacher.facts.get('file')}:"
    student_head, model = student.dense, teacher.model
    teacher_head = model.dense if isinstance(model, DenseDetector) else model
    if type(teacher_head) is not type(student_head):
        name = teacher.facts.get("kind", type(teacher_head).__name__)
        needed = (
            "LD needs a gfl teacher"
            if isinstance(student_head, GFL)
            else "adaptive distillation needs a retinanet teacher"
        )
        instead = {
            GFL: "; under this teacher train a gfl student, by LD",
            RetinaNet: "; under this teacher train a retinanet student, by ADL",
        }
        raise UserError(f"{start} it is a {name} detector, and {needed}{instead.get(type(teacher_head), '')}")
    assert isinstance(teacher_head, GFL | RetinaNet)
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
