"""Settings classes of a pipeline's YAML file and of the report. Does not import torch."""

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
    """Yield (dotted key, value) for nested settings; lists count as values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class StageConfig(Config):
    """One command of a pipeline. It writes into `<output>/<name of the stage>`."""

    command: CommandName
    like: str | None = None
    """an earlier stage whose command, file and settings this one has too, but for what it says itself"""
    config: str | None = None
    """YAML file of the command"""
    set: dict[str, Any] = {}
    """settings laid on that file, by dotted key, as flags would"""
    processes: Processes = 1
    """processes on this machine"""


class RowConfig(Config):
    """Stages that supply the numbers of one row of the table."""

    classifier: str | None = None
    """stage that reports top-1 and agreement"""
    detector: str | None = None
    """stage that reports AP"""


class TableConfig(Config):
    """The table printed at the end."""

    rows: dict[str, RowConfig] = Field(min_length=1)
    gain: tuple[str, str] | None = None
    """(row, row it is compared with)"""


class PipelineConfig(Config):
    """Stages in the order they run in, and the table of their results."""

    output: Path
    """folder of all the stages' run directories"""
    variables: dict[str, str | int | float | None] = {}
    """values for ${name}; one without a value has to be given as --variables.NAME"""
    stages: dict[str, StageConfig] = Field(min_length=1)
    smoke: dict[CommandName, dict[str, Any]] = {}
    """settings laid on every stage of a command under --smoke: its smallest size"""
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
    """Write report.html for a pipeline or a single run: gain, curves, tables, images, settings, machine and cost."""

    runs: Path
    """folder that holds the run directories of a pipeline, or one run directory"""
    output: Path = Path("report")
    """folder of the page; if it is not given, `report` inside `runs`"""
    pipeline: Path | None = None
    """the pipeline's YAML file, for the order of the stages and the rows of the table; null: as the pipeline recorded it in `runs`"""

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
