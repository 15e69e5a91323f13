"""The loss of stage 1: distillation terms by name and weight, and cross-entropy where labels are the objective or a term.

Everything is a sum over the images of a batch; the loop divides by the global batch. Nothing here waits for the device but `implausible_start`.

B images, K classes, M logits that are compared: of the K classes, or of those in a store and one bucket for the rest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.mixing import Mixed
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data_config import LossConfig
from ssld.stage1_ssld.distillation import losses
from ssld.stage1_ssld.distillation.features import FeaturePairs


class Objective:
    """Weighted terms of the loss.

    Args:
        terms: of the distillation loss; none where labels are the objective.
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
        """Sums over the batch: `loss`, the weighted total, and, where there are several terms, each unweighted by its name.

        Args:
            logits_BK: of the student.
            soft: of the teacher, to the same views; None leaves out the terms that compare answers in classes.
            labels_B: NO_LABEL where an image has none.
            mixed: how the images were mixed, if they were.
            features: of student and teacher; None leaves out the terms that compare them.
        """
        parts: dict[str, Tensor] = {}
        loss = logits_BK.new_zeros((), dtype=torch.float32)
        student_BM = None if soft is None else soft.comparable(logits_BK)
        for name, term in self._terms.items():
            if term.of_features and features is not None:
                pairs = features[term.name]
                part = torch.stack([evaluate_term(term, ours, theirs) for ours, theirs in pairs]).mean()
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


def evaluate_term(term: LossConfig, student_BM: Tensor, teacher_BM: Tensor) -> Tensor:
    """One term of the distillation loss, unweighted, summed over the batch; pooled and spatial take features [B,D] and [B,N,D]."""
    if term.standardize:
        student_BM, teacher_BM = losses.standardize_logits(student_BM), losses.standardize_logits(teacher_BM)
    match term.name:
        case "symmetric_kl":
            return losses.symmetric_kl(student_BM, teacher_BM)
        case "kl":
            return losses.kl(student_BM, teacher_BM, term.temperature)
        case "soft_cross_entropy":
            return losses.soft_cross_entropy(student_BM, teacher_BM)
        case "jensen_shannon":
            return losses.jensen_shannon(student_BM, teacher_BM)
        case "dist":
            return losses.dist(student_BM, teacher_BM)
        case "decoupled_kd":
            return losses.decoupled_kd(student_BM, teacher_BM, beta=term.beta, temperature=term.temperature)
        case "bernoulli_kl":
            return losses.bernoulli_kl(student_BM, teacher_BM)
        case "pooled":
            return losses.cosine_distance(student_BM, teacher_BM)
        case "spatial":
            return losses.smooth_l1(student_BM, teacher_BM)


def cross_entropy(logits_BK: Tensor, labels_B: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Sum over the labeled images of the cross-entropy; a mixed image has both labels, by their shares."""
    of_own_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=NO_LABEL)
    if mixed is None:
        return of_own_B.sum()
    partners_B = labels_B[mixed.partners_B]
    of_partner_B = F.cross_entropy(logits_BK.float(), partners_B, reduction="none", ignore_index=NO_LABEL)
    return (mixed.shares_B * of_own_B + (1 - mixed.shares_B) * of_partner_B).sum()


def implausible_start(loss: Tensor, ignorant: Tensor, images: int) -> str | None:
    """What to tell about a first loss that no untrained student gives; None when all is well. Waits for the device.

    Args:
        loss: sum over the first batch.
        ignorant: the same for a student whose logits are all zero.
        images: in that batch.
    """
    first, blank = loss.item() / images, ignorant.item() / images
    # A teacher that says little makes any untrained student look far from it: below a nat an image the ratio means nothing.
    if -1e-3 <= first <= max(1.5 * blank, 1.0):
        return None
    return (
        f"warning: the first loss is {first:.3g} an image, where a student that knows nothing has {blank:.3g}: before any "
        "training the student is sure of something that the teacher denies. Check that it starts from the weights you mean, that their classes are "
        "in the teacher's order, and that the teacher (or the store) is the one for these classes"
    )


def _names(terms: Sequence[LossConfig]) -> list[str]:
    """Names of the terms; from the second of a kind on with its number."""
    names = [term.name for term in terms]
    before = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
