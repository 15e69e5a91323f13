"""The line on the learning rate of a run that goes on with another length."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ssld.shared.training.training_state import TrainingState
from ssld.stage2_detect.config import Stage2OptimConfig
from ssld.stage2_detect.training.schedule import Schedule


def line(
    folder: Path, step: int, steps: int, changed: list[str], before: int | None = None, **optim: Any
) -> str | None:
    """The line of a run at lr 0.1 whose schedule is `optim`."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": at, "lr": 0.001}) + "\n" for at in (50, 100)))
    config = Stage2OptimConfig.model_validate({"lr": 0.1, "reference_batch": 8, "warmup_steps": 0, **optim})
    schedule = Schedule.of(config, 10, steps)
    run = SimpleNamespace(path=folder, changed=changed)
    state: Any = SimpleNamespace(run=run, steps=steps, resumed=f"step_{step:08d}" if step else "", length_before=before)
    lines = TrainingState.describe_start(state, step, 0.1, schedule.factor(step))
    assert lines[:1] == ([f"resumed from step_{step:08d}"] if step else [])
    return lines[1] if lines[1:] else None


def test_what_the_rate_does_is_said(tmp_path: Path) -> None:
    longer = ["steps: 100 -> 200"]
    passed = line(tmp_path, 100, 200, longer, milestones_steps=[60, 80])
    assert passed is not None
    assert passed.startswith(
        "another length than at the last start: continues after step 100 with lr 0.001, after 0.001 (1% of the full rate), by the schedule of all 200"
    )
    assert "to train anew by it, give another --output (in a pipeline: --redo and this stage's name)" in passed
    fractions = line(tmp_path, 100, 200, longer, milestones_steps=[0.6, 0.8])
    assert fractions is not None
    assert "with lr 0.1, after 0.001 (100% of the full rate)" in fractions
    cosine = line(tmp_path, 100, 200, ["train_epochs: 1 -> 2"], schedule="cosine")
    assert cosine is not None
    assert "with lr 0.05, after 0.001 (50% of the full rate)" in cosine


def test_other_starts_have_no_such_line(tmp_path: Path) -> None:
    for step, steps, changed in (
        (100, 200, []),
        (100, 200, ["save_every: 10 -> 20"]),
        (0, 200, ["steps: 100 -> 200"]),
        (200, 200, ["steps: 300 -> 200"]),
    ):
        assert line(tmp_path, step, steps, changed, schedule="cosine") is None


def test_the_same_length_in_another_unit_is_no_other_length(tmp_path: Path) -> None:
    changed = ["steps: 200 -> null", "train_epochs: null -> 20"]
    assert line(tmp_path, 100, 200, changed, before=200, schedule="cosine") is None
    assert line(tmp_path, 100, 200, changed, before=100, schedule="cosine")
