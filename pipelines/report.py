"""ENTRY: write one self-contained HTML page on a pipeline, or on a single run, from its run directories.

    python pipelines/report.py --runs runs/quickstart

It only reads what the stages left behind (result.json, metrics.jsonl, analysis.json, pictures, config.yaml, environment.json): no other script calls
it. Stages that have not run, or not to their end, are shown as such. The page loads nothing from elsewhere. Does not import torch.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.config import PipelineConfig, ReportConfig, TableConfig
from ssld.pipelines.reports.charts import COLOURS, Chart, precision_recall
from ssld.pipelines.reports.stage_view import Room, StageView, mean_curve, percent, read_json, view
from ssld.pipelines.reports.table import COLUMNS, Row, gain, gain_cells, read_record, table_rows
from ssld.pipelines.runner.stages import read_pipeline
from ssld.shared.config.command import run_command
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import RunDir
from ssld.shared.wording import count, duration

_TEMPLATE = "report.html.jinja"
_OWN_FILES = (
    "report.html",
    "result.json",
    "log.txt",
    "error.json",
    "config.yaml",
    "environment.json",
)  # in this order deleted
_MEASURES = (("detector AP", 2), ("top-1", 0))  # title, column of a row's values


@dataclass(frozen=True)
class Gain:
    """What one backbone is worth over another by one measure, and over the table's other rows."""

    measure: str
    points: float
    better: str
    base: str
    others: list[tuple[str, float]]

    @property
    def text(self) -> str:
        """The points with their sign."""
        return signed(self.points)


@dataclass(frozen=True)
class Bar:
    """One bar: a row's value in percent, its length from 0 to 100, its colour."""

    name: str
    text: str
    length: float
    series: int


@dataclass(frozen=True)
class Bars:
    """The rows of the table by one measure."""

    measure: str
    bars: list[Bar]
    alt: str


@dataclass(frozen=True)
class Comparison:
    """Detectors of several rows of the table beside each other: AP of each class, and the difference that the pipeline asks for."""

    names: list[str]
    classes: list[tuple[str, list[str]]]
    gains: list[str] | None
    chart: Chart | None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ReportConfig, report, argv, program="report.py", torch_threads=False)


def report(config: ReportConfig) -> None:
    """Write report.html. Raises UserError when there is no pipeline or no folder of runs."""
    if not config.runs.is_dir():
        raise UserError(f"runs: {config.runs}: no such folder")
    record = read_record(config.runs)
    pipeline = read_pipeline(config.pipeline) if config.pipeline else record.pipeline if record else None
    single = (config.runs / "config.yaml").is_file()
    if pipeline is None and not single and not _runs_below(config.runs):
        raise UserError(
            f"runs: {config.runs}: neither a run directory nor a folder of them; give the --output of a run or of a pipeline"
        )
    _forget_last(config.output)
    run = RunDir(config, "report")
    title = config.pipeline.stem if config.pipeline else record.name if record else config.runs.resolve().name
    page = render(pipeline, config.runs, title=title, smoke=bool(record and record.smoke))
    file = run.path / "report.html"
    write_atomically(file, page.encode(errors="replace").decode())  # names in JSON may hold halves of characters
    run.finish({}, [file])
    run.log(f"wrote {file}")


def render(pipeline: PipelineConfig | None, runs: Path, *, title: str, smoke: bool = False) -> str:
    """The page.

    Args:
        pipeline: whose stages' run directories lie in `runs`; None: what lies there tells.
        runs: a folder of run directories, or a run directory.
        title: of the page.
        smoke: the numbers are those of a trial at the smallest sizes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    table = pipeline.table if pipeline else None
    stages = _stages(pipeline, runs)
    rows = table_rows(table, runs) if table else []
    difference = gain(table, rows) if table else None
    filled = [0, *(n + 1 for n in range(len(COLUMNS) - 1) if any(row.values[n] is not None for row in rows))]
    environment = Environment(
        loader=PackageLoader("ssld.pipelines", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(count=count, duration=duration, percent=percent)
    return environment.get_template(_TEMPLATE).render(
        title=title,
        runs=runs,
        smoke=smoke,
        written=time.strftime("%Y-%m-%d %H:%M"),
        columns=[COLUMNS[n] for n in filled],
        rows=[[row.cells()[n] for n in filled] for row in rows],
        gain=[gain_cells(difference)[n] for n in filled] if difference else None,
        gains=gains(table, rows) if table else [],
        bars=[bars for title, column in _MEASURES if (bars := _bars(title, rows, column))],
        comparison=_comparison_if_any(table, runs) if table else None,
        stages=stages,
        opened=_opened(table, stages),
        seconds=sum(stage.seconds or 0 for stage in stages),
        images_seen=sum(stage.images_seen or 0 for stage in stages),
        finished=sum(stage.status == "finished" for stage in stages),
    )


def gains(table: TableConfig, rows: list[Row]) -> list[Gain]:
    """What the pipeline's comparison says by each measure that both rows have; the other rows where they are few."""
    if table.gain is None:
        return []
    found = []
    for measure, column in _MEASURES:
        values = {row.name: value for row in rows if (value := row.values[column]) is not None}
        if not set(table.gain) <= set(values):
            continue
        better, base = table.gain
        others = [name for name in values if name not in table.gain]
        over = [(name, 100 * (values[better] - values[name])) for name in others] if len(others) <= 2 else []
        found.append(Gain(measure, 100 * (values[better] - values[base]), better, base, over))
    return found


