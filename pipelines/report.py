"""ENTRY: write a self-contained HTML report of a pipeline or a single run from its run directories.

    python pipelines/report.py --runs runs/quickstart

It reads only files that the stages wrote (result.json, metrics.jsonl, analysis.json, label_audit.json, pictures/, config.yaml, environment.json and
others). Stages that have not run or not finished are marked as such. The page loads nothing from the network. Does not import torch.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.config import PipelineConfig, ReportConfig, RowConfig, TableConfig
from ssld.pipelines.folder import inside, rebased, shown
from ssld.pipelines.reports.blocks import StageFolder, blocks_of, read_evaluations, stage_folders, stage_views
from ssld.pipelines.reports.budget import Budget
from ssld.pipelines.reports.charts import COLORS, Chart, precision_recall
from ssld.pipelines.reports.gains import MEASURES, capitalized, gains, signed
from ssld.pipelines.reports.photos import ComparedPhotos, Evaluation, Photos, compare
from ssld.pipelines.reports.provenance import alone, brought, compared, start
from ssld.pipelines.reports.stage_view import StageView, mean_curve, percent, read_json
from ssld.pipelines.reports.table import (
    COLUMNS,
    NONE,
    Row,
    evaluated,
    further,
    gain,
    intervals_note,
    read_record,
    table_rows,
)
from ssld.pipelines.runner.stages import read_pipeline
from ssld.shared.config.command import run_command
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import RunDir
from ssld.shared.wording import FEW_IMAGES, count, duration

_TEMPLATE = "report.html.jinja"
# Deleted in this order.
_OWN_FILES = ("report.html", "result.json", "log.txt", "error.json", "config.yaml", "environment.json")
MANY_CLASSES = 20
"""more classes are folded on the page"""
_EXTREMES = 5  # classes with the largest and the smallest differences, of many
_OF_TABLE = (
    "rows", "columns", "differences", "gains", "compared", "starts", "triples", "table_gain", "size", "intervals_note", "seeds", "bars", "comparison",
)  # fmt: skip
"""names in the template of what `_of_table` returns"""
_COLUMN_ORDER = (2, 3, 0, 1)  # of a row's values on the page: AP first, which a phone would cut off behind the others


@dataclass(frozen=True)
class Bar:
    """One bar: name and value of a row, length from 0 to 100, ends of its interval from 0 to 100, number of its color."""

    name: str
    text: str
    length: float
    ends: tuple[float, float] | None
    series: int


@dataclass(frozen=True)
class Bars:
    """Bar chart of the rows of the table by one measure."""

    measure: str
    bars: list[Bar]
    alt: str


@dataclass(frozen=True)
class Comparison:
    """Detectors of several rows side by side: AP of each class, and the difference between the two rows of `table.gain`.

    Attributes:
        classes: (class, its number of objects, AP in each row, and last the difference if there is one), all as text.
        extremes: of many classes, those with the largest and smallest difference; else empty.
    """

    names: list[str]
    classes: list[tuple[str, list[str]]]
    extremes: list[tuple[str, list[str]]]
    has_gain: bool
    chart: Chart | None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ReportConfig, report, argv, program="report.py", torch_threads=False)


def report(config: ReportConfig) -> None:
    """Write report.html. Raises UserError if `runs` holds no run directory."""
    if not config.runs.is_dir():
        raise UserError(f"runs: {config.runs}: no such folder")
    single = (config.runs / "config.yaml").is_file()
    record = read_record(config.runs)
    of_runs = record or (read_record(config.runs.absolute().parent) if single else None)
    pipeline = read_pipeline(config.pipeline) if config.pipeline else record.pipeline if record else None
    if pipeline is None and not single and not _runs_below(config.runs):
        raise UserError(
            f"runs: {config.runs}: neither a run directory nor a folder of them; give the --output of a run or of a pipeline"
        )
    title = config.pipeline.stem if config.pipeline else record.name if record else config.runs.resolve().name
    with inside((of_runs and of_runs.folder) or Path.cwd()) as moved:  # where paths in the stages' records begin
        if moved:
            paths = {key: rebased(path) for key in ("runs", "output", "pipeline") if (path := getattr(config, key))}
            config = config.model_copy(update=paths)
        _forget_last(config.output)
        run = RunDir(config, "report")
        page = render(pipeline, config.runs, title=title, smoke=bool(record and record.smoke))
        file = run.path / "report.html"
        write_atomically(file, page.encode(errors="replace").decode())  # names in JSON may hold lone surrogates
        run.finish({}, [file])
        run.log(f"wrote {shown(file)}")


def render(pipeline: PipelineConfig | None, runs: Path, *, title: str, smoke: bool = False) -> str:
    """Render the page as HTML.

    Args:
        pipeline: pipeline whose run directories are in `runs`; None shows every run directory in `runs`.
        runs: a folder of run directories, or a run directory.
        title: title of the page.
        smoke: whether the numbers come from a run at the smallest sizes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    table = with_every_detector(pipeline) if pipeline else None
    photos = Photos(Budget())
    folders = _folders(pipeline, runs)
    evaluations = read_evaluations(folders)
    of_table = _of_table(table, runs, evaluations, photos) if table else dict.fromkeys(_OF_TABLE)
    stages = stage_views(folders, evaluations, photos, first=_compared_stages(table))
    environment = Environment(
        loader=PackageLoader("ssld.pipelines", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(count=count, duration=duration, percent=percent, signed=signed, capitalized=capitalized)
    return environment.get_template(_TEMPLATE).render(
        **of_table,
        title=title,
        runs=runs,
        smoke=smoke,
        few_images=FEW_IMAGES,
        written=time.strftime("%Y-%m-%d %H:%M"),
        photos=photos.embedded,
        stages=stages,
        blocks=blocks_of(folders, stages),
        many_classes=MANY_CLASSES,
        opened=_opened(table, stages),
        seconds=sum(stage.seconds or 0 for stage in stages),
        images_seen=sum(stage.images_seen or 0 for stage in stages),
        finished=sum(stage.status == "finished" for stage in stages),
    )


def _of_table(table: TableConfig, runs: Path, evaluations: Mapping[str, Evaluation], photos: Photos) -> dict[str, Any]:
    """Return what the page says about the rows of a table, by its name in the template; the photos that two rows differ on are embedded first."""
    triples = _compared_photos(table, evaluations, photos)
    rows, difference, more = table_rows(table, runs), gain(table, runs), further(table, runs)
    filled = [0, *(n + 1 for n in _COLUMN_ORDER if any(row.values[n] is not None for row in rows))]
    one = alone(table, runs)
    return {
        "rows": [[_cells(row, lambda value: percent(max(value, 0)))[n] for n in filled] for row in rows],
        "columns": [COLUMNS[n] for n in filled],
        "differences": [
            [_cells(row, signed_percent)[n] for n in filled]
            for row in ([difference] if difference else []) + list(more.values())
        ],
        "gains": gains(table, rows, difference, more, _brought(table, more, runs)),
        "compared": " ".join(one) if one else compared(table, runs),
        "starts": {name: start(row, runs) for name, row in table.rows.items()},
        "triples": triples if triples and (triples.gained or triples.lost) else None,
        "table_gain": table.gain,
        "size": evaluated(table, runs),
        "intervals_note": capitalized(intervals_note(table)),
        "seeds": max(len(stages) for row in table.rows.values() for stages in (row.classifier, row.detector)),
        "bars": [bars for title, column in MEASURES if (bars := _bars(title, rows, column))],
        "comparison": _comparison_if_any(table, runs),
    }


def signed_percent(value: float) -> str:
    """Format a fraction in percent, with a sign and without the percent sign."""
    return signed(100 * value)


def _cells(row: Row, text: Callable[[float], str]) -> list[tuple[str, str | None]]:
    """Return (text, 95 % interval or None) of each cell of a row."""
    pairs = zip(row.values, row.intervals, strict=True)
    cells = [
        (NONE, None) if value is None else (text(value), f"{text(i.low)} to {text(i.high)}" if i else None)
        for value, i in pairs
    ]
    return [(row.name, None), *cells]


def _brought(table: TableConfig, more: Iterable[tuple[str, str]], runs: Path) -> dict[tuple[str, str], str | None]:
    """Return what the first row of each compared pair had and the second had not, in words."""
    pairs = [*([table.gain] if table.gain else []), *more]
    return {pair: brought(table.rows[pair[0]], table.rows[pair[1]], runs) for pair in pairs}


def _bars(measure: str, rows: list[Row], column: int) -> Bars | None:
    """Return the bars of one measure, from 0 to the largest value or end of an interval."""
    present = [(n, row, value) for n, row in enumerate(rows) if (value := row.values[column]) is not None]
    if not present:
        return None
    tops = [interval.high for _, row, _ in present if (interval := row.intervals[column])]
    scale = 100 / (max([*tops, *(value for _, _, value in present)]) or 1)
    bars = []
    for n, row, value in present:
        interval = row.intervals[column]
        ends = (max(0, scale * interval.low), scale * interval.high) if interval else None
        bars.append(Bar(row.name, percent(value), max(0, scale * value), ends, n % COLORS))
    words = [
        f"{row.name} {percent(value)}"
        + (f" ({percent(interval.low)} to {percent(interval.high)})" if (interval := row.intervals[column]) else "")
        for _, row, value in present
    ]
    brackets = ", with 95 % intervals in brackets" if tops else ""
    return Bars(measure, bars, f"{measure} in %{brackets}: {', '.join(words)}")


def _comparison_if_any(table: TableConfig, runs: Path) -> Comparison | None:
    """Return the comparison of the detectors; None if there are fewer than two, or their files are damaged, which their stages report."""
    try:
        return _comparison(table, runs)
    except MALFORMED:
        return None


def _comparison(table: TableConfig, runs: Path) -> Comparison | None:
    """Compare the detectors of up to six rows, those of `table.gain` first."""
    names = [*(table.gain or ()), *(name for name in table.rows if name not in (table.gain or ()))]
    results = {}
    for name in names:
        stage = next(iter(table.rows[name].detector), None)
        if stage and (per_class := read_json(runs / stage / "result.json").get("metrics", {}).get("per_class")):
            results[name] = per_class
    compared = dict(list(results.items())[:COLORS])
    if len(compared) < 2:
        return None
    analyses = {name: read_json(runs / table.rows[name].detector[0] / "analysis.json") for name in compared}
    objects = {row["class"]: row["objects"] for row in next(iter(analyses.values())).get("classes") or []}
    classes = [
        (
            label,
            [
                f"{objects[label]:,}" if label in objects else NONE,
                *(percent(one.get(label)) for one in compared.values()),
            ],
        )
        for label in next(iter(compared.values()))
    ]
    extremes: list[tuple[str, list[str]]] = []
    has_gain = bool(table.gain and set(table.gain) <= set(compared))
    if table.gain and has_gain:
        better, base = (compared[name] for name in table.gain)
        pairs = [(better.get(label), base.get(label)) for label, _ in classes]
        differences = [None if a is None or b is None else 100 * (a - b) for a, b in pairs]
        for (_, cells), difference in zip(classes, differences, strict=True):
            cells.append(NONE if difference is None else signed(difference))
        if len(classes) > MANY_CLASSES:
            known_rows = [n for n, difference in enumerate(differences) if difference is not None]
            ranked = sorted(known_rows, key=lambda n: -(differences[n] or 0.0))
            extremes = [classes[n] for n in dict.fromkeys([*ranked[:_EXTREMES], *ranked[-_EXTREMES:]])]
    means = {name: mean_curve(analysis) for name, analysis in analyses.items()}
    known = {name: mean for name, mean in means.items() if mean is not None}
    known = known if any(any(mean[1]) for mean in known.values()) else {}
    chart = None
    if known:
        recall = next(iter(known.values()))[0]
        chart = precision_recall("the detectors", recall, {name: mean[1] for name, mean in known.items()}, None)
    return Comparison(list(compared), classes, extremes, has_gain, chart)


def with_every_detector(pipeline: PipelineConfig) -> TableConfig | None:
    """Return the pipeline's table with a row for each evaluated detector that no row names, called as its stage; None without a table."""
    table = pipeline.table
    if table is None:
        return None
    named = {stage for row in table.rows.values() for stage in row.detector}
    others = [
        name for name, stage in pipeline.stages.items() if stage.command == "evaluate_detector" and name not in named
    ]
    more = {name: RowConfig(detector=(name,)) for name in others if name not in table.rows}
    return table.model_copy(update={"rows": {**table.rows, **more}})


def _compared_photos(
    table: TableConfig, evaluations: Mapping[str, Evaluation], photos: Photos
) -> ComparedPhotos | None:
    """Compare the photos of the two rows of `table.gain`, by their first seed; None if the photos of one are not at hand."""
    if table.gain is None:
        return None
    stages = [next(iter(table.rows[name].detector), "") for name in table.gain]
    if not all(stage in evaluations for stage in stages):
        return None
    better, base = (evaluations[stage] for stage in stages)
    return compare(better, base, table.gain, photos)


def _folders(pipeline: PipelineConfig | None, runs: Path) -> list[StageFolder]:
    """Return the stages in the pipeline's order; without a pipeline, the run directories in the order of their start."""
    if pipeline is None:
        found = [runs] if (runs / "config.yaml").is_file() else _runs_below(runs)
        return stage_folders([(run.resolve().name, None, run) for run in found])
    stages = [
        (name, stage.command, runs / name) for name, stage in pipeline.stages.items() if stage.command != "report"
    ]
    return stage_folders(stages)


def _compared_stages(table: TableConfig | None) -> list[str]:
    """Return the stages of the two rows of `table.gain`, which get their images first."""
    rows = [table.rows[name] for name in (table.gain or ())] if table else []
    return [stage for row in rows for stage in (*row.detector, *row.classifier)]


def _opened(table: TableConfig | None, stages: Sequence[StageView]) -> str | None:
    """Return the stage whose best and worst images are unfolded: that of the better row, else the first that has any."""
    candidates = [stage.name for stage in stages if stage.pairs]
    better = table.rows[table.gain[0]].detector if table and table.gain else ()
    return next((name for name in (*better, *candidates) if name in candidates), None)


def _runs_below(folder: Path) -> list[Path]:
    """Return the run directories in a folder except reports, in the order of their start."""
    started = {
        entry: read_json(entry / "environment.json") for entry in folder.iterdir() if (entry / "config.yaml").is_file()
    }
    runs = [entry for entry, record in started.items() if record.get("command") != "report"]
    return sorted(runs, key=lambda entry: (str(started[entry].get("started", "")), entry.name))


def _forget_last(output: Path) -> None:
    """Delete an older report in the output folder: reports are cheap and never an input."""
    if read_json(output / "environment.json").get("command") == "report":
        for name in _OWN_FILES:
            (output / name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
