"""Boxes end at the border of the original image, also where the rounded size of the network's input reaches beyond it."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_dense
import torch

from ssld.stage2_detect.data.coco_json import result_rows
from ssld.stage2_detect.data.sizing import MultiScaleBatch, Sizing
from ssld.stage2_detect.deploy.gate import _of_image
from ssld.stage2_detect.evaluation.tta import detect_views
from ssld.stage2_detect.models.batch import Detections, ImageBatch

# (height, width) whose inputs of a short side of 160 have (160, 313) and (172, 160) pixels: widths of 586.9 and heights of 700.9 of the originals.
ORIGINALS = [(300, 586), (699, 652)]
SIZING = Sizing(160, 320, "bilinear", "fast")


@pytest.fixture(scope="module")
def images() -> ImageBatch:
    draw = torch.Generator().manual_seed(0)
    batch = SIZING.batch([torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draw) for size in ORIGINALS])
    assert isinstance(batch, ImageBatch)
    assert replace(batch, originals_B2=None).original_sizes().tolist() == [[300, 587], [701, 652]]
    assert batch.original_sizes().tolist() == [list(size) for size in ORIGINALS]
    return batch


def check(detections: list[Detections]) -> None:
    """Some boxes reach the border, none goes beyond, in memory and as rows of a file."""
    for one, (height, width) in zip(detections, ORIGINALS, strict=True):
        far = one.boxes_N4[:, 2:].amax(0)
        assert one.boxes_N4.min() >= 0
        assert (far <= torch.tensor([width, height])).all()
        assert (far > torch.tensor([width, height]) - 1).all()
        boxes = np.array([row["bbox"] for row in result_rows(1, one, range(9))])
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array([width, height]) + 1e-9).all()


@pytest.mark.parametrize("after_nms", [False, True])
@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_one_stage_detectors(kind: str, after_nms: bool, images: ImageBatch) -> None:
    model = tiny_dense.detector(kind, 0).eval()
    model.clip_after_nms, model.score_threshold = after_nms, 0.0
    detections = model(images)
    check(detections)
    by_rule = model(replace(images, originals_B2=None))
    assert by_rule[1].boxes_N4[:, 3].max() > ORIGINALS[1][0]
    if not after_nms:
        return  # NMS compares the clipped boxes
    limits = torch.tensor(ORIGINALS).flip(1).repeat(1, 2)
    for one, other, limit_4 in zip(detections, by_rule, limits, strict=True):
        assert len(one.scores_N) == len(other.scores_N) > 50
        torch.testing.assert_close(one.boxes_N4, other.boxes_N4.minimum(limit_4), rtol=0, atol=0)


def test_mirror_images(images: ImageBatch) -> None:
    """An input of 224 x 160 pixels of a picture of 333 x 238.3 of its pixels: its left border is mirrored to 238.3."""
    model = tiny_dense.detector("gfl", 0).eval()
    check(detect_views(model, MultiScaleBatch((images,)), flip=True, nms_iou=0.5, most=100))
    narrow = SIZING.batch([torch.zeros(3, 660, 333, dtype=torch.uint8)])
    assert isinstance(narrow, ImageBatch)
    wide = replace(narrow, scales_B=narrow.scales_B * 0.998)
    (one,) = detect_views(model, MultiScaleBatch((wide,)), flip=True, nms_iou=0.5, most=100)
    assert one.boxes_N4[:, 2].max() == 333


def test_the_comparison_of_an_exported_file() -> None:
    def run(pixels: torch.Tensor, sizes: torch.Tensor) -> list[np.ndarray]:
        return [
            np.array([[[0, 0, 160, 172]]], np.float32),
            np.full((1, 1), 0.9),
            np.zeros((1, 1), int),
            np.ones(1, int),
        ]

    batch = torch.zeros(1, 3, 192, 160, dtype=torch.uint8), torch.tensor([[172, 160]])
    one = _of_image(run, batch, 160 / 652, ORIGINALS[1], None)
    assert one.boxes_N4.tolist() == [[0, 0, 652, 699]]


def test_rows_of_a_file_are_rounded_inside_the_image() -> None:
    boxes = torch.tensor([[0.0005, 10.0016, 64.0, 64.0]])
    (row,) = result_rows(1, Detections(boxes, torch.tensor([0.5]), torch.tensor([0])), [3])
    x, y, width, height = row["bbox"]
    assert x + width <= 64
    assert y + height <= 64
