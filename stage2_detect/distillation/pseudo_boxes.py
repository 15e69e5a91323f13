"""Pseudo-boxes of a teacher: which of its detections are targets, and whether the sides of a box are certain enough to be learned.

A detection is a pseudo-box from the threshold of its class on. Its sides are judged as in Soft Teacher (arXiv 2106.09018, section 3.3): the teacher
refines shifted copies of the box, and the standard deviation of the refined sides, divided by the mean of the box's width and height, is small where
the sides are certain. Shifts are drawn from the seed of (run, step, image), so that they depend neither on the device nor on the batch.

Shapes: B images, G boxes of an image (padded), J shifted copies, K classes.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ssld.stage2_detect.data.padding import pad_targets
from ssld.stage2_detect.models import boxes, sampling
from ssld.stage2_detect.models.batch import Detections, Targets

_STREAM = 2  # stream of the sampling hash; RPN and RoI heads use 0 and 1
_SHIFT = 0.06  # largest shift of a side, as a share of the box's width or height


def pseudo_targets(detections: Sequence[Detections], thresholds_K: Tensor, seeds_B: Tensor) -> Targets:
    """Return the detections with scores of at least their class's threshold as targets, on the device of `seeds_B`; boxes without area are left out.

    Args:
        detections: of each image, in network coordinates, on the CPU.
        thresholds_K: on the CPU.
        seeds_B: seed of each image at this step.
    """
    chosen = [
        one.where((one.scores_N >= thresholds_K[one.labels_N]) & (boxes.area(one.boxes_N4) > 0)) for one in detections
    ]
    targets = pad_targets([(one.boxes_N4.numpy(), one.labels_N.numpy()) for one in chosen], [0] * len(chosen))
    return replace(targets.to(seeds_B.device), seeds_B=seeds_B)


def shifted(boxes_BG4: Tensor, seeds_B: Tensor, copies: int) -> Tensor:
    """Compute copies [B, G, J, 4] of boxes, each side shifted by up to 6 % of the box's width or height, drawn uniformly."""
    B, G = boxes_BG4.shape[:2]
    numbers = sampling.hash_priority(seeds_B, G * copies * 4, _STREAM).to(boxes_BG4.dtype) * 2.0**-62
    sides_BG2 = boxes_BG4[..., 2:] - boxes_BG4[..., :2]
    shifts = _SHIFT * (2 * numbers.view(B, G, copies, 4) - 1) * sides_BG2.repeat(1, 1, 2)[:, :, None]
    return boxes_BG4[:, :, None] + shifts


def spread(refined_BGJ4: Tensor, boxes_BG4: Tensor) -> Tensor:
    """Compute the spread [B, G] of refined copies: the mean over the four sides of their standard deviation, divided by the mean of the width and the
    height of the box."""
    side_BG = (boxes_BG4[..., 2:] - boxes_BG4[..., :2]).mean(dim=-1)
    return refined_BGJ4.std(dim=2).mean(dim=-1) / side_BG.clamp(min=1e-6)


def of_class(boxes_BRD4: Tensor, labels_BR: Tensor) -> Tensor:
    """Return the box [B, R, 4] of each RoI's class, of boxes for each class or for all together (D = K or 1)."""
    index_BR = labels_BR.clamp(0, boxes_BRD4.shape[2] - 1)
    return boxes_BRD4.gather(2, index_BR[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
