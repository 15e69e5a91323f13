"""ADL, adaptive distillation of a RetinaNet student (arXiv 1901.00366; Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa).

Classes are compared at every anchor that is not ignored.

Shapes: B images, A anchors of all levels, K classes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.distill_config import ADLConfig
from ssld.stage2_detect.distillation.losses import adaptive_distillation, adaptive_normalizer
from ssld.stage2_detect.models.anchors import grids_of
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.dense import HeadPass
from ssld.stage2_detect.models.retinanet import RetinaNet


class ADL:
    """The losses of a RetinaNet student under a RetinaNet teacher.

    Args:
        term: weight and form of the term.
        head: the student's head.
        ranks: processes whose counts the losses are divided by.
    """

    head_type: ClassVar[type[RetinaNet]] = RetinaNet
    needs: ClassVar[str] = "adaptive distillation needs a retinanet teacher"
    instead: ClassVar[str] = "under this teacher train a retinanet student, by ADL"

    def __init__(self, term: ADLConfig, head: RetinaNet, ranks: Ranks = ONE_RANK) -> None:
        self.term, self.head, self.ranks = term, head, ranks

    def losses(self, student: HeadPass, teacher: HeadPass, sizes_B2: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Compute the head's own losses and `loss_adl`, times its weight."""
        grids = grids_of(student.features)
        assigned = self.head.assign(grids, sizes_B2, targets)
        losses = self.head.losses(student.outputs, grids, sizes_B2, targets, self.ranks, assigned)
        if self.term.weight:
            counted_BA = assigned.labels_BA >= 0
            losses["loss_adl"] = adaptive_loss(
                self.term, student.outputs[0], teacher.outputs[0], counted_BA, self.ranks
            )
        return losses


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
