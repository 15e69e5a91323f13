"""The loss of stage 1: distillation terms by name and weight, and cross-entropy where labels are the objective or a term.

Everything is a sum over the images of a batch; the loop divides by the global batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_ssld import losses
from stage1_ssld.batch import NO_LABEL
from stage1_ssld.config import DistillConfig, TeachConfig
from stage1_ssld.data_config import LossConfig
from stage1_ssld.guidance import Answers
from stage1_ssld.mix import Mixed


class Objective:
    """Weighted terms of the loss.

    Args:
        terms: of the distillation loss; none where labels are the objective.
        hard_label_weight: weight of the cross-entropy with human labels.
    """

    def __init__(self, terms: Sequence[LossConfig], hard_label_weight: float) -> None:
        self._terms, self._hard_label_weight = terms, hard_label_weight

    def __call__(
        self,
        logits_BK: Tensor,
        answers: Answers | None,
        labels_B: Tensor,
        mixed: Mixed | None = None,
    ) -> dict[str, Tensor]:
        """Sums over the batch: `loss`, the weighted total, and, where there are several terms, each unweighted by its name.

        Args:
            answers: of student and teacher; None where labels are the objective.
            labels_B: NO_LABEL where an image has none.
        """
        parts: dict[str, Tensor] = {}
        weights: list[float] = []
        for term in self._terms:
            assert answers is not None
            parts[_part_name(term, parts)] = evaluate_term(term, answers.student_BM, answers.teacher_BM)
            weights.append(term.weight)
        if self._hard_label_weight > 0:
            parts["cross_entropy"] = cross_entropy(logits_BK, labels_B, mixed)
            weights.append(self._hard_label_weight)
        total = sum(
            (part * weight for part, weight in zip(parts.values(), weights, strict=True)), logits_BK.new_zeros(())
        )
        return {"loss": total} | (parts if len(parts) > 1 else {})

    def of_ignorance(self, teacher_BM: Tensor) -> Tensor:
        """The distillation terms of a student that gives every class the same probability."""
        with torch.no_grad():
            blank_BM = torch.zeros_like(teacher_BM)
            return sum(
                (evaluate_term(term, blank_BM, teacher_BM) * term.weight for term in self._terms),
                teacher_BM.new_zeros(()),
            )


def make_objective(config: DistillConfig | TeachConfig) -> Objective:
    """The loss of a run: labels alone, or the configured terms."""
    if isinstance(config, DistillConfig) and config.objective == "teacher":
        return Objective(config.losses, config.hard_label_weight)
    return Objective([], 1.0)


def evaluate_term(term: LossConfig, student_BM: Tensor, teacher_BM: Tensor) -> Tensor:
    """One term of the distillation loss, unweighted, summed over the batch."""
    if term.standardize:
        student_BM, teacher_BM = losses.standardize_logits(student_BM), losses.standardize_logits(teacher_BM)
    match term.name:
        case "kl":
            return losses.kl(student_BM, teacher_BM, term.temperature)
        case "decoupled_kd":
            return losses.decoupled_kd(student_BM, teacher_BM, temperature=term.temperature)
        case name:
            loss: Callable[[Tensor, Tensor], Tensor] = getattr(losses, name)
            return loss(student_BM, teacher_BM)


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Sum over the labelled images of the cross-entropy; a mixed image has both labels, by their shares."""
    per_image_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=NO_LABEL)
    if mixed is None:
        return per_image_B.sum()
    partner_labels_B = labels_B[mixed.partners_B]
    partner_B = F.cross_entropy(logits_BK.float(), partner_labels_B, reduction="none", ignore_index=NO_LABEL)
    return (mixed.shares_B * per_image_B + (1 - mixed.shares_B) * partner_B).sum()


def implausible(loss: float, ignorant: float, images: int) -> str | None:
    """What to tell about a first loss that no untrained student gives; None when all is well.

    Args:
        loss: sum over the first batch.
        ignorant: `Objective.of_ignorance` of the same batch.
        images: in that batch.
    """
    # A teacher that says little makes any untrained student look far from it: below a nat an image the ratio means nothing.
    if 0 <= loss <= max(1.5 * ignorant, images):
        return None
    return (
        f"warning: the first loss is {loss / images:.3g} an image; a student that knows nothing gives {ignorant / images:.3g}. "
        "Either the teacher's answers are not logits (no classification head, probabilities instead), or the student starts from weights of "
        "other classes, or in another class order than the teacher's"
    )


def _part_name(term: LossConfig, taken: dict[str, Tensor]) -> str:
    name, number = str(term.name), 2
    while name in taken:
        name, number = f"{term.name}_{number}", number + 1
    return name
