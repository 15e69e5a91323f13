"""prototypes.py: what cannot work costs one line, and what is doubtful is named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.stage1_ssld.clustering import encoder, steps
from ssld.stage1_ssld.curate import main as curate
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.prototypes import main as prototypes


def test_a_pool_below_the_number_of_prototypes_is_named(
    settings: Any, arguments: Any, user_error: Any, tiny: Any, tmp_path: Path
) -> None:
    files = sorted(tiny.train.rglob("*.png"))
    (tmp_path / "pool").mkdir()
    for images, prototypes_set, said in (
        (1, None, "pool: 1 image for 16 prototypes, which need an image each at least; give more images"),
        (1, 4, "pool: 1 image for 4 prototypes, which need an image each at least; give more images"),
        (3, None, "pool: 3 images for 16 prototypes, which need an image each at least; give more images, or set prototypes to at most 3"),
    ):  # fmt: skip
        for file in files[:images]:
            shutil.copy(file, tmp_path / "pool")
        given = settings | {"pool": [str(tmp_path / "pool")], "prototypes": prototypes_set}
        assert user_error(prototypes, arguments(given)) == said


@pytest.mark.parametrize(
    ("sizes", "balanced", "expected"),
    [
        ([40, 12, 8], False, []),
        ([12, 10, 8], True, []),
        ([12, 9, 9], True, []),
        ([3, 5, 4], True, ["warning: 4.0 images per prototype are few, so their centers are accidental"]),
        ([300, 2, 58], True, ["warning: balanced: the prototypes have 2 to 300 images, not about 120 each"]),
        ([300, 3, 58, 2], False, ["warning: 2 of 4 prototypes have fewer than 4 images: single photos"]),
        ([300, 40, 50, 30, 3], False, []),
    ],
)
def test_doubtful_prototypes_are_named(sizes: list[int], balanced: bool, expected: list[str]) -> None:
    lines = list(steps._doubts(np.array(sizes), balanced=balanced))
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def classifier_of(path: Path) -> Path:
    net: Any = timm.create_model("test_vit", num_classes=0)
    save_backbone(path, net, arch="test_vit", inputs=input_settings(net, {}), classes=0)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": 75}, "prototypes: 75 are more than the 74 images of the pool; give fewer, or more images"),
        ({"prototypes": 1}, "prototypes: has to be at least 2"),
        ({"perplexity": 6.0}, "perplexity: 6 has to be less than the number of prototypes, 6"),
        ({"prototypes": None, "perplexity": 20.0}, "perplexity: 20 has to be less than the number of prototypes, 16"),
        ({"perplexity": 1.0}, "perplexity: has to be above 1"),
        ({"pool": ["no/such"]}, "pool.0: no/such: no such file or folder"),
        ({"encoder": "gone.safetensors"}, "encoder.model: gone.safetensors: no such file"),
        ({"encoder": "random:test_vitt"}, "test_vitt: timm has no such model; did you mean 'test_vit'?"),
        ({"encoder": {"model": "random:test_vit", "global_pool": "map"}}, "encoder.global_pool: test_vit: has no pooling 'map'"),
        ({"encoder": {"model": "random:test_resnet", "global_pool": "mean"}}, "encoder.global_pool: test_resnet: has no pooling 'mean'"),
        ({"encoder": "random:deit_tiny_distilled_patch16_224", "image_size": None},
         "deit_tiny_distilled_patch16_224: its classifier is not one linear layer on its pooled features"),
        ({"encoder": "random:test_maxvit", "image_size": 50}, "encoder.model: random:test_maxvit: test_maxvit cannot work at 50 pixels"),
        ({"encoder": "random:vit_small_patch16_dinov3", "image_size": 100},  # whose tokens may be any number, of whole patches
         "vit_small_patch16_dinov3 cannot work at 100 pixels (Input height (100) should be divisible by patch size (16).)"),
    ],
)  # fmt: skip
def test_mistakes_cost_one_line(
    change: dict[str, Any], message: str, arguments: Any, settings: Any, user_error: Any
) -> None:
    assert message in user_error(prototypes, arguments(settings | change))


def test_a_fixed_size_without_a_setter(
    arguments: Any, settings: Any, user_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("timm.models.vision_transformer.VisionTransformer.set_input_size")
    assert (
        user_error(prototypes, arguments(settings)) == "image_size: test_vit: works at its own size only; leave it out"
    )


def test_an_encoder_that_answers_nan(arguments: Any, settings: Any, user_error: Any, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=0)
    tensors = net.state_dict() | {"norm.bias": torch.full((64,), float("nan"))}
    torch.save(tensors, tmp_path / "nan.pth")
    damaged = {"model": str(tmp_path / "nan.pth"), "arch": "test_vit"}
    message = user_error(prototypes, arguments(settings | {"encoder": damaged}))
    assert message.startswith(f"{tmp_path / 'nan.pth'}: 1 tensor with values that are not finite, first norm.bias; ")


def test_an_encoder_that_sees_nothing(arguments: Any, settings: Any, user_error: Any, tmp_path: Path) -> None:
    """Before the pool is embedded."""
    net = timm.create_model("test_vit", num_classes=0)
    torch.save(net.state_dict() | {"norm.weight": torch.zeros(64)}, tmp_path / "blind.pth")
    blind = {"model": str(tmp_path / "blind.pth"), "arch": "test_vit"}
    message = user_error(prototypes, arguments(settings | {"encoder": blind}))
    assert message.startswith(f"encoder.model: {tmp_path / 'blind.pth'}: its outputs are the same for every image: ")


def test_a_precision_that_is_too_small(
    arguments: Any, settings: Any, user_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values so large that fp16 makes them infinite: one line with the cause and the remedy."""
    real = encoder.embed

    def overflows(classifier: Any, pixels: torch.Tensor) -> torch.Tensor:
        actual = real(classifier, pixels)
        return actual if not torch.is_autocast_enabled("cpu") else actual / 0

    monkeypatch.setattr(encoder, "embed", overflows)
    message = user_error(prototypes, arguments(settings | {"precision": "bf16"}))
    assert message.endswith("its features are NaN; try precision: fp32")


