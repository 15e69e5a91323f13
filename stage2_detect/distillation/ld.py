"""LD, localization distillation of a GFL student (arXiv 2102.12252; HikariTJU/LD@4287990c, ld_head.py).

The heads' logits are compared on the same batch: distributions of distances and classes at the student's positives (main) and at the cells around
them or all negatives (VLR). Imitation compares feature maps at chosen cells, also on levels without positives, which the released code leaves out.

In the released code, sums over the images of a process are not divided, so the strength of the terms depends on their number: `reference`.
`global` is twice the mean over the images of the global batch: equal to `reference` at two images per process, on any number of ranks.

Shapes: B images, A anchors of all levels, K classes, E bins of a distance, C channels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.distill_config import LDConfig
from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.distillation.losses import localization_distillation, soft_divergence
from ssld.stage2_detect.models.anchors import Grids, grids_of
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.dense import HeadPass
from ssld.stage2_detect.models.gfl import GFL

_SIDES = 4
_RELEASED_IMAGES = 2  # images per process at which `global` equals `reference`


class LD:
    """The losses of a GFL student under a GFL teacher.

    Args:
        terms: weights and forms of the terms.
        head: the student's head.
        ranks: processes whose counts the losses are divided by.
    """

    head_type: ClassVar[type[GFL]] = GFL
    needs: ClassVar[str] = "LD needs a gfl teacher"
    instead: ClassVar[str] = "under this teacher train a gfl student, by LD"

    def __init__(self, terms: LDConfig, head: GFL, ranks: Ranks = ONE_RANK) -> None:
        self.terms, self.head, self.ranks = terms, head, ranks

    def losses(self, student: HeadPass, teacher: HeadPass, sizes_B2: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Compute the head's own losses and the terms, times their weights."""
        terms, head, grids = self.terms, self.head, grids_of(student.features)
        assigned, thresholds = head.assign(grids, sizes_B2, targets)
        losses = head.losses(student.outputs, grids, sizes_B2, targets, self.ranks, assigned)
        (logits_BAK, bins_BA4E), (teacher_BAK, teacher_BA4E) = student.outputs, teacher.outputs
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
                losses["loss_kd"] = terms.kd_weight * self._level_means(kd_BA, positive_BA, grids)
            if terms.kd_vlr_weight:
                losses["loss_kd_vlr"] = terms.kd_vlr_weight * self._level_means(kd_BA, region_BA > 0, grids)
        if terms.imitation_weight:
            cells_BA = self._imitated_cells(student, teacher, sizes_B2, targets)
            errors_BA = _map_errors(student.features, teacher.features)
            losses["loss_imitation"] = terms.imitation_weight * self._level_means(errors_BA, cells_BA, grids)
        return losses

    def _imitated_cells(self, student: HeadPass, teacher: HeadPass, sizes_B2: Tensor, targets: Targets) -> Tensor:
        """Mark the cells at which the student's maps imitate the teacher's: bool [B, A]."""
        head, grids = self.head, grids_of(student.features)
        valid_BA = head.valid(grids, sizes_B2)
        if self.terms.imitated_cells == "gi":
            (logits_BAK, bins_BA4E), (teacher_BAK, teacher_BA4E) = student.outputs, teacher.outputs
            index_BA = torch.arange(logits_BAK.shape[1], device=sizes_B2.device).expand(len(sizes_B2), -1)
            return regions.general_instances(
                logits_BAK,
                teacher_BAK,
                head.decode(bins_BA4E, index_BA, grids),
                head.decode(teacher_BA4E, index_BA, grids),
                [rows * columns for rows, columns in grids],
                valid_BA=valid_BA,
            )
        region = regions.inside_objects if self.terms.imitated_cells == "inside" else regions.fine_grained
        anchors_A4 = head.anchors(grids, sizes_B2.device)
        return region(anchors_A4, targets.boxes_BG4, targets.labels_BG >= 0, valid_BA=valid_BA)

    def _level_means(self, values_BA: Tensor, chosen_BA: Tensor, grids: Grids) -> Tensor:
        """Compute the sum over the levels of the mean of the chosen values; `global` counts those of all ranks."""
        counts = [rows * columns for rows, columns in grids]
        sums = torch.stack([part.sum() for part in torch.where(chosen_BA, values_BA, 0.0).split(counts, dim=1)])
        chosen = torch.stack([part.sum() for part in chosen_BA.split(counts, dim=1)])
        if self.terms.normalization == "reference":
            return (sums / chosen.clamp(min=1)).sum()
        return (sums * self.ranks.world_size / self.ranks.total(chosen).clamp(min=1)).sum()


def _map_errors(features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Compute the squared error of maps of equal width, its mean over the channels, at every cell: [B, A]."""
    errors = [
        (maps.float() - teacher_maps.float()).square().mean(dim=1).flatten(1)
        for maps, teacher_maps in zip(features, teacher_features, strict=True)
    ]
    return torch.cat(errors, dim=1)