def signed(points: float) -> str:
    """Points with one decimal and a sign; U+2212 is the minus that lines up with digits."""
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _bars(measure: str, rows: list[Row], column: int) -> Bars | None:
    values = [(row.name, value, n) for n, row in enumerate(rows) if (value := row.values[column]) is not None]
    if not values:
        return None
    longest = max(value for _, value, _ in values) or 1
    bars = [Bar(name, percent(value), 100 * value / longest, n % COLOURS) for name, value, n in values]
    return Bars(measure, bars, f"{measure} in %: " + ", ".join(f"{bar.name} {bar.text}" for bar in bars))


def _comparison_if_any(table: TableConfig, runs: Path) -> Comparison | None:
    """The detectors beside each other; None where there are not two, or their records are damaged, which their stages say."""
    try:
        return _comparison(table, runs)
    except MALFORMED:
        return None


def _comparison(table: TableConfig, runs: Path) -> Comparison | None:
    """The detectors of up to six rows, those that the pipeline compares first."""
    names = [*(table.gain or ()), *(name for name in table.rows if name not in (table.gain or ()))]
    found = {}
    for name in names:
        stage = table.rows[name].detector
        if stage and (per_class := read_json(runs / stage / "result.json").get("metrics", {}).get("per_class")):
            found[name] = per_class
    shown = dict(list(found.items())[:COLOURS])
    if len(shown) < 2:
        return None
    classes = [
        (label, [percent(per_class.get(label)) for per_class in shown.values()]) for label in next(iter(shown.values()))
    ]
    differences = None
    if table.gain and set(table.gain) <= set(shown):
        better, base = (shown[name] for name in table.gain)
        pairs = [(better.get(label), base.get(label)) for label, _ in classes]
        differences = ["-" if a is None or b is None else signed(100 * (a - b)) for a, b in pairs]
    means = {name: mean_curve(read_json(runs / str(table.rows[name].detector) / "analysis.json")) for name in shown}
    known = {name: mean for name, mean in means.items() if mean is not None}
    chart = None
    if known:
        recall = next(iter(known.values()))[0]
        chart = precision_recall("the detectors", recall, {name: mean[1] for name, mean in known.items()}, None)
    return Comparison(list(shown), classes, differences, chart)


def _stages(pipeline: PipelineConfig | None, runs: Path) -> list[StageView]:
    """The stages in the pipeline's order; without one, the run directories in the order of their start."""
    room = Room()
    if pipeline is None:
        found = [runs] if (runs / "config.yaml").is_file() else _runs_below(runs)
        return [view(run.resolve().name, None, run, room) for run in found]
    names = [name for name, stage in pipeline.stages.items() if stage.command != "report"]
    table = pipeline.table
    rows = [table.rows[name] for name in (table.gain if table and table.gain else ())] if table else []
    first = [stage for row in rows for stage in (row.detector, row.classifier) if stage]
    # What the page is about comes first where there is not room for all pictures.
    views = {
        name: view(name, pipeline.stages[name].command, runs / name, room)
        for name in sorted(names, key=lambda name: first.index(name) if name in first else len(first))
    }
    return [views[name] for name in names]


def _opened(table: TableConfig | None, stages: list[StageView]) -> str | None:
    """The stage whose best and worst pictures are shown at once: that of the better row, else the first that has any."""
    shown = [stage.name for stage in stages if stage.pairs]
    wanted = table.rows[table.gain[0]].detector if table and table.gain else None
    return wanted if wanted in shown else next(iter(shown), None)


def _runs_below(folder: Path) -> list[Path]:
    """The run directories in a folder but for reports, by their start."""
    started = {
        entry: read_json(entry / "environment.json") for entry in folder.iterdir() if (entry / "config.yaml").is_file()
    }
    found = [entry for entry, record in started.items() if record.get("command") != "report"]
    return sorted(found, key=lambda entry: (str(started[entry].get("started", "")), entry.name))


def _forget_last(output: Path) -> None:
    """A report is cheap and never an input: an older one in the same folder makes way."""
    if read_json(output / "environment.json").get("command") == "report":
        for name in _OWN_FILES:
            (output / name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
