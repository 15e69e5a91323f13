"""torchvision's detectors, converted: the same detections, losses, gradients and running statistics as torchvision's own classes.

Random weights, all norms with random statistics; images of two sizes, one without objects. Both sides take the first boxes in place of random ones,
and torchvision's mask loss takes this project's targets, which are rasterized polygons in place of pooled bitmaps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import _utils as reference_utils
from torchvision.models.detection import roi_heads as reference_roi_heads

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.foreign.coco_classes import coco_classes
from ssld.stage2_detect.foreign.fitting import check_fits
from ssld.stage2_detect.foreign.torchvision_weights import choose, convert, recognize
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.mask_targets import ImageMasks, rasterize
from ssld.stage2_detect.models.rcnn import RCNN

SIZES = [(64, 96), (60, 70)]
LABELS = tuple(coco_classes())
POST_NMS, SAMPLES, ANCHORS, DETECTIONS = 20, 8, 32, 10
PAIRS = {
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_box": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_box": "loss_box_reg",
    "loss_mask": "loss_mask",
}
NAMES = [f"{kind}_resnet50_fpn{version}" for kind in ("fasterrcnn", "maskrcnn", "retinanet") for version in ("", "_v2")]
NAMES += ["fasterrcnn_mobilenet_v3_large_fpn"]
DENSE_PAIRS = {"loss_cls": "classification", "loss_box": "bbox_regression"}


class FirstSampler:
    """torchvision's sampler, but of the first boxes in their order."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.count, self.fraction = batch_size_per_image, positive_fraction

    def __call__(self, matched: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positives, negatives = [], []
        for labels in matched:
            positive, negative = torch.zeros_like(labels).bool(), torch.zeros_like(labels).bool()
            chosen = torch.where(labels >= 1)[0][: int(self.count * self.fraction)]
            positive[chosen] = True
            negative[torch.where(labels == 0)[0][: self.count - len(chosen)]] = True
            positives.append(positive)
            negatives.append(negative)
        return positives, negatives


def sampled_anchors(name: str) -> int:
    """The first anchors are others where a cell has several scales, whose order differs; all of them are the same."""
    return 1000 if "mobilenet" in name else ANCHORS


def torchvisions(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(reference_utils, "BalancedPositiveNegativeSampler", FirstSampler)
    counts = {
        "rpn_post_nms_top_n_train": POST_NMS,
        "rpn_post_nms_top_n_test": POST_NMS,
        "rpn_batch_size_per_image": sampled_anchors(name),
        "box_batch_size_per_image": SAMPLES,
        "box_score_thresh": 0.02,
        "box_detections_per_img": DETECTIONS,
    }
    torch.manual_seed(0)
    options: dict[str, Any] = {} if "retinanet" in name else counts
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=91, **options)
    model.transform.resize = lambda image, target: (image, target)  # images come at their size
    model.transform.image_mean, model.transform.image_std = (
        (255 * torch.tensor(values)).tolist() for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Draw the norms' weights and statistics, and the last layers."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.uniform_(0.5, 1.0)
            module.bias.uniform_(-0.2, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    _enliven(model)


def _enliven(model: Any) -> None:
    """Scale last layers so that scores pass the threshold, and take the probability of labels without a class."""
    others = [label for label in range(91) if label not in LABELS]
    if hasattr(model, "roi_heads"):
        predictor = model.roi_heads.box_predictor
        nn.init.normal_(predictor.cls_score.weight, std=0.3)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.05)
        nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.1)
        nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.02)
        without = others[1:]  # the background is a class of this project's softmax too
        predictor.cls_score.weight[without], predictor.cls_score.bias[without] = 0.0, -1e4
        return
    model.detections_per_img = 100_000
    head = model.head.classification_head
    nn.init.normal_(head.cls_logits.weight, std=0.05)
    head.cls_logits.bias.fill_(-3.2)
    for module in model.head.modules():  # torchvision's own start would leave all anchors with one score
        if isinstance(module, nn.Conv2d) and module.out_channels == module.in_channels:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.02)
    head.cls_logits.weight.view(9, 91, -1)[:, others] = 0.0
    head.cls_logits.bias.view(9, 91)[:, others] = -1e4


