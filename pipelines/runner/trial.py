"""Trial of a pipeline for its estimate: three real steps of every training, into a folder that is deleted afterwards.

Stages that make data or convert files run as a whole, finished stages are read where they are. A stage that reads from one that cannot be tried, such
as a curation, stays unknown until that one is finished. Evaluations and checks of the teacher do not run; the time of an evaluation follows from that
of a training step.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssld.pipelines.runner.cost import evaluation_images, training_images
from ssld.pipelines.runner.estimate import EVALUATIONS, Rate, evaluation_rate, rate_key
from ssld.pipelines.runner.launch import Signals, run_stage
from ssld.pipelines.runner.plan import Planned
from ssld.pipelines.runner.stages import BURN_IN, Stage, has_moving_teacher
from ssld.pipelines.toy_data import ToyDataConfig
from ssld.shared.config.flag_values import flags
from ssld.shared.config.settings import parse_config
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import Stopped, UserError
from ssld.shared.run_dir import read_metrics
from ssld.shared.terminal import say
from ssld.shared.wording import duration
from ssld.stage1_ssld.config import ConvertPaddleConfig, DistillConfig
from ssld.stage2_detect.config import ConvertDataConfig, ConvertForeignConfig, TrainConfig
from ssld.stage2_detect.config import ConvertPaddleConfig as ConvertPaddleDetectorConfig

STEPS = 3
GRACE_SECONDS = 5.0
"""time that a training has to finish its step when a trial has reached its limit; then it is killed"""
_WHOLE = (ToyDataConfig, ConvertDataConfig, ConvertForeignConfig, ConvertPaddleConfig, ConvertPaddleDetectorConfig)
"""settings of the stages that a trial runs as a whole"""
_TRIED = (*_WHOLE, TrainingConfig)
_LENGTH = {"steps": STEPS, "train_epochs": None, "train_images": None, "log_every": 1, "save_every": STEPS}
_NO_EVALUATION = {"evaluate_every": None, "patience": None}
_STAGE_1: dict[str, Any] = {"data.val": None}
_STAGE_2 = {"data.val_annotations": None, "data.val_images": None, "val_loss": False, "expected": None}


def measure(
    plan: list[Planned],
    build: Callable[[Path], list[Stage]],
    output: Path,
    rates: dict[str, Rate],
    limit: float | None = None,
) -> None:
    """Measure the stages of a plan whose rate is unknown, and add them to `rates`, which has them by their keys (see `rate_key`).

    Args:
        plan: the stages; finished ones are not measured.
        build: builds the stages for another folder of run directories.
        output: folder of the pipeline.
        rates: rates so far; after an error it has those that were measured before it.
        limit: seconds after which the trial of a stage ends; its rate is then that of the steps so far, and unknown without one. None: no limit.

    Raises:
        UserError: a stage failed in the trial.
        Stopped: after Ctrl-C or SIGTERM, at once.
    """
    keys = {planned.stage.name: rate_key(planned.stage, output) for planned in plan}
    done = {planned.stage.name for planned in plan if planned.state == "done"}
    with Signals(kill=True) as signals, tempfile.TemporaryDirectory(prefix="ssld_trial_") as folder:
        stages = build(Path(folder))
        needed = _needed(stages, {name for name, key in keys.items() if key not in rates and name not in done}) - done
        ready: set[str] = set()
        for stage in stages:
            key = keys[stage.name]
            if stage.name in done:
                stage.run.symlink_to((output / stage.name).absolute())
                ready.add(stage.name)
            elif stage.name in needed and stage.needs <= ready and isinstance(stage.config, _TRIED):
                rate = _try_stage(stage, signals, limit)
                rates |= {key: rate} if rate else {}
                ready.add(stage.name)
            elif isinstance(stage.config, EVALUATIONS) and key not in rates:
                rate = evaluation_rate(stage, stages, {other.name: rates.get(keys[other.name]) for other in stages})
                rates |= {key: rate} if rate else {}
            if signals.received:
                raise Stopped("trial: stopped")


def _needed(stages: list[Stage], unknown: set[str]) -> set[str]:
    """Return the stages of unknown rate that can be estimated, and all that they read from."""
    names: set[str] = set()
    for stage in reversed(stages):
        if stage.name in names or (stage.name in unknown and isinstance(stage.config, (*_TRIED, *EVALUATIONS))):
            names |= {stage.name, *stage.needs}
    return names


def _try_stage(stage: Stage, signals: Signals, limit: float | None) -> Rate | None:
    """Run a stage, a training for `STEPS` steps only, and return its rate; None if not one step ended within the limit."""
    whole = not isinstance(stage.config, TrainingConfig)
    images, val_images = training_images(stage.config), evaluation_images(stage.config) or 0
    within = "" if limit is None else f", in {duration(limit)} at most"
    say(f"trial of {stage.name}: {'whole' if whole else f'{STEPS} steps'}{within}")
    begun = time.monotonic()
    tried = stage if whole else shortened(stage)
    with _stopped_after(limit, signals) as stopped:
        outcome = run_stage(tried, stage.run.with_suffix(".trial.txt"), signals, quiet=True)
    total = time.monotonic() - begun
    if signals.received:
        raise Stopped(f"trial of {stage.name}: stopped")
    if outcome.code and stopped.is_set():
        return rate_of_part(stage.run, total, images=images, val_images=val_images)
    if outcome.code:
        raise UserError(*(f"trial of {stage.name}: {line}" for line in outcome.lines))
    return rate_of(stage.run, total, images=images, val_images=val_images)


@contextmanager
def _stopped_after(limit: float | None, signals: Signals) -> Iterator[threading.Event]:
    """Stop the process that runs inside after `limit` seconds, by SIGTERM and a little later by SIGKILL; yields whether that has happened."""
    stopped = threading.Event()

    def stop(number: int) -> None:
        if signals.group is not None:
            stopped.set()
            with suppress(ProcessLookupError):
                os.killpg(signals.group, number)

    after = {signal.SIGTERM: limit, signal.SIGKILL: limit + GRACE_SECONDS} if limit is not None else {}
    timers = [threading.Timer(seconds, stop, [number]) for number, seconds in after.items()]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield stopped
    finally:
        for timer in timers:
            timer.cancel()


def shortened(stage: Stage) -> Stage:
    """Return a training stage of `STEPS` steps without evaluations; a moving teacher begins after the first of them."""
    teacher = {BURN_IN: 1} if has_moving_teacher(stage.config) else {}
    return with_settings(stage, _LENGTH | teacher | without_evaluation(stage))


def without_evaluation(stage: Stage) -> dict[str, Any]:
    """Return the settings, by key, with which a training stage neither evaluates nor checks its teacher."""
    own = _STAGE_2 if isinstance(stage.config, TrainConfig) else _STAGE_1
    if isinstance(stage.config, DistillConfig):
        own = own | {"keep_weights": "last"} | ({"teacher.check_images": 0} if stage.config.teacher else {})
    elif isinstance(stage.config, TrainConfig) and stage.config.distill:
        own = own | {"distill.check_images": 0}
    return _NO_EVALUATION | own


def with_settings(stage: Stage, settings: dict[str, Any]) -> Stage:
    """Return a stage with `settings`, values by dotted key, in place of its own."""
    words: list[str] = []
    rest = iter(stage.arguments)
    for word in rest:
        flag, equals, _ = word.partition("=")
        value = [] if equals else [next(rest)]
        key = flag.removeprefix("--")
        if not any(key == one or key.startswith(f"{one}.") for one in settings):
            words += [word, *value]
    words += flags(stage.kind.config_type, settings)
    config = parse_config(stage.kind.config_type, words, program=stage.kind.script)
    return replace(stage, config=config, arguments=tuple(words))


def rate_of(run: Path, total: float, *, images: int | None, val_images: int) -> Rate:
    """Return the rate of a trial in a run directory that took `total` seconds; its first step, in which kernels are chosen, counts as start."""
    times = [line["seconds"] for line in read_metrics(run) if "seconds" in line][1:]
    step = sum(times) / len(times) if times else 0.0
    sizes = {file: file.stat().st_size for file in run.rglob("*") if file.is_file()}
    checkpoints = run / "checkpoints"
    return Rate(
        start=round(max(0.0, total - STEPS * step), 3) if times else round(total, 3),
        step=round(step, 6),
        images=images,
        val_images=val_images,
        files=sum(size for file, size in sizes.items() if not file.is_relative_to(checkpoints)),
        model=sum(size for file, size in sizes.items() if file.parent == run and file.suffix == ".safetensors"),
        checkpoint=sum(size for file, size in sizes.items() if file.is_relative_to(checkpoints)),
    )


def rate_of_part(run: Path, total: float, *, images: int | None, val_images: int) -> Rate | None:
    """Return the rate of a trial that ended at its limit: of its steps without the first, or of the first if there is no other; None without steps.

    Its files are not complete, so that their sizes stay unknown.
    """
    times = [line["seconds"] for line in read_metrics(run) if "seconds" in line]
    if not times:
        return None
    steps = times[1:] or times
    step = sum(steps) / len(steps)
    return Rate(
        start=round(max(0.0, total - len(times) * step), 3), step=round(step, 6), images=images, val_images=val_images
    )
