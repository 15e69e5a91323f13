"""Norms in pyramid and heads against their definition, RoIs that do not exist, and several anchor scales of the RPN."""

from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.norms import Norm, RoIConvolutions
from ssld.stage2_detect.models.rcnn import RCNN

SIZES = (8.0, 16.0, 32.0, 64.0, 128.0)


def convolutions(norm: Norm) -> RoIConvolutions:
    torch.manual_seed(0)
    return RoIConvolutions(channels=6, hidden=8, convolutions=2, norm=norm, freeze_norm=False)


def detector(**settings: object) -> RCNN:
    torch.manual_seed(0)
    group = {"hidden": 16, "convolutions": 1, "norm": "group"}
    config = DetectorConfig.model_validate(
        {"kind": "mask_rcnn", "fpn_channels": 16, "fpn_norm": "group", "roi": group, "mask": group} | settings
    )
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    model = build_detector(config, classes=3, body=body, arch="test_resnet", inputs=inputs)
    assert isinstance(model, RCNN)
    return model


def test_group_norm_of_heads_follows_the_definition() -> None:
    """Mean and variance over 2 channels (8 in 4 groups) and all cells of one RoI, in float64; a RoI that does not exist changes nothing."""
    head = convolutions("group")
    assert head.norms is not None
    maps = torch.randn(3, 6, 5, 5)
    expected = maps.double()
    for conv, norm in zip(head.convs, head.norms, strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.GroupNorm)
        assert conv.bias is None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        groups = F.conv2d(expected, conv.weight.double(), padding=1).view(3, 4, 2, 5, 5)
        centered = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
        scaled = centered / (centered.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()
        affine = scaled.view(3, 8, 5, 5) * norm.weight.double().view(8, 1, 1) + norm.bias.double().view(8, 1, 1)
        expected = affine.clamp(min=0)
    torch.testing.assert_close(head.convolve(maps).double(), expected, rtol=1e-5, atol=1e-5)
    some = head.convolve(maps, torch.tensor([True, False, True]))
    torch.testing.assert_close(some[[0, 2]].double(), expected[[0, 2]], rtol=1e-5, atol=1e-5)


def test_group_norm_reaches_pyramid_and_heads() -> None:
    model = detector()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    blocks = {f"pyramid.fpn.{kind}_blocks.{level}.1" for kind in ("inner", "layer") for level in range(4)}
    assert norms == blocks | {"roi_heads.heads.0.norms.0", "mask_head.norms.0"}
    maps = model.eval().pyramid(torch.randn(1, 3, 64, 64))
    blocks_of_layers: Any = model.pyramid.fpn.layer_blocks
    with torch.no_grad():  # their norms come last: with a weight of zero the maps are the bias
        for block in blocks_of_layers:
            nn.init.zeros_(block[1].weight)
            nn.init.constant_(block[1].bias, 0.25)
        for one, other in zip(maps, model.pyramid(torch.randn(1, 3, 64, 64)), strict=True):
            assert one.std() > 0.1
            assert (other == 0.25).all()


def test_batch_norm_measures_the_rois_that_exist() -> None:
    valid = torch.tensor([True, False, True, False])
    maps = torch.randn(4, 6, 5, 5)
    maps[1] = 1e4
    head, alone = convolutions("batch"), convolutions("batch")
    actual, expected = head.convolve(maps, valid), alone.convolve(maps[valid])
    torch.testing.assert_close(actual[valid], expected)
    actual[valid].square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(head.named_parameters(), alone.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad)
    for (name, buffer), other_buffer in zip(head.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(buffer, other_buffer, msg=name)


def test_without_any_roi_gradients_are_zero_and_nothing_is_measured() -> None:
    head = convolutions("batch")
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    valid = torch.zeros(4, dtype=torch.bool)
    maps = head.convolve(torch.randn(4, 6, 5, 5), valid)
    torch.where(valid[:, None, None, None], maps, 0.0).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, buffer in head.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert head.norms is not None
    assert all(norm.training for norm in head.norms)


def test_anchors_of_several_scales_are_torchvisions() -> None:
    """The same boxes in each cell, in another order: scales come first here, ratios there."""
    scales, ratios = (1.0, 1.5), (0.5, 1.0, 2.0)
    rpn = {"anchor_sizes": list(SIZES), "anchor_scales": list(scales), "anchor_grid": "torchvision"}
    model = detector(rpn=rpn)
    assert model.rpn.head.objectness.out_channels == 6
    assert model.rpn.head.deltas.out_channels == 24
    maps = [torch.zeros(1, 1, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32)] + [torch.zeros(1, 1, 1, 2)]
    generator = AnchorGenerator(
        tuple(tuple(size * scale for scale in scales) for size in SIZES), (ratios,) * len(SIZES)
    )
    [expected] = generator(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), maps)
    expected = expected.view(-1, len(ratios), len(scales), 4).transpose(1, 2).reshape(-1, 4)
    actual = model.rpn.anchors([(one.shape[-2], one.shape[-1]) for one in maps], torch.device("cpu"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
