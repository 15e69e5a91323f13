"""The learning rate of a run by its settings, and in the log of a real one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssld.stage2_detect import train
from ssld.stage2_detect.config import Stage2OptimConfig
from ssld.stage2_detect.training.schedule import Schedule


def factors(steps: int, **settings: Any) -> list[float]:
    optim = Stage2OptimConfig(lr=1.0, reference_batch=8, warmup_steps=0, **settings)
    schedule = Schedule.of(optim, 5, steps)
    return [schedule.factor(step) for step in range(steps)]


def test_every_schedule_of_a_run() -> None:
    assert factors(4) == [1, 1, 1, 1]
    assert factors(6, milestones_epochs=[0.8], gamma=0.5) == [1, 1, 1, 1, 0.5, 0.5]
    assert factors(8, schedule="wsd", decay_steps=0.25) == [1] * 7 + [0.5]
    assert factors(8, schedule="wsd", decay_steps=4) == [1] * 5 + [0.75, 0.5, 0.25]
    assert np.allclose(factors(8, schedule="cosine"), 0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 8))


def test_milestones_after_the_end_are_doubted() -> None:
    optim = Stage2OptimConfig(
        lr=1.0, reference_batch=8, warmup_steps=0, milestones_epochs=None, milestones_steps=[6, 9]
    )
    doubt = Schedule.of(optim, 5, 6).doubt()
    assert doubt == "milestones: all are after the last of 6 steps, so the learning rate never drops"
    assert Schedule.of(optim, 5, 7).doubt() is None
    assert Schedule.of(Stage2OptimConfig(lr=1.0, reference_batch=8), 5, 7).doubt() is None


def test_milestones_belong_to_their_schedule() -> None:
    with pytest.raises(
        ValueError, match="schedule wsd has no milestones: set milestones_epochs and milestones_steps to null"
    ):
        Stage2OptimConfig(lr=1.0, reference_batch=8, schedule="wsd", milestones_steps=[5])


def test_a_run_follows_its_schedule(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    optim = {"schedule": "wsd", "decay_steps": 0.5, "milestones_epochs": None, "milestones_steps": None}
    settings = train_settings | {"steps": 4, "log_every": 1, "optim": train_settings["optim"] | {"lr": 0.01} | optim}
    settings["optim"] |= {"reference_batch": settings["batch_size"], "warmup_steps": 0}
    assert call(train.main, arguments(settings)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.01, 0.01, 0.01, 0.005])
    assert "linear to 0 in the last 2 steps" in (tmp_path / "run" / "log.txt").read_text()
