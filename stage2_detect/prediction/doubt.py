"""Doubts of a detector about an image without annotations: scores between yes and no, and disagreement of two views.

Both are in units of objects, so they are added, and an image with many doubtful objects comes before one with few. Only boxes with a score of at
least `least` count: detectors return dozens of boxes of low score for any image.

    margin         sum over the boxes of (1 - |2 s - 1|)^2, s the score: 1 for a score of 0.5, 0 for 0 and 1
    disagreement   half of the summed scores of the boxes of both views, minus the sum over pairs of boxes of IoU x the smaller score

Margin: 1-vs-2 margin sampling, summed over the boxes, of Brust et al. 2018, "Active Learning for Deep Object Detection" (arXiv 1809.09875). A box
has a score of its class alone here, so the second class is "no object of this class", with 1 - s.

Disagreement: the idea of comparing an image with its mirror image is that of Yu et al. 2021, "Consistency-based Active Learning for Object
Detection" (arXiv 2103.10374); the formula is this project's. A pair of boxes contributes (s + t) / 2 - IoU x min(s, t), a box without a partner
s / 2: 0 for equal boxes with equal scores, and without a jump where an overlap vanishes.

Legend: N, M boxes of two views of an image, P pairs.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ssld.stage2_detect.data.loaders import ImageLoader, Item
from ssld.stage2_detect.evaluation.tta import mirror_back, mirrored
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.boxes import has_area, pairwise_iou
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.rcnn import RCNN


class Doubt(NamedTuple):
    """Doubts about one image, each at least 0, in objects."""

    margin: float
    disagreement: float

    @property
    def total(self) -> float:
        """The sum, by which images are ordered."""
        return self.margin + self.disagreement


def doubt_of(first: Detections, second: Detections, least: float) -> Doubt:
    """Compute the doubts from the boxes of an image and those of its mirror image, mirrored back; `least` is the lowest score that counts."""
    return Doubt(margin(first.scores_N.double().numpy(), least), disagreement(first, second, least))


def margin(scores_N: np.ndarray, least: float) -> float:
    """Compute the margin part of the doubt from the scores of an image."""
    counted = scores_N[scores_N >= least]
    return float(((1 - np.abs(2 * counted - 1)) ** 2).sum())


def disagreement(first: Detections, second: Detections, least: float) -> float:
    """Compute the disagreement of two views, whose boxes are in the same pixels; the order of the views does not matter.

    A pair counts if one of its boxes has a score of at least `least`.
    """
    overlaps_NM = pairwise_iou(first.boxes_N4[None].double(), second.boxes_N4[None].double())[0].numpy()
    same_NM = first.labels_N[:, None].numpy() == second.labels_N[None].numpy()
    scores_N, scores_M = first.scores_N.double().numpy(), second.scores_N.double().numpy()
    agreed_NM = np.where(same_NM, overlaps_NM * np.minimum(scores_N[:, None], scores_M[None]), 0.0)
    alone_N, alone_M = np.ones(len(scores_N), dtype=bool), np.ones(len(scores_M), dtype=bool)
    total = 0.0
    for n, m in _pairs(agreed_NM):
        alone_N[n] = alone_M[m] = False
        if max(scores_N[n], scores_M[m]) >= least:
            total += (scores_N[n] + scores_M[m]) / 2 - agreed_NM[n, m]
    for scores, alone in ((scores_N, alone_N), (scores_M, alone_M)):
        total += scores[alone & (scores >= least)].sum() / 2
    return max(float(total), 0.0)  # rounding


def _pairs(agreed_NM: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs (row, column), each row and column at most once: greedily, those that agree most first."""
    rows_P, columns_P = np.nonzero(agreed_NM)
    order = np.lexsort((columns_P, rows_P, -agreed_NM[rows_P, columns_P]))
    free_N, free_M = (np.ones(size, dtype=bool) for size in agreed_NM.shape)
    for row, column in zip(rows_P[order].tolist(), columns_P[order].tolist(), strict=True):
        if free_N[row] and free_M[column]:
            free_N[row] = free_M[column] = False
            yield row, column


@torch.no_grad()
def two_views(
    fast: Detector, loader: ImageLoader[Item], *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Item, Detections, Detections]]:
    """Yield each item of a loader with the boxes of its image and those of the mirror image, mirrored back; without masks.

    Args:
        fast: a detector of `for_inference`.
        loader: loads one view per image, without test-time augmentation.
    """
    boxes_of = boxes_alone(fast)
    for batch, items in loader:
        assert isinstance(batch, ImageBatch), "test-time augmentation is not for two views"
        images = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            first, second = boxes_of(images), boxes_of(mirrored(images))
        back = [one.where(has_area(one.boxes_N4)) for one in mirror_back(second, images)]
        yield from zip(items, first, back, strict=True)


def boxes_alone(fast: Detector) -> Callable[[ImageBatch], list[Detections]]:
    """Return a function that detects boxes, without the masks of a detector that has them."""
    if isinstance(fast, RCNN):
        return lambda images: fast.detect_boxes(images)[1]
    detector: Callable[[Any], list[Detections]] = fast
    return detector
