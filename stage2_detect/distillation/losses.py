"""Distillation losses of detectors: pure functions, float32 inside.

For the heads of one-stage detectors, without reduction (the caller weighs, sums and divides): `soft_divergence`, `localization_distillation`,
`adaptive_distillation`. For RoIs, a sum: `roi_kd`. For feature maps, means: `pkd` and `channel_wise`; `maps.py` sums them over a pyramid.

Shapes: ... any leading dimensions, B images, C channels of the student, D of the teacher, H rows, W columns, P positions of a map, N RoIs, K classes,
E bins of a distance, 4 distances of a box.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-8  # added to a variance, so that a constant channel has a finite gradient
_MASS_POWER = 1.8  # exponent of the teacher's probabilities in the divisor of the adaptive loss, as released


def soft_divergence(student_K: Tensor, teacher_K: Tensor, temperature: float) -> Tensor:
    """Compute T^2 / K * KL(softmax(teacher / T) || softmax(student / T)) [...]: the mean over K, as in LD's code (kd_loss.py)."""
    log_student_K = F.log_softmax(student_K.float() / temperature, dim=-1)
    log_teacher_K = F.log_softmax(teacher_K.float() / temperature, dim=-1)
    return temperature**2 * (log_teacher_K.exp() * (log_teacher_K - log_student_K)).mean(dim=-1)


def localization_distillation(student_4E: Tensor, teacher_4E: Tensor, temperature: float = 10.0) -> Tensor:
    """Compute the localization distillation loss [...] (arXiv 2102.12252 equation 4): `soft_divergence` of the bins, mean over the four sides."""
    return soft_divergence(student_4E, teacher_4E, temperature).mean(dim=-1)


def adaptive_distillation(
    student_K: Tensor,
    teacher_K: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 2.0,
    form: Literal["paper", "code", "focal"] = "paper",
) -> Tensor:
    """Compute the adaptive distillation loss [..., K] of sigmoid logits (arXiv 1901.00366 equations 3 to 6).

    With q the teacher's and p the student's probability, KL their binary divergence and H the teacher's entropy, the weight is
    (1 - exp(-(KL + beta * H)))^gamma. It multiplies KL in the paper's form, and half the soft cross-entropy, KL + H, in the released code's
    (Tangshitao/Semi-supervised-Adaptive-Distillation@3244dfa, whose LOSS_BETA is 1 - beta: its default 0 is beta = 1). `focal` is the paper's
    ablation FDL: (1 - p_t)^gamma * KL, p_t being the student's probability of the outcome that the teacher considers likelier.

    Computed from logits: finite for saturated ones.
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


def adaptive_normalizer(teacher_K: Tensor) -> Tensor:
    """Compute the sum of the teacher's probabilities to the power 1.8 over all anchors and classes, the divisor of the adaptive loss (at least 1)."""
    return (teacher_K.detach().float().sigmoid() ** _MASS_POWER).sum()


def pkd(student_BDHW: Tensor, teacher_BDHW: Tensor, inside_BHW: Tensor) -> Tensor:
    """Compute the mean over the channels of 1 - r, r being Pearson's correlation over the pixels of the batch where
    `inside_BHW` is True; in 0..2.

    A channel that is constant on one side counts 1/2, on both sides 0, as in half the squared error of normalized maps.
    """
    student, teacher = (_normalized(maps_BDHW, inside_BHW) for maps_BDHW in (student_BDHW, teacher_BDHW))
    pixels = inside_BHW.sum() * student.shape[1]
    return 0.5 * (student - teacher).square().sum() / pixels


def channel_wise(student_BPD: Tensor, teacher_BPD: Tensor, inside_BP: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the channel-wise divergence (arXiv 2011.13256 equations 3 to 5): T^2 * KL(t || s), where t and s are the softmax of a channel over
    the P positions that `inside_BP` marks, at temperature T; mean over channels and images, in nats.

    In a channel it compares where the teacher is most active, not how much.
    """
    outside_BP1 = ~inside_BP[:, :, None]
    log_s_BPD, log_t_BPD = (
        F.log_softmax(maps.float().masked_fill(outside_BP1, -torch.inf) / temperature, dim=1)
        for maps in (student_BPD, teacher_BPD)
    )
    divergence_BPD = log_t_BPD.exp() * (log_t_BPD - log_s_BPD).masked_fill(outside_BP1, 0.0)
    return temperature**2 * divergence_BPD.sum(dim=1).mean()


def roi_kd(student_NK: Tensor, teacher_NK: Tensor, valid_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the sum over the valid RoIs of T^2 * (KL(t||s) + KL(s||t)) / 2 of the softmax at temperature T, in nats; from logits, float32
    inside."""
    log_s_NK, log_t_NK = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student_NK, teacher_NK))
    divergence_N = 0.5 * ((log_t_NK.exp() - log_s_NK.exp()) * (log_t_NK - log_s_NK)).sum(dim=-1)
    return temperature**2 * torch.where(valid_N, divergence_N, 0.0).sum()


def inside_maps(sizes_B2: Tensor, map_BCHW: Tensor, stride: int) -> Tensor:
    """Mark the cells of a map whose first pixel is inside their image of (height, width) `sizes_B2`; the others cover padding: bool [B, H, W]."""
    H, W = map_BCHW.shape[-2:]
    rows_BH = stride * torch.arange(H, device=sizes_B2.device) < sizes_B2[:, :1]
    columns_BW = stride * torch.arange(W, device=sizes_B2.device) < sizes_B2[:, 1:]
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def _normalized(maps_BCHW: Tensor, inside_BHW: Tensor) -> Tensor:
    """Normalize to float32 [B, C, H, W]: each channel with zero mean and unit variance over the pixels inside, and zero elsewhere."""
    inside_B1HW = inside_BHW[:, None]
    pixels = inside_BHW.sum()
    maps_BCHW = maps_BCHW.float()
    mean_C11 = torch.where(inside_B1HW, maps_BCHW, 0.0).sum(dim=(0, 2, 3), keepdim=True)[0] / pixels
    centered_BCHW = torch.where(inside_B1HW, maps_BCHW - mean_C11, 0.0)
    variance_C11 = centered_BCHW.square().sum(dim=(0, 2, 3), keepdim=True)[0] / pixels
    return centered_BCHW * torch.rsqrt(variance_C11 + _EPSILON)
