"""The learning rate of a detector's training as a function of the step. A module of its own, so that the choice of schedule can be tested without
a training."""

from dataclasses import dataclass
from typing import Any, Self

from ssld.shared.config.training import in_steps
from ssld.shared.training.optim import decay_factor, multistep_factor
from ssld.shared.wording import count
from ssld.stage2_detect.config import Stage2OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Schedule of a run of `steps` steps, with all lengths in steps."""

    optim: Stage2OptimConfig
    steps: int
    warmup_steps: int
    milestones: list[int]

    @classmethod
    def of(cls, optim: Stage2OptimConfig, steps_per_epoch: int, steps: int) -> Self:
        """Return the schedule of a run, `steps_per_epoch` steps of which are a pass over the images."""
        milestones = optim.milestones(steps_per_epoch, steps) if optim.schedule == "milestones" else []
        return cls(optim, steps, optim.total_warmup_steps(steps), milestones)

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate at `step` (0-based)."""
        warmup: dict[str, Any] = {"warmup_steps": self.warmup_steps, "warmup_start": self.optim.warmup_start}
        if self.optim.schedule == "milestones":
            return multistep_factor(step, milestones=self.milestones, gamma=self.optim.gamma, **warmup)
        return decay_factor(step, steps=self.steps, decay_steps=self.decay_steps, **warmup)

    @property
    def decay_steps(self) -> int | None:
        """Length of the linear decay of wsd; None for a cosine."""
        return in_steps(self.optim.decay_steps, self.steps) if self.optim.schedule == "wsd" else None

    def doubt(self) -> str | None:
        """Return a line for the log if no milestone is within the run, else None."""
        if self.milestones and min(self.milestones) >= self.steps:
            return f"milestones: all are after the last of {self.steps} steps, so the learning rate never drops"
        return None

    def describe(self) -> str:
        """Return the schedule in words, for the log."""
        if self.optim.schedule == "milestones":
            return f"warm-up {self.warmup_steps} steps, milestones {self.milestones}"
        how = (
            "cosine to 0" if self.decay_steps is None else f"linear to 0 in the last {count(self.decay_steps, 'step')}"
        )
        return f"warm-up {self.warmup_steps} steps, {how}"
