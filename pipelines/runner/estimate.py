"""Time and disk space of a pipeline from measured rates, and the file that keeps the rates. Does not import torch.

A rate belongs to settings and a machine, not to a length: after a change of steps, intervals, learning rate or seed it still holds.
"""

import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssld.pipelines.runner.stages import Stage
from ssld.shared.config.settings import dump
from ssld.shared.config.training import TrainingConfig
from ssld.shared.files import write_atomically
from ssld.shared.machine import cores
from ssld.shared.wording import count, duration
from ssld.stage1_ssld.config import DistillConfig

FILE = "estimate.json"
"""file in a pipeline's output with the measured rates"""
FORWARD_SHARE = 0.5
"""seconds of evaluating an image, relative to those of training on it: no backward pass, but decoding, the teacher and the scores"""
# Settings that change the length of a stage, or nothing about its speed.
_NOT_RATE = frozenset(
    {
        "steps",
        "train_epochs",
        "train_images",
        "log_every",
        "evaluate_every",
        "save_every",
        "keep_checkpoints",
        "patience",
    }
    | {"output", "resume", "seed", "trackers", "verbose", "process_timeout"}
    | {"lr", "warmup_steps", "warmup_epochs", "warmup_start", "milestones_steps", "milestones_epochs"}
)


@dataclass(frozen=True)
class Rate:
    """Measured cost of a stage."""

    start: float
    """seconds outside its training steps and evaluations: imports, opening of the data, writing of the model file"""
    step: float = 0.0
    """seconds per optimizer step; 0 for a stage that was measured as a whole"""
    images: int | None = None
    """number of training images; None if unknown"""
    val_images: int = 0
    """number of images per evaluation"""
    files: int = 0
    """bytes of its run directory without checkpoints"""
    model: int = 0
    """bytes of its model files"""
    checkpoint: int = 0
    """bytes per checkpoint"""


def seconds(stage: Stage, rate: Rate) -> float | None:
    """Return the seconds of a stage: its start, its steps, and its evaluations. None if the number of steps is unknown."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return rate.start
    steps = _steps(config, rate)
    if steps is None:
        return None
    every = config.in_steps(steps).evaluate_every
    evaluations = 1 + ((steps - 1) // int(every) if every else 0)
    return rate.start + steps * rate.step + evaluations * evaluation_seconds(config, rate, rate.val_images)


def evaluation_seconds(config: TrainingConfig, rate: Rate, images: int) -> float:
    """Return the seconds in which the network of a training evaluates `images` images."""
    return FORWARD_SHARE * images * rate.step / config.batch_size


def disk(stage: Stage, rate: Rate) -> int | None:
    """Return the most bytes that a stage takes: its files, the best model, and the checkpoints, one more than are kept while one is written."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return rate.files
    steps = _steps(config, rate)
    if steps is None:
        return None
    saves = math.ceil(steps / int(config.in_steps(steps).save_every))
    best = rate.model if config.evaluate_every and rate.val_images else 0
    return rate.files + best + min(saves, config.keep_checkpoints + 1) * rate.checkpoint


def time_text(times: dict[str, float | None]) -> str:
    """Format the sum of the seconds of stages, by name; None if unknown."""
    if not times:
        return "nothing to run"
    known = [time for time in times.values() if time is not None]
    missing = len(times) - len(known)
    if not missing:
        return f"about {duration(sum(known))}"
    if not known:
        return "unknown time"
    return f"about {duration(sum(known))}, and {count(missing, 'stage')} of unknown time"


def rate_key(stage: Stage, output: Path) -> str:
    """Return the digest of all that a stage's rate depends on: its settings without lengths, with paths relative to
    the pipeline's folder, and the machine."""
    machine = [
        platform.node(),
        cores(),
        *(os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")),
    ]
    text = json.dumps([stage.kind.script, stage.processes, machine, _shortened(dump(stage.config))], sort_keys=True)
    return hashlib.sha256(text.replace(str(output), "${output}").encode()).hexdigest()[:16]


def read_rates(output: Path) -> dict[str, Rate]:
    """Return the rates measured in the folder of a pipeline, by their keys; none where the file is missing or damaged."""
    try:
        content = json.loads((output / FILE).read_text(encoding="utf-8"))
        return {str(key): Rate(**values) for key, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_rates(output: Path, rates: dict[str, Rate]) -> None:
    """Write the rates into the folder of a pipeline."""
    write_atomically(output / FILE, json.dumps({key: asdict(rate) for key, rate in rates.items()}, indent=1) + "\n")


def _steps(config: TrainingConfig, rate: Rate) -> int | None:
    if isinstance(config, DistillConfig) and not config.is_fitted:
        return None  # chosen when its images are read
    return None if config.train_epochs is not None and rate.images is None else config.total_steps(rate.images)


def _shortened(value: Any) -> Any:
    """Return settings without those that do not change the rate, in every group."""
    if not isinstance(value, dict):
        return value
    return {key: _shortened(inner) for key, inner in value.items() if key not in _NOT_RATE}
