"""Detections of the RoI heads against a loop over images, classes and boxes."""

import math

import numpy as np
import pytest
import torch
from tiny_roi_heads import (
    SIZES,
    STRIDES,
    WEIGHTS,
    K,
    detect,
    make,
    maps,
    predict_no_shift,
    proposals,
)
from torchvision import ops

from ssld.stage2_detect.models import boxes, pooling
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.postprocess import NMS
from ssld.stage2_detect.models.roi_heads import RoIHeads
from ssld.stage2_detect.models.rpn import Proposals


def _detect_by_loop(heads: RoIHeads, found: Proposals, scales: list[float]) -> list[list[tuple]]:
    result = []
    pooled = pooling.pool_rois(maps(), found.boxes_BR4, found.valid_BR, strides=STRIDES, size=3).unflatten(0, (2, -1))
    for i, scale in enumerate(scales):
        height, width = SIZES[i].tolist()
        logits, deltas = heads.heads[0](pooled[i][found.valid_BR[i]])
        rois = found.boxes_BR4[i][found.valid_BR[i]]
        rows = []
        for label in range(K):
            decoded = ops.clip_boxes_to_image(boxes.decode(deltas[:, label], rois, WEIGHTS), (height, width))
            scores = logits.softmax(dim=1)[:, label]
            decoded, scores = decoded[scores > heads.score_threshold], scores[scores > heads.score_threshold]
            for place in ops.nms(decoded, scores, heads.nms.iou).tolist():
                rows.append((scores[place].item(), label, *decoded[place].tolist()))
        rows = sorted(rows, reverse=True)[: heads.detections_per_image]
        original = (math.floor(width / scale + 0.5), math.floor(height / scale + 0.5))
        final = []
        for score, label, *corners in rows:
            x1, x2 = (min(c / scale, original[0]) for c in corners[0::2])
            y1, y2 = (min(c / scale, original[1]) for c in corners[1::2])
            if x2 > x1 and y2 > y1:
                final.append((score, label, x1, y1, x2, y2))
        result.append(final)
    return result


@pytest.mark.parametrize("limit", [1000, 7])
def test_detections_equal_the_loop(limit: int) -> None:
    heads = make(score_threshold=0.2, nms=NMS(iou=0.3), detections_per_image=limit).eval()
    found, scales = proposals(), [0.8, 1.3]
    images = ImageBatch(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), SIZES, torch.tensor(scales))
    with torch.no_grad():
        expected = _detect_by_loop(heads, found, scales)
    ours = detect(heads, maps(), found, images)
    for detections, rows in zip(ours, expected, strict=True):
        assert len(rows) > 5
        table = np.array(rows)
        np.testing.assert_allclose(detections.scores_N.numpy(), table[:, 0], rtol=1e-5)
        assert detections.labels_N.tolist() == table[:, 1].tolist()
        np.testing.assert_allclose(detections.boxes_N4.numpy(), table[:, 2:], atol=1e-3)
        assert detections.boxes_N4.dtype == torch.float32


def test_boxes_without_area_are_dropped() -> None:
    heads = make(score_threshold=0.0).eval()
    predict_no_shift(heads)
    rois = torch.tensor([[[10.0, 10.0, 30.0, 40.0], [160.0, 20.0, 170.0, 40.0]]])  # the second lies beside the image
    images = ImageBatch(torch.zeros(1, 3, 128, 160, dtype=torch.uint8), SIZES[:1], torch.ones(1))
    (found,) = detect(heads, [m[:1] for m in maps()], Proposals(rois, torch.ones(1, 2, dtype=torch.bool)), images)
    assert len(found.scores_N) == K
    assert (found.boxes_N4 == rois[0, 0]).all()


def test_nothing_found() -> None:
    images = ImageBatch(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), SIZES, torch.ones(2))
    nothing = Proposals(torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool))
    for found in detect(make().eval(), maps(), nothing, images):
        assert found.boxes_N4.shape == (0, 4)
        assert found.scores_N.shape == found.labels_N.shape == (0,)
