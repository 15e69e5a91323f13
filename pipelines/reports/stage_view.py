"""View of one run directory for the report template: numbers, curves, tables, images, settings and machine.

Reads only files that a command wrote, and imports no code of the stages. If a file is missing or damaged, its part of the page is left out.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ssld.pipelines.config import CommandName
from ssld.pipelines.reports.audit_view import FILE as AUDIT_FILE
from ssld.pipelines.reports.audit_view import SHEET as AUDIT_SHEET
from ssld.pipelines.reports.audit_view import LabelAudit, read_audit
from ssld.pipelines.reports.budget import Budget
from ssld.pipelines.reports.charts import Chart, curves, precision_recall
from ssld.pipelines.reports.photos import PHOTO_SIDE, Drawn, Evaluation, Photos, draw_pair
from ssld.pipelines.reports.settings_view import changed_settings
from ssld.pipelines.runner.stages import KINDS, LOGS, typed_name
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import IMAGE_SUFFIXES, spread
from ssld.shared.run_dir import read_metrics, read_result
from ssld.shared.tally import Tally
from ssld.shared.wording import count

T = TypeVar("T")
_MATRIX_CLASSES = 12  # more columns do not fit
_CONFUSIONS = 15
_PREDICTED = 6
_ERROR_LINES = 4
_BATCHES, _BATCHES_TITLE = "batches.jpg", "First training images, as the network gets them"
_CONSOLE_BYTES = 100_000  # of the end of a stage's output, in which an error is looked for
MINUS = "\N{MINUS SIGN}"
"""as wide as a digit"""
_FRACTIONS = ("top1", "top5", "agreement", "teacher_top1", "teacher_top5", "knn", "AP", "AR")
_HEADLINES = ("AP", "AP50", "AP75", "AP_segm", "top1", "agreement", "kl", "kept")
_LABELS = {"top1": "top-1", "top5": "top-5", "kl": "KL", "AP_segm": "AP of masks", "images_seen": "images seen"}
_UNITS = {"kl": "nats", "memory_gb": "GB", "seconds": "s", "teacher_entropy": "nats", "images_per_second": "images/s"}
# command as recorded in a run directory -> name of the command in a pipeline
_RECORDED: dict[str, CommandName] = {
    "write_soft_labels": "soft_labels",
    "evaluate": "evaluate_backbone",
    "export": "export_backbone",
}


@dataclass(frozen=True)
class ClassRow:
    """Scores of one class of an evaluation, as fractions; None if undefined."""

    name: str
    AP: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    objects: int | None


@dataclass(frozen=True)
class Matrix:
    """Confusion matrix: `rows` are (true class, [(count, fraction of the row)]); the last name and row are the background."""

    names: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Pair:
    """One evaluation image with its annotations and with its detections.

    Attributes:
        drawn: the photo with both on top; None if it is not at hand.
        truth, detections: without `drawn`, data: URLs of the two images that the evaluation drew.
    """

    kind: str
    image: str
    caption: str
    drawn: Drawn | None = None
    truth: str = ""
    detections: str = ""


@dataclass(frozen=True)
class Embedded:
    """An image as a data: URL, with its alternative text and title."""

    source: str
    alt: str
    title: str


@dataclass(frozen=True)
class StageView:
    """Content of the page for one stage."""

    name: str
    command: str
    status: str
    seconds: float | None
    images_seen: int | None
    read: list[tuple[str, str, str]]
    """(setting, what was read from it, what of it was dropped, changed or skipped)"""
    headlines: list[tuple[str, str, str]]
    """(name, value, 95 % interval or nothing)"""
    metrics: list[tuple[str, str]]
    charts: list[Chart]
    threshold: float | None
    classes: list[ClassRow]
    matrix: Matrix | None
    confusions: list[tuple[str, str, int]]
    pairs: list[Pair]
    plots: list[Embedded]
    batches: Embedded | None
    """sheet of a training's first images"""
    predicted: list[Embedded]
    left_out: int
    audit: LabelAudit | None
    audit_sheet: Embedded | None
    line: str
    settings: list[tuple[str, str, str]]
    """(key, value, default) of what differs from the defaults"""
    config: str
    errors: tuple[str, ...]
    """last lines of a stage that failed"""
    environment: list[tuple[str, str]]
    unreadable: int
    damaged: tuple[str, ...]
    """files that exist but could not be read"""

    @property
    def ran(self) -> bool:
        """Return whether the stage has been started."""
        return self.status != "not run"


