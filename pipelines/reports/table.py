"""Table at the end of a pipeline: scores of each backbone as a classifier, and of each detector.

Numbers come from the stages' result.json, as fractions, and are printed in percent. A number that no stage measured is printed as "-". Does not
import torch.

Differences have 95 % intervals. If both rows have several runs: over their seeds (Student's t, runs paired by number), which does not cover the
choice of the evaluation images: all seeds are evaluated on the same ones. Otherwise for detectors a
paired bootstrap over the evaluation images, measured by `evaluate.py --compare`; for classifiers the interval of two independent proportions
(Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10), which is too wide rather than too narrow,
because both are evaluated on the same images. Rows with different runs have a difference of means without an interval.
"""

import json
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssld.pipelines.config import PipelineConfig, RowConfig, TableConfig
from ssld.pipelines.reports.audit_view import images_of
from ssld.pipelines.reports.provenance import alone, failed_teachers, images_read
from ssld.shared.config.validation import validate
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import read_result
from ssld.shared.wording import FEW_IMAGES, count, padded, printable, verdict, width_of

COLUMNS = ("model", "top-1", "agreement", "detector AP", "AP50")
_CLASSIFIER, _DETECTOR = ("top1", "agreement"), ("AP", "AP50")
NONE = "-"
CLAIMS = {"better": "good", "worse": "bad"}
"""verdicts that claim a difference, and their names on the page"""
FEW_OBJECTS = 100
"""objects and photos of an evaluation below which AP is said to be unsure; about: the interval says how unsure"""
_MOST = 1e9  # larger numbers are no metric
_NO_SPREAD = 1e-9  # rounding errors of equal values are smaller
_Z = 1.96  # 97.5th percentile of the normal distribution
# The same of Student's t with 1 to 9 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_ONE_TRAINING = "; one training of each: another seed can change it by more"
RECORD = "pipeline.json"  # beside the run directories
SMOKE = "smoke sizes: these numbers only show that everything runs"


@dataclass(frozen=True)
class Record:
    """Record of a pipeline beside its run directories, from which a report can be written with no other input."""

    name: str
    smoke: bool
    pipeline: PipelineConfig
    folder: Path | None = None
    """folder that the relative paths in the records of the stages begin in; None: not recorded, as by version 0.2, or the runs were moved away"""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a fraction or a difference.

    Attributes:
        basis: how it was computed, in words.
        images: number of evaluated images; None if unknown.
        identical: whether the two compared evaluations have the same detections.
    """

    low: float
    high: float
    basis: str
    images: int | None = None
    identical: bool = False

    @property
    def verdict(self) -> str:
        """Conclusion from the interval of a difference; only `better` and `worse` claim one."""
        return verdict(self.low, self.high, self.images, identical=self.identical)


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, and for each column after the first a fraction and its interval, or None.

    Attributes:
        notes: for each column the reason why a difference over several runs has no interval, or None.
    """

    name: str
    values: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...] = (None,) * (len(COLUMNS) - 1)
    notes: tuple[str | None, ...] = (None,) * (len(COLUMNS) - 1)

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        return (self.name, *(NONE if value is None else f"{100 * value:.1f}" for value in self.values))


def table_rows(table: TableConfig, output: Path) -> list[Row]:
    """Return the rows, with None for stages in `output` that are not finished; means over the finished seeds."""
    rows = []
    for name, row in table.rows.items():
        values: list[float | None] = []
        intervals: list[Interval | None] = []
        for key, stages in _measures(row):
            runs = _runs(output, stages, key)
            numbers = [value for value, _ in runs.values()]
            values.append(statistics.fmean(numbers) if numbers else None)
            intervals.append(
                over_seeds(numbers) if len(numbers) > 1 else _of_one_run(key, [result for _, result in runs.values()])
            )
        rows.append(Row(name, tuple(values), tuple(intervals)))
    return rows


def gain(table: TableConfig, output: Path) -> Row | None:
    """Return the difference between the two rows of `table.gain` with its intervals; None without them."""
    return difference(table, output, table.gain) if table.gain else None


