"""What a dense teacher's answers cost a student that differs: pure functions of logits, float32, per element; the caller weighs, sums and divides.

Shapes: ... any leading dimensions, K classes, E bins of a distance, 4 distances of a box.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_divergence(student_K: Tensor, teacher_K: Tensor, temperature: float) -> Tensor:
    """T^2 / K * KL(softmax(teacher / T) || softmax(student / T)) [...]: the mean over K, as LD's code has it (kd_loss.py)."""
    log_student_K = F.log_softmax(student_K.float() / temperature, dim=-1)
    log_teacher_K = F.log_softmax(teacher_K.float() / temperature, dim=-1)
    return temperature**2 * (log_teacher_K.exp() * (log_teacher_K - log_student_K)).mean(dim=-1)


def localization_distillation(student_4E: Tensor, teacher_4E: Tensor, temperature: float = 10.0) -> Tensor:
    """Localisation distillation [...] (arXiv 2102.12252 equation 4): `soft_divergence` of the bins, mean over the four sides."""
    return soft_divergence(student_4E, teacher_4E, temperature).mean(dim=-1)


def adaptive_distillation(
    student_K: Tensor,
    teacher_K: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 2.0,
    form: Literal["paper", "code", "focal"] = "paper",
) -> Tensor:
    """Adaptive distillation loss [..., K] of sigmoid logits (arXiv 1901.00366 equations 3 to 6).

    With q the teacher's and p the student's probability, KL their binary divergence and H the teacher's entropy, the weight is
    (1 - exp(-(KL + beta * H)))^gamma. It multiplies KL in the paper's form, and half the soft cross-entropy, KL + H, in the released code's
    (Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa, whose own LOSS_BETA is 1 - beta: its default 0 is 1 here). `focal` is the paper's
    ablation FDL: (1 - p_t)^gamma * KL, p_t being the student's probability of what the teacher holds for likelier.

    From logits throughout: finite for saturated ones.
    """
    student_K, teacher_K = student_K.float(), teacher_K.detach().float()
    q_K = teacher_K.sigmoid()
    # log q and log(1 - q) as softplus; q = 0 or 1 multiplies a finite number then.
    entropy_K = q_K * F.softplus(-teacher_K) + (1 - q_K) * F.softplus(teacher_K)
    cross_K = q_K * F.softplus(-student_K) + (1 - q_K) * F.softplus(student_K)
    divergence_K = (cross_K - entropy_K).clamp(min=0)
    if form == "focal":
        p_K = student_K.sigmoid()
        return torch.where(q_K >= 0.5, 1 - p_K, p_K).clamp(min=1e-12) ** gamma * divergence_K
    # The floor keeps the slope of the power finite where both agree and are sure.
    weight_K = (-torch.expm1(-(divergence_K + beta * entropy_K))).clamp(min=1e-12) ** gamma
    return weight_K * (0.5 * cross_K if form == "code" else divergence_K)


def adaptive_normalizer(teacher_K: Tensor, power: float = 1.8) -> Tensor:
    """Sum of the teacher's probabilities to a power, over all anchors and classes: what the adaptive loss is divided by (at least 1)."""
    return (teacher_K.detach().float().sigmoid() ** power).sum()
