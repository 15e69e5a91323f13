"""Settings classes of a pipeline's YAML file and of the report. Does not import torch."""

import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import Processes
from ssld.shared.config.settings import CommandConfig, Config
from ssld.shared.config.yaml_files import flatten, read_recipe
from ssld.shared.wording import did_you_mean

CommandName = Literal[
    "toy_data",
    "convert_backbone",
    "convert_data",
    "teach",
    "prototypes",
    "curate",
    "soft_labels",
    "distill",
    "evaluate_backbone",
    "export_backbone",
    "convert_detector",
    "convert_paddle_detector",
    "train",
    "evaluate_detector",
    "export_detector",
    "predict",
    "audit",
    "report",
]

ROOT = Path(__file__).resolve().parents[1]
MOST_SEEDS = 10
REFERENCE = re.compile(r"\$\{([^}]*)\}")


def located(path: str) -> str:
    """Return `path` below the project's root if it exists only there, else unchanged."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


class StageConfig(Config):
    """One command of a pipeline. It writes into `<output>/<name of the stage>`."""

    command: CommandName
    """command that the stage runs"""
    like: str | None = None
    """earlier stage whose command, config and set this stage takes over, except for keys of its own"""
    config: str | None = None
    """YAML file with settings of the command"""
    set: dict[str, Any] = {}
    """settings that override those of `config`, by dotted key, like flags"""
    processes: Processes = 1
    """number of processes on this machine"""
    seeds: int = Field(1, ge=1, le=MOST_SEEDS)
    """number of runs with different seeds; stages that read from this one are repeated with it"""


class RowConfig(Config):
    """Stages that one row of the table takes its numbers from."""

    classifier: tuple[str, ...] = Field((), max_length=MOST_SEEDS)
    """name of the stage that reports top-1 accuracy and agreement, or a list of its runs with different seeds"""
    detector: tuple[str, ...] = Field((), max_length=MOST_SEEDS)
    """name of the stage that reports AP, or a list of its runs with different seeds"""

    @field_validator("classifier", "detector", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("classifier", "detector")
    @classmethod
    def _each_stage_once(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"each stage at most once (given: {', '.join(stages)})")
        return stages


class TableConfig(Config):
    """The table printed at the end."""

    rows: dict[str, RowConfig] = Field(min_length=1)
    gain: tuple[str, str] | None = None
    """pair of rows (row, baseline) whose difference is reported; null: none"""


class PipelineConfig(Config):
    """Stages in the order they run in, and the table of their results."""

    output: Path
    """folder of the run directories of all stages"""
    variables: dict[str, str | int | float | None] = {}
    """values for ${NAME}; a variable without a value has to be given as --variables.NAME"""
    stages: dict[str, StageConfig] = Field(min_length=1)
    smoke: dict[CommandName, dict[str, Any]] = {}
    """settings per command that --smoke puts on top of its stages, for the smallest sizes"""
    table: TableConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_likes(cls, values: Any) -> Any:
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            return values  # the fields' own checks report the mistake
        filled: dict[str, Any] = {}
        for name, stage in stages.items():
            other = stage.get("like")
            if other is not None and not (isinstance(other, str) and other in filled):
                raise ValueError(
                    f"stages.{name}.like: {other}: no earlier stage of this name{did_you_mean(str(other), list(filled))}"
                )
            base = filled[other] if other is not None else {}
            settings = [part.get("set", {}) for part in (base, stage)]
            if all(isinstance(part, dict) for part in settings):
                keys = [key for key, _ in flatten(settings[1])]
                if twice := [key for key in keys if keys.count(key) > 1]:
                    raise ValueError(f"stages.{name}.set: {twice[0]} is given twice, with dots and in a group")
                stage = {**base, **stage, "set": dict(flatten(settings[0])) | dict(flatten(settings[1]))}
            filled[name] = stage
        if not all(isinstance(stage.get("set", {}), dict) for stage in filled.values()):
            return {**values, "stages": filled}  # likewise
        copies = _copies(filled)
        if max(copies.values(), default=1) == 1:
            return {**values, "stages": filled}
        values = {**values, "stages": _repeat(filled, copies)}
        return {**values, "table": _with_copies(values["table"], copies)} if "table" in values else values

    @model_validator(mode="after")
    def _table_names_stages(self) -> Self:
        if self.table is None:
            return self
        for name, row in self.table.rows.items():
            for key, stages in row:
                for stage in stages:
                    if stage not in self.stages:
                        hint = did_you_mean(stage, list(self.stages))
                        raise ValueError(f"table.rows.{name}.{key}: {stage}: no such stage{hint}")
        for name in self.table.gain or ():
            if name not in self.table.rows:
                raise ValueError(f"table.gain: {name}: no such row{did_you_mean(name, list(self.table.rows))}")
        return self


def copy_name(stage: str, number: int) -> str:
    """Return the name of a stage's run with another seed: NAME, NAME_1, NAME_2, ..."""
    return f"{stage}_{number}" if number else stage


