"""The norm of the gradient and the entropies in metrics.jsonl, against values computed from recorded logits and from the update."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from ssld.shared.models.backbones import Classifier, input_settings, save_backbone
from ssld.shared.models.teacher import FrozenTeacher
from ssld.stage1_ssld.distill import main as distill


def entropies(logits_BK: torch.Tensor) -> np.ndarray:
    z = logits_BK.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    result: np.ndarray = -(p * np.log(p)).sum(1)
    return result


@pytest.mark.parametrize("accumulate", [1, 2])
def test_entropies_are_means_over_the_batch(
    accumulate: int,
    arguments: Any,
    distill_settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics_of: Any,
) -> None:
    logits: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}

    def record(owner: type, name: str, key: str) -> None:
        original = getattr(owner, name)

        def recorded(self: Any, pixels: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = original(self, pixels)
            if key == "teacher" or self.training:
                logits[key].append(result.detach().clone())
            return result

        monkeypatch.setattr(owner, name, recorded)

    record(FrozenTeacher, "__call__", "teacher")
    record(Classifier, "forward", "student")
    data = {name: value for name, value in distill_settings["data"].items() if name != "val"}
    teacher = distill_settings["teacher"] | {"check_images": 0}
    settings = distill_settings | {"data": data, "teacher": teacher, "accumulate": accumulate, "steps": 3}
    assert call(distill, arguments(settings)) == 0
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:  # of the logged step alone, not a mean since the last line
        passes = slice(accumulate * (line["step"] - 1), accumulate * line["step"])
        for key, batches in logits.items():
            expected = entropies(torch.cat(batches[passes]))
            assert len(expected) == 8
            assert line[f"{key}_entropy"] == pytest.approx(expected.mean(), rel=1e-5)
    assert lines[0]["teacher_entropy"] != lines[0]["student_entropy"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert (
        f"teacher_entropy {lines[0]['teacher_entropy']:.4f}, student_entropy {lines[0]['student_entropy']:.4f}" in log
    )
    assert f"grad_norm {lines[0]['grad_norm']:.4f}" in log


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("objective", ["teacher", "labels"])
def test_gradient_norm_is_that_of_the_update(
    objective: str,
    clip: float | None,
    arguments: Any,
    distill_settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    teacher_file: Path,
    metrics_of: Any,
) -> None:
    """One step of SGD without decay moves the weights by lr times the gradient: from both files follows its norm, before clipping."""
    lr, start = 0.02, tmp_path / "start.safetensors"
    torch.manual_seed(1)
    net = timm.create_model("test_resnet", num_classes=3)
    names = ["disc", "ring", "stripes"]
    save_backbone(start, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3, class_names=names)
    settings = distill_settings | {
        "steps": 1,
        "log_every": 1,
        "objective": objective,
        "student": {"model": str(start)},
        "teacher": {"model": str(teacher_file)} if objective == "teacher" else None,
        "optim": {"lr": lr, "reference_batch": 8, "momentum": 0, "weight_decay": 0, "clip_grad_norm": clip},
    }
    settings["data"] = {"train": [distill_settings["data"]["train"][0]], "image_size": 32}
    assert call(distill, arguments(settings)) == 0
    before, after = load_file(start), load_file(tmp_path / "run" / "student.safetensors")
    running = ("running_mean", "running_var", "num_batches_tracked")
    moves = [(before[name] - tensor).double() for name, tensor in after.items() if not name.endswith(running)]
    moved = np.sqrt(sum(float(move.square().sum()) for move in moves)) / lr
    norm = metrics_of(tmp_path / "run")[0]["grad_norm"]
    if clip is None:
        assert moved == pytest.approx(norm, rel=1e-3)
    else:
        assert moved == pytest.approx(clip, rel=1e-2)
        assert norm > 2 * clip


def test_a_teacher_of_another_size_is_mentioned(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path
) -> None:
    for size in (None, "own"):
        teacher = distill_settings["teacher"] | {"size": size}
        assert call(distill, arguments(distill_settings | {"teacher": teacher, "steps": 1}, f"{size}")) == 0
    line = "teacher sees views of 32 px; its own size is 160 x 160 (teacher.size: own)"
    assert line in (tmp_path / "None" / "log.txt").read_text()
    assert "its own size is" not in (tmp_path / "own" / "log.txt").read_text()


def test_without_soft_labels_there_are_no_entropies(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path
) -> None:
    assert call(distill, arguments(distill_settings | {"losses": ["pooled"]})) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "grad_norm" in first
    assert not {name for name in first if "entropy" in name}
