"""Masks of a Mask R-CNN belong to its boxes, and are as large as the image was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.data.sizing import MultiScaleBatch
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.tta import detect_views
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.mask_targets import decode
from ssld.stage2_detect.models.rcnn import RCNN


@pytest.fixture
def mask_model(mask_file: Path) -> RCNN:
    model = load_detector(mask_file).model.eval()
    assert isinstance(model, RCNN)
    return model


def test_masks_are_as_large_as_the_picture(mask_model: RCNN) -> None:
    """Of 301 x 833 pixels the network sees 36 x 100, which goes back to 300 x 833."""
    scale = torch.tensor([100 / 833])
    sizes = torch.tensor([[36, 100]])
    assert (sizes / scale[:, None] + 0.5).floor().long().tolist() != [[301, 833]]
    pixels = torch.randint(0, 256, (1, 3, 64, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageBatch(pixels, sizes, scale, originals_B2=torch.tensor([[301, 833]]))
    for detections in (
        mask_model(images),
        detect_views(mask_model, MultiScaleBatch((images,)), flip=True, nms_iou=0.5, most=100),
    ):
        assert detections[0].masks
        assert all(mask["size"] == [301, 833] for mask in detections[0].masks)


def test_a_box_that_is_left_out_takes_its_mask_along(mask_model: RCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three boxes lies in the rounded half pixel behind the image; the masks of the others stay unchanged."""
    corners = torch.tensor([[0.0, 0, 8, 8], [10.9, 0, 11, 8], [2, 0, 6, 8]])
    detections = Detections(corners, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]))
    monkeypatch.setattr(mask_model.roi_heads, "detect_network", lambda *args: [detections])
    shapes = torch.tensor([0.0, 0.0, 0.9]).view(3, 1, 1).repeat(1, 8, 8)

    def predict(features: Any, given: list[Detections]) -> Tensor:
        assert given == [detections]
        return shapes[None]

    assert mask_model.mask_head is not None
    monkeypatch.setattr(mask_model.mask_head, "predict", predict)
    images = ImageBatch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[8, 11]]), torch.tensor([1.05]))
    result = mask_model(images)[0]
    assert result.labels_N.tolist() == [0, 1]
    assert result.masks
    assert decode(result.masks).any(axis=(0, 1)).tolist() == [False, True]
