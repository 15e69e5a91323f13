"""Where a dense teacher teaches: regions of a head's cells as functions of anchors, objects and thresholds.

Sources: arXiv 2102.12252 section 3.3 (valuable localisation region), 1906.03609 (fine-grained), and HikariTJU/LD@4287990c for what was released.

Each function goes over the objects one by one, so that no matrix of all objects and anchors is made.

Shapes: B images, G objects (padded), A anchors.
"""

from typing import Literal

import torch
from torch import Tensor

from stage2_detect.models import boxes

Overlap = Literal["anchor", "union"]


@torch.no_grad()
def valuable_region(
    anchors_A4: Tensor,
    objects_BG4: Tensor,
    thresholds_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    gamma: float = 0.25,
    overlap: Overlap = "anchor",
) -> Tensor:
    """float32 weight [B, A] of every anchor in the valuable localisation region, 0 outside it.

    An anchor belongs to the region of an object where gamma * threshold <= X < threshold, X being distance-IoU, and its weight is the highest IoU
    with the objects whose regions it is in. Positives are not taken out.

    Args:
        thresholds_BG: of the assignment (`atss.Thresholds.region_BG`); infinite for padding, which has no region then.
        valid_BA: anchors that exist for the image; None is all.
        gamma: 0 begins at X = 0.
        overlap: `union` is the paper's distance-IoU; `anchor` has the anchor's area in place of the union, which is what was released and gave the
            published 42.1.
    """
    weight_BA = objects_BG4.new_zeros((len(thresholds_BG), len(anchors_A4)))
    for index in range(thresholds_BG.shape[1]):
        threshold_B1 = thresholds_BG[:, index, None]
        iou_BA, x_BA = _distance_iou(objects_BG4[:, index, None], anchors_A4[None], overlap)
        inside_BA = (x_BA >= gamma * threshold_B1) & (x_BA < threshold_B1) & torch.isfinite(threshold_B1)
        weight_BA = torch.where(inside_BA, torch.maximum(weight_BA, iou_BA), weight_BA)
    return weight_BA if valid_BA is None else weight_BA * valid_BA


@torch.no_grad()
def inside_objects(
    anchors_A4: Tensor, objects_BG4: Tensor, present_BG: Tensor, *, valid_BA: Tensor | None = None
) -> Tensor:
    """bool [B, A]: anchors whose centre lies inside any object; only those of `valid_BA`, if given."""
    x_A, y_A = ((anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2).unbind(-1)
    inside_BA = torch.zeros((len(present_BG), len(anchors_A4)), dtype=torch.bool, device=anchors_A4.device)
    for index in range(present_BG.shape[1]):
        x1, y1, x2, y2 = objects_BG4[:, index, None].unbind(-1)
        here_BA = (x_A > x1) & (x_A < x2) & (y_A > y1) & (y_A < y2)
        inside_BA |= here_BA & present_BG[:, index, None]
    return inside_BA if valid_BA is None else inside_BA & valid_BA


@torch.no_grad()
def fine_grained(
    anchors_A4: Tensor,
    objects_BG4: Tensor,
    present_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    share: float = 0.5,
) -> Tensor:
    """bool [B, A]: anchors whose IoU with an object is above `share` of the best that any anchor has with it; only those of `valid_BA`, if given."""
    near_BA = torch.zeros((len(present_BG), len(anchors_A4)), dtype=torch.bool, device=anchors_A4.device)
    for index in range(present_BG.shape[1]):
        iou_BA = boxes.pairwise_iou(objects_BG4[:, index : index + 1], anchors_A4.expand(len(present_BG), -1, -1))[:, 0]
        if valid_BA is not None:
            iou_BA.masked_fill_(~valid_BA, 0)
        near_BA |= (iou_BA > share * iou_BA.amax(dim=1, keepdim=True)) & present_BG[:, index, None]
    return near_BA


def _distance_iou(first_4: Tensor, anchors_4: Tensor, overlap: Overlap) -> tuple[Tensor, Tensor]:
    """IoU, and the overlap less the squared distance of the centres over the squared diagonal of the box around both."""
    top_left_2 = torch.maximum(first_4[..., :2], anchors_4[..., :2])
    shared = (torch.minimum(first_4[..., 2:], anchors_4[..., 2:]) - top_left_2).clamp(min=0).prod(dim=-1)
    union = (boxes.area(first_4) + boxes.area(anchors_4) - shared).clamp(min=1e-6)
    around_2 = torch.maximum(first_4[..., 2:], anchors_4[..., 2:]) - torch.minimum(first_4[..., :2], anchors_4[..., :2])
    away_2 = (first_4[..., :2] + first_4[..., 2:] - anchors_4[..., :2] - anchors_4[..., 2:]) / 2
    distance = away_2.square().sum(dim=-1) / around_2.square().sum(dim=-1).clamp(min=1e-6)
    share = shared / (boxes.area(anchors_4).clamp(min=1e-6) if overlap == "anchor" else union)
    return shared / union, share - distance
