"""Selection of one-stage detectors on given boxes and scores, and options of their heads, against numbers by hand and torchvision."""

import functools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms

from ssld.shared.distributed.ranks import ONE_RANK
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.assign import Assignment
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.retinanet import RetinaNet
from tests.stage2_detect.distillation.test_dense_teaching import K, detector

GRIDS = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
ANCHORS = sum(rows * columns for rows, columns in GRIDS)


def detect_dense(
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
    detections = detect_dense(model, boxes, logits, (128, 128))
    anchor, label = (logits.sigmoid() > model.score_threshold).nonzero(as_tuple=True)
    scores = logits.sigmoid()[anchor, label]
    assert len(scores) > 800
    best = batched_nms(boxes[anchor].double(), scores.double(), label, 0.6)[:most]
    torch.testing.assert_close(detections.boxes_N4, boxes[anchor[best]])
    torch.testing.assert_close(detections.scores_N, scores[best])
    assert detections.labels_N.tolist() == label[best].tolist()


def test_boxes_are_clipped_to_the_image_and_those_outside_left_out() -> None:
    """An image of 60 x 100 px, of an original half as large, in a batch padded to 128 x 128."""
    given = torch.tensor([[-8.0, 10, 40, 80], [20, 70, 60, 110], [110, 0, 126, 30], [50, 20, 70, 40]])
    logits = torch.full((4, K), -20.0)
    logits[:, 1] = torch.tensor([2.0, 4.0, 3.0, 1.0])
    model = detector("gfl", 0).eval()
    detections = detect_dense(model, given, logits, (60, 100), scale=2.0)
    assert detections.boxes_N4.tolist() == [[0, 5, 20, 30], [25, 10, 35, 20]]
    torch.testing.assert_close(detections.scores_N, torch.tensor([2.0, 1.0]).sigmoid())
    model.clip_boxes = False
    assert (
        detect_dense(model, given, logits, (60, 100), scale=2.0).boxes_N4.tolist() == (given[[1, 2, 0, 3]] / 2).tolist()
    )


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
    for detections in (whole, padded):
        assert (detections.boxes_N4[:, 2:] > detections.boxes_N4[:, :2]).all()


def one_object(*box: float) -> Targets:
    return Targets(torch.tensor([[box]]), torch.tensor([[1]]), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("side", "least", "positives"),
    [(22.0, 0.4, 1), (20.0, 0.4, 0), (20.0, 0.0, 1), (24.0, 0.6, 0)],
    ids=["between", "weak", "always", "above"],
)
def test_an_objects_best_anchor_counts_from_an_iou_on(side: float, least: float, positives: int) -> None:
    """Squares inside the anchor of 32 px around (16, 16): their IoU is (side / 32)^2 = 0.47, 0.39 and 0.56."""
    net = RetinaNet(classes=3, channels=8, ratios=(1.0,), low_quality_iou=least, positive_iou=0.6)
    targets = one_object(16 - side / 2, 16 - side / 2, 16 + side / 2, 16 + side / 2)
    labels_A = net.assign(GRIDS, torch.tensor([[128, 128]]), targets).labels_BA[0]
    assert (labels_A == 1).sum() == positives
    center = (2 * 16 + 2) * 3  # row and column 2 of the finest level, the smallest scale
    assert labels_A[center] == positives


def test_the_box_loss_is_square_up_to_its_beta() -> None:
    net = RetinaNet(classes=3, channels=8, smooth_l1_beta=0.11)
    center, A = (2 * 16 + 2) * 9 + 1, 9 * ANCHORS
    labels_BA = torch.zeros(1, A, dtype=torch.int64)
    labels_BA[0, center] = 1
    assigned = Assignment(labels_BA, torch.zeros_like(labels_BA), torch.zeros(1, A))
    outputs = torch.full((1, A, 3), -20.0), torch.zeros(1, A, 4)
    losses = net.losses(outputs, GRIDS, torch.tensor([[128, 128]]), one_object(5.0, 5, 27, 29), ONE_RANK, assigned)
    # From the anchor (0, 0, 32, 32): dx = 0, dy = 1 / 32, dw = log(22 / 32), dh = log(24 / 32).
    expected_loss = 0.5 * (1 / 32) ** 2 / 0.11 + (math.log(32 / 22) - 0.055) + (math.log(32 / 24) - 0.055)
    assert losses["loss_box"].item() == pytest.approx(expected_loss, rel=1e-5)


def test_tower_norm_is_torchvisions_second_head() -> None:
    torch.manual_seed(0)
    ours = RetinaNet(classes=3, channels=64, tower_norm=True)
    norm = functools.partial(nn.GroupNorm, 32)
    theirs = RetinaNetHead(64, 9, 3, norm_layer=norm)
    for tower, last, branch, name in (
        (ours.head.class_tower, ours.head.logits, theirs.classification_head, "cls_logits"),
        (ours.head.box_tower, ours.head.boxes, theirs.regression_head, "bbox_reg"),
    ):
        for place in range(4):
            assert tower[3 * place].bias is None
            nn.init.normal_(tower[3 * place + 1].weight)  # type: ignore[arg-type]
            branch.conv[place][0].load_state_dict(tower[3 * place].state_dict())
            branch.conv[place][1].load_state_dict(tower[3 * place + 1].state_dict())
        getattr(branch, name).load_state_dict(last.state_dict())
    features = [torch.randn(2, 64, side, side) for side in (8, 4)]
    logits, deltas = ours(features)
    expected_outputs = theirs(features)
    torch.testing.assert_close(logits, expected_outputs["cls_logits"])
    torch.testing.assert_close(deltas, expected_outputs["bbox_regression"])


@pytest.mark.parametrize("source", ["p5", "c5"])
def test_where_p6_comes_from_and_the_other_options(source: str) -> None:
    options = {"kind": "retinanet", "fpn_channels": 16, "retinanet": {"tower_norm": True}}
    config = DetectorConfig.model_validate(options | {"dense": {"p6_from": source, "relu_before_p7": True}})
    body = timm.create_model("test_resnet", features_only=True, pretrained=False)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.25,) * 3)
    model = build_detector(config, classes=K, body=body, arch="test_resnet", inputs=inputs).eval()
    assert isinstance(model, DenseDetector)
    assert any(isinstance(layer, nn.GroupNorm) for layer in model.dense.head.class_tower)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps, c5 = model.pyramid(pixels), model.pyramid.body(pixels)[-1]
    weights = dict(model.pyramid.fpn.extra_blocks.named_parameters())
    p6 = F.conv2d(c5 if source == "c5" else maps[2], weights["p6.weight"], weights["p6.bias"], stride=2, padding=1)
    p7 = F.conv2d(p6.relu(), weights["p7.weight"], weights["p7.bias"], stride=2, padding=1)
    torch.testing.assert_close(maps[3], p6)
    torch.testing.assert_close(maps[4], p7)