def ours(name: str, reference: nn.Module) -> Detector:
    state = reference.state_dict()
    found = recognize(state, "state")
    assert (found.name, found.labels) == (name, 91)
    settings = found.about.model | {"freeze_stages": 0, "freeze_norm": False}
    config = DetectorConfig.model_validate(settings)
    inputs = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with pytest.MonkeyPatch.context() as patch:  # every weight is replaced, so that drawing them would be lost time
        for function in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(nn.init, function, lambda tensor, *_, **__: tensor)
        body = timm.create_model(found.about.arch, features_only=True, **found.about.model_args)
        model = build_detector(config, classes=80, body=body, arch=found.about.arch, inputs=inputs)
    tensors = convert(state, LABELS, norm_eps=1e-5, source="state")
    check_fits(tensors, model.state_dict(), "state")
    model.load_state_dict(tensors)
    if isinstance(model, RCNN):
        model.rpn.post_nms_top_n_train = model.rpn.post_nms_top_n_test = POST_NMS
        model.rpn.samples_per_image, model.roi_heads.samples_per_image = sampled_anchors(name), SAMPLES
        model.rpn.sampling = model.roi_heads.sampling = "first"
        model.roi_heads.score_threshold = 0.02
        model.roi_heads.detections_per_image = DETECTIONS
    return model


def batch() -> tuple[list[Tensor], ImageBatch]:
    draw = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8) for size in SIZES]
    pixels = torch.zeros(2, 3, *SIZES[0], dtype=torch.uint8)
    for place, image in enumerate(images):
        pixels[place, :, : image.shape[1], : image.shape[2]] = image
    return [image.float() for image in images], ImageBatch(pixels, torch.tensor(SIZES), torch.ones(2))


def objects() -> tuple[list[dict[str, Tensor]], Targets]:
    """Three objects in the first image, none in the second."""
    corners = torch.tensor([[8.0, 10, 50, 44], [30, 20, 92, 60], [4, 40, 30, 62]])
    classes = torch.tensor([0, 16, 79])
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *SIZES[1], dtype=torch.uint8),
    }
    full = {
        "boxes": corners,
        "labels": torch.tensor(LABELS)[classes],
        "masks": torch.zeros(3, *SIZES[0], dtype=torch.uint8),
    }
    polygons = tuple([[x1, y1, x2, y1, (x1 + x2) / 2, y2]] for x1, y1, x2, y2 in corners.tolist())
    masks = (ImageMasks(polygons), ImageMasks(()))
    targets = Targets(
        torch.stack((corners, torch.zeros(3, 4))),
        torch.stack((classes, torch.full((3,), -1))),
        torch.zeros(2).long(),
        masks=masks,
    )
    return [full, empty], targets


def use_our_mask_targets(masks: tuple[ImageMasks, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def rasterized(gt_masks: Tensor, rois: Tensor, matched: Tensor, size: int) -> Tensor:
        image = 0 if len(gt_masks) else 1
        images = torch.full_like(matched, image).numpy()
        return torch.from_numpy(rasterize(masks, images, matched.numpy(), rois.detach().numpy(), size)).float()

    monkeypatch.setattr(reference_roi_heads, "project_masks_on_boxes", rasterized)


@pytest.mark.parametrize("name", NAMES)
def test_detections_losses_and_gradients_are_torchvisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torchvisions(name, monkeypatch)
    model = ours(name, reference)
    floats, images = batch()

    reference.eval()
    model.eval()
    maps: list[Tensor] = []
    if "maskrcnn" in name:  # before they are pasted
        monkeypatch.setattr(
            reference_roi_heads, "maskrcnn_inference", _noting(reference_roi_heads.maskrcnn_inference, maps)
        )
    with torch.no_grad():
        expected = reference(floats)
        actual = model(images)
    for theirs, one in zip(expected, actual, strict=True):
        area = (theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]).prod(dim=1)
        # torchvision's RetinaNet counts boxes without area, those in the padding, among its detections.
        theirs = {key: value[area > 0][: model.detections_per_image] for key, value in theirs.items()}
        assert len(theirs["scores"]) > 5, "a comparison of nothing"
        labels_N = torch.tensor(LABELS)[one.labels_N]
        # By class, then by score: scores of different classes may differ by less than the rounding.
        mine, other = (
            (labels_N + one.scores_N.double()).argsort(),
            (theirs["labels"] + theirs["scores"].double()).argsort(),
        )
        assert labels_N[mine].tolist() == theirs["labels"][other].tolist()
        torch.testing.assert_close(one.scores_N[mine], theirs["scores"][other], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.boxes_N4[mine], theirs["boxes"][other], rtol=1e-5, atol=1e-4)
    assert len(maps) == (len(SIZES) if "maskrcnn" in name else 0)
    if maps:
        assert isinstance(model, RCNN)
        assert model.mask_head is not None
        features, detections = model.detect_boxes(images)
        predicted = model.mask_head.predict(features, detections)
        for number, one in enumerate(detections):
            torch.testing.assert_close(predicted[number, : len(one.scores_N)], maps[number][:, 0], rtol=1e-5, atol=1e-5)

    if name.startswith("fasterrcnn_resnet50"):
        return  # Mask R-CNN's losses are these and one more, with the same parts.
    reference.train()
    model.train()
    dicts, targets = objects()
    assert targets.masks is not None
    use_our_mask_targets(targets.masks, monkeypatch)
    their_losses = reference(floats, dicts)
    our_losses = model(images, targets)
    assert isinstance(our_losses, dict)
    pairs = DENSE_PAIRS if isinstance(model, DenseDetector) else PAIRS
    assert {pairs[key] for key in our_losses} == their_losses.keys()
    for key, loss in our_losses.items():
        assert loss > 0
        torch.testing.assert_close(loss, their_losses[pairs[key]], rtol=1e-5, atol=0, msg=_naming(key))
    sum(their_losses.values()).backward()
    torch.stack(list(our_losses.values())).sum().backward()
    gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    their_gradients = convert(gradients, LABELS, norm_eps=1e-5, source="gradients")
    # A bias that the norm of the next layer takes away again (of MobileNet's blocks) has a gradient of 0 but for rounding.
    least = 1e-3 * max(gradient.norm().item() for gradient in their_gradients.values() if gradient.is_floating_point())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        floor = least if "mobilenet" in name else 1e-9
        distance = (parameter.grad - their_gradients[key]).norm() / their_gradients[key].norm().clamp(min=floor)
        assert distance < 1e-4, (key, float(distance))
    state = convert(reference.state_dict(), LABELS, norm_eps=1e-5, source="state")
    running = {key: tensor for key, tensor in model.state_dict().items() if "running_" in key}  # of this step
    assert running
    for key, tensor in running.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-4, atol=1e-5, msg=_naming(key))