def further(table: TableConfig, output: Path) -> dict[tuple[str, str], Row]:
    """Return the differences that were measured beside the gain, by (row, the row that it is compared with).

    A detector's evaluation names another one's detections (`compare`): the row of that evaluation is the other one of the pair.
    """
    stages = {row.detector[0]: name for name, row in table.rows.items() if row.detector}
    pairs = []
    for stage, name in stages.items():
        compared = (_result(output, stage) or {}).get("metrics", {}).get("compared")
        file = compared.get("file") if isinstance(compared, dict) else None
        base = stages.get(Path(file).parent.name) if isinstance(file, str) else None
        if base and base != name and (name, base) != table.gain:
            pairs.append((name, base))
    rows = {pair: difference(table, output, pair) for pair in pairs}
    return {pair: row for pair, row in rows.items() if any(row.intervals)}


def difference(table: TableConfig, output: Path, pair: tuple[str, str]) -> Row:
    """Return the difference between two rows, the first minus the second, with its intervals."""
    values: list[float | None] = []
    intervals: list[Interval | None] = []
    notes: list[str | None] = []
    better, base = (_measures(table.rows[name]) for name in pair)
    for (key, stages), (_, base_stages) in zip(better, base, strict=True):
        first, second = _runs(output, stages, key), _runs(output, base_stages, key)
        interval = note = None
        if first.keys() != second.keys():
            note = f"different {'runs' if len(first) == len(second) else 'numbers of runs'}: no interval"
        elif len(first) > 1:
            pairs = [(first[number], second[number]) for number in first]
            compared = [_compared(key, one[1], other[1]) for one, other in pairs]
            images = [one.images for one in compared if one and one.images is not None]
            images += [n for number in first if (n := images_of(output / stages[number])) is not None]
            interval = over_seeds([one[0] - other[0] for one, other in pairs], min(images, default=None))
            note = None if interval else "no spread over the seeds: no interval"
        elif first:
            number = next(iter(first))
            interval = _compared(key, first[number][1], second[number][1])
        means = [statistics.fmean(value for value, _ in runs.values()) for runs in (first, second) if runs]
        values.append(means[0] - means[1] if len(means) == 2 else None)
        intervals.append(interval)
        notes.append(note if len(means) == 2 else None)
    return Row(" - ".join(pair), tuple(values), tuple(intervals), tuple(notes))


def gain_cells(row: Row) -> tuple[str, ...]:
    """Return the row of differences as text, with signs."""
    return (row.name, *(NONE if value is None else f"{100 * value:+.1f}" for value in row.values))


def interval_cells(row: Row) -> tuple[str, ...]:
    """Return the intervals of a row of differences as text."""
    texts = (NONE if i is None else f"{100 * i.low:+.1f} to {100 * i.high:+.1f}" for i in row.intervals)
    return ("95 % interval", *texts)


@dataclass(frozen=True)
class Evaluated:
    """Size of the evaluation of the compared detectors; None for what is not recorded."""

    images: int | None
    objects: int | None

    @property
    def few(self) -> bool:
        """Whether AP on so few images or objects is unsure."""
        sizes = ((self.images, FEW_IMAGES), (self.objects, FEW_OBJECTS))
        return any(number is not None and number < least for number, least in sizes)

    @property
    def text(self) -> str:
        """Size in words."""
        sizes = ((self.images, "image"), (self.objects, "object"))
        parts = [count(number, what) for number, what in sizes if number is not None]
        unsure = ": too few to tell detectors apart unless they differ a lot"
        unsure += f" (below about {FEW_IMAGES} images or {FEW_OBJECTS} objects, AP is unsure)"
        return f"AP is measured on {' with '.join(parts)}{unsure if self.few else ''}"


def evaluated(table: TableConfig, output: Path) -> Evaluated | None:
    """Return the size of the evaluation of the first compared detector; None where nothing is recorded."""
    for name in table.gain or table.rows:
        for stage in table.rows[name].detector:
            metrics = (_result(output, stage) or {}).get("metrics", {})
            counts, compared = metrics.get("at_threshold"), metrics.get("compared")
            known = isinstance(counts, dict) and all(type(counts.get(key)) is int for key in ("right", "missed"))
            objects = int(counts["right"] + counts["missed"]) if known else None
            run = output / stage
            images = images_read(run, "annotations") or images_read(run, "data.val") or images_of(run)
            if images is None and isinstance(compared, dict) and type(compared.get("images")) is int:
                images = compared["images"]
            if images is not None or objects is not None:
                return Evaluated(images, objects)
    return None


