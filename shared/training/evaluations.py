"""Evaluations of a network in training: the metrics of the last one, and the file of the best weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssld.shared.distributed.ranks import on_main_rank
from ssld.shared.training.training_state import TrainingState


class Evaluations:
    """Evaluates the network of a run after some of its steps; all ranks together.

    Args:
        state: state of the run.
        measure: evaluates the network after a number of steps and returns its metrics.
        score: returns the metric, higher is better, that chooses the best weights; None where it was not measured. Not called if none are kept.
        save: writes the network's file, on the main rank: path, step, metrics.
        keeps_best: whether the best weights are kept: where there is more than one evaluation.

    Attributes:
        metrics: those of the last evaluation; empty without one.
        step: the step of the last evaluation; -1 without one.
    """

    def __init__(
        self,
        state: TrainingState,
        measure: Callable[[int], dict[str, Any]],
        score: Callable[[dict[str, Any]], float | None],
        save: Callable[[Path, int, dict[str, Any]], None],
        *,
        keeps_best: bool,
    ) -> None:
        self._state, self._measure, self._score, self._save = state, measure, score, save
        self._keeps_best = keeps_best
        self.metrics: dict[str, Any] = {}
        self.step = -1

    def run(self, step: int, *, due: bool = False) -> None:
        """Evaluate after `step` steps, at which a checkpoint may be `due`; it is then written before."""
        state = self._state
        with state.evaluating(step, due=due):
            self.metrics, self.step = self._measure(step), step
            score = self._score(self.metrics) if self._keeps_best else None
            if score is not None and state.improved(score):
                state.check(step)
                on_main_rank(lambda: self._save(state.best_file, step, self.metrics), "best weights")
