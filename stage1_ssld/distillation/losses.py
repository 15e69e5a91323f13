"""Distillation losses as pure functions of the student's and the teacher's logits, two of them of features.

Computed in float32 and summed over the batch; the training loop divides by the global batch. Each loss is a function of this module and a row of
the same name in `LOSSES` of `stage1_ssld/data_config.py`, which settings read without importing torch.

SSLD: Cui et al. 2021, arXiv 2103.05959. Its "JS divergence" is half the symmetric KL (Jeffreys) divergence at temperature 1, not the bounded
mixture form: PaddleClas@d178931f, ppcls/loss/dmlloss.py. There the logarithm has an epsilon of 1e-12; this log-softmax needs none.
Losses that compare distributions only (symmetric_kl, kl at temperature 1, soft_cross_entropy, jensen_shannon) also accept log-probabilities over
buckets of classes: the log-softmax of log-probabilities leaves them unchanged.

B images, K classes, N cells of a map, D dimensions of a feature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_kl(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch of 0.5 * (KL(t||s) + KL(s||t)) = 0.5 * sum_k (p_t - p_s) * (log p_t - log p_s), in nats."""
    log_s_BK, log_t_BK = _log_probs(student_logits_BK), _log_probs(teacher_logits_BK)
    return 0.5 * ((log_t_BK.exp() - log_s_BK.exp()) * (log_t_BK - log_s_BK)).sum()


