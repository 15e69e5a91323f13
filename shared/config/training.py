"""Settings that training has in both stages. Does not import torch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Interval, Passes, Positive, Seed, Steps, Workers
from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.settings import Config
from ssld.shared.config.yaml_files import Alternatives
from ssld.shared.errors import UserError

MOST_LOG_STEPS, LOG_LINES = 50, 20
"""by default: most steps between two lines of metrics, and fewest lines of a run"""
PASSES_FILE = "auto_batch.json"
"""file in a run directory with the result of `auto_batch`"""


def in_steps(length: float, steps: int) -> int:
    """Return a length as whole steps: one below 1 is a fraction of the `steps` of the run, at least one step."""
    return max(1, round(length * steps)) if 0 < length < 1 else int(length)


class OptimConfig(Config):
    """Optimizer settings of both stages."""

    name: Literal["sgd", "nesterov", "adamw"] = "sgd"
    """optimizer: sgd (with momentum), nesterov (SGD with Nesterov momentum) or adamw"""
    lr: float = Field(gt=0, le=1000)
    """learning rate for a global batch of `reference_batch` images"""
    reference_batch: BatchSize
    """global batch size that `lr` refers to; another batch_size scales lr, linearly for SGD and by the square root for AdamW"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """momentum of SGD, or beta1 of AdamW; 0 to below 1"""
    weight_decay: float = Field(1e-4, ge=0, le=100)
    """weight decay, 0 to 100: coupled (L2) for SGD, decoupled for AdamW"""
    decay_norm_and_bias: bool = True
    """apply weight decay to the scales of normalization layers and to biases too"""
    clip_grad_norm: Positive | None = None
    """largest L2 norm of the gradient over all parameters, above 0; null: no clipping"""


class EmaConfig(Config):
    """Exponential moving average of the trained weights; evaluated and exported in place of them."""

    decay: float = Field(0.9999, gt=0, lt=1)
    """decay of the average per optimizer step, above 0 to below 1"""
    warmup: bool = True
    """increase the decay from small values over the first steps"""


class TrainingConfig(ComputeConfig):
    """Settings of a training run in either stage."""

    alternatives: ClassVar[Alternatives] = (
        ("steps", "train_epochs", "train_images"),
        ("optim.warmup_steps", "optim.warmup_epochs"),
        ("optim.milestones_steps", "optim.milestones_epochs"),
    )

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"steps", "train_epochs", "train_images", "save_every", "keep_checkpoints", "evaluate_every"}
        | {"accumulate", "auto_batch", "val_batch_size"}  # for a run that ran out of memory; its batch stays
    )
    other_names: ClassVar[Mapping[str, str]] = {
        "learning_rate": "optim.lr",
        "batch": "batch_size",
        "bs": "batch_size",
        "epochs": "train_epochs",
        "gpu": "device",
        "gpus": "device",
        "amp": "precision",
    }
    # For a run whose loss was not finite.
    may_change_before_the_end: ClassVar[frozenset[str]] = frozenset(
        {"precision", "optim.lr", "optim.clip_grad_norm"}
        | {"optim.warmup_steps", "optim.warmup_epochs", "optim.warmup_start"}
    )

    seed: Seed = 0
    """seed of all random numbers, 0 to 2^32 - 1"""
    steps: Steps | None = None
    """length of the run in optimizer steps; give one of steps, train_epochs, train_images; without any, distill chooses one, train and teach stop"""
    train_epochs: Passes | None = None
    """length of the run in passes over the training images, in place of steps"""
    train_images: Images | None = None
    """length of the run in training images, repeats included, in place of steps"""
    batch_size: BatchSize
    """global batch size: images per optimizer step, over all processes and accumulated passes"""
    accumulate: BatchSize = 1
    """gradient accumulation: forward and backward passes per optimizer step and process"""
    auto_batch: bool = False
    """choose `accumulate` before the run: the fewest passes for which images of the largest size fit into memory; `batch_size` stays"""
    channels_last: bool = False
    """use the channels_last memory format, which is often faster on GPUs"""
    compile: bool = False
    """compile the network with torch.compile"""
    workers: Workers = 2
    """worker processes per rank that decode images; 0: decode in the training process"""
    log_every: Interval | None = None
    """optimizer steps between two lines of metrics, or a fraction of the run; null: 50, or fewer so that there are at least 20 lines"""
    evaluate_every: Interval | None = None
    """optimizer steps between two evaluations, or a fraction of the run; null: evaluate at the end only"""
    save_every: Interval = 1000
    """optimizer steps between two checkpoints, or a fraction of the run; further ones are written before evaluations and where a run is stopped"""
    keep_checkpoints: Count = 2
    """number of checkpoints to keep, the newest ones"""
    resume: Literal["auto", "never"] = "auto"
    """resume mode: auto, continue from the newest checkpoint; never, refuse an output folder that holds a run"""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """trackers: tensorboard, wandb, mlflow; [] for none"""
    look: bool = False
    """stop before the first step, when `batches.jpg` with the first training images is written"""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in ("steps", "train_epochs", "train_images") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of steps, train_epochs, train_images (given: {', '.join(given) or 'none'})"
            )
        return self

    @model_validator(mode="after")
    def _one_accumulate(self) -> Self:
        if self.auto_batch and self.accumulate != 1:
            raise ValueError("accumulate: auto_batch finds it; give one of the two")
        return self

    def in_steps(self, steps: int) -> Self:
        """Return the settings of a run of `steps` steps, with its fractions and the interval of log lines as whole steps."""
        log_every = (
            in_steps(self.log_every, steps) if self.log_every else max(1, min(MOST_LOG_STEPS, steps // LOG_LINES))
        )
        lengths: dict[str, Any] = {"log_every": log_every, "save_every": in_steps(self.save_every, steps)}
        if self.evaluate_every is not None:
            lengths["evaluate_every"] = in_steps(self.evaluate_every, steps)
        return self.model_copy(update=lengths)

    def evaluates_after(self, step: int, steps: int) -> bool:
        """Whether a run of `steps` steps, whose lengths are whole steps, is evaluated after `step` of them, before the end."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0 and 0 < step < steps

    def describe_keeping(self, steps: int, *, evaluates: bool) -> str:
        """Return a line for the log on when a run of `steps` steps is evaluated (if it has evaluation images) and saved."""
        kept = "the newest is kept" if self.keep_checkpoints == 1 else f"the newest {self.keep_checkpoints} are kept"
        often = self.evaluate_every and self.evaluate_every < steps
        evaluated = f"every {self.evaluate_every} steps and at the end" if often else "at the end"
        places = [f"every {self.save_every} steps"] if self.save_every < steps else []
        places += ["at evaluations"] if often and evaluates else []
        saved = f"{' or '.join(places)} and at the end, {kept}" if places else "at the end"
        return f"a checkpoint {saved}; {f'evaluation {evaluated}' if evaluates else 'no evaluation'}"

    def total_steps(self, images: int | None) -> int:
        """Return the optimizer steps of the run for a training set of `images` images. Raises UserError if that number is needed and unknown."""
        if self.steps is not None:
            return self.steps
        if self.train_epochs is not None and images is None:
            raise UserError("train_epochs: the length of a stream is unknown; give steps or train_images")
        total = self.train_images if self.train_images is not None else (self.train_epochs or 0) * (images or 0)
        return max(1, round(total / self.batch_size))
