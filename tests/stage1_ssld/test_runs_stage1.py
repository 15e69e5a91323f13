"""One stage-1 run directory over several starts: finished, refused, extended, begun again."""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssld.shared.files import file_sha256
from ssld.shared.run_dir import RunDir
from ssld.stage1_ssld.distill import main as distill

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def test_finished_run_says_so(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, capsys: Any
) -> None:
    assert call(distill, arguments(distill_settings)) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.suffix != ".txt"}
    capsys.readouterr()
    assert call(distill, arguments(distill_settings | {"workers": 1, "log_every": 3})) == 0
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in before if file.name != ".lock"}
    assert after == {file: time for file, time in before.items() if file.name != ".lock"}


def test_another_configuration_is_refused(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, user_error: Any
) -> None:
    assert call(distill, arguments(distill_settings)) == 0
    student = file_sha256(tmp_path / "run" / "student.safetensors")
    line = user_error(distill, arguments(distill_settings, "run", "--optim.lr", "0.3", "--seed", "5"))
    assert "run: holds a run with another configuration (seed: 0 -> 5; optim.lr: 0.02 -> 0.3)" in line
    assert file_sha256(tmp_path / "run" / "student.safetensors") == student
    assert (tmp_path / "run" / "result.json").exists()
    line = user_error(distill, arguments(distill_settings | {"steps": 9}, "run", "--resume", "never"))
    assert "--resume is never" in line


def test_more_steps_go_on_from_the_checkpoint(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, capsys: Any, metrics_of: Any
) -> None:
    assert call(distill, arguments(distill_settings)) == 0
    capsys.readouterr()
    assert call(distill, arguments(distill_settings | {"steps": 10})) == 0
    out = capsys.readouterr().out
    assert "changed since the last start: steps: 6 -> 10" in out
    assert "resumed from step_00000006" in out
    (line,) = [line for line in out.splitlines() if line.startswith("another length than at the last start")]
    found = re.search(
        r"after step 6 with lr (\S+), after (\S+) \((\d+)% of the full rate\), by the schedule of all 10 steps; to train anew",
        line,
    )
    assert found
    warmup = int(re.findall(r"warm-up (\d+) steps", out)[-1])
    share = 0.5 + 0.5 * math.cos(math.pi * (6 - warmup) / (10 - warmup))
    base = float(re.findall(r"^lr (\S+) for batch ", out, re.MULTILINE)[-1])
    assert float(found[1]) == pytest.approx(base * share, rel=1e-2)
    assert float(found[2]) < float(found[1])  # the rate rises again
    assert int(found[3]) == round(100 * share)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [2, 4, 6, 6, 8, 10, 10]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["steps"] == 10


def test_changed_input_is_refused(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, user_error: Any, jpeg: Any
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed=seed))
    settings = distill_settings | {"steps": 2, "batch_size": 4, "data": {"train": [str(folder)], "image_size": 32}}
    assert call(distill, arguments(settings)) == 0
    (folder / "4.jpg").write_bytes(jpeg(seed=4))
    assert "data.train.0 has other content" in user_error(distill, arguments(settings))


def test_a_run_that_died_before_its_last_line_is_finished_without_doubles(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any, monkeypatch: Any
) -> None:
    """Killed after the last evaluation was logged, before result.json: the evaluation is done again, and logged once."""
    assert call(distill, arguments(distill_settings, "whole")) == 0

    def killed(*args: Any) -> None:
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", killed)
        with pytest.raises(SystemError):
            call(distill, arguments(distill_settings))
    assert call(distill, arguments(distill_settings)) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_tensorboard(arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path) -> None:
    for _ in range(2):
        assert call(distill, arguments(distill_settings | {"trackers": ["tensorboard"]})) == 0
    files = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert [file.parent for file in files] == [tmp_path / "run"]  # TensorBoard names the run by its folder
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    assert {"training/loss", "evaluation/top1", "final/top1"} <= set(tags["scalars"])
    assert [one.step for one in events.Scalars("training/loss")] == [2, 4, 6]
    assert "batches" in tags["images"]


def test_a_tracker_that_is_not_installed_is_no_silence(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    assert call(distill, arguments(distill_settings | {"trackers": ["wandb"]})) == 2
    assert "error: trackers: wandb is not installed; pip install wandb, or leave it out" in capsys.readouterr().err
