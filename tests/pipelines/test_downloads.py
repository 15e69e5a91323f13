"""Models that must be downloaded are reported by the doctor, by a dry run and before the first stage, in one line each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines import doctor, run
from ssld.pipelines.checks import settings as checked_settings
from ssld.pipelines.runner import plan
from ssld.shared.models.downloads import find_downloads

LINE = (
    "hf-hub:org/name: not on this machine, and its download (model.safetensors of org/name) is not possible: HF_HUB_OFFLINE is set; "
    "`hf download org/name` where there is a network, or give a file or a folder instead"
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and an empty cache; checked in this process, since importing timm in another takes seconds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (plan, checked_settings):
        monkeypatch.setattr(module, "find_downloads_apart", find_downloads)
    sound: dict[str, Any] = {"broken": {}, "cuda": None, "threads": 2, "devices": [], "groups": ["gloo"], "mps": False}
    monkeypatch.setattr(doctor, "ask_torch", lambda: sound)


def write(folder: Path, tiny: Any) -> tuple[Path, Path]:
    """(settings of a distillation, a pipeline of two of them)"""
    command = folder / "distill.yaml"
    settings = {
        "data": {"train": [str(tiny.train)], "image_size": 32},
        "student": "random:test_resnet",
        "teacher": {"model": "hf-hub:org/name", "ensemble": ["timm:test_resnet"]},
        "optim": {"lr": 0.1, "reference_batch": 8},
        "steps": 1,
        "batch_size": 4,
    }
    command.write_text(yaml.safe_dump(settings))
    stage = {"command": "distill", "config": str(command)}
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"output": str(folder / "runs"), "stages": {"one": stage, "two": stage}}))
    return command, pipeline


def test_the_doctor_tells_what_is_missing(offline: None, tiny: Any, tmp_path: Path, capfd: Any) -> None:
    command, pipeline = write(tmp_path, tiny)
    assert doctor.main([str(command), "--quick"]) == 1
    out = capfd.readouterr().out
    assert f"  fault   settings    teacher.model: {LINE}\n" in out
    assert "  fault   settings    teacher.ensemble.0.model: timm:test_resnet: not on this machine" in out
    assert doctor.main([str(pipeline), "--quick"]) == 1
    assert f"  fault   settings    one: teacher.model: {LINE}\n" in capfd.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_nothing_is_started_without_them(
    flags: list[str], offline: None, tiny: Any, tmp_path: Path, capfd: Any
) -> None:
    _, pipeline = write(tmp_path, tiny)
    assert run.main([str(pipeline), *flags]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"error: stage one: teacher.model: {LINE}"
    assert lines[1].startswith("error: stage one: teacher.ensemble.0.model: timm:test_resnet: not on this machine")
    assert len(lines) == 2, "once for both stages"
    assert not (tmp_path / "runs").exists()
