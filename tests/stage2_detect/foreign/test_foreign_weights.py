"""Weights of detectron2 and mmdetection in this project's detectors: every part gives what it gives there, and so do scores and boxes.

The other side is `others.py`, plain functions by the names of these projects, and formulas in float64 NumPy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.foreign.detectron2_weights import detectron2_detector
from ssld.stage2_detect.foreign.fitting import ForeignDetector, check_fits
from ssld.stage2_detect.foreign.mmdetection_weights import mmdetection_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import pooling
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.rpn import Proposals
from tests.stage2_detect.foreign.others import (
    CHANNELS,
    CLASSES,
    Network,
    Project,
    State,
    detectron2_state,
    mmdetection_state,
)

SIZE = (64, 96)
STRIDES = (8, 16, 32, 64, 128)
BLUE_FIRST = (103.53, 116.28, 123.675)
STD = (58.395, 57.12, 57.375)


def built(detector: ForeignDetector) -> Detector:
    config = DetectorConfig.model_validate(detector.model)
    body = timm.create_model(detector.arch, features_only=True)
    inputs = InputSettings.of_detector(detector.mean, detector.std)
    model = build_detector(config, classes=detector.classes, body=body, arch=detector.arch, inputs=inputs)
    check_fits(detector.tensors, model.state_dict(), "state")
    model.load_state_dict(detector.tensors)
    return model.eval()


def given_pixels(*, caffe: bool) -> tuple[ImageBatch, Tensor]:
    """An image for this project, and as its own project hands it to the network."""
    pixels = torch.randint(0, 256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([SIZE]), torch.ones(1))
    if caffe:
        return images, pixels.flip(1).float() - torch.tensor(BLUE_FIRST).view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (BLUE_FIRST[::-1], STD))
    return images, (pixels.float() - mean) / std


def close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * scale)


SMALL = "resnet18"
CASES: list[tuple[str, str, Callable[[], State], bool]] = [
    ("detectron2", "faster_rcnn", lambda: detectron2_state("faster_rcnn", merged=True), True),
    ("detectron2", "mask_rcnn", lambda: detectron2_state("mask_rcnn", arch=SMALL), False),
    ("detectron2", "mask_rcnn", lambda: detectron2_state("mask_rcnn", arch=SMALL, new_baseline=True), False),
    ("detectron2", "cascade_mask_rcnn", lambda: detectron2_state("cascade_mask_rcnn", arch=SMALL), False),
    ("detectron2", "retinanet", lambda: detectron2_state("retinanet", arch=SMALL), False),
    ("mmdetection", "faster_rcnn", lambda: mmdetection_state("faster_rcnn", arch=SMALL), False),
    ("mmdetection", "mask_rcnn", lambda: mmdetection_state("mask_rcnn", arch=SMALL, group_norm=True), False),
    ("mmdetection", "cascade_rcnn", lambda: mmdetection_state("cascade_rcnn", merged=True), True),
    ("mmdetection", "retinanet", lambda: mmdetection_state("retinanet", arch=SMALL), False),
    ("mmdetection", "gfl", lambda: mmdetection_state("gfl", arch=SMALL), False),
]


@pytest.mark.parametrize(
    ("project", "kind", "make", "caffe"), CASES, ids=[f"{case[0]}-{case[1]}-{n}" for n, case in enumerate(CASES)]
)
@torch.no_grad()
def test_every_part_is_theirs(project: str, kind: str, make: Callable[[], State], caffe: bool) -> None:
    state = make()
    if project == "detectron2":
        detector = detectron2_detector(state, caffe=caffe, source="state")
    else:
        detector = mmdetection_detector(state, {}, caffe=None, source="state")
    arch = "resnet50" if caffe else "resnet18"
    assert (detector.model["kind"], detector.classes, detector.arch) == (kind, CLASSES, arch)
    model = built(detector)
    theirs = Network(Project(project), state, stride_in_1x1=caffe)
    images, pixels = given_pixels(caffe=caffe)
    features, expected = model.features(images), theirs.pyramid(theirs.body(pixels, detector.arch), kind)
    for one, other in zip(features, expected, strict=True):
        close(one, other)
    if isinstance(model, DenseDetector):
        _check_one_stage(model, theirs, expected, project, kind)
        return
    for feature in expected:
        for one, other in zip(model.rpn.head(feature), theirs.rpn(feature), strict=True):
            close(one, other)
    pooled = torch.randn(6, CHANNELS, 7, 7, generator=torch.Generator().manual_seed(2))
    stages = range(3) if kind.startswith("cascade") else [None]
    for head, stage in zip(model.roi_heads.heads, stages, strict=True):
        for one, other in zip(head(pooled), theirs.box_head(pooled, stage), strict=True):
            close(one, other)
    assert (model.mask_head is not None) == ("mask" in kind)
    if model.mask_head is not None:
        close(model.mask_head(pooled), theirs.mask_head(pooled))
    _check_scores(model, theirs, expected, project)


def _check_scores(model: RCNN, theirs: Network, features: list[Tensor], project: str) -> None:
    """Boxes and scores of proposals, by the formulas in float64."""
    features = [one / one.std() for one in features]  # else the softmax is 0 or 1
    rois = torch.tensor([[4.0, 6, 40, 50], [30, 2, 90, 60], [10, 20, 26, 30]])
    proposals = Proposals(rois[None], torch.ones(1, 3, dtype=torch.bool))
    boxes_BRD4, scores_BRK = model.roi_heads.score(features, proposals, torch.tensor([SIZE]))
    cascade = len(model.roi_heads.heads) == 3
    weights: list[tuple[float, ...]] = [(10, 10, 5, 5)]
    if cascade:
        third = (30, 30, 15, 15) if project == "detectron2" else (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)
        weights += [(20, 20, 10, 10), third]
    logits, now = [], rois
    for stage, weight in enumerate(weights):
        pooled = pooling.pool_rois(
            features,
            now[None],
            torch.ones(1, 3, dtype=torch.bool),
            strides=(4, 8, 16, 32),
            size=7,
            sampling_ratio=0,
            aligned=True,
        )
        scores, deltas = (one.double().numpy() for one in theirs.box_head(pooled, stage if cascade else None))
        logits.append(scores)
        decoded = _decode(deltas / np.array(weight), now.double().numpy()[:, None])
        now = torch.from_numpy(decoded[:, 0]).float()
    softmax = [np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in logits]
    averaged = np.mean(softmax, axis=0)
    if cascade and project == "mmdetection":  # of logits
        mean = np.mean(logits, axis=0)
        averaged = np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True)
        assert np.abs(averaged - np.mean(softmax, axis=0)).max() > 0.01, "a comparison of equals"
    np.testing.assert_allclose(scores_BRK[0].numpy(), averaged[:, :CLASSES], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(boxes_BRD4[0].numpy(), decoded, rtol=1e-3, atol=2e-2)


def _decode(deltas: np.ndarray, references: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = np.moveaxis(references, -1, 0)
    width, height = x2 - x1, y2 - y1
    dx, dy, dw, dh = np.moveaxis(deltas, -1, 0)
    x, y = dx * width + (x1 + x2) / 2, dy * height + (y1 + y2) / 2
    w, h = (np.exp(np.minimum(one, np.log(1000 / 16))) * side for one, side in ((dw, width), (dh, height)))
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)
    return np.clip(boxes, 0, np.array([SIZE[1], SIZE[0]] * 2))


def _check_one_stage(model: DenseDetector, theirs: Network, features: list[Tensor], project: str, kind: str) -> None:
    """Scores and boxes of every anchor, in the order of the other project's anchors."""
    logits, values = model.dense(features)
    grids = [(one.shape[-2], one.shape[-1]) for one in features]
    boxes = model.dense.decode(values, torch.arange(values.shape[1])[None], grids)[0].double().numpy()
    start = 0
    for (scores, deltas), stride, (rows, columns) in zip(theirs.dense(features, kind), STRIDES, grids, strict=True):
        shapes = 1 if kind == "gfl" else 9
        count = rows * columns * shapes
        part = slice(start, start + count)
        start += count
        y, x = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
        centers = np.stack([x, y], axis=-1)[:, :, None].astype(float)
        cells_K = scores[0].view(shapes, CLASSES, rows, columns).permute(2, 3, 0, 1)
        cells_V = deltas[0].view(shapes, -1, rows, columns).permute(2, 3, 0, 1).double().numpy()
        if kind == "gfl":
            bins = cells_V.reshape(rows, columns, 1, 4, 17)
            share = np.exp(bins - bins.max(axis=-1, keepdims=True))
            distance = (share / share.sum(axis=-1, keepdims=True) * np.arange(17)).sum(axis=-1) * stride
            expected = np.concatenate([centers - distance[..., :2], centers + distance[..., 2:]], axis=-1)
        else:
            expected = _retina_boxes(cells_V, centers, stride, by_ratio=project == "mmdetection")
        order = np.arange(shapes)
        if kind == "retinanet" and project == "mmdetection":  # scale after scale, as here, out of ratio after ratio
            order = order.reshape(3, 3).T.ravel()
        close(logits[0, part].view(rows, columns, shapes, CLASSES), cells_K[:, :, order])
        actual = boxes[part].reshape(rows, columns, shapes, 4)
        np.testing.assert_allclose(actual, expected[:, :, order], rtol=1e-3, atol=1e-3 * stride)
    assert start == logits.shape[1]


