"""What a training run goes on from, in both stages: its networks, optimizer, loss averages and best score, to and from checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ssld.shared.distributed.processes import load_scaler_state, scaler_state
from ssld.shared.distributed.ranks import from_main_rank
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.shared.run_dir import RunDir
from ssld.shared.training.checkpoint import (
    load_checkpoint,
    load_module,
    load_optimizer,
    newest_checkpoint,
    optimizer_part,
    save_checkpoint,
)
from ssld.shared.training.loss_watch import LossWatch
from ssld.shared.training.progress import Progress
from ssld.shared.training.quarantine import Quarantine


@dataclass
class TrainingState:
    """The state of a run of `steps` steps; the loop itself stays in the entry.

    Attributes:
        networks: file name in a checkpoint -> network; never the teacher.
        best: highest score of an evaluation so far.
        stale: evaluations since then.
        progress: how far the run is; the loop begins it and counts its steps.
    """

    run: RunDir
    accelerator: Accelerator
    networks: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    quarantine: Quarantine
    steps: int
    batch_size: int
    keep_checkpoints: int
    watch: LossWatch = field(default_factory=LossWatch)
    best: float = float("-inf")
    stale: int = 0

    def __post_init__(self) -> None:
        self.progress = Progress(self.run, self.accelerator.device)

    def restore(self) -> tuple[int, str]:
        """(steps done, a line on where they come from): load the newest checkpoint, if there is one, on every rank.

        Raises UserError when it does not fit the networks, or is beyond the end of the run.
        """
        newest = from_main_rank(newest_checkpoint(self.run.checkpoints))
        step, line = 0, ""
        if newest:
            parts, state = load_checkpoint(newest)
            for name, network in self.networks.items():
                load_module(network, parts[name], newest)
            load_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
            load_scaler_state(self.accelerator, state["scaler"])
            self.watch.load_state(state["watch"])
            step, line = int(state["step"]), f"resumed from {newest.name}"
            self.best = self.best if state["best"] is None else state["best"]
            self.stale = int(state.get("stale", 0))
        if step > self.steps:
            raise UserError(
                f"{self.run.path}: is at step {step} already, beyond the {self.steps} asked for; give another --output"
            )
        self.run.cut_metrics(step)
        return step, line

    def improved(self, score: float) -> bool:
        """Note an evaluation's score; whether it is the best so far."""
        better = score > self.best
        self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
        return better

    def exhausted(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better than the best one; None: never."""
        return patience is not None and self.stale >= patience

    def finish(self, metrics: dict[str, Any], step: int, outputs: Sequence[Path], best: Path) -> None:
        """Write result.json after the last step: what the last evaluation gave, and of the best one, whose file is `best` if there was one, its
        step and numbers."""
        metrics = metrics | {"steps": step, "images_seen": step * self.batch_size}
        if best.exists() and self.run.main:
            facts = read_metadata(best)
            numbers = {name: value for name, value in facts["metrics"].items() if isinstance(value, int | float)}
            metrics["best"] = {"file": best.name, "step": facts["step"], **numbers}
            outputs = [*outputs, best]
        self.run.finish(metrics, outputs)

    def save(self, step: int) -> None:
        """Write a checkpoint, all ranks together; raises UserError first if a loss since the last one was not finite."""
        self.watch.check()
        self.quarantine.write()
        with self.progress.pausing():
            self._write(step)

    def _write(self, step: int) -> None:
        if self.accelerator.is_main_process:
            tensors, values = optimizer_part(self.optimizer)
            parts = {name: network.state_dict() for name, network in self.networks.items()}
            state: dict[str, Any] = {
                "optimizer": values,
                "scaler": scaler_state(self.accelerator),
                "watch": self.watch.state(),
                "best": self.best if self.best > float("-inf") else None,
                "stale": self.stale,
            }
            save_checkpoint(
                self.run.checkpoints, step, parts | {"optimizer": tensors}, state, keep=self.keep_checkpoints
            )

    def log(self, step: int, lr: float) -> None:
        """Write the averages since the last line to the metrics, the trackers and the log."""
        means = self.watch.averages()
        self.quarantine.judge(step * self.batch_size)
        speed = self.progress.read(self.batch_size)
        self.run.metric(step, lr=lr, **means, **speed)
        self.accelerator.log({"lr": lr, **means, **speed}, step=step)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
        self.run.log(
            f"step {step}/{self.steps}: {shown}, lr {lr:.4g}; {self.progress.describe(speed, means['loss'], lr)}"
        )
