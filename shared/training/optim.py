"""Parameter groups, optimizers, and learning-rate schedules as functions of the step (so that a resumed run needs no scheduler state)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["sgd", "nesterov", "adamw"]


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    decay_norm_and_bias: bool,
    lr_factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by (lr factor, weight decay); each group carries `lr_factor` and the `names` it holds.

    Args:
        decay_norm_and_bias: whether one-dimensional parameters (norm scales, biases) are decayed too.
        lr_factor: parameter name -> factor on the learning rate.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if decay_norm_and_bias or parameter.ndim > 1 else 0.0
        factor = lr_factor(name)
        group = groups.setdefault(
            (factor, decay), {"params": [], "names": [], "lr_factor": factor, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], *, momentum: float) -> torch.optim.Optimizer:
    """Create SGD with plain or Nesterov momentum, or AdamW with betas (momentum, 0.999). The learning rate is set by `set_lr` before each step."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999))
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=name == "nesterov")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to lr times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def scale_lr(lr: float, reference_batch: int, batch_size: int, name: OptimizerName) -> float:
    """Scale a recipe's learning rate to another global batch: linear for SGD, square root for Adam-type optimizers."""
    ratio = batch_size / reference_batch
    return lr * (math.sqrt(ratio) if name == "adamw" else ratio)


def describe_lr(lr: float, reference_batch: int, batch_size: int, name: OptimizerName) -> str:
    """Say what `scale_lr` does, for a log."""
    if batch_size == reference_batch:
        return f"lr {lr:g} for batch {batch_size}"
    how = "with the square root of the batch" if name == "adamw" else "linearly"
    scaled = scale_lr(lr, reference_batch, batch_size, name)
    return f"lr {scaled:g} = {lr:g} scaled from batch {reference_batch} to {batch_size} ({how})"


def cosine_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Return the factor on the learning rate at `step` (0-based): linear warm-up to 1, then half a cosine that reaches 0 after the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def multistep_factor(
    step: int, *, milestones: Sequence[int], gamma: float, warmup_steps: int, warmup_start: float
) -> float:
    """Return the factor on the learning rate at `step` (0-based): linear warm-up from `warmup_start` to 1, times gamma for each milestone passed."""
    return _warmup(step, warmup_steps, warmup_start) * gamma ** sum(step >= milestone for milestone in milestones)


def decay_factor(step: int, *, steps: int, decay_steps: int | None, warmup_steps: int, warmup_start: float) -> float:
    """Return the factor on the learning rate at `step` (0-based): linear warm-up from `warmup_start` to 1, then a decay that would reach 0 after
    the last step.

    Args:
        decay_steps: the rate is constant, and falls linearly in the last `decay_steps` steps (warmup-stable-decay, arXiv 2405.18392); None: it
            falls as half a cosine from the end of the warm-up on.
    """
    length = steps - warmup_steps if decay_steps is None else min(decay_steps, steps - warmup_steps)
    progress = max(0.0, (step - (steps - length)) / max(1, length))
    decayed = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay_steps is None else 1.0 - progress
    return _warmup(step, warmup_steps, warmup_start) * decayed


def _warmup(step: int, warmup_steps: int, warmup_start: float) -> float:
    return 1.0 if step >= warmup_steps else warmup_start + (1.0 - warmup_start) * step / warmup_steps
