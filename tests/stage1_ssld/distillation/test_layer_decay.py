"""Layer decay: learning-rate factors by layer against timm's own grouping of parameters, and against what one step moves."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import group_parameters

from ssld.stage1_ssld.config import DistillConfig
from ssld.stage1_ssld.data_config import LossConfig, NetworkConfig
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation.student import Student
from ssld.stage1_ssld.distillation.teacher import make_teacher


def student(arch: str, classes: int, distill_settings: dict[str, Any], tmp_path: Path, *losses: str) -> Student:
    settings = distill_settings | {"student": {"model": f"random:{arch}"}, "output": tmp_path / "run"}
    settings["data"] = settings["data"] | {"image_size": 160 if "vit" in arch else 32}
    config = DistillConfig(**settings, losses=list(losses) or ["symmetric_kl"])
    teacher = None
    if losses:
        assert config.teacher is not None
        teacher = make_teacher(config.teacher, precision="fp32", device=torch.device("cpu"), channels_last=False)
    return Student(
        NetworkConfig(model=f"random:{arch}"),
        config,
        classes=classes,
        device=torch.device("cpu"),
        features=[LossConfig.model_validate(name) for name in losses],
        teacher=teacher,
    )


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("classes", [3, 0])
def test_factors_follow_timms_layers(arch: str, classes: int, distill_settings: dict[str, Any], tmp_path: Path) -> None:
    net: Any = timm.create_model(arch, num_classes=classes)
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    expected = {f"classifier.net.{name}": 0.7 ** (top - layer) for name, layer in layers.items()}
    factors = student(arch, classes, distill_settings, tmp_path).lr_factors(0.7)
    assert factors == pytest.approx(expected, rel=1e-12)
    assert len(set(factors.values())) > 4
    if classes:
        assert factors[f"classifier.net.{net.pretrained_cfg['classifier']}.weight"] == 1


def test_feature_heads_keep_the_full_rate(distill_settings: dict[str, Any], tmp_path: Path) -> None:
    factors = student("test_convnext", 3, distill_settings, tmp_path, "pooled").lr_factors(0.5)
    heads = {name: factor for name, factor in factors.items() if name.startswith("heads.")}
    assert heads
    assert set(heads.values()) == {1.0}
    assert min(factors.values()) < 0.1


def test_one_step_moves_each_layer_by_its_factor(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path, teacher_file: Path
) -> None:
    optim = {"lr": 0.1, "reference_batch": 8, "momentum": 0, "weight_decay": 0}
    settings = distill_settings | {"steps": 1, "student": {"model": str(teacher_file)}}
    settings |= {"objective": "labels", "teacher": None}
    settings["data"] = {"train": [distill_settings["data"]["train"][0]], "image_size": 32}
    for decay in (1.0, 0.5):
        assert call(distill, arguments(settings | {"optim": optim | {"layer_decay": decay}}, f"{decay:g}")) == 0
    before = load_file(teacher_file)
    whole, decayed = (load_file(tmp_path / name / "student.safetensors") for name in ("1", "0.5"))
    net: Any = timm.create_model("test_resnet", num_classes=3)
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    top, ratios = max(layers.values()), {}
    for name, layer in layers.items():
        full, part = (float((after[name] - before[name]).double().norm()) for after in (whole, decayed))
        if full > 1e-4:  # far above float32's rounding of the weights
            ratios[name] = part / full
            assert ratios[name] == pytest.approx(0.5 ** (top - layer), rel=0.02), name
    assert len({round(ratio, 2) for ratio in ratios.values()}) > 3
    assert "layer decay 0.5: learning-rate factors from " in (tmp_path / "0.5" / "log.txt").read_text()
    assert "layer decay" not in (tmp_path / "1" / "log.txt").read_text()


@pytest.mark.parametrize("decay", [0, -0.5, 1.01])
def test_bounds(decay: float, arguments: Any, distill_settings: dict[str, Any], user_error: Any) -> None:
    settings = distill_settings | {"optim": distill_settings["optim"] | {"layer_decay": decay}}
    assert "optim.layer_decay" in user_error(distill, arguments(settings))
