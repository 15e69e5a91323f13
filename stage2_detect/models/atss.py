"""Assignment of anchors to objects by the statistics of each object's candidates: ATSS (arXiv 1912.02424, section 3).

The candidates of an object are, on every level, the anchors whose centers are nearest to the object's. The object's IoU threshold is the mean plus
the standard deviation of the candidates' IoUs. Candidates at or above it with their center inside the object are positive; one that is positive for
several objects is assigned to the one it overlaps most. There is no ignore band. Behavior as of mmdetection's assigner in HikariTJU/LD@4287990c;
PaddleDetection@666f597f uses the biased standard deviation and does not exclude anchors in the padding.

Shapes: B images, G objects (padded), A anchors of all levels, N candidates per object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssld.stage2_detect.models import boxes
from ssld.stage2_detect.models.assign import Assignment

_INSIDE = 0.01  # least distance of a center from the object's border, in pixels
_CHUNK_ELEMENTS = 2**24  # elements of a distance matrix computed at once, 64 MB


@dataclass(frozen=True)
class Thresholds:
    """IoU thresholds of each object, from its candidates."""

    positive_BG: Tensor
    """float32 IoU from which a candidate is positive; infinite for padding."""
    region_BG: Tensor
    """float32, with the unbiased standard deviation: the threshold that defines the regions of distillation."""


@torch.no_grad()
def assign_atss(
    anchors_A4: Tensor,
    anchors_of_level: Sequence[int],
    objects_BG4: Tensor,
    present_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    candidates: int = 9,
    unbiased_std: bool = True,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> tuple[Assignment, Thresholds]:
    """Label every anchor 1 (positive) or 0.

    Args:
        anchors_A4: float32, in pixels, level by level.
        anchors_of_level: number of anchors of each level; the sum is A.
        objects_BG4: float32, in pixels.
        present_BG: bool; False is padding.
        valid_BA: bool; anchors that exist for the image, at least one per level. Others are no candidates and get 0. None: all are valid.
        candidates: number per level and object; all anchors where a level has fewer.
        unbiased_std: use the unbiased standard deviation of the candidates' IoUs.
        chunk_elements: bounds memory; the result does not depend on it.
    """
    B, G = present_BG.shape
    A = len(anchors_A4)
    step = max(1, chunk_elements // max(1, G * max(anchors_of_level)))
    parts = [
        _assign(
            anchors_A4,
            anchors_of_level,
            objects_BG4[i : i + step],
            present_BG[i : i + step],
            None if valid_BA is None else valid_BA[i : i + step],
            candidates,
            unbiased_std,
        )
        for i in range(0, B, step)
    ]
    if G == 0:
        zeros_BA = torch.zeros((B, A), dtype=torch.int64, device=anchors_A4.device)
        empty_BG = objects_BG4.new_zeros((B, 0))
        return Assignment(zeros_BA, zeros_BA, objects_BG4.new_full((B, A), -1.0)), Thresholds(empty_BG, empty_BG)
    labels, objects, ious, positive, region = (torch.cat(part) for part in zip(*parts, strict=True))
    return Assignment(labels, objects, ious), Thresholds(positive, region)


def _assign(
    anchors_A4: Tensor,
    anchors_of_level: Sequence[int],
    objects_BG4: Tensor,
    present_BG: Tensor,
    valid_BA: Tensor | None,
    candidates: int,
    unbiased_std: bool,
) -> tuple[Tensor, ...]:
    """Do the work of `assign_atss` for a part of the images.

    Returns:
        labels [B, A] (1 or 0), object of each positive [B, A], its IoU [B, A] (-1 for others), and both thresholds [B, G]; nothing without objects.
    """
    B, G = present_BG.shape
    if G == 0:
        return ()
    centers_A2 = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2
    index_BGN = _nearest(centers_A2, anchors_of_level, objects_BG4, valid_BA, candidates)
    candidates_BGN4 = anchors_A4[index_BGN]
    iou_BGN = boxes.pairwise_iou(objects_BG4[:, :, None], candidates_BGN4)[:, :, 0]
    valid_BGN = torch.ones_like(iou_BGN, dtype=torch.bool)
    if valid_BA is not None:  # False where a level has fewer than `candidates`
        valid_BGN = valid_BA.gather(1, index_BGN.flatten(1)).view_as(index_BGN)
    count_BG = valid_BGN.sum(dim=-1)
    mean_BG = torch.where(valid_BGN, iou_BGN, 0.0).sum(dim=-1) / count_BG
    squares_BG = torch.where(valid_BGN, (iou_BGN - mean_BG[..., None]).square(), 0.0).sum(dim=-1)
    biased_BG, unbiased_BG = (squares_BG / count_BG).sqrt(), (squares_BG / (count_BG - 1)).sqrt()
    positive_BG = mean_BG + (unbiased_BG if unbiased_std else biased_BG)
    positive_BG = positive_BG.masked_fill(~present_BG, torch.inf)
    region_BG = (mean_BG + unbiased_BG).masked_fill(~present_BG, torch.inf)

    x_BGN, y_BGN = centers_A2[index_BGN].unbind(-1)
    x1, y1, x2, y2 = objects_BG4[:, :, None].unbind(-1)
    depth_BGN = torch.stack((x_BGN - x1, y_BGN - y1, x2 - x_BGN, y2 - y_BGN)).amin(dim=0)
    wins_BGN = valid_BGN & (iou_BGN >= positive_BG[..., None]) & (depth_BGN > _INSIDE)

    # An anchor that is positive for several objects is assigned to the one with the highest IoU; of equal ones to the first, as argmax would.
    A = len(anchors_A4)
    claim_BGN = torch.where(wins_BGN, iou_BGN, -1.0)
    ious_BA = iou_BGN.new_full((B, A), -1.0)
    ious_BA.scatter_reduce_(1, index_BGN.flatten(1), claim_BGN.flatten(1), "amax")
    best_BGN = wins_BGN & (claim_BGN == ious_BA.gather(1, index_BGN.flatten(1)).view_as(claim_BGN))
    object_BGN = torch.arange(G, device=index_BGN.device).view(1, G, 1).expand_as(index_BGN)
    objects_BA = index_BGN.new_full((B, A), G)
    objects_BA.scatter_reduce_(1, index_BGN.flatten(1), torch.where(best_BGN, object_BGN, G).flatten(1), "amin")
    labels_BA = (objects_BA < G).long()
    return labels_BA, torch.where(labels_BA == 1, objects_BA, 0), ious_BA, positive_BG, region_BG


def _nearest(
    centers_A2: Tensor, anchors_of_level: Sequence[int], objects_BG4: Tensor, valid_BA: Tensor | None, candidates: int
) -> Tensor:
    """Index [B, G, N] of the anchors whose centers are nearest to each object's, `candidates` a level; invalid ones where too few are valid."""
    object_centers_BG2 = (objects_BG4[..., :2] + objects_BG4[..., 2:]) / 2
    chosen, start = [], 0
    for count in anchors_of_level:
        distance_BGL = torch.cdist(
            object_centers_BG2,
            centers_A2[start : start + count].expand(len(objects_BG4), -1, -1),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        if valid_BA is not None:
            distance_BGL.masked_fill_(~valid_BA[:, None, start : start + count], torch.inf)
        chosen.append(distance_BGL.topk(min(candidates, count), dim=-1, largest=False).indices + start)
        start += count
    return torch.cat(chosen, dim=-1)