def view(
    name: str,
    command: CommandName | None,
    run: Path,
    photos: Photos,
    *,
    evaluation: Evaluation | None = None,
    evaluated: bool = False,
) -> StageView:
    """Build the view of one run directory.

    Args:
        name: name of the stage.
        command: name of its command in the pipeline; None: as recorded in the run directory.
        run: run directory, which may be missing.
        photos: photos of the page so far, with the bytes left for images.
        evaluation: annotations and detections of an evaluation, whose photos are then drawn anew.
        evaluated: whether another stage evaluates this one's detector: scores and images are then that stage's.
    """
    damaged: list[str] = []

    def part(file: str, read: Callable[[], T], default: Any) -> T:
        """Return `read()`; if the file's content is malformed, note the file as damaged and return `default`."""
        try:
            return read()
        except (*MALFORMED, UserError):
            damaged.append(file)
            empty: T = default
            return empty

    result = part("result.json", lambda: _checked(read_result(run)), None) if run.is_dir() else None
    lines = part("metrics.jsonl", lambda: _numbered(read_metrics(run)), [])
    environment = read_json(run / "environment.json")
    recorded = str(environment.get("command", ""))
    known = command or _RECORDED.get(recorded) or recorded or "unknown"
    errors = () if result else failure(run)
    config, quarantine = run / "config.yaml", run / "quarantine.txt"
    values: dict[str, Any] = result["metrics"] if result else {}
    scalars = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    analysis = {} if evaluated else read_json(run / "analysis.json")
    budget = photos.budget
    pairs, left_out = part(
        "pictures/index.json", lambda: ([], 0) if evaluated else _pairs(run / "pictures", photos, evaluation), ([], 0)
    )
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    audit = part(AUDIT_FILE, lambda: read_audit(run), None)
    findings = f"The first {count(audit.drawn, 'finding')}, with labels and detections" if audit else ""
    images_seen, threshold = values.get("images_seen"), analysis.get("score_threshold")
    return StageView(
        name=name,
        command=known,
        status="failed" if errors else _status(run, result, lines),
        seconds=_seconds(result, lines),
        images_seen=images_seen if isinstance(images_seen, int) else None,
        read=part("result.json", lambda: _read(result), []),
        headlines=[
            (label(key), number(key, scalars[key]), _interval(values, key))
            for key in _HEADLINES
            if scalars.get(key) is not None and not evaluated
        ],
        metrics=[(label(key), number(key, value)) for key, value in scalars.items()],
        charts=part("metrics.jsonl", lambda: curves(name, lines), [])
        + part("analysis.json", lambda: _precision_recall(name, analysis), []),
        threshold=threshold if isinstance(threshold, float) else None,
        classes=[] if evaluated else part("analysis.json", lambda: _classes(values, analysis), []),
        matrix=part("analysis.json", lambda: _matrix(analysis), None),
        confusions=part("analysis.json", lambda: _confusions(analysis), []),
        pairs=pairs,
        plots=part("outcome.json", lambda: _curation(run, values, budget), []),
        batches=_sheet(run, _BATCHES, _BATCHES_TITLE, budget),
        predicted=_predicted(run / "pictures", budget),
        left_out=left_out,
        audit=audit,
        audit_sheet=_sheet(run, AUDIT_SHEET, findings, budget) if audit and audit.drawn else None,
        line=part("environment.json", lambda: _line(command, recorded, environment), ""),
        settings=part("config.yaml", lambda: changed_settings(known, text), []),
        config=text,
        errors=errors,
        environment=part("environment.json", lambda: _environment(environment), []),
        unreadable=len(quarantine.read_bytes().splitlines()) if quarantine.is_file() else 0,
        damaged=tuple(dict.fromkeys(damaged)),
    )


