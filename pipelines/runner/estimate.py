"""Time and disk space of a pipeline from measured rates, and the files that keep the rates. Does not import torch.

A rate belongs to settings and a machine, not to a length: after a change of steps, intervals, learning rate or seed it still holds. Rates are kept in
the pipeline's folder, and for other pipelines of this machine in the user's cache folder, there without the data that they were measured on.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ssld.pipelines.config import ReportConfig
from ssld.pipelines.runner.cost import disk_bytes, evaluation_images, training_images, training_steps
from ssld.pipelines.runner.plan import Planned
from ssld.pipelines.runner.stages import Stage
from ssld.shared.config.settings import dump
from ssld.shared.config.training import TrainingConfig
from ssld.shared.files import user_cache, write_atomically
from ssld.shared.machine import cores
from ssld.shared.wording import duration
from ssld.stage1_ssld.config import EvaluateConfig as EvaluateBackboneConfig
from ssld.stage2_detect.config import EvaluateConfig as EvaluateDetectorConfig
from ssld.stage2_detect.predict_config import AuditConfig, PredictConfig

FILE = "estimate.json"
"""file in a pipeline's output with the measured rates"""
EVALUATIONS = (EvaluateBackboneConfig, EvaluateDetectorConfig, PredictConfig, AuditConfig)
"""settings of the stages whose rate follows from that of the training whose model they read"""
FORWARD_SHARE = 0.5
"""seconds of evaluating an image, relative to those of training on it: no backward pass, but decoding, the teacher and the scores"""
MOST_REMEMBERED = 500
"""rates that the user's cache folder keeps, the newest"""
# Settings that change the length of a stage, or nothing about its speed.
_NOT_RATE = frozenset(
    {
        "steps", "train_epochs", "train_images", "log_every", "evaluate_every", "save_every", "keep_checkpoints", "patience", "output", "resume",
        "seed", "trackers", "verbose", "process_timeout", "lr", "warmup_steps", "warmup_epochs", "warmup_start", "milestones_steps",
        "milestones_epochs",
    }
)  # fmt: skip
_DATA = frozenset(
    {"train", "val", "source", "train_annotations", "train_images", "val_annotations", "val_images", "unlabeled", "pseudo"}
)  # fmt: skip
"""settings of a training that name the data it reads"""


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


def seconds(stage: Stage, rate: Rate, done: int = 0) -> float | None:
    """Return the seconds of a stage: its start, its steps after the `done` ones, and their evaluations. None if the number of steps is unknown."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return rate.start
    steps = training_steps(config, rate.images)
    if steps is None:
        return None
    every = config.in_steps(steps).evaluate_every
    done = min(done, steps)
    evaluations = 1 + ((steps - 1) // int(every) - min(done, steps - 1) // int(every) if every else 0)
    return rate.start + (steps - done) * rate.step + evaluations * evaluation_seconds(config, rate, rate.val_images)


def evaluation_seconds(config: TrainingConfig, rate: Rate, images: int) -> float:
    """Return the seconds in which the network of a training evaluates `images` images."""
    return FORWARD_SHARE * images * rate.step / config.batch_size


def evaluation_rate(stage: Stage, stages: list[Stage], rates: Mapping[str, Rate | None]) -> Rate | None:
    """Return the rate of an evaluation from that of the training among `stages` whose model it reads; None if that is unknown.

    Args:
        rates: rates of `stages`, by name.
    """
    assert isinstance(stage.config, EVALUATIONS)
    model, images = Path(stage.config.model), evaluation_images(stage.config)
    for other in stages:
        rate = rates.get(other.name)
        if isinstance(other.config, TrainingConfig) and model.is_relative_to(other.run) and rate and images is not None:
            return Rate(start=round(rate.start + evaluation_seconds(other.config, rate, images), 3))
    return None


def disk_of(stage: Stage, rate: Rate) -> int | None:
    """Return the most bytes that a stage takes: its files, the best model, and the checkpoints, one more than are kept while one is written."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return rate.files
    steps = training_steps(config, rate.images)
    if steps is None:
        return None
    saves = math.ceil(steps / int(config.in_steps(steps).save_every))
    best = rate.model if config.evaluate_every and rate.val_images else 0
    return rate.files + best + min(saves, config.keep_checkpoints + 1) * rate.checkpoint


