"""The loss of stage 1: distillation terms by name and weight, and cross-entropy with labels where they are the objective or a term.

All values are sums over the images of a batch; the loop divides by the global batch. Only `implausible_start` waits for the device.

B images, K classes, M compared logits: the K classes, or the classes stored per view and one bucket for the rest.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.mixing import Mixed
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data_config import LossConfig
from ssld.stage1_ssld.distillation import losses
from ssld.stage1_ssld.distillation.features import FeaturePairs


class Objective:
    """Weighted sum of loss terms.

    Args:
        terms: terms of the distillation loss; empty where labels are the objective.
        hard_label_weight: weight of the cross-entropy with human labels; 1 where labels are the objective.
    """

    def __init__(self, terms: Sequence[LossConfig], hard_label_weight: float) -> None:
        self._terms = dict(zip(_names(terms), terms, strict=True))
        self._hard_label_weight = hard_label_weight

    def __call__(
        self,
        logits_BK: Tensor,
        soft: SoftLabels | None,
        labels_B: Tensor,
        mixed: Mixed | None = None,
        features: FeaturePairs | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate all terms: `loss`, the weighted total, and, where there are several terms, each of them unweighted, under its name.

        Args:
            logits_BK: the student's logits.
            soft: the teacher's soft labels of the same views; None leaves out the terms that compare logits.
            labels_B: class numbers, NO_LABEL for an unlabeled image.
            mixed: how mixup or cutmix mixed the images; None for unmixed ones.
            features: student and teacher features; None leaves out the terms that compare them.
        """
        parts: dict[str, Tensor] = {}
        loss = logits_BK.new_zeros((), dtype=torch.float32)
        student_BM = None if soft is None else soft.comparable(logits_BK)
        for name, term in self._terms.items():
            if term.of_features and features is not None:
                pairs = features[term.loss.compares]
                part = torch.stack([evaluate_term(term, student, teacher) for student, teacher in pairs]).mean()
            elif not term.of_features and soft is not None and student_BM is not None:
                part = evaluate_term(term, student_BM, soft.logits_BM)
            else:
                continue
            parts[name] = part
            loss = loss + term.weight * part
        if self._hard_label_weight > 0:
            parts["cross_entropy"] = part = cross_entropy(logits_BK, labels_B, mixed)
            loss = loss + self._hard_label_weight * part
        return {"loss": loss} | (parts if len(parts) > 1 else {})


def evaluate_term(term: LossConfig, student: Tensor, teacher: Tensor) -> Tensor:
    """One term of the distillation loss, unweighted, summed over the batch.

    Args:
        student, teacher: what the loss compares: logits [B,M], pooled features [B,D] or those of all cells [B,N,D].

    Raises:
        UserError: a registered loss that returns anything but one number with a gradient.
    """
    if term.standardize:
        student, teacher = losses.standardize_logits(student), losses.standardize_logits(teacher)
    function = term.loss.function or getattr(losses, term.name)
    part = function(student, teacher, **{key: getattr(term, key) for key in term.loss.settings})
    if not isinstance(part, Tensor) or part.ndim != 0:
        shape = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise UserError(f"losses: {term.name} returned {shape}; return a scalar tensor, the sum over the batch")
    if student.requires_grad and torch.is_grad_enabled() and not part.requires_grad:
        raise UserError(
            f"losses: {term.name} returned a tensor without gradient; compute it from the student's output, without detach"
        )
    return part


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Sum over the labeled images of the cross-entropy; a mixed image counts for both of its labels, by their shares."""
    own_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=NO_LABEL)
    if mixed is None:
        return own_B.sum()
    partners_B = labels_B[mixed.partners_B]
    partner_B = F.cross_entropy(logits_BK.float(), partners_B, reduction="none", ignore_index=NO_LABEL)
    return (mixed.shares_B * own_B + (1 - mixed.shares_B) * partner_B).sum()


def implausible_start(loss: Tensor, uniform: Tensor, images: int) -> str | None:
    """Return a warning if the first loss is far above that of a student that predicts all classes alike; None otherwise. Waits for the device.

    Args:
        loss: sum over the first batch.
        uniform: the same for a student whose logits are all zero.
        images: number of images in that batch.
    """
    first, reference = loss.item() / images, uniform.item() / images
    # With a near-uniform teacher every untrained student looks far off: below 1 nat per image the ratio is meaningless.
    if -1e-3 <= first <= max(1.5 * reference, 1.0):
        return None
    return (
        f"warning: the first loss is {first:.3g} per image, a student with uniform predictions has {reference:.3g}: before any "
        "training the student is confident in classes that the teacher rules out. Check that it starts from the intended weights, that their classes "
        "are in the teacher's order, and that the teacher (or the store) belongs to these classes"
    )


def statistics_warning(values: Mapping[str, float], classes: int) -> str | None:
    """Return a warning if a student that starts from trained weights, with their classifier, hardly agrees with its teacher and is undecided.

    Its weights may still be good: with BatchNorm in training mode, the statistics of small batches, or of batches of similar images, can destroy the
    predictions that the same weights give with their running statistics.

    Args:
        values: means over the first logged steps: `agreement` (0..1), `student_entropy` (nats per image).
        classes: number of compared classes.
    """
    agreement, entropy = values.get("agreement", 1.0), values.get("student_entropy", 0.0)
    if agreement >= 0.05 or entropy <= 0.8 * math.log(classes):
        return None
    return (
        f"warning: the student starts from trained weights, but agrees with the teacher on {100 * agreement:.1f} % of the first images and its "
        "predictions are almost uniform. BatchNorm normalizes by each batch in training, which fails for small batches and for similar images; "
        "student.batchnorm: eval keeps the running statistics"
    )


def _names(terms: Sequence[LossConfig]) -> list[str]:
    """Unique names of the terms; the second term of a name becomes NAME_2."""
    names = [term.name for term in terms]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]
