"""Post-processing of scored boxes: NMS within classes, selection of the best per image, conversion to the original image.

Hard NMS drops a box that overlaps a better one of its class; soft NMS (arXiv 1704.04503) lowers its score, and drops it
when the score falls to the threshold.

Shapes: B images, R RoIs per image, E = R * K scores, K classes, C candidates, D candidates above the threshold, then
detections; in `soft_nms` C is the largest number of candidates per class.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ssld.stage2_detect.models import boxes
from ssld.stage2_detect.models.batch import Detections


@dataclass(frozen=True)
class NMS:
    """Settings of NMS within a class.

    Args:
        iou: overlap above which hard NMS drops a box and soft_linear lowers its score; unused by soft_gaussian.
        sigma: of soft_gaussian, which multiplies scores by exp(-IoU^2 / sigma).
    """

    kind: Literal["hard", "soft_linear", "soft_gaussian"] = "hard"
    iou: float = 0.5
    sigma: float = 0.5


HARD = NMS()
_CANDIDATES = 2000
"""Scores per image that are copied to the host at once; soft NMS and untrained detectors may need more."""


def select(
    boxes_BRD4: Tensor, scores_BRK: Tensor, *, threshold: float, nms: NMS, most: int, candidates: int = _CANDIDATES
) -> list[Detections]:
    """Select the best `most` boxes of each image with scores above `threshold`, best first, in the boxes' own coordinates.

    The best candidates of all images are copied to the host at once, and NMS runs there: a GPU is waited for once per batch. Only where
    NMS leaves fewer than `most` of `candidates` boxes, and there were more, are more of them copied.

    Args:
        boxes_BRD4: float32 boxes, one for each of K classes or one for all of them.
        scores_BRK: float32 in 0..1; a RoI with scores of 0 is never chosen if the threshold is not negative.
        candidates: scores per image that are copied at first.
    """
    B, R, K = scores_BRK.shape
    scores_BE = torch.where(scores_BRK > threshold, scores_BRK, -torch.inf).flatten(1)
    size = min(max(candidates, 4 * most), R * K)
    while True:
        selected = [
            _select_of_image(rows_D6, threshold=threshold, nms=nms, most=most, complete=size == R * K)
            for rows_D6 in _copy_best(boxes_BRD4, scores_BE, K, size)
        ]
        complete = [one for one in selected if one is not None]
        if len(complete) == B:
            return complete
        size = min(8 * size, R * K)


def _copy_best(boxes_BRD4: Tensor, scores_BE: Tensor, classes: int, size: int) -> Tensor:
    """Copy (x1, y1, x2, y2, score, label) of the `size` best scores of each image to the host, in their order: float32 [B, size, 6]."""
    # In their own order, not that of topk, which is arbitrary between equal scores: of equal scores at the cut any may be copied.
    place_BC = scores_BE.topk(size, dim=1, sorted=False).indices.sort(dim=1).values
    roi_BC, label_BC = place_BC // classes, place_BC % classes
    D = boxes_BRD4.shape[2]
    boxes_BC4 = boxes.take(boxes_BRD4.flatten(1, 2), roi_BC if D == 1 else roi_BC * D + label_BC)
    # A label is exact in float32, and one tensor is one copy.
    columns = (boxes_BC4, scores_BE.gather(1, place_BC)[..., None], label_BC[..., None].float())
    return torch.cat(columns, dim=-1).cpu()


def _select_of_image(rows_C6: Tensor, *, threshold: float, nms: NMS, most: int, complete: bool) -> Detections | None:
    """Detections from the best rows of an image; None where rows that are not `complete` may lack some of them."""
    rows_D6 = rows_C6[rows_C6[:, 4] > -torch.inf]
    boxes_D4, scores_D, class_D = rows_D6[:, :4].contiguous(), rows_D6[:, 4].contiguous(), rows_D6[:, 5].long()
    # Classes are moved apart for NMS, which needs coordinates from 0 on.
    positive_D4 = boxes_D4 - boxes_D4.amin().clamp(max=0) if len(boxes_D4) else boxes_D4
    best_D, best_scores_D = apply_nms(positive_D4, scores_D, class_D, nms, threshold=threshold, most=most)
    if complete or len(rows_D6) < len(rows_C6):
        return Detections(boxes_D4[best_D], best_scores_D, class_D[best_D])
    # Scores only fall, so a box that was not copied cannot come before one that is as good as the worst copied.
    if len(best_D) < most or best_scores_D[-1] < scores_D.amin():
        return None
    return Detections(boxes_D4[best_D], best_scores_D, class_D[best_D])


def apply_nms(
    boxes_D4: Tensor, scores_D: Tensor, class_D: Tensor, nms: NMS, *, threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """Select the best `most` boxes by NMS: their indices, best first, and their scores, which soft NMS lowers."""
    if nms.kind == "hard":
        best_D = boxes.class_nms(boxes_D4, scores_D, class_D, nms.iou, most=most)
        return best_D, scores_D[best_D]
    scores_D = soft_nms(boxes_D4, scores_D, class_D, nms, most=most)
    scores_D, best_D = scores_D.sort(descending=True, stable=True)
    some_D = scores_D[:most] > threshold
    return best_D[:most][some_D], scores_D[:most][some_D]


def soft_nms(boxes_D4: Tensor, scores_D: Tensor, class_D: Tensor, nms: NMS, *, most: int) -> Tensor:
    """Compute scores [D] by soft NMS within each class; 0 for boxes that cannot be among the best `most` of all classes.

    Classes advance together: each step takes the best remaining box of every class and lowers the scores of the others
    by their IoU with it (arXiv 1704.04503, figure 2). Scores only fall, so the loop ends when `most` taken boxes are as good
    as the best remaining one. Runs on the CPU, as each step reads a value.
    """
    if len(scores_D) == 0:
        return scores_D
    # One row per class that occurs; a candidate's place in it is its number among those of its class.
    _, row_D, count = class_D.unique(return_inverse=True, return_counts=True)
    order_D = row_D.argsort(stable=True)
    first = count.cumsum(0) - count
    place_D = torch.empty_like(row_D)
    place_D[order_D] = torch.arange(len(row_D), device=row_D.device) - first[row_D[order_D]]
    C = int(count.max())
    boxes_KC4 = boxes_D4.new_zeros((len(count), C, 4))
    left_KC = scores_D.new_full((len(count), C), -1.0)  # -1: empty, or taken
    boxes_KC4[row_D, place_D], left_KC[row_D, place_D] = boxes_D4, scores_D
    final_KC = torch.zeros_like(left_KC)
    best_M = scores_D.new_zeros(most)
    for _ in range(C):
        score_K1, taken_K1 = left_KC.max(dim=1, keepdim=True)
        if score_K1.max() <= best_M[-1]:
            break
        best_M = torch.cat((best_M, score_K1[:, 0])).topk(most).values
        final_KC.scatter_(1, taken_K1, score_K1.clamp(min=0).maximum(final_KC.gather(1, taken_K1)))
        iou_KC = boxes.pairwise_iou(boxes.take(boxes_KC4, taken_K1), boxes_KC4)[:, 0]
        left_KC = torch.where(left_KC >= 0, left_KC * _lowered(iou_KC, nms), -1.0).scatter(1, taken_K1, -1.0)
    return final_KC[row_D, place_D]


def _lowered(iou: Tensor, nms: NMS) -> Tensor:
    """Compute the factors on scores of boxes with this IoU with a better one."""
    if nms.kind == "soft_linear":
        return torch.where(iou >= nms.iou, 1 - iou, 1.0)
    return torch.exp(-iou.square() / nms.sigma)


def to_original(detections: Detections, original_2: Tensor, scale: Tensor) -> tuple[Detections, Tensor]:
    """Convert detections of one image to coordinates of the original, and clip them to it; returns them and a mask of the kept ones, bool [D].

    Boxes end at the original's border: the network's input, whose size is rounded, may reach up to half of its pixels beyond. A box that lies there
    has no area left, and is dropped.

    Args:
        detections: in coordinates of the network's input.
        original_2: (height, width) of the original, as of `ImageBatch.original_sizes`.
        scale: network size / original size.
    """
    return inside(replace(detections, boxes_N4=detections.boxes_N4 / scale), original_2)


def inside(detections: Detections, original_2: Tensor) -> tuple[Detections, Tensor]:
    """Clip detections in coordinates of an image of (height, width) `original_2` to it; returns as `to_original`."""
    boxes_D4 = boxes.clip(detections.boxes_N4[None], original_2[None])[0]
    some_D = boxes.area(boxes_D4) > 0
    return Detections(boxes_D4[some_D], detections.scores_N[some_D], detections.labels_N[some_D]), some_D