@dataclass(frozen=True)
class Costs:
    """Expected cost of a pipeline."""

    times: dict[str, float | None]
    """seconds of each stage that has to run, reports left out, of a training after its checkpoint; None if unknown"""
    disk: dict[str, int | None]
    """bytes of each stage that writes large files; None if unknown"""
    remembered: frozenset[str]
    """stages whose rate is the last known one of this machine, measured for another pipeline"""


def expected_costs(plan: list[Planned], output: Path) -> Costs:
    """Return the costs of a plan from the rates in the pipeline's folder, or else the last known rates of this machine."""
    stages = [planned.stage for planned in plan]
    own, machine = read_rates(output), _read(machine_file())
    rates: dict[str, Rate | None] = {}
    remembered = set()
    for stage in stages:
        rate = own.get(rate_key(stage, output))
        if rate is None:
            if isinstance(stage.config, EVALUATIONS):
                rate = evaluation_rate(stage, stages, rates)
            elif known := machine.get(machine_key(stage, output)):
                images, val_images = training_images(stage.config), evaluation_images(stage.config) or 0
                rate = replace(known, images=images, val_images=val_images)
            remembered |= {stage.name} if rate else set()
        rates[stage.name] = rate
    times: dict[str, float | None] = {}
    disk = disk_bytes(stages)
    for planned in plan:
        stage, rate = planned.stage, rates[planned.stage.name]
        if planned.state != "done" and not isinstance(stage.config, ReportConfig):
            times[stage.name] = seconds(stage, rate, planned.steps_done) if rate else None
        if rate and rate.files and disk.get(stage.name) is None:
            disk[stage.name] = disk_of(stage, rate)
    return Costs(times, disk, frozenset(remembered & times.keys()))


def time_text(times: dict[str, float | None]) -> str:
    """Format the sum of the seconds of stages, by name, and name those whose time is unknown (None)."""
    if not times:
        return "nothing to run"
    known = [time for time in times.values() if time is not None]
    missing = [name for name, time in times.items() if time is None]
    if not known:
        return "unknown time"
    left_out = f", and {', '.join(missing)} of unknown time" if missing else ""
    return f"about {duration(sum(known))}{left_out}"


def rate_key(stage: Stage, output: Path) -> str:
    """Return the digest of all that a stage's rate depends on: its settings without lengths, with paths relative to
    the pipeline's folder, and the machine."""
    return _key(stage, output, _shortened(dump(stage.config)))


def machine_key(stage: Stage, output: Path) -> str:
    """Return the digest of all that a stage's rate depends on except for its data: those of another pipeline of this machine may be equal."""
    return _key(stage, output, _shortened(dump(stage.config), _NOT_RATE | _DATA))


def _key(stage: Stage, output: Path, settings: dict[str, Any]) -> str:
    machine = [
        platform.node(),
        cores(),
        *(os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")),
    ]
    text = json.dumps([stage.kind.script, stage.processes, machine, settings], sort_keys=True)
    return hashlib.sha256(text.replace(str(output), "${output}").encode()).hexdigest()[:16]


def read_rates(output: Path) -> dict[str, Rate]:
    """Return the rates measured in the folder of a pipeline, by their keys; none where the file is missing or damaged."""
    return _read(output / FILE)


def write_rates(output: Path, rates: dict[str, Rate], stages: list[Stage]) -> None:
    """Write rates into the folder of a pipeline, and those of its `stages` into the user's cache folder too, where that is possible."""
    _write(output / FILE, rates)
    known = {machine_key(stage, output): rates.get(rate_key(stage, output)) for stage in stages}
    new = {key: rate for key, rate in known.items() if rate and rate.step}
    if new:
        kept = {key: rate for key, rate in _read(machine_file()).items() if key not in new} | new
        with suppress(OSError):  # the cache is optional
            machine_file().parent.mkdir(parents=True, exist_ok=True)
            _write(machine_file(), dict(list(kept.items())[-MOST_REMEMBERED:]))


def machine_file() -> Path:
    """Return the file with the last known rates of this machine."""
    return user_cache() / "rates.json"


def _read(file: Path) -> dict[str, Rate]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): Rate(**values) for key, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, rates: dict[str, Rate]) -> None:
    write_atomically(file, json.dumps({key: asdict(rate) for key, rate in rates.items()}, indent=1) + "\n")


def _shortened(value: Any, without: frozenset[str] = _NOT_RATE) -> Any:
    """Return settings without those named, by default those that do not change the rate, in every group."""
    if not isinstance(value, dict):
        return value
    return {key: _shortened(inner, without) for key, inner in value.items() if key not in without}
