"""Selection of one-stage detectors on given boxes and scores, and options of their heads, against numbers by hand and torchvision."""

import pytest
import torch
from torchvision.ops import batched_nms

from stage2_detect.models.batch import Detections, ImageBatch
from stage2_detect.models.dense import DenseDetector
from tests.stage2_detect.test_dense_distillation import K, detector

GRIDS = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
ANCHORS = sum(rows * columns for rows, columns in GRIDS)


def shown(
    model: DenseDetector, boxes: torch.Tensor, logits: torch.Tensor, size: tuple[int, int], scale: float = 1.0
) -> Detections:
    """The detections of one image, from boxes [N, 4] in pixels of the network's input, and logits [N, K] of the first N anchors."""
    missing = ANCHORS - len(boxes)
    logits = torch.cat((logits, torch.full((missing, K), -20.0)))[None]
    boxes = torch.cat((boxes, torch.zeros(missing, 4)))[None]
    model.dense.decode = lambda values, index, grids: boxes[0][index]  # type: ignore[method-assign]
    images = ImageBatch(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), torch.tensor([size]), torch.tensor([scale]))
    return model.detect((logits, boxes), GRIDS, images)[0]


@pytest.mark.parametrize("most", [1, 20, 1000])
def test_the_best_of_many_are_torchvisions(most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 90 * torch.rand(300, 2, generator=generator)
    boxes = torch.cat((corners, corners + 5 + 30 * torch.rand(300, 2, generator=generator)), dim=1)
    logits = torch.randn(300, K, generator=generator)
    model = detector("gfl", 0).eval()
    model.detections_per_image, model.candidates = most, None
    found = shown(model, boxes, logits, (128, 128))
    anchor, label = (logits.sigmoid() > model.score_threshold).nonzero(as_tuple=True)
    scores = logits.sigmoid()[anchor, label]
    assert len(scores) > 800
    best = batched_nms(boxes[anchor].double(), scores.double(), label, 0.6)[:most]
    torch.testing.assert_close(found.boxes_N4, boxes[anchor[best]])
    torch.testing.assert_close(found.scores_N, scores[best])
    assert found.labels_N.tolist() == label[best].tolist()


def test_boxes_are_clipped_to_the_image_and_those_outside_left_out() -> None:
    """An image of 60 x 100 px, of an original half as large, in a batch padded to 128 x 128."""
    given = torch.tensor([[-8.0, 10, 40, 80], [20, 70, 60, 110], [110, 0, 126, 30], [50, 20, 70, 40]])
    logits = torch.full((4, K), -20.0)
    logits[:, 1] = torch.tensor([2.0, 4.0, 3.0, 1.0])
    model = detector("gfl", 0).eval()
    found = shown(model, given, logits, (60, 100), scale=2.0)
    assert found.boxes_N4.tolist() == [[0, 5, 20, 30], [25, 10, 35, 20]]
    torch.testing.assert_close(found.scores_N, torch.tensor([2.0, 1.0]).sigmoid())
    model.clip = False
    assert shown(model, given, logits, (60, 100), scale=2.0).boxes_N4.tolist() == (given[[1, 2, 0, 3]] / 2).tolist()


def test_a_padded_image_has_no_detection_without_area() -> None:
    model = detector("gfl", 0).eval()
    model.score_threshold, model.candidates, model.nms_iou, model.detections_per_image = 0.0, None, 1.0, 10_000
    pixels = torch.randint(0, 256, (2, 3, 128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[128, 256], [64, 64]])
    pixels[1, :, 64:], pixels[1, :, :, 64:] = 0, 0
    with torch.no_grad():
        whole, padded = model(ImageBatch(pixels, sizes, torch.ones(2)))
    cells = sum(128 * 256 // stride**2 for stride in model.pyramid.strides[:4]) + 2
    assert K * 64 < len(padded.scores_N) < len(whole.scores_N) <= K * cells
    for found in (whole, padded):
        assert (found.boxes_N4[:, 2:] > found.boxes_N4[:, :2]).all()
