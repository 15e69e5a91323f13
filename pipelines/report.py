"""ENTRY: write one self-contained HTML page on a pipeline from its run directories.

    python pipelines/report.py --pipeline pipelines/quickstart.yaml --runs runs/quickstart --output runs/quickstart/report

It only reads what the stages left behind (result.json, metrics.jsonl, config.yaml, environment.json): no other script calls it. Stages that have
not run, or not to their end, are shown as such. The page loads nothing from elsewhere. Does not import torch.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.charts import Chart, bars, curves
from pipelines.config import PipelineConfig, ReportConfig, StageConfig
from pipelines.stages import KINDS, read_pipeline
from pipelines.table import COLUMNS, gain, gain_cells, table_rows
from shared.command import run_command
from shared.errors import UserError
from shared.run_dir import RunDir, read_metrics, read_result, write_atomically

_TEMPLATE = "report.html.jinja"
_OWN_FILES = ("report.html", "result.json", "config.yaml", "environment.json", "log.txt", "error.json")
_FRACTIONS = ("top1", "top5", "agreement", "teacher_top1", "teacher_top5", "AP", "AR")


@dataclass(frozen=True)
class StageView:
    """What the page says about one stage."""

    name: str
    command: str
    status: str
    minutes: float | None
    metrics: list[tuple[str, str]]
    per_class: list[tuple[str, str]]
    chart: Chart | None
    line: str
    config: str
    environment: list[tuple[str, str]]
    unreadable: int


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ReportConfig, report, argv, program="report.py", torch_threads=False)


def report(config: ReportConfig) -> None:
    """Write report.html. Raises UserError when there is no pipeline or no folder of runs."""
    pipeline = read_pipeline(config.pipeline)
    if not config.runs.is_dir():
        raise UserError(f"runs: {config.runs}: no such folder")
    _forget_last(config.output)
    run = RunDir(config, "report")
    page = render(pipeline, config.runs, title=config.pipeline.stem)
    file = run.path / "report.html"
    write_atomically(file, page)
    run.finish({}, [file])
    run.log(f"wrote {file}")


def render(pipeline: PipelineConfig, runs: Path, *, title: str) -> str:
    """The page for a pipeline whose stages' run directories lie in `runs`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    stages = [_view(name, stage, runs / name) for name, stage in pipeline.stages.items() if stage.command != "report"]
    rows = table_rows(pipeline.table, runs) if pipeline.table else []
    difference = gain(pipeline.table, rows) if pipeline.table else None
    environment = Environment(
        loader=PackageLoader("pipelines", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=title,
        runs=runs,
        written=time.strftime("%Y-%m-%d %H:%M"),
        columns=COLUMNS,
        rows=[row.cells() for row in rows],
        gain=gain_cells(difference) if difference else None,
        compared=pipeline.table.gain if pipeline.table else None,
        bars=bars(rows),
        stages=stages,
        minutes=sum(stage.minutes or 0 for stage in stages),
        finished=sum(stage.status == "finished" for stage in stages),
    )


def _view(name: str, stage: StageConfig, run: Path) -> StageView:
    result = read_result(run) if run.is_dir() else None
    metrics = read_metrics(run)
    environment = _json(run / "environment.json")
    config, quarantine = run / "config.yaml", run / "quarantine.txt"
    values: dict[str, Any] = result["metrics"] if result else {}
    per_class = values.get("per_class") or {}
    script = KINDS[stage.command].script
    return StageView(
        name=name,
        command=stage.command,
        status=_status(run, result, metrics),
        minutes=result["seconds"] / 60 if result else None,
        metrics=[(key, _number(key, value)) for key, value in values.items() if not isinstance(value, dict | list)],
        per_class=[(label, _number("AP", value)) for label, value in per_class.items()],
        chart=curves(name, metrics),
        line=shlex.join(["python", script, *environment["arguments"]]) if "arguments" in environment else "",
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=_environment(environment),
        unreadable=len(quarantine.read_text(encoding="utf-8").splitlines()) if quarantine.is_file() else 0,
    )


def _status(run: Path, result: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> str:
    if result:
        return "finished"
    if not (run / "config.yaml").is_file():
        return "not run"
    return f"unfinished, at step {metrics[-1]['step']}" if metrics else "unfinished"


def _environment(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions as (name, value) lines."""
    keys = ("started", "machine", "python", "cores", "processes", "threads")
    lines = [(key, str(record[key])) for key in keys if record.get(key) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version)
    return [*lines, ("versions", versions)] if versions else lines


def _number(key: str, value: Any) -> str:
    """A metric for people: fractions in percent, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float) and key.startswith(_FRACTIONS):
        return f"{100 * value:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _forget_last(output: Path) -> None:
    """A report is cheap and never an input: an older one in the same folder makes way."""
    if _json(output / "environment.json").get("command") == "report":
        for name in _OWN_FILES:
            (output / name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
