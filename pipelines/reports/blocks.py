"""Stages of the page in blocks: a training and the evaluations of its file are one. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssld.pipelines.config import CommandName
from ssld.pipelines.reports.photos import Evaluation, Photos, read_evaluation
from ssld.pipelines.reports.stage_view import StageView, view
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import MALFORMED, UserError


@dataclass(frozen=True)
class StageFolder:
    """One stage: its name, its command in the pipeline (None: as recorded), its run directory, and the stage whose model file it evaluates."""

    name: str
    command: CommandName | None
    run: Path
    evaluates: str | None = None


@dataclass(frozen=True)
class Block:
    """One block of the page: a stage, and the evaluations of its model file, which have no block of their own."""

    stage: StageView
    evaluations: list[StageView]


def stage_folders(stages: Sequence[tuple[str, CommandName | None, Path]]) -> list[StageFolder]:
    """Find out which of the stages (name, command, run directory) evaluates the model file of which other one."""
    by_run = {run.resolve(): name for name, _, run in stages}
    folders = []
    for name, command, run in stages:
        model = _model(run)
        owner = by_run.get(model.parent.resolve()) if model else None
        folders.append(StageFolder(name, command, run, owner if owner != name else None))
    return folders


def stage_views(
    folders: Sequence[StageFolder], evaluations: Mapping[str, Evaluation], photos: Photos, first: Sequence[str]
) -> list[StageView]:
    """Build the views of all stages, in their order.

    Args:
        evaluations: annotations and detections by stage.
        first: stages that get their images first, in case the page has no room for all.
    """
    evaluated = {folder.evaluates for folder in folders if folder.name in evaluations}
    order = sorted(folders, key=lambda one: first.index(one.name) if one.name in first else len(first))
    views = {
        one.name: view(
            one.name,
            one.command,
            one.run,
            photos,
            evaluation=evaluations.get(one.name),
            evaluated=one.name in evaluated,
        )
        for one in order
    }
    return [views[folder.name] for folder in folders]


def blocks_of(folders: Sequence[StageFolder], views: Sequence[StageView]) -> list[Block]:
    """Put the stages that have been started into blocks, each in the place of its training."""
    ran = [(folder, stage) for folder, stage in zip(folders, views, strict=True) if stage.ran]
    names = {folder.name for folder, _ in ran if folder.evaluates is None}
    own = [(folder, stage) for folder, stage in ran if folder.evaluates not in names]
    return [Block(stage, [one for other, one in ran if other.evaluates == folder.name]) for folder, stage in own]


def read_evaluations(folders: Sequence[StageFolder]) -> dict[str, Evaluation]:
    """Read the evaluations of detectors whose files are at hand, by stage; an annotation file is read once."""
    files: dict[Path, object] = {}
    found = {one.name: read_evaluation(one.run, files) for one in folders if (one.run / "detections.json").is_file()}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def _model(run: Path) -> Path | None:
    """Return the model file in the settings of an evaluation; None for other runs."""
    if not (run / "result.json").is_file() or (run / "predictions.json").is_file():
        return None
    try:
        settings = read_yaml(run / "config.yaml")
        model = settings.get("model")
    except (OSError, UserError, *MALFORMED):
        return None
    evaluation = "annotations" in settings or "bank" in settings
    return Path(model) if evaluation and isinstance(model, str) and model.endswith(".safetensors") else None