def _retina_boxes(deltas: np.ndarray, centers: np.ndarray, stride: int, *, by_ratio: bool) -> np.ndarray:
    """Boxes of the deltas [rows, columns, 9, 4], unclipped; anchors ratio after ratio (mmdetection) or scale after scale (detectron2)."""
    sides = [4 * stride * 2 ** (third / 3) for third in range(3)]
    pairs = (
        [(side, ratio) for ratio in (0.5, 1.0, 2.0) for side in sides]
        if by_ratio
        else [(side, ratio) for side in sides for ratio in (0.5, 1.0, 2.0)]
    )
    size = np.array([(side / np.sqrt(ratio), side * np.sqrt(ratio)) for side, ratio in pairs])
    middle = centers + deltas[..., :2] * size
    half = np.exp(np.minimum(deltas[..., 2:], np.log(1000 / 16))) * size / 2
    return np.concatenate([middle - half, middle + half], axis=-1)


def test_settings_of_detectron2() -> None:
    """Against configs/Base-RCNN-FPN.yaml, Base-RetinaNet.yaml and the defaults of config/defaults.py."""
    rcnn = _config(
        detectron2_detector(detectron2_state("faster_rcnn", arch=SMALL, merged=True), caffe=None, source="s")
    )
    assert rcnn.rpn.anchor_sizes == [32, 64, 128, 256, 512]
    assert (rcnn.rpn.anchor_grid, rcnn.rpn.smooth_l1_beta, rcnn.rpn.normalization) == (
        "exact",
        0.0,
        "samples_per_image",
    )
    assert (rcnn.rpn.pre_nms_top_n_test, rcnn.rpn.post_nms_top_n_test, rcnn.rpn.nms_iou) == (1000, 1000, 0.7)
    assert (rcnn.roi.aligned, rcnn.roi.sampling_ratio, rcnn.roi.score_threshold) == (True, 0, 0.05)
    assert (rcnn.roi.nms.iou, rcnn.roi.detections_per_image, rcnn.stride_in_1x1) == (0.5, 100, True)
    dense = _config(
        detectron2_detector(detectron2_state("retinanet", arch=SMALL, merged=True), caffe=None, source="s")
    ).dense
    assert (dense.p6_from, dense.relu_before_p7, dense.candidates_of, dense.clip_after_nms) == (
        "c5",
        True,
        "scores",
        True,
    )
    assert (dense.candidates, dense.score_threshold, dense.nms_iou, dense.detections_per_image) == (
        1000,
        0.05,
        0.5,
        100,
    )


