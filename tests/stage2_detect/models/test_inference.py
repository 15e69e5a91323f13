"""The folded copy of a detector against the detector, and float32 geometry under autocast."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.models.rcnn import RCNN

SIZES = torch.tensor([[96, 128], [80, 100]])


def images() -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImageBatch(pixels, SIZES, torch.tensor([1.0, 0.5]))


def detector(arch: str = "resnet18d", **options: object) -> RCNN:
    """Random weights, of a norm that does something, and heads that find something."""
    torch.manual_seed(0)
    body = timm.create_model(arch, features_only=True, pretrained=False)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    config = DetectorConfig.model_validate(
        {
            "fpn_channels": 16,
            "roi": {"hidden": 32, "score_threshold": 0.1},
            "rpn": {"post_nms_top_n_test": 100},
            **options,
        }
    )
    inputs = InputSettings.of_detector((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = build_detector(config, classes=5, body=body, arch=arch, inputs=inputs)
    assert isinstance(model, RCNN)
    for module in (model.rpn.head, *model.roi_heads.heads):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def same(first: list[Detections], second: list[Detections], tolerance: float) -> None:
    assert min(len(detections.boxes_N4) for detections in first) >= 5
    for result, others in zip(first, second, strict=True):
        assert torch.equal(result.labels_N, others.labels_N)
        torch.testing.assert_close(result.scores_N, others.scores_N, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result.boxes_N4, others.boxes_N4, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("arch", "options", "left"),
    [
        ("resnet18d", {}, 0),
        ("resnet26d", {"dcn_strides": [32]}, 2),
        ("mobilenetv3_small_050", {}, 0),
        ("convnext_atto", {}, 0),
    ],
)
def test_features_and_detections_are_the_same(arch: str, options: dict[str, object], left: int) -> None:
    model = detector(arch, **options)
    before = copy.deepcopy(model.state_dict())
    fast = for_inference(model)
    assert norms(fast) == left
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with torch.no_grad():
        for result, others in zip(fast.features(images()), model.features(images()), strict=True):
            torch.testing.assert_close(result, others, rtol=1e-5, atol=1e-5 * others.abs().max().item())
        same(fast(images()), model(images()), 1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_model_can_train_on() -> None:
    model = detector().train()
    fast = for_inference(model)
    assert model.training
    assert not fast.training
    assert any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.pyramid.body.get_parameter("layer1.0.conv1.weight").zero_()
    assert fast.pyramid.body.get_parameter("layer1.0.conv1.weight").abs().max() > 0


def test_geometry_stays_float32_under_autocast() -> None:
    model = detector()
    outputs: list[Tensor] = []
    model.rpn.register_forward_hook(lambda _module, _args, out: outputs.append(out[0].boxes_BR4))
    with torch.no_grad():
        exact = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images())
    assert [boxes.dtype for boxes in outputs] == [torch.float32] * 2
    for one, other in zip(rough, exact, strict=True):
        assert one.boxes_N4.dtype == one.scores_N.dtype == torch.float32
        assert len(one.boxes_N4) >= 5
        # Boxes move by what bf16 does to deltas, not by a hundredth of their coordinates.
        distance = (one.boxes_N4[:, None] - other.boxes_N4[None]).abs().amax(dim=2)
        assert distance.amin(dim=1).median() < 0.5
