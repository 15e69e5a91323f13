"""Geometry of boxes: areas, IoU, clipping, deltas, NMS. All of it float32, whatever autocast says.

Deltas are those of R-CNN (arXiv 1311.2524, appendix C): shift of the centre in units of the reference's size, logarithm
of the size's ratio, each times a weight. Boxes are (x1, y1, x2, y2) in absolute pixels without any +1. Differences from
torchvision.ops: batches with padding, several deltas for one reference, and NMS that returns a mask of fixed size.

Shapes: ... any leading dimensions, B images, G objects, N boxes.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.ops import nms

LOG_SIZE_LIMIT = math.log(1000 / 16)
"""A delta never enlarges a side by more than this factor's exponential; as in every R-CNN."""
_MANY = 10_000  # boxes from which NMS goes class by class
_SMALLEST_SIDE = 1e-6  # keeps the deltas of padding finite; data with real sides below it is dropped on loading


def area(boxes_4: Tensor) -> Tensor:
    """Area of boxes [..., 4]; 0 for boxes turned inside out."""
    x1, y1, x2, y2 = boxes_4.unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def pairwise_intersection(first_BG4: Tensor, second_BN4: Tensor) -> Tensor:
    """Area [B, G, N] that every box of `first` shares with every box of `second` of the same image; without gradient. B may
    be missing.
    """
    a_BG1, b_B1N = first_BG4.unsqueeze(-2), second_BN4.unsqueeze(-3)
    # One axis at a time: half the memory of working on pairs of coordinates.
    width_BGN = torch.minimum(a_BG1[..., 2], b_B1N[..., 2]) - torch.maximum(a_BG1[..., 0], b_B1N[..., 0])
    height_BGN = torch.minimum(a_BG1[..., 3], b_B1N[..., 3]) - torch.maximum(a_BG1[..., 1], b_B1N[..., 1])
    return width_BGN.clamp_(min=0).mul_(height_BGN.clamp_(min=0))


def pairwise_iou(first_BG4: Tensor, second_BN4: Tensor) -> Tensor:
    """IoU [B, G, N] in 0..1 of every box of `first` with every box of `second` of the same image; 0 where both are
    empty. torchvision's `box_iou` of batches, which gives NaN there.
    """
    shared_BGN = pairwise_intersection(first_BG4, second_BN4)
    union_BGN = area(first_BG4)[..., :, None] + area(second_BN4)[..., None, :] - shared_BGN
    return shared_BGN / union_BGN.clamp_(min=_SMALLEST_SIDE**2)


def paired_intersection(first_4: Tensor, second_4: Tensor) -> Tensor:
    """Area [...] that boxes with the same place in two tensors [..., 4] share."""
    sides_2 = torch.minimum(first_4[..., 2:], second_4[..., 2:]) - torch.maximum(first_4[..., :2], second_4[..., :2])
    return sides_2.clamp(min=0).prod(dim=-1)


def paired_iou(first_4: Tensor, second_4: Tensor) -> Tensor:
    """IoU [...] of boxes with the same place in two tensors [..., 4]; in strides or pixels."""
    shared = paired_intersection(first_4, second_4)
    return shared / (area(first_4) + area(second_4) - shared).clamp(min=1e-6)


def clip(boxes_BN4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Boxes [B, ..., 4] moved inside images of (height, width) `sizes_B2`."""
    limits_B4 = sizes_B2.to(boxes_BN4.dtype).flip(-1).repeat(1, 2)
    limits = limits_B4.view(limits_B4.shape[0], *[1] * (boxes_BN4.ndim - 2), 4)
    return boxes_BN4.clamp(min=0).minimum(limits)


def encode(boxes_4: Tensor, references_4: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [..., 4] that lead from `references_4` to `boxes_4`; always finite, also for empty boxes."""
    x, y, w, h = _centres(boxes_4)
    ref_x, ref_y, ref_w, ref_h = _centres(references_4)
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
    """Boxes [..., 4] to which float32 deltas lead from references (leading dimensions broadcast)."""
    dx, dy, dw, dh = deltas_4.unbind(-1)
    ref_x, ref_y, ref_w, ref_h = _centres(references_4)
    x, y = dx / weights[0] * ref_w + ref_x, dy / weights[1] * ref_h + ref_y
    half_w = torch.exp((dw / weights[2]).clamp(max=LOG_SIZE_LIMIT)) * ref_w / 2
    half_h = torch.exp((dh / weights[3]).clamp(max=LOG_SIZE_LIMIT)) * ref_h / 2
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=-1)


def take(boxes_BN4: Tensor, index_BS: Tensor) -> Tensor:
    """The boxes (or deltas) [B, S, 4] of `boxes_BN4` with these indices; zeros where there is nothing to take from (N =
    0).
    """
    if boxes_BN4.shape[1] == 0:
        return boxes_BN4.new_zeros((*index_BS.shape, 4))
    return boxes_BN4.gather(1, index_BS[..., None].expand(-1, -1, 4))


def nms_masks(
    boxes_BN4: Sequence[Tensor], scores_BN: Sequence[Tensor], valid_BN: Sequence[Tensor], iou: float
) -> list[Tensor]:
    """Which boxes [B, N] of each of several batches, of different N, greedy NMS keeps, each row by itself; boxes that are not valid neither stay nor
    suppress. On a CPU all rows go side by side on torch's number of threads.
    """
    # Those that are not valid are last in the order: they meet only what is already decided.
    ranked_BN = [scores.masked_fill(~valid, -torch.inf) for scores, valid in zip(scores_BN, valid_BN, strict=True)]
    rows = [pair for pairs in zip(boxes_BN4, ranked_BN, strict=True) for pair in zip(*pairs, strict=True)]
    if boxes_BN4[0].device.type == "cpu" and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # the kernel itself has one, and no lock
            kept = list(threads.map(lambda row: nms(*row, iou), rows))
    else:
        kept = [nms(*row, iou) for row in rows]
    masks = [torch.zeros_like(valid) for valid in valid_BN]
    for mask_N, index in zip((mask_N for mask_BN in masks for mask_N in mask_BN), kept, strict=True):
        mask_N[index] = True
    return [mask & valid for mask, valid in zip(masks, valid_BN, strict=True)]


def class_nms(boxes_N4: Tensor, scores_N: Tensor, classes_N: Tensor, iou: float, *, most: int | None = None) -> Tensor:
    """Indices, best score first, of what greedy NMS within each class keeps, or of the best `most` of that;
    coordinates must not be negative.
    """
    # Whether a box stays depends on better ones only, so the best of all boxes decide about the best that stay.
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
        # Classes are moved apart instead of looped over.
        apart_N = classes_N * (boxes_N4.max() + 1)
        return nms(boxes_N4 + apart_N[:, None], scores_N, iou)[:most]
    # NMS looks at all pairs: of an untrained one-stage detector's boxes a class at a time is many times faster.
    kept = []
    for label in classes_N.unique():
        index_M = (classes_N == label).nonzero()[:, 0]
        kept.append(index_M[nms(boxes_N4[index_M], scores_N[index_M], iou)])
    kept_M = torch.cat(kept).sort().values
    return kept_M[scores_N[kept_M].argsort(descending=True, stable=True)[:most]]


def _centres(boxes_4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes_4.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
