"""A one-stage teacher teaches a one-stage student with the same head: LD under a GFL teacher, adaptive distillation under a RetinaNet one.

LD (arXiv 2102.12252; HikariTJU/LD@4287990c, ld_head.py) compares the heads' raw logits on the same batch: distributions of distances and classes on
the student's positives (main) and on the cells around them (VLR). ADL (arXiv 1901.00366; Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa)
compares classes on every anchor that counts. Imitation compares feature maps where objects are; PKD (arXiv 2207.02039) all over, for either kind.

LD's released sums are of a process, undivided, so that their strength follows its number of images; `reference` is that. `global` is twice the sum
over the images of the global batch, which is the same at two images a process, on any number of ranks.

Shapes: B images, A anchors of all levels, K classes, E bins of a distance, C channels.
"""

import torch
from torch import Tensor, nn

from shared.errors import UserError
from stage2_detect import distillation_losses
from stage2_detect.distill_config import ADLConfig, LDConfig
from stage2_detect.distillation import adapters, pyramid_correlation
from stage2_detect.models import regions
from stage2_detect.models.anchors import Grids
from stage2_detect.models.assign import Assignment
from stage2_detect.models.batch import Detections, ImageBatch, Targets
from stage2_detect.models.dense import DenseDetector, Outputs, grids_of
from stage2_detect.models.gfl import GFL
from stage2_detect.models.retinanet import RetinaNet
from stage2_detect.teacher_detector import FrozenDetector

_SIDES = 4
_RELEASED_IMAGES = 2  # a process, at which `global` equals `reference`


class DistilledDense(nn.Module):
    """A student under a teacher, with the contract of a detector: in train mode `model(images, targets)` -> the student's losses and those of the
    terms; in eval mode `model(images)` -> the student's detections.

    Args:
        student: its own losses stay as they are.
        teacher: of the same classes and anchors; no part of this module's parameters, buffers or state.
        terms: `LDConfig` for a GFL student, `ADLConfig` for a RetinaNet.
        pkd_weight: of `loss_pkd`, over P3..P7; 0 leaves it out.

    Attributes:
        adapters: one a level where the teacher's maps have another width and `loss_pkd` is on, else empty.

    Raises:
        UserError: the teacher's head is of another kind, or has other anchors or bins; or maps of another width are to be imitated.
    """

    def __init__(
        self, student: DenseDetector, teacher: FrozenDetector, terms: LDConfig | ADLConfig, *, pkd_weight: float = 0.0
    ) -> None:
        super().__init__()
        assert isinstance(student.dense, GFL if isinstance(terms, LDConfig) else RetinaNet)
        _require_same_head(student, teacher)
        if isinstance(terms, LDConfig) and terms.imitation and student.pyramid.channels != teacher.channels:
            raise UserError(
                f"distill.ld.imitation: the teacher's maps have {teacher.channels} channels, the student's {student.pyramid.channels}; "
                "give both the same model.fpn_channels, or take distill.pkd_weight, which adapts them"
            )
        self.student, self.teacher, self.terms, self.pkd_weight = student, teacher, terms, pkd_weight
        self.adapters = adapters(
            student.pyramid.channels, teacher.channels, len(student.pyramid.strides) if pkd_weight else 0
        )

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """See the class."""
        if not self.training:
            detections: list[Detections] = self.student(images)
            return detections
        assert targets is not None, "training needs targets"
        features, guides = self.student.features(images), self.teacher.features(images)
        outputs, wanted = self.student.dense(features), self.teacher.outputs(guides)
        grids = grids_of(features)
        shared: dict[str, Tensor] = {}
        if self.pkd_weight:
            correlation = pyramid_correlation(
                features, guides, self.adapters, self.student.pyramid.strides, images.sizes_B2
            )
            shared["loss_pkd"] = self.pkd_weight * correlation
        if isinstance(self.terms, ADLConfig):
            assigned = self.student.dense.assign(grids, images.sizes_B2, targets)
            assert isinstance(assigned, Assignment)
            losses = self.student.dense.losses(outputs, grids, images.sizes_B2, targets, assigned)
            return losses | (self._adl(self.terms, outputs, wanted, assigned) if self.terms.weight else {}) | shared
        assert isinstance(self.student.dense, GFL)
        assigned, thresholds = self.student.dense.assign(grids, images.sizes_B2, targets)
        losses = self.student.dense.losses(outputs, grids, images.sizes_B2, targets, assigned)
        positive_BA = assigned.labels_BA == 1
        weight_BA = torch.zeros_like(assigned.ious_BA)
        if self.terms.vlr_ld or self.terms.vlr_kd:
            weight_BA = regions.valuable_region(
                self.student.dense.anchors(grids, images.sizes_B2.device),
                targets.boxes_BG4,
                thresholds.region_BG,
                valid_BA=self.student.dense.valid(grids, images.sizes_B2),
                gamma=self.terms.gamma,
                overlap=self.terms.overlap,
            )
        losses |= self._ld(self.terms, self.student.dense, outputs, wanted, grids, positive_BA, weight_BA)
        if self.terms.imitation:
            losses["loss_imitation"] = self.terms.imitation * self._imitation(
                self.terms, features, guides, targets, self.student.dense.valid(grids, images.sizes_B2)
            )
        return losses | shared

    def weights(self) -> dict[str, float]:
        """Of the terms, by the name of their losses."""
        if isinstance(self.terms, ADLConfig):
            return {"loss_adl": self.terms.weight, "loss_pkd": self.pkd_weight}
        terms = self.terms
        return {
            "loss_ld": terms.ld,
            "loss_ld_vlr": terms.vlr_ld,
            "loss_kd": terms.kd,
            "loss_kd_vlr": terms.vlr_kd,
            "loss_imitation": terms.imitation,
            "loss_pkd": self.pkd_weight,
        }

    def _ld(
        self,
        terms: LDConfig,
        student: GFL,
        outputs: Outputs,
        wanted: Outputs,
        grids: Grids,
        positive_BA: Tensor,
        region_BA: Tensor,
    ) -> dict[str, Tensor]:
        (logits_BAK, bins_BA4E), (teacher_BAK, teacher_BA4E) = outputs, wanted
        factor = 1.0 if terms.normalization == "reference" else _RELEASED_IMAGES / len(logits_BAK)
        losses: dict[str, Tensor] = {}
        if terms.ld or terms.vlr_ld:
            ld_BA = distillation_losses.localization_distillation(bins_BA4E, teacher_BA4E, terms.ld_temperature)
            if terms.ld:
                score_BA = torch.where(positive_BA, student.scores(logits_BAK), 0.0)
                losses["loss_ld"] = terms.ld * factor * (score_BA * ld_BA).sum()
            if terms.vlr_ld:
                losses["loss_ld_vlr"] = terms.vlr_ld / _SIDES * factor * (region_BA * ld_BA).sum()
        if terms.kd or terms.vlr_kd:
            kd_BA = distillation_losses.soft_divergence(logits_BAK, teacher_BAK, terms.kd_temperature)
            if terms.kd:
                losses["loss_kd"] = terms.kd * self._level_means(kd_BA, positive_BA, grids, terms.normalization)
            if terms.vlr_kd:
                near_BA = region_BA > 0
                losses["loss_kd_vlr"] = terms.vlr_kd * self._level_means(kd_BA, near_BA, grids, terms.normalization)
        return losses

    def _level_means(self, values_BA: Tensor, chosen_BA: Tensor, grids: Grids, normalization: str) -> Tensor:
        """Sum over the levels of the mean of the chosen values; `global` counts those of all ranks."""
        counts = [rows * columns for rows, columns in grids]
        sums = torch.stack([part.sum() for part in torch.where(chosen_BA, values_BA, 0.0).split(counts, dim=1)])
        chosen = torch.stack([part.sum() for part in chosen_BA.split(counts, dim=1)])
        if normalization == "reference":
            return (sums / chosen.clamp(min=1)).sum()
        dense = self.student.dense
        return (sums * dense.world_size / dense.total(chosen).clamp(min=1)).sum()

    def _imitation(
        self,
        terms: LDConfig,
        features: list[Tensor],
        guides: list[Tensor],
        targets: Targets,
        valid_BA: Tensor | None,
    ) -> Tensor:
        """Sum over the levels of the mean squared error of the maps at the chosen cells; for maps of equal width."""
        grids = grids_of(features)
        anchors_A4 = self.student.dense.anchors(grids, targets.boxes_BG4.device)
        region = regions.inside_objects if terms.region == "inside" else regions.fine_grained
        chosen_BA = region(anchors_A4, targets.boxes_BG4, targets.labels_BG >= 0, valid_BA=valid_BA)
        errors_BA = torch.cat(
            [
                (maps.float() - guide.float()).square().mean(dim=1).flatten(1)
                for maps, guide in zip(features, guides, strict=True)
            ],
            dim=1,
        )
        return self._level_means(errors_BA, chosen_BA, grids, terms.normalization)

    def _adl(self, term: ADLConfig, outputs: Outputs, wanted: Outputs, assigned: Assignment) -> dict[str, Tensor]:
        loss_BAK = distillation_losses.adaptive_distillation(
            outputs[0], wanted[0], beta=term.beta, gamma=term.gamma, form=term.form
        )
        # Anchors between the two IoUs are no part of the sum, and are one of the normaliser, as released.
        total = torch.where(assigned.labels_BA >= 0, loss_BAK.sum(dim=-1), 0.0).sum()
        mass = distillation_losses.adaptive_normalizer(wanted[0])
        dense = self.student.dense
        if term.normalization == "global":
            return {"loss_adl": term.weight * total * dense.world_size / dense.total(mass).clamp(min=1)}
        return {"loss_adl": term.weight * total / mass.clamp(min=1)}


