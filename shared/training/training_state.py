"""State of a training run, in both stages, to and from checkpoints: networks, optimizer, loss averages and best score."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssld.shared.checksums import remove_with_sum
from ssld.shared.distributed.processes import load_scaler_state, optimizer_step, scaler_state
from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, total_over_ranks, world_size
from ssld.shared.distributed.stop import WorkerDeaths
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.models.model_file import read_metadata
from ssld.shared.run_dir import RunDir, read_metrics
from ssld.shared.training.checkpoint import (
    add_evaluation,
    drop_from,
    keep_newest,
    load_checkpoint,
    load_module,
    load_optimizer,
    optimizer_part,
    save_checkpoint,
)
from ssld.shared.training.checkpoint_folders import beyond_the_end, newest_checkpoint
from ssld.shared.training.loss_watch import LossWatch, NotFinite
from ssld.shared.training.progress import Progress
from ssld.shared.training.quarantine import Quarantine
from ssld.shared.wording import count

LENGTHS = ("steps:", "train_epochs:", "train_images:")
"""beginnings of the lines on a changed length of a run"""
_WORTH = 20
"""a checkpoint before an evaluation may take this part of the time since the last one: 5 %"""
_MOST_SKIPPED, _FEW = 40, 16
"""steps in a row without an update of the weights after which a run in fp16 stops: its scale, 65,536 at first, is then below 1e-7. A run that ends
earlier, such as a trial, may skip all of its steps while the scale falls to 1"""
_FAILURES = (OSError, EOFError, RuntimeError, MemoryError)
"""errors of memory, disks and processes that read images"""


@dataclass
class TrainingState:
    """The state of a run of `steps` steps; the loop itself stays in the entry.

    A loss that is not finite ends the run, and so do weights that are not: the checkpoints from the bad update on are deleted, the one before it is
    still there.

    Attributes:
        networks: file name in a checkpoint -> network; never the teacher.
        batch_size: images per step, over all processes, after the burn-in.
        lr, precision: settings of the run, for the advice after a bad update.
        best_file: model file of the best evaluation.
        burn_in, burn_in_batch: number of first steps with smaller batches, and images per step in them.
        best: highest score of an evaluation so far.
        stale: evaluations since then.
        skipped: steps without an update, since their gradient was not finite in fp16.
        resumed: name of the checkpoint that was loaded, empty without one.
        length_before: steps of the whole run when that checkpoint was written; None where an earlier version wrote it.
        owes_evaluation: whether that checkpoint was written before an evaluation that did not end.
        progress: clock and bar; the loop starts it and counts its steps.
        deaths: context manager of the loop, for `fetching` and `evaluating`.
    """

    run: RunDir
    accelerator: Accelerator
    networks: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    quarantine: Quarantine
    steps: int
    batch_size: int
    keep_checkpoints: int
    lr: float
    precision: str
    best_file: Path
    burn_in: int = 0
    burn_in_batch: int = 0
    watch: LossWatch = field(default_factory=LossWatch)
    best: float = float("-inf")
    stale: int = 0
    skipped: int = 0
    resumed: str = ""
    length_before: int | None = None
    owes_evaluation: bool = False

    def __post_init__(self) -> None:
        self.deaths = WorkerDeaths()
        self._skipped_now = self._skipped_told = 0  # those in a row until now, and those that the log knows of
        self._saved = self._evaluated = 0  # steps of the last checkpoint and of the last evaluation
        # When the last checkpoint was written, and seconds that it took.
        self._saved_at, self._saving = time.monotonic(), 0.0
        # Not a method of this object: a circle would keep the run's lock after an error.
        self.progress = Progress(self.run, self.accelerator.device, partial(_latest_loss, self.watch))

    def images_seen(self, step: int) -> int:
        """Return the number of images in the first `step` steps, over all processes."""
        short = min(step, self.burn_in)
        return short * self.burn_in_batch + (step - short) * self.batch_size

    def restore(self, *, look: bool = False) -> int:
        """Load the newest checkpoint, if there is one, on every rank; return the number of steps done.

        A best file of a later step, as where a newer checkpoint was deleted, does not belong to this run any more.

        Raises UserError when it does not fit the networks, or is beyond the end of the run, or where the run is only to `look` at its first images.
        """
        newest = from_main_rank(newest_checkpoint(self.run.checkpoints))
        step = 0
        if newest and look:
            raise UserError(f"look: {self.run.path} has done steps already; give another --output")
        if newest:
            parts, state = load_checkpoint(newest)
            for name, network in self.networks.items():
                load_module(network, parts[name], newest)
            load_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
            load_scaler_state(self.accelerator, state["scaler"])
            self.watch.load_state(state["watch"])
            step, self.resumed = int(state["step"]), newest.name
            self.best = self.best if state["best"] is None else state["best"]
            self.stale = int(state.get("stale", 0))
            self.skipped, self._skipped_now = state.get("skipped", [0, 0])
            self._skipped_told = self.skipped
            self.length_before = state.get("length")
            # Earlier versions wrote checkpoints after evaluations alone.
            self.owes_evaluation = state.get("evaluated") is False
            self.run.earlier_seconds = float(state.get("seconds", 0))
            self._saved = step
            self._evaluated = step if state.get("evaluated") else 0
        if step > self.steps:
            raise UserError(f"{beyond_the_end(self.run.path, step, self.steps)}; give another --output")
        self.run.begin()
        self.run.cut_metrics(step)
        if not look:
            self.drop_later(self.best_file, step)
        if not from_main_rank(self.best_file.exists()):
            self.best, self.stale = float("-inf"), 0
        return step

    def drop_later(self, file: Path, step: int) -> None:
        """Delete a model file of a later step than `step`, at which this run continues, or a damaged one."""
        if not self.run.main or not file.exists():
            return
        try:
            later = int(read_metadata(file)["step"])
        except (UserError, *MALFORMED):
            later = None
        if later is None or later > step:
            remove_with_sum(file)
            what = "damaged" if later is None else f"of step {later}, after step {step}, from which this run continues"
            self.run.log(f"{file}: {what}; deleted")

    def describe_start(self, step: int, full_lr: float, factor: float) -> list[str]:
        """Return lines on a run that continues after `step`: its checkpoint, and the learning rate if the run has another length than before.

        The schedule is that of the new length from its beginning, at which this run no longer is: what was trained at a low rate gets a higher one
        again, or all milestones have passed and the rate stays low.

        Args:
            full_lr: learning rate between warm-up and decay.
            factor: that of the schedule on the rate of the next step.
        """
        lines = [f"resumed from {self.resumed}"] if self.resumed else []
        other = any(line.startswith(LENGTHS) for line in self.run.changed) and self.length_before != self.steps
        if other and 0 < step < self.steps:
            logged = [line["lr"] for line in read_metrics(self.run.path) if "lr" in line and line["step"] <= step]
            before = f", after {logged[-1]:.3g}" if logged else ""
            share = f"{factor:.0%} of the full rate"
            lines.append(
                f"another length than at the last start: continues after step {step} with lr {full_lr * factor:.3g}{before} ({share}), by the "
                f"schedule of all {self.steps} steps; to train anew by it, give another --output (in a pipeline: --redo and this stage's name)"
            )
        return lines

    def improved(self, score: float) -> bool:
        """Record an evaluation's score; return whether it is the best so far."""
        better = score > self.best
        self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
        return better

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one; never where it is None."""
        return patience is not None and self.stale >= patience

    def finish(self, metrics: dict[str, Any], step: int, outputs: Sequence[Path]) -> None:
        """Write result.json after the last step: the numbers of the last evaluation, and, if there is a best file, step and numbers of the best."""
        metrics = {"steps": step, "images_seen": self.images_seen(step)} | metrics
        if self.accelerator.scaler is not None:
            metrics["skipped_steps"] = self.skipped
        best = self.best_file
        if best.exists() and self.run.main:
            facts = read_metadata(best)
            numbers = {name: value for name, value in facts["metrics"].items() if isinstance(value, int | float)}
            metrics["best"] = {"file": best.name, "step": facts["step"], **numbers}
            if facts["step"] != step:
                scores = [f", {name} {100 * value:.2f}" for name, value in numbers.items() if value == self.best]
                self.run.log(f"best: step {facts['step']}{''.join(scores[:1])}: {best}")
            outputs = [*outputs, best]
        if self.run.main:
            keep_newest(self.run.checkpoints, self.keep_checkpoints)
        self.run.finish(metrics, outputs)

    def update(self, step: int, clip_grad_norm: float | None, *, measure: bool) -> Tensor | None:
        """Update the weights as `optimizer_step` does, and return its norm.

        Raises UserError where fp16 has skipped 40 steps in a row, or all of a run of more than 16.
        """
        norm, skipped = optimizer_step(self.accelerator, self.optimizer, clip_grad_norm, measure=measure)
        self.skipped += skipped
        self._skipped_now = self._skipped_now + 1 if skipped else 0
        if self._skipped_now == _MOST_SKIPPED or self._skipped_now == self.steps > _FEW:
            good = step - self._skipped_now
            what = f"fp16: no gradient after step {good} was finite, at any scale, so that {self._skipped_now} steps changed nothing"
            raise self._go_back(UserError(what), good + 1)
        return norm

    def check(self, step: int) -> None:
        """Raise UserError if a loss so far was not finite, or the weights are not; all ranks together, after `step` updates."""
        self._check_losses()
        if not from_main_rank(not self.run.main or self._all_finite()):
            raise self._go_back(
                NotFinite(step + 1, f"after step {step}: weights or the optimizer's state are not"), step
            )

    def check_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raise UserError if the main rank's evaluation after `step` updates has a number that is not finite; all ranks together."""
        bad = [
            f"{name} {value}"
            for name, value in metrics.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        bad = from_main_rank(bad)
        if bad:
            raise self._go_back(NotFinite(step + 1, f"in the evaluation after step {step}: {', '.join(bad)}"), step)

    def check_last_update(self, step: int, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Raise UserError if the losses after the last update are not finite; all ranks together.

        A step's loss is computed before its update, so no other check covers the weights after the last one. Running statistics that `losses`
        changes are restored.
        """
        before = [(buffer, buffer.clone()) for network in self.networks.values() for buffer in network.buffers()]
        parts = {name: part.detach().float() for name, part in losses().items()}
        for buffer, value in before:
            buffer.copy_(value)
        if not bool(torch.isfinite(total_over_ranks(torch.stack(list(parts.values())))).all()):
            values = ", ".join(f"{name} {part:.4g}" for name, part in parts.items())
            raise self._go_back(NotFinite(step + 1, f"after the last update, of step {step}: {values}"), step)

    def save(self, step: int) -> None:
        """Write a checkpoint, unless there is one of this step; all ranks together. Raises UserError first as `check` does."""
        if step == self._saved:
            return
        self.check(step)
        self.quarantine.write()
        began = time.monotonic()
        with self.progress.pausing():
            on_main_rank(lambda: self._write(step), "checkpoint")
        self._saved, self._saved_at = step, time.monotonic()
        self._saving = self._saved_at - began

    @contextmanager
    def fetching(self, step: int, micro: int) -> Iterator[None]:
        """Context manager around the wait for micro-batch `micro` of step `step`; the steps before it survive a failure of the loader.

        Not where the step has begun (`micro` > 0): running statistics have changed.
        """
        try:
            with self.deaths.told(), self.progress.waiting():
                yield
        except _FAILURES:
            if micro == 0:
                self._save_alone(step - 1)
            raise

    @contextmanager
    def evaluating(self, step: int, *, due: bool = False) -> Iterator[None]:
        """Context manager around an evaluation after `step` updates, which survive whatever ends it.

        A checkpoint is written before it, if one is `due`, or takes a small part of the time since the last one. A resumed run repeats an evaluation
        that did not end (`owes_evaluation`).
        """
        if due or from_main_rank(time.monotonic() - self._saved_at >= _WORTH * self._saving):
            self.save(step)
        before, again = (self.best, self.stale), step == self._evaluated
        try:
            with self.deaths.told(), self.progress.pausing():
                yield
        except _FAILURES:
            self.best, self.stale = before
            self._save_alone(step)
            raise
        if again:  # for its metrics alone, after a death between the last evaluation and the end of the run
            self.best, self.stale = before
            return
        self._evaluated = step
        if step == self._saved:
            on_main_rank(lambda: add_evaluation(self.run.checkpoints, step, self._standing(step)), "checkpoint")

    def _save_alone(self, step: int) -> None:
        """Save in a run of one process; of several, the others would not take part."""
        if world_size() == 1:
            self.save(step)

    def _standing(self, step: int) -> dict[str, Any]:
        """Return the values of a checkpoint that an evaluation changes."""
        best = self.best if self.best > float("-inf") else None
        return {
            "best": best,
            "stale": self.stale,
            "evaluated": self._evaluated == step,
            "seconds": self.run.seconds,
        }

    def _all_finite(self) -> bool:
        tensors = [tensor for network in self.networks.values() for tensor in network.state_dict().values()]
        tensors += optimizer_part(self.optimizer)[0].values()
        flags = [
            torch.isfinite(tensor).all().to(self.accelerator.device) for tensor in tensors if tensor.is_floating_point()
        ]
        return not flags or bool(torch.stack(flags).all())

    def _check_losses(self) -> None:
        try:
            self.watch.check()
        except NotFinite as error:
            raise self._go_back(error, error.step - 1) from None

    def _go_back(self, error: UserError, step: int) -> UserError:
        """Delete the checkpoints from `step` on, which have the bad update; return the error with the remedy."""

        def drop() -> Path | None:
            drop_from(self.run.checkpoints, step)
            return newest_checkpoint(self.run.checkpoints)

        newest = on_main_rank(drop)
        fp32 = "" if self.precision == "fp32" else " or --precision fp32"
        where = f"continues from {newest.name}" if newest else "restarts from step 0: no earlier checkpoint"
        return UserError(
            f"{error}. The same command with --optim.lr {self.lr / 10:g} (now {self.lr:g}), --optim.clip_grad_norm 1{fp32} {where}"
        )

    def _write(self, step: int) -> None:
        # The losses have proved that earlier checkpoints are good; this one may be bad.
        keep_newest(self.run.checkpoints, self.keep_checkpoints)
        tensors, values = optimizer_part(self.optimizer)
        parts = {name: network.state_dict() for name, network in self.networks.items()}
        state: dict[str, Any] = {
            "optimizer": values,
            "scaler": scaler_state(self.accelerator),
            "watch": self.watch.state(),
            "skipped": [self.skipped, self._skipped_now],
            "length": self.steps,
            **self._standing(step),
        }
        save_checkpoint(self.run.checkpoints, step, parts | {"optimizer": tensors}, state)

    def log(self, step: int, lr: float, **values: Tensor | float | None) -> dict[str, float]:
        """Write the averages since the last line to the metrics, the trackers and the log, with further values of this step; return both.

        Args:
            values: numbers by name, such as the norm of the gradient; None, or what is not finite (fp16 skips such a step), is left out.
        """
        self._check_losses()
        means = self.watch.averages()
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        means |= {name: number for name, number in numbers.items() if math.isfinite(number)}
        if self.accelerator.scaler is not None:
            means["skipped_steps"] = float(self.skipped)
            if new := self.skipped - self._skipped_told:
                self.run.log(
                    f"step {step}: {count(new, 'step')} changed no weights: the gradient was not finite in fp16; a few are normal"
                )
                self._skipped_told = self.skipped
        self.quarantine.judge(self.images_seen(step))
        speed = self.progress.read(self.images_seen)
        self.run.metric(step, lr=lr, **means, **speed)
        averages = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
        self.run.log(
            f"step {step}/{self.steps}: {averages}, lr {lr:.4g}; {self.progress.describe(speed, means['loss'], lr)}"
        )
        return means


def _latest_loss(watch: LossWatch) -> float | None:
    """Read the last step's loss of this process alone, as an estimate of that over all; waits for the device."""
    share = watch.latest("loss")
    return None if share is None else float(share) * world_size()
