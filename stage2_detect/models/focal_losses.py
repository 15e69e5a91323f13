"""Losses of one-stage detectors: pure functions of logits and targets, float32, without reduction; the caller sums and divides.

Shapes: ... any leading dimensions, K classes, E bins of a distance (reg_max + 1).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logits_K: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss [..., K] (arXiv 1708.02002 equation 5).

    Computed from logits, (1 - p_t)^gamma as exp(gamma * log(1 - p_t)): value and gradient are finite for saturated logits and any gamma >= 0.

    Args:
        labels: int64 [...] class of the object; -1 for none.
    """
    logits_K = logits_K.float()
    # Nearly all elements are negatives, so all are computed as negatives, and the positives are replaced.
    loss_K: Tensor = _NegativeFocal.apply(logits_K, gamma, 1 - alpha)
    positive_1, class_1 = labels[..., None] >= 0, labels[..., None].clamp(min=0)
    chosen_1 = logits_K.gather(-1, class_1)
    replaced_1 = torch.where(positive_1, alpha * _focal(-chosen_1, gamma), (1 - alpha) * _focal(chosen_1, gamma))
    return loss_K.scatter_(-1, class_1, replaced_1)


def _focal(logits: Tensor, gamma: float) -> Tensor:
    """Compute p^gamma * -log(1 - p) from the logit of the probability p that should be 0."""
    entropy = F.softplus(logits)
    return (gamma * (logits - entropy)).exp() * entropy  # log p is the difference


class _NegativeFocal(torch.autograd.Function):
    """`weight * _focal`, with the gradient computed in the forward pass: one tensor is stored for the backward pass in place of five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float, weight: float) -> Tensor:
        entropy = F.softplus(logits)
        log_p = logits - entropy
        modulation = (gamma * log_p).exp_()
        if ctx.needs_input_grad[0]:
            p = log_p.exp_()
            # The derivative of p^gamma * entropy is p^gamma * (gamma * (1 - p) * entropy + p).
            ctx.save_for_backward((1 - p).mul_(entropy).mul_(gamma).add_(p).mul_(modulation).mul_(weight))
        return modulation.mul_(entropy).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return slope * derivative, None, None


def quality_focal_loss(logits_K: Tensor, quality_K: Tensor) -> Tensor:
    """Compute the quality focal loss [..., K] (arXiv 2006.04388 equation 2, beta = 2).

    Args:
        quality_K: targets in 0..1: the IoU at the object's class, 0 elsewhere.
    """
    logits_K, quality_K = logits_K.float(), quality_K.float()
    entropy_K = F.binary_cross_entropy_with_logits(logits_K, quality_K, reduction="none")
    return (quality_K - logits_K.sigmoid()).square() * entropy_K


def distribution_focal_loss(logits_E: Tensor, distances: Tensor) -> Tensor:
    """Compute the distribution focal loss [...]: cross-entropy with the two bins around a distance (arXiv 2006.04388 equation 6).

    Args:
        distances: in bins, from 0 to below E - 1.
    """
    log_E = logits_E.float().log_softmax(dim=-1)
    left = distances.floor().clamp(0, logits_E.shape[-1] - 2)
    right_share = distances - left
    index = left.long()[..., None]
    left_log, right_log = log_E.gather(-1, index)[..., 0], log_E.gather(-1, index + 1)[..., 0]
    return -((1 - right_share) * left_log + right_share * right_log)


def expected_distance(logits_E: Tensor) -> Tensor:
    """Compute the mean [...] of the distribution over 0 .. E - 1 (arXiv 2006.04388 equation 5)."""
    bins_E = torch.arange(logits_E.shape[-1], device=logits_E.device, dtype=torch.float32)
    return (logits_E.float().softmax(dim=-1) * bins_E).sum(dim=-1)
