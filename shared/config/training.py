"""Settings that training has in both stages. Does not import torch."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Passes, Positive, Seed, Steps, Workers
from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.settings import Config
from ssld.shared.config.yaml_files import Alternatives
from ssld.shared.errors import UserError

PASSES_FILE = "auto_batch.json"
"""in a run directory: what `auto_batch` has found"""


class OptimConfig(Config):
    """Optimizer settings that both stages have."""

    name: Literal["sgd", "nesterov", "adamw"] = "sgd"
    """sgd has plain momentum"""
    lr: float = Field(gt=0, le=1000)
    """learning rate at `reference_batch` images a step"""
    reference_batch: BatchSize
    """global batch that `lr` is meant for; another batch scales it, linearly for SGD and by the square root for adamw"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """momentum of SGD, first beta of adamw"""
    weight_decay: float = Field(1e-4, ge=0, le=100)
    """coupled L2 for SGD, decoupled for adamw"""
    decay_norm_and_bias: bool = True
    """whether norm scales and biases are decayed too"""
    clip_grad_norm: Positive | None = None
    """largest norm of the gradient over all parameters; null does not clip"""


class EmaConfig(Config):
    """Exponential moving average of the trained network's weights; it is what gets evaluated and exported."""

    decay: float = Field(0.9999, gt=0, lt=1)
    """share of the old average kept at a step"""
    warmup: bool = True
    """let the decay grow from small values over the first steps"""


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
    # For a run whose loss was not finite.
    may_change_before_the_end: ClassVar[frozenset[str]] = frozenset(
        {"precision", "optim.lr", "optim.clip_grad_norm"}
        | {"optim.warmup_steps", "optim.warmup_epochs", "optim.warmup_start"}
    )

    seed: Seed = 0
    """every random draw follows from it"""
    steps: Steps | None = None
    """length in optimizer steps; give exactly one of steps, train_epochs, train_images"""
    train_epochs: Passes | None = None
    """length in passes over the training images"""
    train_images: Images | None = None
    """length in training images seen"""
    batch_size: BatchSize
    """global batch: images an optimizer step, over all processes and accumulation"""
    accumulate: BatchSize = 1
    """forward and backward passes an optimizer step and process"""
    auto_batch: bool = False
    """find `accumulate` before the run: the fewest passes whose images, at their largest, fit into memory; `batch_size` stays"""
    channels_last: bool = False
    """memory layout of the networks"""
    compile: bool = False
    """torch.compile the network"""
    workers: Workers = 2
    """processes a rank that decode images; 0 decodes in the training process"""
    log_every: Steps = 50
    """steps between two lines of metrics"""
    evaluate_every: Steps | None = None
    """steps between two evaluations; null evaluates at the end only"""
    save_every: Steps = 1000
    """steps between two checkpoints"""
    keep_checkpoints: Count = 2
    """newest checkpoints kept"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint; never refuses a folder that holds a run"""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """also log to these, through accelerate"""

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

    def describe_keeping(self, steps: int, *, evaluates: bool) -> str:
        """When a run of so many steps is evaluated, if there is anything to evaluate on, and saved, for the log."""
        kept = "the newest is kept" if self.keep_checkpoints == 1 else f"the newest {self.keep_checkpoints} are kept"
        often = self.evaluate_every and self.evaluate_every < steps
        evaluated = f"every {self.evaluate_every} steps and at the end" if often else "at the end"
        saved = f"every {self.save_every} steps and at the end, {kept}" if self.save_every < steps else "at the end"
        return f"a checkpoint {saved}; {f'evaluation {evaluated}' if evaluates else 'no evaluation'}"

    def total_steps(self, images: int | None) -> int:
        """Optimizer steps of the run for a training set of `images` images; raises UserError where that number is needed and unknown."""
        if self.steps is not None:
            return self.steps
        if self.train_epochs is not None and images is None:
            raise UserError("train_epochs: nobody knows how many images the stream holds; give steps or train_images")
        wanted = self.train_images if self.train_images is not None else (self.train_epochs or 0) * (images or 0)
        return max(1, round(wanted / self.batch_size))