def test_without_scikit_learn(arguments: Any, settings: Any, user_error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("prototypes need scikit-learn; pip install -e '.[prototypes]' in the clone")

    monkeypatch.setattr(steps, "require_scikit_learn", missing)
    assert "pip install -e '.[prototypes]' in the clone" in user_error(prototypes, arguments(settings))


def test_an_encoder_itself_is_refused_as_a_teacher(
    arguments: Any, distill_settings: Any, settings: Any, user_error: Any, tmp_path: Path
) -> None:
    """By every command, with what to do."""
    file = classifier_of(tmp_path / "encoder.safetensors")
    for main, given in (
        (distill, distill_settings | {"teacher": str(file)}),
        (curate, {"pool": settings["pool"], "teacher": str(file), "keep": 2, "device": "cpu", "workers": 0}),
    ):
        message = user_error(main, arguments(given, main.__module__.rpartition(".")[2]))
        assert message.endswith("run `ssld prototypes` first, which makes a teacher of an encoder without classes")


def test_an_encoder_is_known_by_its_name_before_its_download(
    arguments: Any, distill_settings: Any, settings: Any, user_error: Any
) -> None:
    """Features alone need no classes: there the weights are what is missing, since the network is off."""
    name = "timm:vit_small_patch16_dinov3.lvd1689m"
    pool = {"pool": settings["pool"], "teacher": name, "keep": 2, "device": "cpu", "workers": 0}
    both = distill_settings | {"teacher": name, "losses": ["pooled", "kl"]}
    for main, given in ((distill, distill_settings | {"teacher": name}), (distill, both), (curate, pool)):
        message = user_error(main, arguments(given))
        assert message.startswith(
            f"teacher.model: {name}: has 0 classes, a teacher needs several; run `ssld prototypes`"
        )
    features = distill_settings | {"teacher": name, "losses": ["pooled"]}
    message = user_error(distill, arguments(features))
    assert "classes" not in message
    assert name.removeprefix("timm:") in message
