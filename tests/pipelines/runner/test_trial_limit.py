"""The limit of a trial: what is known of a training that is stopped, and a process that does not stop by itself."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines.runner import trial
from ssld.pipelines.runner.estimate import Rate
from ssld.pipelines.runner.launch import Outcome, Signals
from ssld.pipelines.runner.plan import Planned
from ssld.pipelines.runner.stages import KINDS, Stage
from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError

WORDS = ["--data.train", "photos", "--student.model", "random:test_resnet", "--teacher.model", "random:test_resnet"]
WORDS += ["--optim.lr", "0.1", "--optim.reference_batch", "4", "--steps", "100", "--batch_size", "4"]


@pytest.mark.parametrize(
    ("seconds", "rate"),
    [
        ([], None),
        ([9.0], Rate(start=21.0, step=9.0, images=5)),  # the first step is the only measure, though it is slow
        ([9.0, 4.0], Rate(start=22.0, step=4.0, images=5)),
        ([9.0, 4.0, 2.0], Rate(start=21.0, step=3.0, images=5)),
    ],
)
def test_the_rate_of_the_steps_that_ended(seconds: list[float], rate: Rate | None, tmp_path: Path) -> None:
    lines = [json.dumps({"step": number, "seconds": value}) for number, value in enumerate(seconds, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert trial.rate_of_part(tmp_path, 30.0, images=5, val_images=0) == rate


def stage_in(folder: Path) -> Stage:
    kind = KINDS["distill"]
    words = (*WORDS, "--output", str(folder / "one"))
    return Stage("one", kind, parse_config(kind.config_type, list(words), program=kind.script), words, 1, frozenset())


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, shell: str, *, steps: int, limit: float | None
) -> list[Any]:
    """The rates of a training that is a shell command, and that writes its steps before it."""

    def run_shell(stage: Stage, console: Path, signals: Signals, *, quiet: bool = False) -> Outcome:
        stage.run.mkdir(parents=True)
        lines = [json.dumps({"step": number, "seconds": 2.0}) for number in range(1, steps + 1)]
        (stage.run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        process = subprocess.Popen(["sh", "-c", shell], start_new_session=True)
        signals.group = process.pid
        code = process.wait()
        signals.group = None
        return Outcome(code, ("it failed",) if code else ())

    monkeypatch.setattr(trial, "run_stage", run_shell)
    monkeypatch.setattr(trial, "GRACE_SECONDS", 0.1)
    rates: dict[str, Rate] = {}
    trial.measure([Planned(stage_in(folder), "new")], lambda place: [stage_in(place)], folder, rates, limit)
    return list(rates.values())


@pytest.mark.parametrize("shell", ["sleep 100", 'trap "" TERM; sleep 100'], ids=["stops", "ignores SIGTERM"])
def test_a_training_ends_at_the_limit(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert measured(monkeypatch, tmp_path, shell, steps=0, limit=0.1) == []
    assert "trial of one: 3 steps, in 0.1 s at most\n" in capfd.readouterr().out
    (rate,) = measured(monkeypatch, tmp_path, shell, steps=2, limit=0.1)
    assert rate.step == 2.0
    assert (rate.files, rate.model, rate.checkpoint) == (0, 0, 0)  # unknown, so no estimate of the disk space uses them


def test_a_training_within_the_limit_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (60.0, None):
        (rate,) = measured(monkeypatch, tmp_path, "true", steps=3, limit=limit)
        assert rate.step == 2.0
        assert rate.files > 0
    with pytest.raises(UserError, match="trial of one: it failed"):
        measured(monkeypatch, tmp_path, "exit 1", steps=3, limit=60.0)