def test_the_detector_for_320_pixels_has_its_own_thresholds_and_sizes() -> None:
    """With all settings of both sides as they are: 150 candidates per level and 150 proposals, from a score of 0.05 on, and torchvision's resizing,
    which leaves an image of 320 x 384 as it is."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(0)
    reference = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    image = torch.randint(0, 256, (3, 320, 384), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    randomize(reference)
    with torch.no_grad():
        # Statistics of this image: with random ones the maps would be the same at nearly all places, and rounding would order the scores.
        for module in reference.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        maps = list(reference.train().backbone(image[None] / 64 - 2).values())
        # Scores far apart, some on either side of each threshold.
        head = reference.rpn.head.cls_logits
        head.weight.mul_(2 / reference.rpn.head(maps)[0][0].std())
    reference.transform.image_mean, reference.transform.image_std = (
        (255 * torch.tensor(values)).tolist() for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    state = reference.state_dict()
    found = choose(recognize(state, "state"), name, file=Path("mine.pth"), digest="")
    inputs = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    body = timm.create_model(found.about.arch, features_only=True, **found.about.model_args)
    config = DetectorConfig.model_validate(found.about.model)
    model = build_detector(config, classes=80, body=body, arch=found.about.arch, inputs=inputs)
    model.load_state_dict(convert(state, LABELS, norm_eps=1e-5, source="state"))
    reference.eval()
    model.eval()
    assert isinstance(model, RCNN)
    # Scores of many anchors, so that the limits of 150 count, then of few, so that the threshold does.
    for bias in (-4.0, -12.0):
        nn.init.constant_(head.bias, bias)
        nn.init.constant_(model.rpn.head.objectness.get_parameter("bias"), bias)
        with torch.no_grad():
            [expected] = reference([image.float()])
            [actual] = model(ImageBatch(image[None], torch.tensor([[320, 384]]), torch.ones(1)))
        assert len(expected["scores"]) > 5
        assert torch.tensor(LABELS)[actual.labels_N].tolist() == expected["labels"].tolist()
        # Rounding grows through the layers, since each norm divides by the deviation of its own map.
        torch.testing.assert_close(actual.scores_N, expected["scores"], rtol=3e-4, atol=1e-5)
        torch.testing.assert_close(actual.boxes_N4, expected["boxes"], rtol=0, atol=0.02)

    sizing = Sizing.of(ResizeConfig.model_validate(found.about.resize))
    for height, width in ((240, 320), (100, 300), (1000, 700)):
        resized, _ = reference.transform.resize(torch.zeros(3, height, width))
        view = sizing.view(height, width)
        assert max(abs(view.height - resized.shape[1]), abs(view.width - resized.shape[2])) <= 1  # rounded differently


def _naming(key: str) -> Callable[[str], str]:
    return lambda message: f"{key}: {message}"


def _noting(function: Any, noted: list[Tensor]) -> Any:
    def call(*args: Any) -> Any:
        result = function(*args)
        noted.extend(result)
        return result

    return call
