"""Geometry of boxes: areas, IoU, clipping, deltas, NMS. All in float32, also under autocast.

Deltas are those of R-CNN (arXiv 1311.2524, appendix C): shift of the center in units of the reference's size, logarithm
of the size's ratio, each times a weight. Boxes are (x1, y1, x2, y2) in absolute pixels without any +1. Differences from
torchvision.ops: batches with padding, several deltas for one reference, and NMS that returns a mask of fixed size.

Shapes: ... any leading dimensions, B images, G objects, N boxes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

LOG_SIZE_LIMIT = math.log(1000 / 16)
"""Largest delta of a side: a side is enlarged by at most its exponential, as in other R-CNN implementations."""
_MANY = 10_000  # number of boxes above which NMS runs class by class
_SMALLEST_SIDE = 1e-6
"""In pixels; keeps the deltas of padding finite. Objects with smaller sides are dropped on loading."""


def area(boxes_4: Tensor) -> Tensor:
    """Compute the area of boxes [..., 4]; 0 where x2 < x1 or y2 < y1."""
    x1, y1, x2, y2 = boxes_4.unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def pairwise_intersection(first_BG4: Tensor, second_BN4: Tensor) -> Tensor:
    """Compute the area [B, G, N] that every box of `first` shares with every box of `second` of the same image; without
    gradient. B may be missing.
    """
    a_BG1, b_B1N = first_BG4.unsqueeze(-2), second_BN4.unsqueeze(-3)
    # One axis at a time: half the memory of working on pairs of coordinates.
    width_BGN = torch.minimum(a_BG1[..., 2], b_B1N[..., 2]) - torch.maximum(a_BG1[..., 0], b_B1N[..., 0])
    height_BGN = torch.minimum(a_BG1[..., 3], b_B1N[..., 3]) - torch.maximum(a_BG1[..., 1], b_B1N[..., 1])
    return width_BGN.clamp_(min=0).mul_(height_BGN.clamp_(min=0))


def pairwise_iou(first_BG4: Tensor, second_BN4: Tensor) -> Tensor:
    """Compute the IoU [B, G, N] in 0..1 of every box of `first` with every box of `second` of the same image; 0 where both
    are empty, where torchvision's `box_iou` gives NaN.
    """
    shared_BGN = pairwise_intersection(first_BG4, second_BN4)
    union_BGN = area(first_BG4)[..., :, None] + area(second_BN4)[..., None, :] - shared_BGN
    return shared_BGN / union_BGN.clamp_(min=_SMALLEST_SIDE**2)


def paired_intersection(first_4: Tensor, second_4: Tensor) -> Tensor:
    """Compute the area [...] shared by boxes at the same position of two tensors [..., 4]."""
    sides_2 = torch.minimum(first_4[..., 2:], second_4[..., 2:]) - torch.maximum(first_4[..., :2], second_4[..., :2])
    width, height = sides_2.clamp(min=0).unbind(-1)
    return width * height  # not `prod`, whose backward pass makes the host wait to know whether there is a zero


def paired_iou(first_4: Tensor, second_4: Tensor) -> Tensor:
    """Compute the IoU [...] of boxes at the same position of two tensors [..., 4]; in strides or pixels."""
    shared = paired_intersection(first_4, second_4)
    return shared / (area(first_4) + area(second_4) - shared).clamp(min=1e-6)


def clip(boxes_BN4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Clip boxes [B, ..., 4] to images of (height, width) `sizes_B2`."""
    limits_B4 = sizes_B2.to(boxes_BN4.dtype).flip(-1).repeat(1, 2)
    limits = limits_B4.view(limits_B4.shape[0], *[1] * (boxes_BN4.ndim - 2), 4)
    return boxes_BN4.clamp(min=0).minimum(limits)


def encode(boxes_4: Tensor, references_4: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the deltas [..., 4] from `references_4` to `boxes_4`; finite also for empty boxes."""
    x, y, w, h = _centers(boxes_4)
    ref_x, ref_y, ref_w, ref_h = _centers(references_4)
    w, h, ref_w, ref_h = (side.clamp(min=_SMALLEST_SIDE) for side in (w, h, ref_w, ref_h))
    return torch.stack(
        (
            weights[0] * (x - ref_x) / ref_w,
            weights[1] * (y - ref_y) / ref_h,
            weights[2] * torch.log(w / ref_w),
            weights[3] * torch.log(h / ref_h),
        ),
        dim=-1,
    )


def decode(deltas_4: Tensor, references_4: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply float32 deltas to references: boxes [..., 4] (leading dimensions broadcast)."""
    dx, dy, dw, dh = deltas_4.unbind(-1)
    ref_x, ref_y, ref_w, ref_h = _centers(references_4)
    x, y = dx / weights[0] * ref_w + ref_x, dy / weights[1] * ref_h + ref_y
    half_w = torch.exp((dw / weights[2]).clamp(max=LOG_SIZE_LIMIT)) * ref_w / 2
    half_h = torch.exp((dh / weights[3]).clamp(max=LOG_SIZE_LIMIT)) * ref_h / 2
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=-1)


def take(boxes_BN4: Tensor, index_BS: Tensor) -> Tensor:
    """Gather the boxes (or deltas) [B, S, 4] with these indices; zeros where N = 0."""
    if boxes_BN4.shape[1] == 0:
        return boxes_BN4.new_zeros((*index_BS.shape, 4))
    return boxes_BN4.gather(1, index_BS[..., None].expand(-1, -1, 4))


def has_area(boxes_N4: Tensor) -> Tensor:
    """Mark the boxes with sides above 0: bool [N]."""
    return (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(1)


def class_nms(boxes_N4: Tensor, scores_N: Tensor, classes_N: Tensor, iou: float, *, most: int | None = None) -> Tensor:
    """Run greedy NMS within each class.

    Args:
        boxes_N4: no coordinate negative.
        iou: overlap above which the worse box is dropped.
        most: number of indices to return; None returns all.

    Returns:
        int64 indices of the boxes that are kept, best score first.
    """
    # Whether a box is kept depends on better boxes only, so the best kept boxes follow from the best of all boxes.
    few = 4 * most if most is not None else len(scores_N)
    while most is not None and few < len(scores_N):
        best_F = scores_N.argsort(descending=True, stable=True)[:few]
        first = class_nms(boxes_N4[best_F], scores_N[best_F], classes_N[best_F], iou)
        if len(first) >= most:
            return best_F[first[:most]]
        few *= 4
    if boxes_N4.numel() == 0:
        return classes_N
    # In float64, since 80 classes of 1,333 px would cost float32 a hundredth of a pixel; Apple GPUs have none.
    if boxes_N4.device.type != "mps":
        boxes_N4, scores_N = boxes_N4.double(), scores_N.double()
    if len(classes_N) <= _MANY:
        # Classes are moved apart in place of a loop over them.
        apart_N = classes_N * (boxes_N4.max() + 1)
        return nms(boxes_N4 + apart_N[:, None], scores_N, iou)[:most]
    # NMS compares all pairs: for the many boxes of an untrained one-stage detector one class at a time is far faster.
    kept = []
    for label in classes_N.unique():
        index_M = (classes_N == label).nonzero()[:, 0]
        kept.append(index_M[nms(boxes_N4[index_M], scores_N[index_M], iou)])
    kept_M = torch.cat(kept).sort().values
    return kept_M[scores_N[kept_M].argsort(descending=True, stable=True)[:most]]


def _centers(boxes_4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes_4.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
