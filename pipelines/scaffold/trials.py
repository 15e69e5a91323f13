"""Trials of a pipeline that is not written yet, in a folder that is deleted afterwards. Does not import torch."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssld.pipelines.folder import inside_folder_of
from ssld.pipelines.runner.estimate import (
    EVALUATIONS,
    Costs,
    Rate,
    evaluation_rate,
    expected_costs,
    rate_key,
    read_rates,
    write_rates,
)
from ssld.pipelines.runner.launch import stoppable
from ssld.pipelines.runner.plan import Planned
from ssld.pipelines.runner.stages import Stage, build_stages, read_pipeline
from ssld.pipelines.runner.trial import measure, with_settings
from ssld.pipelines.scaffold.fit import Trial, under_moving_teacher
from ssld.pipelines.scaffold.pipeline_file import pipeline_text
from ssld.pipelines.scaffold.starts import in_a_trial, rows_of
from ssld.pipelines.scaffold.suggest import Facts, Settings, Trained
from ssld.shared.config.training import TrainingConfig
from ssld.shared.files import write_atomically
from ssld.stage2_detect.config import TrainConfig


@contextmanager
def trials(facts: Facts, files: Mapping[Path, str]) -> Iterator[Trial]:
    """Yield a function that measures the rate of a training; Stopped is raised at Ctrl-C or SIGTERM.

    Args:
        facts: names files that are not written yet.
        files: their content.
    """
    with stoppable("stopped; nothing is written"), tempfile.TemporaryDirectory(prefix="ssld_init_") as name:
        folder = Path(name)
        moved = {file: folder / file.name for file in files}
        for file, text in files.items():
            write_atomically(moved[file], text)
        names = ("annotations", "val_annotations", "pool", "held_out", "listing", "shown", "moving")
        there = replace(facts, **{key: moved.get(getattr(facts, key), getattr(facts, key)) for key in names})
        paths: dict[str, Any] = {key: path.absolute() for key, path in vars(there).items() if isinstance(path, Path)}
        there = replace(there, **paths)  # as an error of the trial has to name them
        yield lambda settings, trained, limit: _rate(folder, there, settings, trained, limit)


def _rate(folder: Path, facts: Facts, settings: Settings, trained: Trained, limit: float) -> Rate | None:
    """Measure the rate of one training of the pipeline with these settings, within `limit` seconds."""
    file, output = folder / "trial.yaml", folder / "runs"
    networks, moving = settings.networks, facts.moving is not None
    facts = replace(facts, starts=in_a_trial(facts.starts, networks.backbone))
    write_atomically(file, pipeline_text(file, facts, settings))
    name = "ssld"
    if trained != "ssld":
        rows = rows_of(facts.starts, facts.init, networks.backbone, networks.arch, moving=moving)
        name = next(row.stage for row in rows if (row.init is not None) == (trained == "coco"))
    absent = facts.init if trained == "coco" and facts.init and not facts.init.here else None

    def build(output: Path) -> list[Stage]:
        (stage,) = [stage for stage in build_stages(pipeline, file, output=output) if stage.name == name]
        return [with_settings(stage, absent.untrained()) if absent else stage]

    with inside_folder_of(file):
        pipeline = read_pipeline(file)
        (stage,) = build(output)
        rates: dict[str, Rate] = {}
        measure([Planned(stage, "new")], build, output, rates, limit)
        return rates.get(rate_key(stage, output))


def keep_rates(file: Path, rates: Mapping[Trained, Rate]) -> tuple[list[Stage], Costs]:
    """Keep the rates of a written pipeline's trainings, inside its folder; returns its stages and their expected costs."""
    pipeline = read_pipeline(file)
    stages = build_stages(pipeline, file, output=pipeline.output)
    known: dict[str, Rate | None] = {}
    for stage in stages:
        if isinstance(stage.config, TrainConfig):
            rate = rates.get("coco" if stage.config.init else "detector")
            known[stage.name] = under_moving_teacher(rate) if rate and stage.config.moving_teacher else rate
        elif isinstance(stage.config, TrainingConfig):
            known[stage.name] = rates.get("ssld")
        elif isinstance(stage.config, EVALUATIONS):
            known[stage.name] = evaluation_rate(stage, stages, known)
    new = {rate_key(stage, pipeline.output): rate for stage in stages if (rate := known.get(stage.name))}
    pipeline.output.mkdir(parents=True, exist_ok=True)
    write_rates(pipeline.output, read_rates(pipeline.output) | new, stages)
    return stages, expected_costs([Planned(stage, "new") for stage in stages], pipeline.output)
