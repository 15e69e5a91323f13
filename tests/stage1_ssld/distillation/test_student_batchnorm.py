"""The running statistics of a student's BatchNorm in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssld.stage1_ssld.data_config import NetworkConfig, StudentConfig
from ssld.stage1_ssld.distill import main as distill

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(("given", "batchnorm"), [(None, "eval"), ("eval", "eval"), ("batch", "batch")])
def test_statistics_stay_or_move(
    given: str | None,
    batchnorm: str,
    teacher_file: Path,
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    user_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    student = {"model": str(teacher_file)} | ({"batchnorm": given} if given else {})
    settings = distill_settings | {"student": student, "steps": 2, "keep_weights": "last"}
    # Another teacher than the start, so that there is something to learn; one process of each kind of layer is enough.
    settings["teacher"] = {"model": "random:test_resnet"}
    settings["data"] = {name: value for name, value in settings["data"].items() if name != "val"}
    assert call(distill, arguments(settings)) == 0
    before, after = load_file(teacher_file), load_file(tmp_path / "run" / "student.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    statistics = {name for name in after if name.endswith(RUNNING)}
    assert statistics
    assert moved & statistics == (statistics if batchnorm == "batch" else set())
    assert "conv1.0.weight" in moved
    assert "conv1.1.weight" in moved  # BatchNorm's own weights learn
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["student"]["batchnorm"] == batchnorm
    if given == "batch":  # as runs of a version with another default
        del settings["student"]["batchnorm"]
        advice = 'student.batchnorm: "batch" -> "eval" (the default; set it to "batch" to go on as before)'
        assert advice in user_error(distill, arguments(settings))


def test_random_weights_have_no_statistics_to_keep(
    distill_settings: dict[str, Any], arguments: Callable[..., list[str]], user_error: Callable[..., str]
) -> None:
    settings = distill_settings | {"student": {"model": "random:test_resnet", "batchnorm": "eval"}}
    assert (
        "student: batchnorm: eval keeps the running statistics of random:test_resnet, which has none; set batch"
        in user_error(distill, arguments(settings))
    )


def test_by_default_only_trained_weights_keep_statistics() -> None:
    chosen = {"random:test_resnet": "batch", "timm:test_resnet.r160_in1k": "eval", "student.safetensors": "eval"}
    for model, batchnorm in chosen.items():
        for given in (model, {"model": model}, {"model": model, "batchnorm": None}):
            assert StudentConfig.model_validate(given).batchnorm == batchnorm
        assert StudentConfig.model_validate({"model": model, "batchnorm": "batch"}).batchnorm == "batch"
        assert NetworkConfig.model_validate(model).batchnorm == "batch"  # `teach` learns from labels, as everywhere
