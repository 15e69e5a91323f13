"""Assignment of boxes (anchors or RoIs) to objects by the max-IoU rule of Faster R-CNN (arXiv 1506.01497, section 3.1.2).

A box is positive where its best IoU is at least `positive_iou`, negative where it is below `negative_iou`, ignored
between. With `low_quality` the best box or boxes of each object are positive too, but only with an IoU above 0.
torchvision's matcher has no such condition, so an object that touches no anchor makes every anchor positive in it. The
object of a positive is always the one it overlaps most, as in PaddleDetection@666f597f.

Shapes: B images, G objects (padded), A boxes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssld.stage2_detect.models import boxes

_CHUNK_ELEMENTS = 2**24
"""Elements of the IoU matrix computed at once: 64 MB per temporary. 300 objects and 268,000 anchors need 320 MB per image."""


@dataclass(frozen=True)
class Assignment:
    """Label, object and IoU of every box."""

    labels_BA: Tensor
    """int64: 1 positive, 0 negative, -1 ignored."""
    objects_BA: Tensor
    """int64 index of the object with the highest IoU; 0 where the image has none."""
    ious_BA: Tensor
    """float32 IoU with that object; -1 where the image has none."""


@torch.no_grad()
def assign(
    boxes_BA4: Tensor,
    objects_BG4: Tensor,
    present_BG: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool = False,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> Assignment:
    """Label every box; without objects every box is negative.

    Args:
        boxes_BA4: float32, in pixels.
        objects_BG4: float32, in pixels.
        present_BG: bool; False is padding.
        positive_iou: IoU from which a box is positive.
        negative_iou: IoU below which a box is negative.
        low_quality: also mark the best boxes of each object as positive.
        chunk_elements: bounds memory; the result does not depend on it.
    """
    B, A = boxes_BA4.shape[:2]
    best_BA = boxes_BA4.new_full((B, A), -1.0)
    object_BA = torch.zeros((B, A), dtype=torch.int64, device=boxes_BA4.device)
    low_quality_BA = torch.zeros((B, A), dtype=torch.bool, device=boxes_BA4.device)
    step = max(1, chunk_elements // max(1, B * A))
    for start in range(0, objects_BG4.shape[1], step):
        present_Bg = present_BG[:, start : start + step]
        iou_BgA = boxes.pairwise_iou(objects_BG4[:, start : start + step], boxes_BA4)
        iou_BgA.masked_fill_(~present_Bg[..., None], -1.0)
        chunk_best_BA, chunk_object_BA = iou_BgA.max(dim=1)
        better_BA = chunk_best_BA > best_BA  # strict: the first of equals wins, as without chunks
        best_BA = torch.where(better_BA, chunk_best_BA, best_BA)
        object_BA = torch.where(better_BA, chunk_object_BA + start, object_BA)
        if low_quality:
            highest_Bg1 = iou_BgA.amax(dim=2, keepdim=True)
            # An object that touches no box makes none positive.
            highest_Bg1 = highest_Bg1.masked_fill(highest_Bg1 <= 0, torch.inf)
            low_quality_BA |= (iou_BgA == highest_Bg1).any(dim=1)
    positive_BA = (best_BA >= positive_iou) | low_quality_BA
    negative_BA = best_BA < negative_iou
    labels_BA = torch.where(positive_BA, 1, torch.where(negative_BA, 0, -1))
    return Assignment(labels_BA, object_BA, best_BA)