def _require_same_head(student: DenseDetector, teacher: FrozenDetector) -> None:
    """See `DistilledDense`."""
    start = f"distill.teacher: {teacher.facts.get('file')}:"
    ours, model = student.dense, teacher.model
    theirs = model.dense if isinstance(model, DenseDetector) else model
    if type(theirs) is not type(ours):
        name = teacher.facts.get("kind", type(theirs).__name__)
        wanted = (
            "LD needs a gfl teacher" if isinstance(ours, GFL) else "adaptive distillation needs a retinanet teacher"
        )
        instead = {
            GFL: "; under this teacher train a gfl student, by LD",
            RetinaNet: "; under this teacher train a retinanet student, by ADL",
        }
        raise UserError(f"{start} it is a {name} detector, and {wanted}{instead.get(type(theirs), '')}")
    assert isinstance(theirs, GFL | RetinaNet)
    if isinstance(ours, GFL) and isinstance(theirs, GFL) and ours.reg_max != theirs.reg_max:
        raise UserError(
            f"{start} its distances have reg_max {theirs.reg_max}, the student's {ours.reg_max}; set model.gfl.reg_max to {theirs.reg_max}"
        )
    grids = [(2, 2)] * len(ours.strides)
    if theirs.strides != ours.strides:
        raise UserError(f"{start} its strides are {list(theirs.strides)}, the student's {list(ours.strides)}")
    here, there = (head.anchors(grids, torch.device("cpu")) for head in (ours, theirs))
    if here.shape != there.shape or not torch.allclose(here, there):
        raise UserError(f"{start} its anchors are not the student's; only equal ones can be compared")