def kl(student_logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the batch of T^2 * KL(t||s) of the distributions at temperature T, in nats (Hinton et al. 2015, arXiv 1503.02531)."""
    log_s_BK = _log_probs(student_logits_BK, temperature)
    log_t_BK = _log_probs(teacher_logits_BK, temperature)
    return temperature**2 * (log_t_BK.exp() * (log_t_BK - log_s_BK)).sum()


def soft_cross_entropy(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch of -sum_k p_t log p_s = KL(t||s) + H(t); its gradient is that of KL(t||s)."""
    return -(_log_probs(teacher_logits_BK).exp() * _log_probs(student_logits_BK)).sum()


def jensen_shannon(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch of 0.5 * (KL(t||m) + KL(s||m)) with the mixture m = (p_t + p_s) / 2; at most log 2 per image.

    The true form. Where the two distributions are far apart, its gradient is far smaller than that of symmetric_kl, so SSLD's learning rates do not
    suit it.
    """
    log_s_BK, log_t_BK = _log_probs(student_logits_BK), _log_probs(teacher_logits_BK)
    ratio_BK = log_s_BK - log_t_BK
    # log p_t - log m = log 2 - softplus(log p_s - log p_t): exactly zero at equality, without subtracting two large logarithms.
    of_t_BK = log_t_BK.exp() * (math.log(2) - F.softplus(ratio_BK))
    of_s_BK = log_s_BK.exp() * (math.log(2) - F.softplus(-ratio_BK))
    return 0.5 * (of_t_BK + of_s_BK).sum()


def dist(student_logits_BK: Tensor, teacher_logits_BK: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """B * (beta * mean_b (1 - r_b) + gamma * mean_k (1 - r_k)), r the Pearson correlation of the probabilities over the classes of an image (r_b) and
    over the images of a class (r_k).

    DIST, Huang et al. 2022, arXiv 2205.10536, equations 7-10. The second part depends on the whole batch: it is not a sum over images.
    """
    s_BK, t_BK = _log_probs(student_logits_BK).exp(), _log_probs(teacher_logits_BK).exp()
    images, classes = s_BK.shape
    between = (1 - _pearson(s_BK, t_BK)).sum()
    within = (1 - _pearson(s_BK.T, t_BK.T)).sum() * (images / classes)
    return beta * between + gamma * within


def decoupled_kd(
    student_logits_BK: Tensor,
    teacher_logits_BK: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over the batch of T^2 * (alpha * TCKD + beta * NCKD). The target class is the teacher's most likely one; no label is read.

    TCKD: KL of the two probabilities (target, all others together); NCKD: KL among the other classes, renormalized. Zhao et al. 2022, arXiv
    2203.08679, equation 7; the teacher's class as target as in PaddleClas@d178931f, ppcls/loss/dkdloss.py (`use_target_as_gt`).
    """
    s_BK, t_BK = student_logits_BK.float() / temperature, teacher_logits_BK.float() / temperature
    target_B1 = t_BK.argmax(-1, keepdim=True)
    others_BK = torch.zeros_like(t_BK, dtype=torch.bool).scatter_(-1, target_B1, True).logical_not_()
    target_part = kl(_target_and_rest(s_BK, target_B1, others_BK), _target_and_rest(t_BK, target_B1, others_BK))
    low = torch.finfo(torch.float32).min
    log_s_BK = F.log_softmax(s_BK.masked_fill(~others_BK, low), dim=-1)
    log_t_BK = F.log_softmax(t_BK.masked_fill(~others_BK, low), dim=-1)
    difference_BK = (log_t_BK - log_s_BK).masked_fill(~others_BK, 0.0)
    return temperature**2 * (alpha * target_part + beta * (log_t_BK.exp() * difference_BK).sum())


def standardize_logits(logits_BK: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) over the classes of each image, std unbiased: Sun et al. 2024, arXiv 2403.01427, equation 10."""
    z_BK = logits_BK.float()
    return (z_BK - z_BK.mean(-1, keepdim=True)) / (z_BK.std(-1, keepdim=True) + 1e-7)


def bernoulli_kl(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch and the classes of KL(Bernoulli(t)||Bernoulli(s)), for classes that do not exclude each other (sigmoid outputs)."""
    s_BK, t_BK = student_logits_BK.float(), teacher_logits_BK.float()
    yes_BK = t_BK.sigmoid() * (F.logsigmoid(t_BK) - F.logsigmoid(s_BK))
    no_BK = (-t_BK).sigmoid() * (F.logsigmoid(-t_BK) - F.logsigmoid(-s_BK))
    return (yes_BK + no_BK).sum()


def pooled(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Sum over the batch of 1 - cos(s, t), in 0..2 per image: AM-RADIO's loss of pooled features (arXiv 2312.06709, section 3)."""
    return (1 - F.cosine_similarity(student_BD.float(), teacher_BD.float(), dim=-1)).sum()


def spatial(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Sum over the batch of the smooth L1 loss, averaged over cells and channels: d^2 / 2 where |d| < 1, |d| - 1/2 elsewhere, d = s - t.

    The second part of AM-RADIO's loss of spatial features (arXiv 2312.06709, section 3), on standardized features.
    """
    cells_and_channels = student_BND.shape[1] * student_BND.shape[2]
    return F.smooth_l1_loss(student_BND.float(), teacher_BND.float(), reduction="sum") / cells_and_channels


def entropy(logits_BK: Tensor) -> Tensor:
    """Sum over the batch of H(p) = -sum_k p_k log p_k, in nats. Not a loss: the log has it for teacher and student."""
    log_p_BK = _log_probs(logits_BK)
    return -(log_p_BK.exp() * log_p_BK).sum()


def _log_probs(logits_BK: Tensor, temperature: float = 1.0) -> Tensor:
    return F.log_softmax(logits_BK.float() / temperature, dim=-1)


def _pearson(a_NM: Tensor, b_NM: Tensor) -> Tensor:
    """Pearson correlation per row; 0 for a constant row."""
    a_NM, b_NM = a_NM - a_NM.mean(-1, keepdim=True), b_NM - b_NM.mean(-1, keepdim=True)
    return F.cosine_similarity(a_NM, b_NM, dim=-1, eps=1e-8)


def _target_and_rest(logits_BK: Tensor, target_B1: Tensor, others_BK: Tensor) -> Tensor:
    rest_B1 = logits_BK.masked_fill(~others_BK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits_BK.gather(-1, target_B1), rest_B1], dim=-1)
