"""Losses of the last steps, kept on the device so that no step waits for them, read and checked where something is logged or saved.

A separate file from training_state.py, which owns an instance, because its arithmetic over steps and ranks is tested without a training run.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssld.shared.distributed.ranks import for_sums, gather_lists, total_over_ranks
from ssld.shared.errors import UserError

_Entry = tuple[int, Sequence[str | int], Tensor, list[str]]
"""step, image ids, values and names of the parts of a micro-batch"""


class NotFinite(UserError):
    """A loss is not finite; `step`, counted from 1, is the first step with such a loss, after `step` - 1 updates."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"loss is not finite {what}")
        self.step, self._what = step, what

    def __reduce__(self) -> tuple[type["NotFinite"], tuple[int, str]]:
        """Return what a copy in another process is made of."""
        return NotFinite, (self.step, self._what)


class LossWatch:
    """Collects the loss parts of every micro-batch; averages them for the log, and stops the run at the first one that is not finite.

    Steps may have different parts: a part is averaged over the steps that have it.
    """

    def __init__(self) -> None:
        self._pending: list[_Entry] = []
        self._sums: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def add(self, step: int, parts: dict[str, Tensor], ids: Sequence[str | int]) -> None:
        """Keep one micro-batch's parts: scalars whose sum over micro-batches and ranks is the step's value. The names are the same on all ranks."""
        values_P = torch.stack([part.detach().float() for part in parts.values()])
        self._pending.append((step, ids, values_P, list(parts)))

    def check(self) -> None:
        """Read the pending losses, on all ranks together.

        Raises NotFinite naming step, loss parts and image ids when anything is not finite: call it before a checkpoint is written.
        """
        for names, group in itertools.groupby(list(self._pending), key=lambda entry: entry[3]):
            entries = list(group)
            values_NP = torch.stack([values_P for _, _, values_P, _ in entries])
            total_P = total_over_ranks(for_sums(values_NP).sum(0)).tolist()
            if not all(math.isfinite(total) for total in total_P):
                self._raise(entries, values_NP.tolist())
            steps = len({step for step, _, _, _ in entries})
            for name, total in zip(names, total_P, strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + total
                self._steps[name] = self._steps.get(name, 0) + steps
        self._pending.clear()

    def latest(self, name: str) -> Tensor | None:
        """Return this process's share of a part of the last step, a scalar on the device; None where the losses have been read since."""
        if not self._pending:
            return None
        last = self._pending[-1][0]
        return torch.stack(
            [values[names.index(name)] for step, _, values, names in self._pending if step == last]
        ).sum()

    def averages(self) -> dict[str, float]:
        """Return the mean of every part over the steps since the last call."""
        self.check()
        means = {name: total / max(1, self._steps[name]) for name, total in self._sums.items()}
        self._sums, self._steps = {}, {}
        return means

    def state(self) -> dict[str, object]:
        """Return JSON values for a checkpoint, so that a resumed run logs the same averages."""
        return {"sums": self._sums, "steps": self._steps}

    def load_state(self, state: dict[str, object]) -> None:
        """Restore `state`; earlier versions wrote one number of steps for all parts."""
        sums: Any = state["sums"]
        steps: Any = state["steps"]
        self._sums = dict(sums)
        self._steps = dict(steps) if isinstance(steps, dict) else dict.fromkeys(sums, int(steps))

    def _raise(self, entries: list[_Entry], values: list[list[float]]) -> None:
        """Raise the same error on every rank: of the first step, and of the first rank whose own losses are not finite there."""
        faults: list[tuple[int, str]] = []
        for (step, ids, _, names), row in zip(entries, values, strict=True):
            if not all(math.isfinite(value) for value in row):
                parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row, strict=True))
                images = f"; images {', '.join(map(str, list(ids)[:16]))}" if ids else ""
                faults.append((step + 1, f"at step {step + 1}: {parts}{images}"))
                break
        errors = gather_lists(faults) or [(entries[0][0] + 1, "in the sum over ranks")]
        raise NotFinite(*min(errors, key=lambda error: error[0]))