def _read(result: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Return what a run has read by setting, in words; raises one of MALFORMED for a damaged record."""
    tallies = {place: Tally.of_record(record) for place, record in ((result or {}).get("read") or {}).items()}
    return [(place, tally.describe_kept(), tally.describe()) for place, tally in tallies.items()]


def _interval(values: Mapping[str, Any], key: str) -> str:
    """Return the 95 % interval of a metric in percent, as text; empty without a sound one."""
    intervals = values.get("intervals")
    bounds = intervals.get(key) if isinstance(intervals, dict) else None
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(bound, int | float) for bound in bounds):
        return ""
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def _checked(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the result if its parts have the expected types; raises one of MALFORMED otherwise."""
    if result is not None:
        result["metrics"].items()
        round(float(result["seconds"]))  # raises for NaN and infinity
    return result


def _numbered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of metrics if steps and seconds are finite numbers; raises one of MALFORMED otherwise."""
    for line in lines:
        if not isinstance(line["step"], int) or not isinstance(line.get("seconds", 0), int | float | None):
            raise TypeError(f"step {line['step']!r}, seconds {line.get('seconds')!r}")
        round(float(line.get("seconds") or 0.0))  # raises for NaN and infinity
    return lines


def number(key: str, value: Any) -> str:
    """Format a metric: fractions in percent, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and key.startswith(_FRACTIONS):
        return percent(value)
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("-", MINUS) if isinstance(value, int | float) else text


def percent(value: float | None) -> str:
    """Format a fraction in percent, without the percent sign; a dash for None, other non-numbers, and the -1 that COCO tools write for None."""
    return f"{100 * value:.1f}" if isinstance(value, int | float) and value >= 0 else "-"


def label(key: str) -> str:
    """Return the readable name of a metric, with its unit."""
    name = _LABELS.get(key, key.replace("teacher_", "teacher's ").replace("top1", "top-1").replace("_", " "))
    unit = "%" if key.startswith(_FRACTIONS) else _UNITS.get(key)
    return f"{name}, {unit}" if unit else name


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or unreadable."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def mean_curve(analysis: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return (recall, precision averaged over the classes that have objects) of an `analysis.json`."""
    record = analysis.get("precision_recall") or {}
    by_class = list((record.get("precision") or {}).values())
    if not by_class:
        return None
    return record["recall"], [sum(column) / len(by_class) for column in zip(*by_class, strict=True)]


def failure(run: Path) -> tuple[str, ...]:
    """Return the lines that say why a stage ended without a result; none if it has not started, was stopped or is still running."""
    if error := read_json(run / "error.json").get("error"):
        return tuple(str(error).splitlines()[:_ERROR_LINES])
    console = run.parent / LOGS / f"{run.name}.txt"
    try:
        with console.open("rb") as file:
            file.seek(max(0, console.stat().st_size - _CONSOLE_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[starts[-1] + 1 :] if starts else lines  # of the last start
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors and any(line.startswith("Traceback (most recent call last)") for line in lines):
        errors = [line for line in lines if line.strip()][-1:]
    return tuple(errors[-_ERROR_LINES:])


def _status(run: Path, result: dict[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> str:
    if result:
        return "finished"
    if not (run / "config.yaml").is_file():
        return "not run"
    return f"unfinished, at step {lines[-1]['step']}" if lines else "unfinished"


def _seconds(result: dict[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the seconds of a run over all starts: the result counts from the last start only, the logged steps include earlier ones."""
    logged = sum(line.get("seconds") or 0.0 for line in lines)
    return max(float(result["seconds"]), logged) if result else logged or None


def _precision_recall(name: str, analysis: Mapping[str, Any]) -> list[Chart]:
    mean = mean_curve(analysis)
    if mean is None or not any(mean[1]):  # a detector without a right detection has no curve
        return []
    lines = analysis["precision_recall"]["precision"]
    return [precision_recall(name, mean[0], lines, mean[1] if len(lines) > 1 else None)]


def _classes(values: Mapping[str, Any], analysis: Mapping[str, Any]) -> list[ClassRow]:
    """Return the class rows of an analysis; without one, the AP of each class from the result."""
    rows = [
        ClassRow(
            str(row["class"]),
            _number_of(row["AP"]),
            _number_of(row["precision"]),
            _number_of(row["recall"]),
            _number_of(row["f1"]),
            row["objects"],
        )
        for row in analysis.get("classes") or []
    ]
    per_class = values.get("per_class") or {}
    return rows or [ClassRow(name, _number_of(ap), None, None, None, None) for name, ap in per_class.items()]


def _number_of(value: Any) -> float | None:
    return None if value is None else float(value)


def _matrix(analysis: Mapping[str, Any]) -> Matrix | None:
    record = analysis.get("confusions") or {}
    names = record.get("names") or []
    if not 1 < len(names) <= _MATRIX_CLASSES + 1:
        return None
    rows = [
        (name, [(value, value / max(1, sum(counts))) for value in counts])
        for name, counts in zip(names, record["counts"], strict=True)
    ]
    return Matrix(names, rows)


def _confusions(analysis: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return the most frequent (true class, predicted class, count), if there are too many classes for a matrix."""
    record = analysis.get("confusions") or {}
    names = record.get("names") or []
    if len(names) <= _MATRIX_CLASSES + 1:
        return []
    mixed = [
        (value, names[truth], names[predicted])
        for truth, counts in enumerate(record["counts"])
        for predicted, value in enumerate(counts)
        if value and truth != predicted
    ]
    mixed.sort(key=lambda entry: -entry[0])
    return [(truth, predicted, value) for value, truth, predicted in mixed[:_CONFUSIONS]]


def _pairs(folder: Path, photos: Photos, evaluation: Evaluation | None) -> tuple[list[Pair], int]:
    """Return (the best and worst images of an evaluation, number of images left out because the budget is used up)."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], 0
    pairs = []
    for entry in index:
        kind, image = entry["kind"], entry["image"]
        caption = f"{entry['right']} right, {entry['wrong']} wrong, {entry['missed']} missed, error {entry['lrp']:.2f}"
        files = [_inside(folder, entry[side]) for side in ("truth", "detections")]
        if evaluation and (drawn := draw_pair(evaluation, image, photos, entry.get("image_id"))):
            pairs.append(Pair(kind, image, caption, drawn))
            continue
        before = photos.budget.left
        truth, detections = (photos.budget.embed(file, PHOTO_SIDE) for file in files)
        if truth is None or detections is None:
            photos.budget.left = before
            continue
        pairs.append(Pair(kind, image, caption, None, truth, detections))
    return pairs, len(index) - len(pairs)


def _sheet(run: Path, name: str, title: str, budget: Budget) -> Embedded | None:
    """Return a sheet of many small images in a run directory; None if it is missing, lies elsewhere, is unreadable or has no room."""
    file = run / name
    if not file.is_file() or not file.resolve().is_relative_to(run.resolve()):
        return None
    source = budget.embed_sheet(file)
    return Embedded(source, title, title) if source else None


def _inside(folder: Path, name: str) -> Path:
    """Return a file below a folder. Raises ValueError for a path outside it, so that the page cannot embed other files."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is not in {folder}")
    return file


def _curation(run: Path, values: Mapping[str, Any], budget: Budget) -> list[Embedded]:
    """Return the two plots of a curation, or the one of prototypes."""
    numbers = ", ".join(f"{label(key)} {number(key, value)}" for key, value in values.items() if isinstance(value, int))
    examples = [row for row in read_json(run / "outcome.json").get("examples", []) if row["images"]]
    rows = "; ".join(f"{' '.join(row['title'].split())}: {count(len(row['images']), 'image')}" for row in examples)
    plots = (
        (
            "curation.png",
            "Selected images",
            f"Images kept per class, and scores of the pool and of the kept images: {numbers}.",
        ),
        ("examples.png", "Examples", f"Rows of images that were kept or left out. {rows}"),
        (
            "prototypes.png",
            "Prototypes",
            f"Images of some prototypes, the nearest first, with the prototype's probability: {numbers}.",
        ),
    )
    embedded = []
    for file, title, alt in plots:
        if (run / file).is_file() and (source := budget.embed(run / file, 1400)):
            embedded.append(Embedded(source, alt, title))
    return embedded


def _predicted(folder: Path, budget: Budget) -> list[Embedded]:
    """Return some of the images that a prediction drew, evenly spread."""
    if (folder / "index.json").is_file():  # images of an evaluation
        return []
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    files = [files[place] for place in spread(len(files), _PREDICTED)]
    names = [file.relative_to(folder).as_posix() for file in files]
    sources = [budget.embed(file, PHOTO_SIDE) for file in files]
    return [Embedded(s, f"{name} with its detections", name) for name, s in zip(names, sources, strict=True) if s]


def _line(command: CommandName | None, recorded: str, environment: Mapping[str, Any]) -> str:
    """Return the command line of a run."""
    arguments = [str(word) for word in environment.get("arguments", [])]
    if arguments and not arguments[0].startswith("-"):  # the sub-command of ssld
        return shlex.join(["ssld", *arguments])
    known = command or _RECORDED.get(recorded) or recorded
    return shlex.join(["ssld", typed_name(known), *arguments]) if known in KINDS and arguments else ""


def _environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return machine and versions as (name, value) rows."""
    keys = ("started", "machine", "python", "cores", "processes", "threads")
    lines = [(key, str(record[key])) for key in keys if record.get(key) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version)
    return [*lines, ("versions", versions)] if versions else lines