def _copies(stages: dict[str, Any]) -> dict[str, int]:
    """Return the number of runs of each stage: its own `seeds`, or those of the stages that it reads from.

    Raises ValueError for a number of seeds out of bounds, and for a stage that reads from stages with different numbers of seeds.
    """
    copies: dict[str, int] = {}
    for name, stage in stages.items():
        seeds = stage.get("seeds", 1)
        if type(seeds) is not int or not 1 <= seeds <= MOST_SEEDS:
            given = json.dumps(seeds, default=str)
            raise ValueError(f"stages.{name}.seeds: expected a whole number from 1 to {MOST_SEEDS} (given: {given})")
        references = REFERENCE.findall(json.dumps([stage.get("set"), stage.get("config")], default=str))
        repeated = {key: copies[key] for key in references if copies.get(key, 1) > 1}
        numbers = {seeds} - {1} | set(repeated.values())
        if len(numbers) > 1:
            sources = ", ".join(f"{key} {number}" for key, number in repeated.items())
            raise ValueError(f"stages.{name}: reads from stages with different seeds ({sources}, its own {seeds})")
        copies[name] = numbers.pop() if numbers else 1
    return copies


def _repeat(stages: dict[str, Any], copies: dict[str, int]) -> dict[str, Any]:
    """Write out the runs of every stage with several seeds, each reading from the run of its own number. Raises ValueError for a name in use."""
    result: dict[str, Any] = {}
    for name, stage in stages.items():
        for number in range(copies[name]):
            copy = copy_name(name, number)
            if copy in result or (number and copy in stages):
                raise ValueError(f"stages.{name}.seeds: {copy} is the name of another stage; rename it")
            settings = dict(_renamed(stage.get("set", {}), copies, number))
            if stage.get("seeds", 1) > 1:
                settings["seed"] = _first_seed(name, stage) + number
            config = _renamed(stage.get("config"), copies, number)
            result[copy] = {**stage, "like": None, "set": settings, "config": config, "seeds": 1}
    return result


def _first_seed(name: str, stage: dict[str, Any]) -> int:
    """Return the seed of a stage's first run: that of its `set`, else that of its `config` file, else 0.

    Raises ValueError for a seed that is no number, or a file whose name has variables, which are not known yet.
    """
    settings, file = stage.get("set", {}), stage.get("config")
    place, seed = f"stages.{name}.set.seed", settings.get("seed", 0)
    if "seed" not in settings and isinstance(file, str):
        if REFERENCE.search(file):
            raise ValueError(f"{place}: missing; a stage with seeds and the config {file} needs its first seed here")
        if (path := Path(located(file))).is_file():  # a missing file is reported with the stage's other settings
            place, seed = f"stages.{name}.config: {file}: seed", read_recipe(path).get("seed", 0)
    if isinstance(seed, str) and seed.isdecimal():  # text on the command line
        seed = int(seed)
    if type(seed) is not int:
        raise ValueError(f"{place}: {seed!r}: a stage with seeds needs a number")
    return seed


def _renamed(value: Any, copies: dict[str, int], number: int) -> Any:
    """Replace ${NAME} of repeated stages by the run of this number."""
    if isinstance(value, dict):
        return {key: _renamed(item, copies, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, copies, number) for item in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda m: f"${{{copy_name(m[1], number)}}}" if copies.get(m[1], 1) > 1 else m[0], value)


def _with_copies(table: Any, copies: dict[str, int]) -> Any:
    """Write out the runs of the table's stages with several seeds."""
    rows = table.get("rows") if isinstance(table, dict) else None
    if not isinstance(rows, dict):
        return table  # the fields' own checks report the mistake

    def runs_of(stage: Any) -> Any:
        return [copy_name(stage, n) for n in range(copies.get(stage, 1))] if isinstance(stage, str) else stage

    filled = {
        name: {key: runs_of(stage) for key, stage in row.items()} if isinstance(row, dict) else row
        for name, row in rows.items()
    }
    return {**table, "rows": filled}


class ReportConfig(CommandConfig):
    """Write report.html for a pipeline or a single run: gain, curves, tables, images, settings, machine and cost."""

    runs: Path
    """folder with the run directories of a pipeline, or one run directory"""
    output: Path = Path("report")
    """folder of the page; default: `report` inside `runs`"""
    pipeline: Path | None = None
    """YAML file of the pipeline, for the order of stages and the rows of the table; null: the copy recorded in `runs`"""

    @model_validator(mode="before")
    @classmethod
    def _beside_the_runs(cls, values: Any) -> Any:
        if isinstance(values, dict) and "output" not in values and isinstance(values.get("runs"), str | Path):
            return {**values, "output": Path(values["runs"]) / "report"}
        return values

    def inputs(self) -> dict[str, Path]:
        results = sorted(file for file in self.runs.glob("*/result.json") if file.parent != self.output)
        files = {f"runs.{file.parent.name}": file for file in results}
        if (self.runs / "result.json").is_file():
            files["runs"] = self.runs / "result.json"
        return files | ({"pipeline": self.pipeline} if self.pipeline else {})
