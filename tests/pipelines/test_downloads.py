"""Models that must be downloaded are reported by the doctor, by a dry run and before the first stage, in one line each."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ssld.pipelines import doctor, run
from ssld.pipelines.checks import settings as checked_settings
from ssld.pipelines.runner import plan
from ssld.shared.models.downloads import Remote, find_downloads
from ssld.stage2_detect import train
from ssld.stage2_detect.published import PUBLISHED

NAME = "fasterrcnn_resnet50_fpn_v2"
URL = PUBLISHED[NAME].url
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


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of a training that starts from published weights; torch hub's cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    part = tmp_path / "part.json"
    images = [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}]
    categories = [{"id": 1, "name": "one"}]
    part.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    names = {f"{name}_annotations": str(part) for name in ("train", "val")}
    names |= {f"{name}_images": str(tmp_path / "images") for name in ("train", "val")}
    command = tmp_path / "train.yaml"
    optim = {"lr": 0.1, "reference_batch": 8}
    settings = {"data": names, "init": f"coco:{NAME}", "optim": optim, "steps": 1, "batch_size": 2}
    command.write_text(yaml.safe_dump(settings))
    stages = {"detect": {"command": "train", "config": str(command)}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": stages}))
    return command


def test_published_weights_that_can_be_downloaded(
    start: Path, offline: None, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "ask", lambda self: (160_000_000, None))
    line = f"init: coco:{NAME}: not on this machine; {URL} (160.0 MB) will be downloaded"
    doctor.main([str(start), "--quick"])
    assert f"  note    settings    {line}\n" in capfd.readouterr().out
    run.main([str(start.parent / "pipeline.yaml"), "--dry-run"])
    assert f"stage detect: {line}\n" in capfd.readouterr().out
    cached = start.parent / "torch" / "hub" / "checkpoints" / URL.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    doctor.main([str(start), "--quick"])
    assert "coco:" not in capfd.readouterr().out


def test_published_weights_without_a_network(
    start: Path, offline: None, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "ask", lambda self: (None, "no network (test)"))
    cached = start.parent / "torch" / "hub" / "checkpoints" / URL.rpartition("/")[2]
    line = (
        f"init: coco:{NAME}: not on this machine, and its download ({URL}) is not possible: no network (test); "
        f"`download {URL} to {cached}` where there is a network, or give a file or a folder instead"
    )
    assert doctor.main([str(start), "--quick"]) == 1
    assert f"  fault   settings    {line}\n" in capfd.readouterr().out
    for flags in ([], ["--dry-run"]):
        assert run.main([str(start.parent / "pipeline.yaml"), *flags]) == 2
        assert capfd.readouterr().err == f"error: stage detect: {line}\n"
    assert not (start.parent / "runs").exists()
    assert train.main(["--config", str(start), "--output", str(start.parent / "alone")]) == 2
    assert capfd.readouterr().err == f"error: {line}\n"
    assert not (start.parent / "alone").exists()