def write_record(output: Path, record: Record) -> None:
    """Write the record into the folder of the run directories; the current folder is that of the pipeline."""
    content = {
        "name": record.name,
        "smoke": record.smoke,
        "folder": os.path.relpath(Path.cwd(), output),  # which holds after all is moved together
        "output": str(output),
        "pipeline": record.pipeline.model_dump(mode="json"),
    }
    write_atomically(output / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(output: Path) -> Record | None:
    """Read the record in a folder; None if there is none. Raises UserError if it is unreadable."""
    file = output / RECORD
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, smoke, pipeline = (content[key] for key in ("name", "smoke", "pipeline"))
        pipeline.items()
        folder = Path(os.path.abspath(output / content["folder"])) if "folder" in content else None
        moved_away = folder and os.path.abspath(folder / content["output"]) != os.path.abspath(output)
    except (OSError, *MALFORMED):
        raise UserError(f"{file}: not readable; delete it and give --pipeline") from None
    there = folder.resolve() if folder and not moved_away and folder.is_dir() else None
    return Record(str(name), bool(smoke), validate(PipelineConfig, pipeline, source=str(file)), there)


def table_text(table: TableConfig, output: Path, *, smoke: bool = False) -> str:
    """Return the table as aligned lines, with a note if the run was a smoke run.

    Columns without a number are left out, unless nothing is measured yet.
    """
    rows = table_rows(table, output)
    differences = [*([one] if (one := gain(table, output)) else []), *further(table, output).values()]
    cells = [COLUMNS, *(row.cells() for row in rows)]
    for one in differences:
        cells += [gain_cells(one), *([interval_cells(one)] if any(one.intervals) else [])]
    filled = [0, *(n for n in range(1, len(COLUMNS)) if any(line[n] != NONE for line in cells[1:]))]
    filled = filled if len(filled) > 1 else list(range(len(COLUMNS)))
    cells = [tuple(printable(line[n]) for n in filled) for line in cells]
    widths = [max(width_of(line[column]) for line in cells) for column in range(len(filled))]
    lines = [_line(line, widths) for line in cells]
    if differences:
        lines.insert(len(rows) + 1, "-" * width_of(lines[0]))
    for one in differences:
        of = f"{one.name}, " if len(differences) > 1 else ""
        unclear: dict[str, list[str]] = {}
        for name, interval in zip(COLUMNS[1:], one.intervals, strict=True):
            if interval and interval.verdict not in CLAIMS:
                unclear.setdefault(interval.verdict, []).append(name)
        lines += [f"{of}{', '.join(names)}: {text}" for text, names in unclear.items()]
        lines += [f"{of}{name}: {note}" for name, note in zip(COLUMNS[1:], one.notes, strict=True) if note]
    if any(interval for one in differences for interval in one.intervals):
        lines.append(intervals_note(table))
    if size := evaluated(table, output):
        lines.append(size.text)
    lines += alone(table, output) or ()
    lines += failed_teachers(table, output)
    if smoke:
        lines.append(SMOKE)
    return "\n".join(lines)


def intervals_note(table: TableConfig) -> str:
    """Return the note on the sources of error that the intervals of differences leave out."""
    rows = [table.rows[name] for name in table.gain or table.rows]
    runs = [len(stages) for row in rows for stages in (row.classifier, row.detector) if stages] or [1]
    notes = []
    if min(runs) == 1:
        notes.append(
            "the intervals cover the choice of the images, not the training: another seed can change a difference by more"
        )
    if max(runs) > 1:
        which = "those over several seeds" if notes else "the intervals are over the seeds; they"
        notes.append(f"{which} do not cover the choice of evaluation images")
    return "; ".join(notes)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "    ".join([padded(*first), *(padded(cell, width, right=True) for cell, width in rest)])


def _measures(row: RowConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Return (key of the metric, stages that report it) for each column after the first."""
    return [(key, row.classifier) for key in _CLASSIFIER] + [(key, row.detector) for key in _DETECTOR]


def _result(output: Path, stage: str) -> dict[str, Any] | None:
    """Return the result.json of a finished stage, whose metrics are a dictionary."""
    result = read_result(output / stage)
    return result if isinstance(result, dict) and isinstance(result.get("metrics"), dict) else None


def _runs(output: Path, stages: tuple[str, ...], key: str) -> dict[int, tuple[float, dict[str, Any]]]:
    """Return (value of the metric, result.json) of each run that has measured it, by the run's number in the row."""
    results = ((number, _result(output, stage)) for number, stage in enumerate(stages))
    pairs = ((number, _fraction(result["metrics"], key), result) for number, result in results if result)
    return {number: (value, result) for number, value, result in pairs if value is not None}


def _fraction(metrics: dict[str, Any], key: str) -> float | None:
    """Return a metric; None for anything but a finite number from 0 on."""
    value = metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _MOST else None


def over_seeds(values: list[float], images: int | None = None) -> Interval | None:
    """Return the interval of a mean over runs with different seeds, each evaluated on `images` images.

    None for runs without spread, which are no sample of seeds.
    """
    spread = statistics.stdev(values)
    if spread < _NO_SPREAD:
        return None
    half = _STUDENT[len(values) - 2] * spread / math.sqrt(len(values))
    mean = statistics.fmean(values)
    basis = f"Student's t over {len(values)} seeds; does not cover the choice of evaluation images"
    return Interval(mean - half, mean + half, basis, images)


def _of_one_run(key: str, results: list[dict[str, Any]]) -> Interval | None:
    """Return the interval of one run's number: of a proportion (Wilson 1927) for classifiers, the bootstrap of the evaluation for detectors."""
    if not results:
        return None
    metrics = results[0]["metrics"]
    if key in _DETECTOR:
        intervals = metrics.get("intervals")
        bounds = intervals.get(key) if isinstance(intervals, dict) else None
        return _interval(bounds, "bootstrap over the images") if isinstance(bounds, list) and len(bounds) == 2 else None
    share, images = _fraction(metrics, key), metrics.get("images")
    if share is None or type(images) is not int or images < 1 or share > 1:
        return None
    center = (share + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    half = _Z / (1 + _Z**2 / images) * math.sqrt(share * (1 - share) / images + _Z**2 / (4 * images**2))
    return Interval(center - half, center + half, f"binomial, {count(images, 'image')}")


def _compared(key: str, better: dict[str, Any], base: dict[str, Any]) -> Interval | None:
    """Return the interval of the difference between two runs; None if it was not measured."""
    return (_bootstrap if key in _DETECTOR else _of_proportions)(key, better, base)


def _bootstrap(key: str, better: dict[str, Any], base: dict[str, Any]) -> Interval | None:
    """Return the interval between two detectors that the evaluation of the better one has measured."""
    compared = better["metrics"].get("compared")
    outputs = base.get("outputs")
    if not isinstance(compared, dict) or not isinstance(outputs, dict) or not isinstance(compared.get(key), dict):
        return None
    if compared.get("sha256") != outputs.get("detections.json"):  # compared with another evaluation
        return None
    images = compared.get("images")
    basis = f"paired bootstrap over {count(images, 'image')}" if isinstance(images, int) else "paired bootstrap"
    interval = _interval([compared[key].get("low"), compared[key].get("high")], basis + _ONE_TRAINING)
    own = better.get("outputs")
    identical = isinstance(own, dict) and own.get("detections.json") == compared["sha256"]
    return interval and replace(interval, images=images if isinstance(images, int) else None, identical=identical)


def _of_proportions(key: str, better: dict[str, Any], base: dict[str, Any]) -> Interval | None:
    """Return Newcombe's interval between two classifiers."""
    first, second = _of_one_run(key, [better]), _of_one_run(key, [base])
    share, base_share = _fraction(better["metrics"], key), _fraction(base["metrics"], key)
    if first is None or second is None or share is None or base_share is None:
        return None
    difference = share - base_share
    low = difference - math.hypot(share - first.low, second.high - base_share)
    high = difference + math.hypot(first.high - share, base_share - second.low)
    images = min(better["metrics"]["images"], base["metrics"]["images"])
    return Interval(low, high, f"binomial, {count(images, 'image')}{_ONE_TRAINING}", images)


def _interval(bounds: list[Any], basis: str) -> Interval | None:
    numbers = [float(bound) for bound in bounds if type(bound) in (int, float) and abs(bound) <= 1]
    return Interval(numbers[0], numbers[1], basis) if len(numbers) == 2 else None
