"""Box losses: pure functions of predicted and target deltas or boxes, float32, one number per box.

L1 kinds compare deltas. IoU kinds compare boxes "in delta space on a unit prior", as PaddleDetection@666f597f
(ppdet/modeling/heads/bbox_head.py): both sets of deltas, divided by their weights, are applied to a box of side 1. Since a
RoI's width and height scale the axes by different factors, distances and aspect ratios in that space are not those in pixels.

Shapes: ... any leading dimensions, the same for both arguments.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssld.stage2_detect.models import boxes

_EPSILON = 1e-10  # PaddleDetection's
TORCHVISION_EPSILON = 1e-7
"""`epsilon` of `generalized_iou` in torchvision, and in the one-stage heads"""


@dataclass(frozen=True)
class BoxLoss:
    """A box loss with its weight and divisor.

    Args:
        name: kind of loss.
        weight: factor on the loss.
        beta: distance at which the square part of smooth_l1 and balanced_l1 ends.
        alpha, gamma: parameters of balanced_l1, see `balanced_l1`.
        normalization: `rois` divides by the number of sampled RoIs; `positives` also divides by the number of positives and
            multiplies by the number of classes, as PaddleDetection does with IoU losses.
    """

    name: Literal["l1", "smooth_l1", "balanced_l1", "giou", "ciou"] = "l1"
    weight: float = 1.0
    beta: float = 1.0
    alpha: float = 0.5
    gamma: float = 1.5
    normalization: Literal["rois", "positives"] = "rois"

    def __call__(self, deltas_4: Tensor, target_4: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
        """Compute the loss [...] of deltas [..., 4] with these delta weights, times the loss's own weight."""
        deltas_4, target_4 = deltas_4.float(), target_4.float()
        match self.name:
            case "l1":
                loss = l1(deltas_4, target_4)
            case "smooth_l1":
                loss = smooth_l1(deltas_4, target_4, beta=self.beta)
            case "balanced_l1":
                loss = balanced_l1(deltas_4, target_4, alpha=self.alpha, gamma=self.gamma, beta=self.beta)
            case "giou":
                loss = generalized_iou(unit_boxes(deltas_4, weights), unit_boxes(target_4, weights))
            case "ciou":
                loss = complete_iou(unit_boxes(deltas_4, weights), unit_boxes(target_4, weights))
        return self.weight * loss


L1 = BoxLoss()


def unit_boxes(deltas_4: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Apply deltas [..., 4] to a box of side 1 around the origin; growth is limited as in `boxes.decode`."""
    corner_2 = torch.full_like(deltas_4[..., :2], 0.5)
    return boxes.decode(deltas_4, torch.cat((-corner_2, corner_2), dim=-1), weights)


def l1(deltas_4: Tensor, target_4: Tensor) -> Tensor:
    """Compute the sum [...] of the four distances."""
    return (deltas_4 - target_4).abs().sum(dim=-1)


def smooth_l1(deltas_4: Tensor, target_4: Tensor, *, beta: float) -> Tensor:
    """Compute the sum [...] of d^2 / (2 beta) below `beta` and d - beta / 2 above it (arXiv 1504.08083 equation 3)."""
    return F.smooth_l1_loss(deltas_4, target_4, reduction="none", beta=beta).sum(dim=-1)


def balanced_l1(deltas_4: Tensor, target_4: Tensor, *, alpha: float, gamma: float, beta: float) -> Tensor:
    """Compute the sum [...] of the balanced L1 loss (arXiv 1904.02701 section 3.3), whose gradient is
    alpha * ln(b * d / beta + 1) below `beta` and `gamma` above it, with b such that the two meet.
    """
    b = math.expm1(gamma / alpha)
    distance_4 = (deltas_4 - target_4).abs()
    # Beyond beta the logarithm is not used; the clamp keeps it from overflowing.
    near_4 = distance_4.clamp(max=beta)
    inner_4 = alpha / b * (b * near_4 + beta) * torch.log1p(b * near_4 / beta) - alpha * near_4
    return (inner_4 + gamma * (distance_4 - near_4)).sum(dim=-1)


def generalized_iou(boxes_4: Tensor, target_4: Tensor, epsilon: float = _EPSILON) -> Tensor:
    """Compute 1 - GIoU [...] in 0..2 (arXiv 1902.09630).

    torchvision's `generalized_box_iou_loss` without its boolean indexing, for which a GPU has to be waited for.

    Args:
        epsilon: added to the areas that are divided by.
    """
    iou, union, around_2 = _overlap(boxes_4, target_4, epsilon)
    width, height = around_2.unbind(-1)
    hull = width * height + epsilon
    return 1 - iou + (hull - union) / hull


def complete_iou(boxes_4: Tensor, target_4: Tensor) -> Tensor:
    """Compute 1 - CIoU [...] (arXiv 1911.08287 section 4): IoU, squared distance of the centers over the squared diagonal of the box
    around both, and difference in aspect ratio; the weight of the last is a constant to the gradient.
    """
    iou, _, around_2 = _overlap(boxes_4, target_4, _EPSILON)
    offset_2 = (boxes_4[..., :2] + boxes_4[..., 2:] - target_4[..., :2] - target_4[..., 2:]) / 2
    distance = (offset_2.square().sum(dim=-1) + _EPSILON) / (around_2.square().sum(dim=-1) + _EPSILON)
    aspect = 4 / math.pi**2 * (_angle(boxes_4) - _angle(target_4)).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect + _EPSILON)
    return 1 - iou + distance + alpha * aspect


def _overlap(boxes_4: Tensor, target_4: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute IoU, union plus `epsilon`, and (width, height) of the smallest box around both."""
    shared = boxes.paired_intersection(boxes_4, target_4)
    union = boxes.area(boxes_4) + boxes.area(target_4) - shared + epsilon
    around_2 = torch.maximum(boxes_4[..., 2:], target_4[..., 2:]) - torch.minimum(boxes_4[..., :2], target_4[..., :2])
    return shared / union, union, around_2


def _angle(boxes_4: Tensor) -> Tensor:
    width, height = (boxes_4[..., 2:] - boxes_4[..., :2]).clamp(min=_EPSILON).unbind(-1)
    return torch.atan2(width, height)
