"""`ssld doctor FILE --look DIR`: sheets of the first training images, with the real trainings, in this process."""

import importlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ssld.pipelines import doctor
from ssld.pipelines.checks import look
from ssld.pipelines.runner.launch import Outcome
from ssld.pipelines.runner.stages import Stage

SOUND: dict[str, Any] = {"broken": {}, "cuda": None, "threads": 2, "devices": [], "groups": ["gloo"], "mps": False}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, call: Any, capsys: pytest.CaptureFixture[str]) -> list[Stage]:
    """The stages that the doctor starts, each in this process instead of its own."""
    stages: list[Stage] = []

    def run(stage: Stage, *_: Any, **__: Any) -> Outcome:
        stages.append(stage)
        module = importlib.import_module(f"ssld.{stage.kind.script.removesuffix('.py').replace('/', '.')}")
        before = capsys.readouterr().out
        code = call(module.main, list(stage.arguments))
        error = capsys.readouterr().err
        print(before, end="")
        return Outcome(code, tuple(error.splitlines()))

    monkeypatch.setattr(look, "run_stage", run)
    monkeypatch.setattr(doctor, "ask_torch", lambda: SOUND)
    return stages


def detector_settings(tmp_path: Path, tiny: Any) -> dict[str, Any]:
    """Settings of a detector that would train on two of the drawn images."""
    import json

    files = sorted(Path(tiny.train).rglob("*.png"))[:2]
    images = [{"id": number, "file_name": str(file), "width": 44, "height": 40} for number, file in enumerate(files)]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [4, 4, 30, 20]} for number in range(2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = {"train_annotations": str(tmp_path / "train.json"), "train_images": str(tiny.train)}
    return {
        **{"threads": 1, "workers": 0, "device": "cpu", "steps": 40, "batch_size": 2},
        **{"backbone": "random:test_resnet", "data": data, "export_check": True},
        "resize": {"train_short_sides": [64], "train_long_side": 64, "short_side": 64, "long_side": 64},
        "model": {"fpn_channels": 16, "roi": {"hidden": 32}},
        "optim": {"lr": 0.01, "reference_batch": 2, "warmup_steps": 2, "milestones_steps": [4]},
    }


def test_a_signal_ends_the_sheets_with_their_folder(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_stopped(*_: Any, **__: Any) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(1, ("killed",))

    monkeypatch.setattr(doctor, "ask_torch", lambda: SOUND)
    monkeypatch.setattr(look, "run_stage", be_stopped)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(detector_settings(tmp_path, tiny)))
    assert doctor.main([str(file), "--quick", "--look", str(tmp_path / "sheets")]) == 143
    assert capsys.readouterr().err == "stopped; the sheets of the stages before are written\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_every_training_that_can_start_has_a_sheet(
    tmp_path: Path,
    tiny: Any,
    distill_settings: dict[str, Any],
    started: list[Stage],
    capsys: pytest.CaptureFixture[str],
) -> None:
    detector = detector_settings(tmp_path, tiny)
    later = {**detector, "backbone": "${distill}/student.safetensors"}
    sets = {"distill": ("distill", distill_settings), "detector": ("train", detector), "later": ("train", later)}
    stages = {name: {"command": command, "set": values} for name, (command, values) in sets.items()}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": stages}, sort_keys=False))
    assert doctor.main([str(file), "--quick", "--look", str(tmp_path / "sheets")]) == 0
    out = capsys.readouterr().out
    assert [stage.name for stage in started] == ["distill", "detector"]
    assert "later: no sheet yet, it reads from distill" in out
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["detector.jpg", "distill.jpg"]
    assert not (tmp_path / "runs").exists()
    assert not any(stage.run.exists() for stage in started)  # the temporary folder is gone
    with Image.open(tmp_path / "sheets" / "distill.jpg") as sheet:
        assert sheet.size == (4 * 166 - 6, 2 * (160 + 18 + 6) - 6)  # eight views of 32 px, enlarged five times
    with Image.open(tmp_path / "sheets" / "detector.jpg") as sheet:
        assert sheet.size == (
            4 * (512 + 6) - 6,
            2 * (464 + 18 + 6) - 6,
        )  # eight images of 64 x 58, enlarged eight times


def test_a_look_leaves_the_folder_to_the_training(
    distill_settings: dict[str, Any], arguments: Any, call: Any, user_error: Any, tmp_path: Path
) -> None:
    from ssld.stage1_ssld.distill import main

    settings = distill_settings | {"steps": 1, "save_every": 1}
    assert call(main, arguments(settings, "run", "--look", "true")) == 0
    run = tmp_path / "run"
    assert (run / "batches.jpg").is_file()
    assert not (run / "checkpoints").exists()
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "result.json").exists()
    assert call(main, arguments(settings | {"seed": 1})) == 0  # other settings, too
    assert (run / "result.json").is_file()
    (run / "result.json").unlink()
    assert user_error(main, arguments(settings | {"seed": 1}, "run", "--look", "true")) == (
        f"look: {run} has done steps already; give another --output"
    )


@pytest.mark.usefixtures("started")
def test_mistakes(tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--look", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --look: give a settings file or a pipeline too\n"
    (tmp_path / "file").write_text("")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(detector_settings(tmp_path, tiny)))
    assert doctor.main([str(file), "--quick", "--look", str(tmp_path / "file")]) == 2
    assert "--look" in capsys.readouterr().err
