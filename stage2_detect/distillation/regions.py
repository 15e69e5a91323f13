"""Regions of a one-stage head in which it is distilled, as functions of anchors, objects and thresholds, or of both detectors' outputs.

Sources: arXiv 2102.12252 section 3.3 (valuable localization region), 1906.03609 (fine-grained), 2103.02340 (general instances), and
HikariTJU/LD@4287990c (the released code).

Objects are processed in chunks, which bounds the matrices of objects and anchors; the results do not depend on `chunk_elements`.

Shapes: B images, G objects (padded), g objects of a chunk, A anchors of all levels, K classes.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ssld.stage2_detect.models import boxes

Overlap = Literal["anchor", "union"]
_CHUNK_ELEMENTS = 2**22
"""Elements of a matrix of objects and anchors computed at once, 16 MB; there are about a dozen such matrices."""
_SHARE_OF_BEST = 0.5  # of an object's highest IoU, above which a cell is near it, as in the paper
_GI_IOU = 0.3  # overlap of general instances above which the one of lower score is dropped, as in the paper
_TAKEN = -1.0  # score of a box that is already taken, dropped or not valid


@torch.no_grad()
def valuable_region(
    anchors_A4: Tensor,
    objects_BG4: Tensor,
    thresholds_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    gamma: float = 0.25,
    overlap: Overlap = "anchor",
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> Tensor:
    """Compute the float32 weight [B, A] of every anchor in the valuable localization region, 0 outside it.

    An anchor belongs to the region of an object if gamma * threshold <= X < threshold, X being the distance-IoU. Its weight is the highest IoU with
    the objects to whose regions it belongs. Positives are not excluded.

    Args:
        thresholds_BG: thresholds of the assignment (`atss.Thresholds.region_BG`); infinite for padding, which has no region.
        valid_BA: bool; anchors that exist for the image; None: all.
        gamma: lower bound of the region, as a share of the threshold.
        overlap: `union` is the paper's distance-IoU; `anchor` divides by the anchor's area in place of the union, as in the released code, which
            gave the published AP of 42.1.
    """
    weight_BA = objects_BG4.new_zeros((len(thresholds_BG), len(anchors_A4)))
    for part in _chunks(thresholds_BG.shape[1], weight_BA.numel(), chunk_elements):
        threshold_Bg1 = thresholds_BG[:, part, None]
        iou_BgA, x_BgA = _distance_iou(objects_BG4[:, part], anchors_A4, overlap)
        inside_BgA = (x_BgA >= gamma * threshold_Bg1) & (x_BgA < threshold_Bg1) & torch.isfinite(threshold_Bg1)
        weight_BA = torch.maximum(weight_BA, iou_BgA.masked_fill_(~inside_BgA, 0).amax(dim=1))
    return weight_BA if valid_BA is None else weight_BA * valid_BA


@torch.no_grad()
def inside_objects(
    anchors_A4: Tensor,
    objects_BG4: Tensor,
    present_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> Tensor:
    """Mark the anchors whose center lies inside any object, only those of `valid_BA` if given: bool [B, A]."""
    x_A, y_A = ((anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2).unbind(-1)
    inside_BA = torch.zeros((len(present_BG), len(anchors_A4)), dtype=torch.bool, device=anchors_A4.device)
    for part in _chunks(present_BG.shape[1], inside_BA.numel(), chunk_elements):
        x1, y1, x2, y2 = objects_BG4[:, part, None].unbind(-1)
        covered_BgA = (x_A > x1) & (x_A < x2) & (y_A > y1) & (y_A < y2)
        inside_BA |= (covered_BgA & present_BG[:, part, None]).any(dim=1)
    return inside_BA if valid_BA is None else inside_BA & valid_BA


@torch.no_grad()
def fine_grained(
    anchors_A4: Tensor,
    objects_BG4: Tensor,
    present_BG: Tensor,
    *,
    valid_BA: Tensor | None = None,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> Tensor:
    """Mark the anchors whose IoU with an object is above half of the object's highest IoU, only those of `valid_BA` if given: bool [B, A]."""
    near_BA = torch.zeros((len(present_BG), len(anchors_A4)), dtype=torch.bool, device=anchors_A4.device)
    for part in _chunks(present_BG.shape[1], near_BA.numel(), chunk_elements):
        iou_BgA = boxes.pairwise_iou(objects_BG4[:, part], anchors_A4.expand(len(present_BG), -1, -1))
        if valid_BA is not None:
            iou_BgA.masked_fill_(~valid_BA[:, None], 0)
        near_BgA = (iou_BgA > _SHARE_OF_BEST * iou_BgA.amax(dim=2, keepdim=True)) & present_BG[:, part, None]
        near_BA |= near_BgA.any(dim=1)
    return near_BA


