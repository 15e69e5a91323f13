"""Deformable convolution against its definition written out in float64 NumPy: values, gradients, layouts, types, and where a body takes it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.detector_file import load_detector, save_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.deform import ModulatedDeformConv2d
from ssld.stage2_detect.models.freezing import lr_factor_of_parameter, stage_of_parameter
from ssld.stage2_detect.models.pyramid import TimmPyramid


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """[C] values of image [C, H, W] at a place; zero outside."""
    y0, x0 = int(np.floor(y)), int(np.floor(x))
    value = np.zeros(len(image))
    for row, column in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            value += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def reference(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    offset_weight: np.ndarray,
    offset_bias: np.ndarray,
    **options: Any,
) -> np.ndarray:
    """Equation 1 of arXiv 1811.11168, with offsets and masks from a convolution of the same geometry."""
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    B, _, H, W = x.shape
    rows = (H + 2 * padding - 2 * dilation - 1) // stride + 1
    columns = (W + 2 * padding - 2 * dilation - 1) // stride + 1
    out = np.zeros((B, len(weight), rows, columns))
    grid = [(k // 3, k % 3) for k in range(9)]
    for b in range(B):
        for row in range(rows):
            for column in range(columns):
                places = [
                    (row * stride - padding + i * dilation, column * stride - padding + j * dilation) for i, j in grid
                ]
                plain = np.stack([bilinear(x[b], *place) for place in places], axis=1)  # [I, 9]
                predicted = np.tensordot(offset_weight.reshape(27, -1, 9), plain, axes=2) + offset_bias
                mask = 1 / (1 + np.exp(-predicted[18:]))
                moved = [
                    bilinear(x[b], y + predicted[2 * k], z + predicted[2 * k + 1]) for k, (y, z) in enumerate(places)
                ]
                sampled = np.stack(moved, axis=1) * mask
                out[b, :, row, column] = np.tensordot(weight.reshape(len(weight), -1, 9), sampled, axes=2) + bias
    return out


def make(inside: int, out: int, *, bias: bool = True, **options: Any) -> ModulatedDeformConv2d:
    """A layer with offsets of about a pixel."""
    layer = ModulatedDeformConv2d(nn.Conv2d(inside, out, 3, bias=bias, **options))
    nn.init.normal_(layer.offset.weight, std=0.2)
    assert layer.offset.bias is not None
    nn.init.normal_(layer.offset.bias, std=0.7)
    return layer


GEOMETRIES: list[dict[str, Any]] = [
    {"stride": 1, "padding": 1, "dilation": 1},
    {"stride": 2, "padding": 1, "dilation": 1},
    {"stride": 1, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_definition(geometry: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = make(3, 4, **geometry).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert layer.bias is not None
    assert layer.offset.bias is not None
    tensors = [x, layer.weight, layer.bias, layer.offset.weight, layer.offset.bias]
    arrays = [tensor.detach().numpy().copy() for tensor in tensors]
    expected = reference(*arrays, **geometry)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-10, atol=1e-12)

    slope = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, slope)
    draw = np.random.default_rng(0)
    step = 1e-6
    for array, gradient in zip(arrays, gradients, strict=True):
        for _ in range(6):
            place = tuple(draw.integers(0, array.shape))
            kept = array[place]
            sides = []
            for sign in (1, -1):
                array[place] = kept + sign * step
                sides.append((reference(*arrays, **geometry) * slope.numpy()).sum())
            array[place] = kept
            assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_new_layer_is_the_convolution_at_half_its_weight(bias: bool, geometry: dict[str, Any]) -> None:
    torch.manual_seed(2)
    plain = nn.Conv2d(8, 6, 3, bias=bias, **geometry)
    layer = ModulatedDeformConv2d(plain)
    assert layer.weight is plain.weight
    assert set(layer.state_dict()) == {"weight", "offset.weight", "offset.bias"} | ({"bias"} if bias else set())
    x = torch.randn(2, 8, 20, 13)
    expected = plain(x) * 0.5 + (0 if plain.bias is None else 0.5 * plain.bias[:, None, None])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_channels_last_stays_and_gives_the_same() -> None:
    torch.manual_seed(3)
    layer = make(8, 12, stride=2, padding=1)
    x = torch.randn(2, 8, 16, 12, requires_grad=True)
    out = layer(x)
    slope = torch.randn_like(out)
    expected = torch.autograd.grad(out, [x, *layer.parameters()], slope)
    assert out.is_contiguous()
    layer = layer.to(memory_format=torch.channels_last)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    last = layer(x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)
    for actual, reference in zip(torch.autograd.grad(last, [x, *layer.parameters()], slope), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


def test_under_autocast_it_computes_in_float32_and_returns_bf16() -> None:
    torch.manual_seed(4)
    layer = make(8, 12, padding=1)
    x = torch.randn(2, 8, 16, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == layer.offset(x).dtype == torch.bfloat16
    assert torch.equal(out, layer(x.float()).bfloat16())
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    half = layer.bfloat16()(x)  # weights in bf16, no autocast
    assert half.dtype == torch.bfloat16
    assert (half.float() - out.float()).abs().max() < 0.05 * out.float().abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_gives_the_same(autocast: bool) -> None:
    torch.manual_seed(6)
    layer = make(8, 12, stride=2, padding=1)
    x = torch.randn(2, 8, 32, 24)
    expected = layer(x)
    layer, x = layer.cuda().to(memory_format=torch.channels_last), x.cuda().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        out.float().cpu(), expected, rtol=1e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-4
    )


# ---- in a body


def body_of(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, features_only=True, pretrained=False, **options)


def deformable(body: nn.Module) -> list[str]:
    return [name for name, module in body.named_modules() if isinstance(module, ModulatedDeformConv2d)]


@pytest.mark.parametrize(
    ("name", "strides", "expected"),
    [
        ("resnet50d", (8, 16, 32), [f"layer{n}.{i}.conv2" for n, d in ((2, 4), (3, 6), (4, 3)) for i in range(d)]),
        ("seresnet50", (32,), [f"layer4.{i}.conv2" for i in range(3)]),
        ("resnet18d", (4, 32), [f"layer{n}.{i}.conv2" for n in (1, 4) for i in range(2)]),
        ("darknet53", (32,), [f"stages_4.blocks.{i}.conv2.conv" for i in range(4)]),
    ],
)
def test_the_second_convolution_of_each_block_is_replaced(
    name: str, strides: tuple[int, ...], expected: list[str]
) -> None:
    body = body_of(name)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    pyramid = TimmPyramid(body, name=name, channels=16, dcn_strides=strides)
    assert deformable(body) == expected
    after = body.state_dict()
    offsets = {f"{module}.offset.{leaf}" for module in expected for leaf in ("weight", "bias")}
    assert set(after) == set(before) | offsets
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [m.shape[-1] for m in pyramid.eval()(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("name", "strides", "named"),
    [
        ("test_convnext", (8, 16, 32), "8, 16, 32"),
        ("mobilenetv3_small_050", (32,), "32"),
        ("resnext26ts", (16,), "16"),
        ("regnetx_002", (8, 32), "8, 32"),
    ],
)
def test_a_body_without_dense_convolutions_is_refused(name: str, strides: tuple[int, ...], named: str) -> None:
    message = f"model.dcn_strides: backbone {name} has no dense 3x3 convolution in the blocks of stride {named} to make .*resnet50d"
    with pytest.raises(UserError, match=message):
        TimmPyramid(body_of(name), name=name, dcn_strides=strides)


def test_standardized_convolutions_are_not_taken_for_plain_ones() -> None:
    with pytest.raises(UserError, match="has no dense 3x3 convolution"):
        TimmPyramid(body_of("resnetv2_50x1_bit"), name="resnetv2_50x1_bit", dcn_strides=(32,))


def test_a_detector_file_holds_the_offsets(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = DetectorConfig.model_validate(
        {"dcn_strides": [8, 32], "fpn_channels": 16, "roi": {"hidden": 16, "score_threshold": 0.0}}
    )
    body = body_of("resnet18")
    inputs = InputSettings.of_detector((0.5,) * 3, (0.25,) * 3)
    model = build_detector(config, classes=2, body=body, arch="resnet18", inputs=inputs).eval()
    for name, parameter in body.named_parameters():
        if name.endswith(".offset.weight"):
            nn.init.normal_(parameter, std=0.05)
    data = CocoData("drawn", False, ("wide", "tall"), (3, 7), images=[])
    file = tmp_path / "detector.safetensors"
    save_detector(file, model, config=config, resize=ResizeConfig(), arch="resnet18", inputs=inputs, data=data)
    loaded = load_detector(file).model
    assert (
        deformable(loaded.pyramid.body) == deformable(body) == [f"layer{n}.{i}.conv2" for n in (2, 4) for i in (0, 1)]
    )
    pixels = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[96, 64]]), torch.ones(1))
    with torch.inference_mode():
        (actual,), (reference,) = model(images), loaded(images)
    assert len(actual.boxes_N4) > 0
    assert torch.equal(actual.boxes_N4, reference.boxes_N4)
    assert torch.equal(actual.scores_N, reference.scores_N)


def test_offsets_learn_at_the_full_rate() -> None:
    body = body_of("resnet18")
    TimmPyramid(body, name="resnet18", channels=16, dcn_strides=(16, 32))
    factors = lr_factor_of_parameter(body, (0.1, 0.2, 0.3, 0.4, 0.5))
    stages = stage_of_parameter(body)
    offsets = {name for name in factors if ".offset." in name}
    assert len(offsets) == 8
    for name, factor in factors.items():
        assert factor == (1.0 if name in offsets else (0.1, 0.2, 0.3, 0.4, 0.5)[stages[name]]), name


def _step(pyramid: TimmPyramid) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in pyramid.parameters() if p.requires_grad], lr=1.0)
    sum(m.square().mean() for m in pyramid.train()(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    return before, pyramid.state_dict()


@pytest.mark.parametrize("freeze_stages", [0, 4])
def test_offsets_of_frozen_stages_are_frozen_too(freeze_stages: int) -> None:
    torch.manual_seed(5)
    body = body_of("resnet18", zero_init_last=False)
    pyramid = TimmPyramid(body, name="resnet18", channels=16, dcn_strides=(16, 32), freeze_stages=freeze_stages)
    before, after = _step(pyramid)
    for name in before:
        if ".conv2." in name:
            still = freeze_stages == 4 and not name.startswith("body.layer4")
            assert torch.equal(before[name], after[name]) == still, name
