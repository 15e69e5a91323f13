"""Features of a teacher: pooled features and maps, of networks of every layout, against timm's own forward passes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, save_backbone
from ssld.shared.models.teacher import FrozenTeacher, TeacherEnsemble, feature_map

PIXELS = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder_file(folder: Path, arch: str, classes: int = 0, **model_args: Any) -> Path:
    """A network of random weights for 64 px."""
    torch.manual_seed(2)
    net = timm.create_model(arch, num_classes=classes, **model_args)
    inputs = InputSettings((0.5,) * 3, (0.5,) * 3, (64, 64), "bilinear", False)
    path = folder / f"{arch}.safetensors"
    save_backbone(path, net, arch=arch, inputs=inputs, classes=classes, model_args=model_args)
    return path


@pytest.mark.parametrize(
    ("arch", "model_args", "side"),
    [
        ("test_resnet", {}, 2),  # [B,C,H,W]
        ("test_mambaout", {}, 2),  # [B,H,W,C]
        ("test_vit", {"img_size": 64}, 4),  # class token before the patches
        ("test_vit", {"img_size": 64, "reg_tokens": 4}, 4),
        ("test_vit", {"img_size": 64, "class_token": False, "global_pool": "avg"}, 4),
        ("test_vit4", {"img_size": 64, "patch_size": 8}, 8),
    ],
)
def test_features_are_timms(tmp_path: Path, arch: str, model_args: dict[str, Any], side: int) -> None:
    """The map is timm's last intermediate one, normed; the pooled features are the output of a network without classes."""
    path = encoder_file(tmp_path, arch, **model_args)
    teacher = FrozenTeacher(str(path), classes=False)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    taught = teacher.features(pixels, maps=True)
    net: Any = timm.create_model(arch, num_classes=0, **model_args).eval()
    net.load_state_dict(load_file(path))
    x = pixels / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(taught.pooled_BD, net(x), rtol=1e-4, atol=1e-5)
        last = len(net.feature_info) - 1
        _, (expected,) = net.forward_intermediates(x, indices=[last], norm="vit" in arch, output_fmt="NCHW")
    assert taught.map_BCHW is not None
    assert taught.map_BCHW.shape == (3, net.num_features, side, side)
    torch.testing.assert_close(taught.map_BCHW, expected, rtol=1e-4, atol=1e-5)
    assert taught.logits_BK is None
    assert teacher.features(pixels, maps=False).map_BCHW is None
    half = FrozenTeacher(str(path), classes=False, dtype=torch.bfloat16).features(pixels, maps=True)
    assert half.map_BCHW is not None
    assert half.map_BCHW.dtype == half.pooled_BD.dtype == torch.float32


def test_logits_beside_features_are_the_teachers(teacher_file: Path) -> None:
    for batchnorm in ("eval", "batch"):
        teacher = FrozenTeacher(str(teacher_file), batchnorm=batchnorm, fold_batchnorm=True)
        teacher.match_classes(["stripes", "disc", "ring"], 3, "the images")
        taught = teacher.features(PIXELS, maps=False)
        torch.testing.assert_close(taught.logits_BK, teacher(PIXELS))
        torch.testing.assert_close(taught.pooled_BD, teacher.embed(PIXELS))
    other = FrozenTeacher(str(teacher_file), size=80)
    both = TeacherEnsemble([FrozenTeacher(str(teacher_file)), other])
    both.match_classes(["stripes", "disc", "ring"], 3, "the images")
    taught = both.features(PIXELS, maps=True)
    torch.testing.assert_close(taught.logits_BK, both(PIXELS))
    torch.testing.assert_close(taught.pooled_BD, both.embed(PIXELS))
    assert taught.map_BCHW is not None


def test_pooling_of_features_can_be_set(tmp_path: Path) -> None:
    path = encoder_file(tmp_path, "test_vit", img_size=64)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    own, token, mean = (
        FrozenTeacher(str(path), classes=False, global_pool=pool).features(pixels, maps=True)
        for pool in (None, "token", "avg")
    )
    assert torch.equal(own.pooled_BD, token.pooled_BD)
    assert mean.map_BCHW is not None
    torch.testing.assert_close(mean.pooled_BD, mean.map_BCHW.mean((2, 3)))
    assert not torch.allclose(mean.pooled_BD, own.pooled_BD)
    with pytest.raises(UserError, match=r"^teacher.global_pool: test_vit: has no pooling 'best' \("):
        FrozenTeacher(str(path), classes=False, global_pool="best")
    of_classes = encoder_file(tmp_path, "test_resnet", classes=4)
    with pytest.raises(
        UserError, match=r"teacher.global_pool: .*'s classifier needs its own pooling; remove global_pool"
    ):
        FrozenTeacher(str(of_classes), global_pool="max")
    assert FrozenTeacher(str(of_classes), classes=False).num_classes == 4
    without = FrozenTeacher(str(of_classes), classes=False, global_pool="max")
    assert without.num_classes == 0
    assert without.features(pixels, maps=False).logits_BK is None


@pytest.mark.parametrize("shape", [(2, 50, 8), (2, 16, 9), (2, 8), (2, 4, 4, 8), (2, 1, 8)])
def test_features_that_are_no_map(shape: tuple[int, ...]) -> None:
    """Tokens that fill no square, another width, no grid, a layout that the network does not name, a class token alone."""
    net = torch.nn.Module()
    net.num_features = 8  # type: ignore[assignment]
    assert feature_map(net, torch.zeros(2, 16, 8), "this").shape == (2, 8, 4, 4)
    for features in (torch.zeros(shape), [torch.zeros(2, 16, 8)]):
        with pytest.raises(
            UserError, match=r"^this: last features have shape \[.*\], not \[B, C, H, W\]; remove spatial from losses"
        ):
            feature_map(net, features, "this")