@torch.no_grad()
def negatives(labels_BA: Tensor, scores_BA: Tensor) -> Tensor:
    """Compute the float32 weight [B, A] of the valuable region of LD's anchor-free ld_fcos_head.py: the student's best score of each negative.

    Args:
        labels_BA: labels of the assignment; 0 is a negative.
        scores_BA: probability of the best class.
    """
    return torch.where(labels_BA == 0, scores_BA.float(), 0.0)


@torch.no_grad()
def general_instances(
    student_BAK: Tensor,
    teacher_BAK: Tensor,
    student_boxes_BA4: Tensor,
    teacher_boxes_BA4: Tensor,
    anchors_of_level: Sequence[int],
    *,
    valid_BA: Tensor | None = None,
    most: int = 10,
) -> Tensor:
    """Mark the cells at which two detectors differ most, after NMS of their boxes (arXiv 2103.02340 section 3.1, as used by LD): bool [B, A].

    A cell's score is the largest difference of the two detectors' probabilities of a class, its box that of the detector with the larger one. The
    best `most` boxes of each level and image are kept; the released code keeps the best of all images of a process, which then depend on each other.

    Args:
        student_BAK, teacher_BAK: logits.
        student_boxes_BA4, teacher_boxes_BA4: box of every cell, in pixels.
        anchors_of_level: number of cells of each level; the sum is A.
        valid_BA: bool; cells that exist for the image; None: all.
        most: number of cells per level and image.
    """
    difference_BAK = teacher_BAK.float().sigmoid() - student_BAK.float().sigmoid()
    score_BA, class_BA = difference_BAK.abs().max(dim=-1)
    greater_BA1 = difference_BAK.gather(-1, class_BA[..., None]) > 0
    boxes_BA4 = torch.where(greater_BA1, teacher_boxes_BA4.float(), student_boxes_BA4.float())
    if valid_BA is not None:
        score_BA = score_BA.masked_fill(~valid_BA, _TAKEN)
    chosen_BA = torch.zeros_like(class_BA, dtype=torch.bool)
    start = 0
    for count in anchors_of_level:
        level = slice(start, start + count)
        chosen_BA[:, level] = _best_apart(boxes_BA4[:, level], score_BA[:, level], most)
        start += count
    return chosen_BA


def _best_apart(boxes_BL4: Tensor, scores_BL: Tensor, most: int) -> Tensor:
    """Mark the best `most` boxes of each image that greedy NMS keeps: bool [B, L]; boxes with a score of `_TAKEN` are ignored.

    Each step takes one box of every image, so no shape depends on values and the host does not wait for a GPU.
    """
    kept_BL = torch.zeros_like(scores_BL, dtype=torch.bool)
    for _ in range(min(most, scores_BL.shape[1])):
        best_B1, index_B1 = scores_BL.max(dim=1, keepdim=True)
        kept_BL = kept_BL.scatter(1, index_B1, kept_BL.gather(1, index_B1) | (best_B1 > _TAKEN))
        overlaps_BL = boxes.pairwise_iou(boxes.take(boxes_BL4, index_B1), boxes_BL4)[:, 0] > _GI_IOU
        scores_BL = scores_BL.masked_fill(overlaps_BL, _TAKEN).scatter(1, index_B1, _TAKEN)
    return kept_BL


def _chunks(objects: int, elements: int, most: int) -> Iterator[slice]:
    """Yield ranges of objects, each of one object or of at most `most` elements."""
    step = max(1, most // max(1, elements))
    return (slice(start, start + step) for start in range(0, objects, step))


def _distance_iou(objects_Bg4: Tensor, anchors_A4: Tensor, overlap: Overlap) -> tuple[Tensor, Tensor]:
    """Compute IoU [B, g, A], and the overlap minus the squared distance of the centers over the squared diagonal of the box around both."""
    shared = boxes.pairwise_intersection(objects_Bg4, anchors_A4[None])
    objects_Bg14 = objects_Bg4[:, :, None]
    # One axis at a time: half the memory of pairs of coordinates.
    distance_x, around_x = _along(objects_Bg14[..., 0], objects_Bg14[..., 2], anchors_A4[:, 0], anchors_A4[:, 2])
    distance_y, around_y = _along(objects_Bg14[..., 1], objects_Bg14[..., 3], anchors_A4[:, 1], anchors_A4[:, 3])
    distance, diagonal = distance_x + distance_y, (around_x + around_y).clamp_(min=1e-6)
    area_A = boxes.area(anchors_A4)
    union = (boxes.area(objects_Bg14) + area_A - shared).clamp_(min=1e-6)
    share = shared / (area_A.clamp(min=1e-6) if overlap == "anchor" else union)
    return shared / union, share - distance / diagonal


def _along(start: Tensor, end: Tensor, other_start: Tensor, other_end: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the squared distance of the middles of intervals, and the squared length from the first start to the last end."""
    around = (torch.maximum(end, other_end) - torch.minimum(start, other_start)).square_()
    return ((start + end - other_start - other_end) / 2).square_(), around
