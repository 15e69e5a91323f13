"""Distillation losses as pure functions of logits: float32 inside, summed over the batch; the caller divides by the global batch.

SSLD: Cui et al. 2021, arXiv 2103.05959. Its "JS divergence" is half the symmetric KL (Jeffreys) divergence at temperature 1, not the bounded
mixture form: PaddleClas@d178931f, ppcls/loss/dmlloss.py. There the logarithm has an epsilon of 1e-12; here it is a log-softmax, which needs none.

B images, K classes.
"""

import torch.nn.functional as F
from torch import Tensor


def symmetric_kl(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch of 0.5 * (KL(t||s) + KL(s||t)) = 0.5 * sum_k (p_t - p_s) * (log p_t - log p_s), in nats."""
    log_s_BK = F.log_softmax(student_logits_BK.float(), dim=-1)
    log_t_BK = F.log_softmax(teacher_logits_BK.float(), dim=-1)
    return 0.5 * ((log_t_BK.exp() - log_s_BK.exp()) * (log_t_BK - log_s_BK)).sum()


def kl(student_logits_BK: Tensor, teacher_logits_BK: Tensor) -> Tensor:
    """Sum over the batch of KL(t||s), in nats."""
    log_s_BK = F.log_softmax(student_logits_BK.float(), dim=-1)
    log_t_BK = F.log_softmax(teacher_logits_BK.float(), dim=-1)
    return (log_t_BK.exp() * (log_t_BK - log_s_BK)).sum()
