"""Evaluations of a run: which weights are kept as the best, and in which order state, metrics and file are written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.distributed import ranks
from ssld.shared.training.evaluations import Evaluations


class State:
    """Stands for `TrainingState`; notes its calls."""

    def __init__(self) -> None:
        self.best_file, self.best, self.calls = Path("best"), 0.0, list[str]()

    @contextmanager
    def evaluating(self, step: int, *, due: bool) -> Iterator[None]:
        self.calls.append(f"checkpoint of {step}" if due else "no checkpoint")
        yield
        self.calls.append("evaluated")

    def improved(self, score: float) -> bool:
        better, self.best = score > self.best, max(score, self.best)
        return better

    def check(self, step: int) -> None:
        self.calls.append(f"weights checked after {step}")


def run(scores: list[float | None], *, keeps_best: bool = True) -> tuple[Evaluations, list[str]]:
    """Evaluate after steps 1, 2, ... with these scores."""
    state: Any = State()

    def save(path: Path, step: int, metrics: dict[str, Any]) -> None:
        state.calls.append(f"{path} of {step}: {metrics['AP']}")

    def score(metrics: dict[str, Any]) -> float | None:
        assert keeps_best
        value: float | None = metrics["AP"]
        return value

    evaluations = Evaluations(
        state,
        lambda step: {"AP": scores[step - 1]},
        score,
        save,
        keeps_best=keeps_best,
    )
    assert (evaluations.metrics, evaluations.step) == ({}, -1)
    for step in range(1, len(scores) + 1):
        evaluations.run(step, due=step == 2)
    return evaluations, state.calls


def test_the_best_weights_are_checked_and_kept() -> None:
    evaluations, calls = run([0.2, 0.1, 0.3])
    assert calls == [
        *("no checkpoint", "weights checked after 1", "best of 1: 0.2", "evaluated"),
        *("checkpoint of 2", "evaluated"),
        *("no checkpoint", "weights checked after 3", "best of 3: 0.3", "evaluated"),
    ]
    assert (evaluations.metrics, evaluations.step) == ({"AP": 0.3}, 3)


def test_one_evaluation_alone_or_without_a_score_keeps_none() -> None:
    """A score that was not measured, such as `best_by: agreement` without a teacher, is then not asked for at the end of a training."""
    assert run([0.2], keeps_best=False)[1] == ["no checkpoint", "evaluated"]
    assert run([None])[1] == ["no checkpoint", "evaluated"]


def test_weights_that_cannot_be_written_end_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes does not write, and raises what the main one has raised."""
    state: Any = State()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "best.safetensors")
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: box.__setitem__(0, (None, full)))
    written: list[Any] = []
    evaluations = Evaluations(
        state, lambda step: {"AP": 0.5}, lambda metrics: 0.5, lambda *given: written.append(given), keeps_best=True
    )
    with pytest.raises(OSError) as caught:
        evaluations.run(1)
    assert (caught.value.filename, caught.value.errno, written) == ("best.safetensors", errno.ENOSPC, [])
