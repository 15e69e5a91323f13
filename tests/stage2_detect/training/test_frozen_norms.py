"""Random weights behind frozen norms: a warning at the start, since such norms normalize nothing and the body may diverge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssld
from ssld.shared.config.settings import parse_config
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.training.trained_detector import TrainedDetector

WARNING = (
    "warning: random:test_resnet has random weights, and freeze_norm: true freezes its BatchNorm layers at mean 0 and variance 1, where they "
    "normalize nothing: the training may diverge or learn little; set freeze_norm: false"
)


@pytest.mark.parametrize(
    ("backbone", "frozen", "warned"),
    [
        ("random:test_resnet", True, True),
        ("random:test_resnet", False, False),
        ("random:test_convnext", True, False),  # no BatchNorm
        ("FILE", True, False),
    ],
)
def test_training_warns(
    backbone: str,
    frozen: bool,
    warned: bool,
    train_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    teacher_file: Path,
) -> None:
    settings = train_settings | {"backbone": backbone.replace("FILE", str(teacher_file))}
    settings["model"] = train_settings["model"] | {"freeze_norm": frozen}
    config = parse_config(TrainConfig, arguments(settings), program="train.py")
    annotations, images = train_settings["data"]["train_annotations"], train_settings["data"]["train_images"]
    data = read_coco(Path(annotations), Path(images), training=True, keep_empty=True)
    lines = list(TrainedDetector(config, data, device=torch.device("cpu")).preview())
    assert [line for line in lines if line.startswith("warning")] == ([WARNING] if warned else [])


def test_a_detector_file_has_its_own_norms(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = train_settings | {"init": str(tmp_path / "other.safetensors")}
    config = parse_config(TrainConfig, arguments(settings), program="train.py")
    assert not config.freezes_random_norms


@pytest.mark.parametrize("frozen", [False, True])
def test_in_your_own_loop(frozen: bool) -> None:
    detector = ssld.build_detector("gfl", backbone="random:test_resnet", classes=2, fpn_channels=16, freeze_norm=frozen)
    assert detector.loaded.split("\n")[1:] == ([WARNING] if frozen else [])