def test_settings_of_mmdetection() -> None:
    """Against configs/_base_/models/cascade-rcnn_r50_fpn.py, retinanet_r50_fpn.py and gfl/gfl_r50_fpn_1x_coco.py."""
    rcnn = _config(mmdetection_detector(mmdetection_state("cascade_rcnn", arch=SMALL), {}, caffe=None, source="s"))
    assert (rcnn.rpn.smooth_l1_beta, rcnn.rpn.normalization, rcnn.stride_in_1x1) == (1 / 9, "sampled", False)
    assert (rcnn.cascade.loss_weights, rcnn.cascade.average_of) == ([1.0, 0.5, 0.25], "logits")
    assert (rcnn.roi.box_loss.name, rcnn.roi.box_loss.beta, rcnn.roi.aligned) == ("smooth_l1", 1.0, True)
    retinanet = _config(
        mmdetection_detector(mmdetection_state("retinanet", arch=SMALL), {}, caffe=None, source="s")
    ).dense
    assert (retinanet.p6_from, retinanet.relu_before_p7, retinanet.nms_iou, retinanet.clip_after_nms) == (
        "c5",
        False,
        0.5,
        False,
    )
    gfl = _config(mmdetection_detector(mmdetection_state("gfl", arch=SMALL), {}, caffe=None, source="s"))
    assert (gfl.dense.p6_from, gfl.dense.nms_iou, gfl.gfl.reg_max, gfl.gfl.tower_bias) == ("p5", 0.6, 16, False)


def _config(detector: ForeignDetector) -> DetectorConfig:
    values: dict[str, Any] = detector.model
    return DetectorConfig.model_validate(values)
