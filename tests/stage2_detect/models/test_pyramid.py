"""The pyramid over several families: levels, refusals, freezing, stages of parameters."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.shared.errors import UserError
from ssld.stage2_detect.models.freezing import ConstantBatchNorm2d, stage_of_parameter
from ssld.stage2_detect.models.pyramid import P6P7, TimmPyramid

SMALL_SWIN = {
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "window_size": 4,
    "strict_img_size": False,
}
FAMILIES = [
    ("test_resnet", {}),
    ("test_convnext", {}),
    ("test_efficientnet", {}),
    ("mobilenetv3_small_050", {}),
    ("lcnet_050", {}),
    ("hgnetv2_b0", {}),
    ("swin_tiny_patch4_window7_224", SMALL_SWIN),
]


def body_of(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, features_only=True, pretrained=False, **options)


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_levels_have_their_strides_and_every_parameter_a_gradient(name: str, options: dict) -> None:
    pyramid = TimmPyramid(body_of(name, **options), name=name, channels=16)
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16, math.ceil(64 / s), math.ceil(96 / s)) for s in pyramid.strides]
    sum(m.square().mean() for m in maps).backward()
    without = [n for n, p in pyramid.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_the_coarsest_levels_in_bf16(size: int) -> None:
    """Of a map of one cell, too, where torch's own kernel leaves parts of the gradient as the memory was: here NaN, of tensors before."""
    torch.manual_seed(0)
    extra = P6P7(16, 16, p6_from="p5", relu_before_p7=False)
    maps = torch.randn(4, 16, size, size)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        extra.zero_grad()
        lengths = (1152, 2304, 4608, 9216) * 8
        used = [torch.full((length,), torch.nan, dtype=kind) for length in lengths for kind in (dtype, torch.float32)]
        del used
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (_, p6, p7), _ = extra([maps], [maps], ["p5"])
        assert p7.shape[-2:] == (1, 1)
        (p6.float().sum() + p7.float().sum()).backward()
        return [parameter.grad.clone() for parameter in extra.parameters() if parameter.grad is not None]

    expected = gradients(torch.float32)
    for _ in range(10):
        torch.testing.assert_close(gradients(torch.bfloat16), expected, rtol=0.05, atol=0.1)


def test_stages_of_a_resnet_are_its_layers() -> None:
    stages = stage_of_parameter(body_of("resnet50d"))
    for name, stage in stages.items():
        assert stage == (int(name[5]) if name.startswith("layer") else 0), name


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("test_convnext", {}, {"stem_0.weight": 0, "stages_0.blocks.0.gamma": 1, "stages_3.downsample.1.weight": 4}),
        ("hgnetv2_b0", {}, {"stem.stem1.conv.weight": 0, "stages_0.blocks.0.layers.0.conv.weight": 1}),
        (
            "mobilenetv3_small_050",
            {},
            {
                "conv_stem.weight": 0,
                "blocks.0.0.conv_dw.weight": 1,
                "blocks.1.0.conv_pw.weight": 2,
                "blocks.2.0.conv_pw.weight": 3,  # stride 16 is reached here, and left after block 3
                "blocks.3.0.conv_pw.weight": 3,
                "blocks.4.0.conv_pw.weight": 4,
                "blocks.5.0.conv.weight": 4,
            },
        ),
        (
            "swin_tiny_patch4_window7_224",
            SMALL_SWIN,
            {
                "patch_embed.proj.weight": 0,
                "layers_0.blocks.0.attn.relative_position_bias_table": 1,
                "layers_1.downsample.norm.weight": 2,
            },
        ),
    ],
)
def test_stages_of_other_families(name: str, options: dict, expected: dict[str, int]) -> None:
    body = body_of(name, **options)
    stages = stage_of_parameter(body)
    assert set(stages) == {n for n, _ in body.named_parameters()}
    assert {n: stages[n] for n in expected} == expected
    assert list(stages.values()) == sorted(stages.values())
    assert set(stages.values()) == {0, 1, 2, 3, 4}


def test_a_backbone_of_one_stride_is_refused() -> None:
    with pytest.raises(UserError, match="test_vit cannot carry a detector: it has maps of stride 16 only"):
        TimmPyramid(body_of("test_vit"), name="test_vit")


