"""The shape of a pipeline's YAML file, and the settings of the report. Does not import torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import Processes
from ssld.shared.config.settings import CommandConfig, Config, did_you_mean

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
    "train",
    "evaluate_detector",
    "export_detector",
    "predict",
    "report",
]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings; lists are values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class StageConfig(Config):
    """One command of a pipeline; it writes into `<output>/<name of the stage>`."""

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


class RowConfig(Config):
    """Stages that one row of the table takes its numbers from."""

    classifier: str | None = None
    """name of the stage that reports top-1 accuracy and agreement"""
    detector: str | None = None
    """name of the stage that reports AP"""


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
            return values  # the fields' own checks say what is wrong
        filled: dict[str, Any] = {}
        for name, stage in stages.items():
            other = stage.get("like")
            if other is not None and other not in filled:
                raise ValueError(
                    f"stages.{name}.like: {other}: no earlier stage of this name{did_you_mean(str(other), list(filled))}"
                )
            base = filled.get(other, {})
            settings = [part.get("set", {}) for part in (base, stage)]
            if all(isinstance(part, dict) for part in settings):
                stage = {**base, **stage, "set": dict(flatten(settings[0])) | dict(flatten(settings[1]))}
            filled[name] = stage
        return {**values, "stages": filled}

    @model_validator(mode="after")
    def _table_names_stages(self) -> Self:
        if self.table is None:
            return self
        named = [stage for row in self.table.rows.values() for stage in (row.classifier, row.detector) if stage]
        for stage in named:
            if stage not in self.stages:
                raise ValueError(f"table: {stage}: no such stage; stages: {', '.join(self.stages)}")
        for row in self.table.gain or ():
            if row not in self.table.rows:
                raise ValueError(f"table.gain: {row}: no such row; rows: {', '.join(self.table.rows)}")
        return self


class ReportConfig(CommandConfig):
    """Write report.html on a pipeline or a single run: gain, curves, tables, images, settings, machine and cost."""

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