def test_a_backbone_of_one_input_size_is_refused() -> None:
    name = "swin_tiny_patch4_window7_224"
    options = SMALL_SWIN | {"strict_img_size": True}
    with pytest.raises(UserError, match=f"{name} cannot carry a detector, which needs images of any size"):
        TimmPyramid(body_of(name, **options), name=name)


def test_a_map_of_another_size_than_promised_is_refused() -> None:
    body = body_of("test_resnet")
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    first.stride = (1, 1)
    with pytest.raises(
        UserError, match=r"test_resnet .* map of stride 4 is \(1, 32, 32, 48\) instead of \(1, 32, 16, 24\)"
    ):
        TimmPyramid(body, name="test_resnet")


@pytest.mark.parametrize("stages", [-1, 6])
def test_an_impossible_number_of_stages_is_refused(stages: int) -> None:
    with pytest.raises(UserError, match="freeze_stages is"):
        TimmPyramid(body_of("test_resnet"), name="test_resnet", freeze_stages=stages)


def test_convolutions_start_as_the_reference_has_them() -> None:
    torch.manual_seed(0)
    pyramid = TimmPyramid(body_of("test_resnet"), name="test_resnet", channels=64)
    for block, width in zip(pyramid.fpn.inner_blocks, (32, 48, 192, 96), strict=True):
        bound = math.sqrt(3 / width)  # Xavier-uniform with fan_in for both fans
        assert block[0].weight.abs().max() <= bound
        assert block[0].weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (block[0].bias == 0).all()
    assert pyramid.fpn.layer_blocks[0][0].weight.abs().max() <= math.sqrt(3 / (64 * 9))


def _step(pyramid: TimmPyramid) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after one step of training."""
    before = {k: v.clone() for k, v in pyramid.state_dict().items()}
    pyramid.train()
    optimizer = torch.optim.SGD((p for p in pyramid.parameters() if p.requires_grad), lr=1.0)
    sum(m.square().mean() for m in pyramid(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    return before, pyramid.state_dict()


@pytest.mark.parametrize("freeze_stages", [0, 1, 2, 5])
@pytest.mark.parametrize("freeze_norm", [False, True])
def test_frozen_is_what_a_training_step_does_not_change(freeze_stages: int, freeze_norm: bool) -> None:
    body = body_of("test_resnet", zero_init_last=False)  # a residual branch that ends in zeros has no gradient yet
    stages = {f"body.{name}": stage for name, stage in stage_of_parameter(body).items()}
    norms = {f"body.{name}" for name, module in body.named_modules() if isinstance(module, _BatchNorm)}
    pyramid = TimmPyramid(body, name="test_resnet", channels=16, freeze_stages=freeze_stages, freeze_norm=freeze_norm)
    before, after = _step(pyramid)
    for name in before:
        module = name.rpartition(".")[0]
        stage = stages.get(name, stages.get(f"{module}.weight", 9))  # buffers are their module's
        frozen = stage < freeze_stages or (freeze_norm and module in norms)
        assert torch.equal(before[name], after[name]) == frozen, name


def test_frozen_modules_stay_in_eval_mode() -> None:
    body = body_of("test_convnext", drop_path_rate=0.5)
    pyramid = TimmPyramid(body, name="test_convnext", channels=16, freeze_stages=5, freeze_norm=True)
    pyramid.eval()
    pyramid.train()
    images = torch.randn(1, 3, 64, 64)
    first, second = pyramid.features(images), pyramid.features(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert pyramid.training
    assert pyramid.fpn.training


def test_frozen_norms_keep_the_keys_of_the_state_dict() -> None:
    plain = TimmPyramid(body_of("test_resnet"), name="test_resnet")
    frozen = TimmPyramid(body_of("test_resnet"), name="test_resnet", freeze_norm=True, freeze_stages=2)
    assert list(plain.state_dict()) == list(frozen.state_dict())


def test_a_frozen_norm_is_the_norm_and_keeps_nothing() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    norm = norm.eval().requires_grad_(False)
    constant = ConstantBatchNorm2d.of(norm)
    assert constant.state_dict().keys() == norm.state_dict().keys()
    assert constant.weight is norm.weight
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        actual = constant(x)
    assert all(tensor.numel() <= 6 for tensor in kept)
    expected = norm(x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(x)
    slopes = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (actual, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)
    assert constant(x.bfloat16()).dtype == torch.bfloat16
