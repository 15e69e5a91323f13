"""What the report says of one run directory: numbers, curves, tables, pictures, settings and machine, as the template shows them.

Only reads what a command left behind; nothing of a stage's code is imported. A file that is absent or damaged leaves its part of the page out.
"""

import base64
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ssld.pipelines.config import CommandName
from ssld.pipelines.reports.charts import Chart, curves, precision_recall
from ssld.pipelines.runner.stages import KINDS
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import IMAGE_SUFFIXES, spread
from ssld.shared.run_dir import read_metrics, read_result
from ssld.shared.wording import count

T = TypeVar("T")
PAGE_BYTES = 2_000_000  # of pictures in a page, encoded
_MATRIX_CLASSES = 12  # more do not fit beside each other
_CONFUSIONS = 15
_PREDICTED = 6
_FRACTIONS = ("top1", "top5", "agreement", "teacher_top1", "teacher_top5", "knn", "AP", "AR")
_HEADLINES = ("AP", "AP50", "AP75", "AP_segm", "top1", "agreement", "kl", "kept")
_LABELS = {"top1": "top-1", "top5": "top-5", "kl": "KL, nats", "AP_segm": "AP of masks", "images_seen": "images seen"}
# what a run directory calls its command -> the pipeline's name of it
_RECORDED: dict[str, CommandName] = {
    "write_soft_labels": "soft_labels",
    "evaluate": "evaluate_backbone",
    "export": "export_backbone",
}


@dataclass(frozen=True)
class ClassRow:
    """One class of an evaluation; fractions, None where there is nothing to measure."""

    name: str
    AP: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    objects: int | None


@dataclass(frozen=True)
class Matrix:
    """Confusions: `rows` are (truth, [(count, share of the row)]); the last name and row are the background."""

    names: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Pair:
    """One picture of an evaluation, with its objects and with what was found, as data: addresses."""

    kind: str
    image: str
    truth: str
    found: str
    words: str


@dataclass(frozen=True)
class Embedded:
    """A picture as a data: address and the words that stand for it."""

    source: str
    alt: str
    title: str


@dataclass(frozen=True)
class StageView:
    """What the page says about one stage."""

    name: str
    command: str
    status: str
    seconds: float | None
    images_seen: int | None
    headlines: list[tuple[str, str]]
    metrics: list[tuple[str, str]]
    charts: list[Chart]
    threshold: float | None
    classes: list[ClassRow]
    matrix: Matrix | None
    confusions: list[tuple[str, str, int]]
    pairs: list[Pair]
    pictures: list[Embedded]
    predicted: list[Embedded]
    left_out: int
    line: str
    config: str
    environment: list[tuple[str, str]]
    unreadable: int
    damaged: tuple[str, ...]
    """files that are there and could not be shown"""

    @property
    def ran(self) -> bool:
        """Whether there is anything to show."""
        return self.status != "not run"


class Room:
    """How many bytes of pictures a page may still take in."""

    def __init__(self, left: int = PAGE_BYTES) -> None:
        self.left = left

    def embed(self, file: Path, longest: int) -> str | None:
        """A picture file as a data: address, its longer side at most `longest` pixels; None when it cannot be read or there is no room."""
        from PIL import Image

        try:
            with Image.open(file) as image:
                if file.suffix == ".jpg" and max(image.size) <= longest:
                    content = file.read_bytes()
                else:
                    small = image.convert("RGB")
                    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
                    buffer = io.BytesIO()
                    small.save(buffer, "JPEG", quality=85, optimize=True)
                    content = buffer.getvalue()
        except Exception:  # PIL raises many kinds for damaged files
            return None
        text = base64.b64encode(content).decode()
        if len(text) > self.left:
            return None
        self.left -= len(text)
        return f"data:image/jpeg;base64,{text}"


def view(name: str, command: CommandName | None, run: Path, room: Room) -> StageView:
    """The view of one run directory.

    Args:
        name: of the stage.
        command: the pipeline's name of it; None: as the run directory says.
        run: the directory; it need not be there.
        room: what is left for pictures.
    """
    damaged: list[str] = []

    def part(file: str, look: Callable[[], T], otherwise: Any) -> T:
        """What `look` makes of a file, or of a folder; `otherwise`, and the file noted, where its content has another form."""
        try:
            return look()
        except (*MALFORMED, UserError):
            damaged.append(file)
            empty: T = otherwise
            return empty

    result = part("result.json", lambda: _checked(read_result(run)), None) if run.is_dir() else None
    lines = part("metrics.jsonl", lambda: _numbered(read_metrics(run)), [])
    environment = read_json(run / "environment.json")
    recorded = str(environment.get("command", ""))
    config, quarantine = run / "config.yaml", run / "quarantine.txt"
    values: dict[str, Any] = result["metrics"] if result else {}
    scalars = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    analysis = read_json(run / "analysis.json")
    pairs, left_out = part("pictures/index.json", lambda: _pairs(run / "pictures", room), ([], 0))
    seen, threshold = values.get("images_seen"), analysis.get("score_threshold")
    return StageView(
        name=name,
        command=command or _RECORDED.get(recorded) or recorded or "unknown",
        status=_status(run, result, lines),
        seconds=_seconds(result, lines),
        images_seen=seen if isinstance(seen, int) else None,
        headlines=[(label(key), number(key, scalars[key])) for key in _HEADLINES if scalars.get(key) is not None],
        metrics=[(label(key), number(key, value)) for key, value in scalars.items()],
        charts=part("metrics.jsonl", lambda: curves(name, lines), [])
        + part("analysis.json", lambda: _precision_recall(name, analysis), []),
        threshold=threshold if isinstance(threshold, float) else None,
        classes=part("analysis.json", lambda: _classes(values, analysis), []),
        matrix=part("analysis.json", lambda: _matrix(analysis), None),
        confusions=part("analysis.json", lambda: _confusions(analysis), []),
        pairs=pairs,
        pictures=part("outcome.json", lambda: _curation(run, values, room), []),
        predicted=_predicted(run / "pictures", room),
        left_out=left_out,
        line=part("environment.json", lambda: _line(command, recorded, environment), ""),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        environment=part("environment.json", lambda: _environment(environment), []),
        unreadable=len(quarantine.read_bytes().splitlines()) if quarantine.is_file() else 0,
        damaged=tuple(dict.fromkeys(damaged)),
    )


def _checked(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """A result whose parts are what the page counts on. Raises one of MALFORMED for another."""
    if result is not None:
        result["metrics"].items()
        round(float(result["seconds"]))  # refuses what is no finite number
    return result


def _numbered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics, whose steps and seconds are numbers. Raises one of MALFORMED where they are not."""
    for line in lines:
        if not isinstance(line["step"], int) or not isinstance(line.get("seconds", 0), int | float | None):
            raise TypeError(f"step {line['step']!r}, seconds {line.get('seconds')!r}")
        round(float(line.get("seconds") or 0.0))  # refuses what is no finite number
    return lines


def number(key: str, value: Any) -> str:
    """A metric for people: fractions in percent, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and key.startswith(_FRACTIONS):
        return percent(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def percent(value: float | None) -> str:
    """A fraction in percent, without the sign; a dash for None and what else is no number."""
    return f"{100 * value:.1f}" if isinstance(value, int | float) else "-"


def label(key: str) -> str:
    """A metric's name for people."""
    return _LABELS.get(key, key.replace("teacher_", "teacher's ").replace("top1", "top-1").replace("_", " "))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def mean_curve(analysis: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """(recall, precision averaged over the classes that have objects) of an `analysis.json`."""
    found = analysis.get("precision_recall") or {}
    curves_of = list((found.get("precision") or {}).values())
    if not curves_of:
        return None
    return found["recall"], [sum(column) / len(curves_of) for column in zip(*curves_of, strict=True)]


def _status(run: Path, result: dict[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> str:
    if result:
        return "finished"
    if not (run / "config.yaml").is_file():
        return "not run"
    return f"unfinished, at step {lines[-1]['step']}" if lines else "unfinished"


def _seconds(result: dict[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """What a run took. A result counts from the last start; the logged steps tell of those before too."""
    logged = sum(line.get("seconds") or 0.0 for line in lines)
    return max(float(result["seconds"]), logged) if result else logged or None


def _precision_recall(name: str, analysis: Mapping[str, Any]) -> list[Chart]:
    mean = mean_curve(analysis)
    if mean is None:
        return []
    lines = analysis["precision_recall"]["precision"]
    return [precision_recall(name, mean[0], lines, mean[1] if len(lines) > 1 else None)]


def _classes(values: Mapping[str, Any], analysis: Mapping[str, Any]) -> list[ClassRow]:
    """The rows of an analysis; without one, the AP of each class that the result has."""
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
    found = analysis.get("confusions") or {}
    names = found.get("names") or []
    if not 1 < len(names) <= _MATRIX_CLASSES + 1:
        return None
    rows = [
        (name, [(value, value / max(1, sum(counts))) for value in counts])
        for name, counts in zip(names, found["counts"], strict=True)
    ]
    return Matrix(names, rows)


def _confusions(analysis: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The most frequent (truth, what was said, count), where there are too many classes for a matrix."""
    found = analysis.get("confusions") or {}
    names = found.get("names") or []
    if len(names) <= _MATRIX_CLASSES + 1:
        return []
    mixed = [
        (value, names[truth], names[said])
        for truth, counts in enumerate(found["counts"])
        for said, value in enumerate(counts)
        if value and truth != said
    ]
    mixed.sort(key=lambda entry: -entry[0])
    return [(truth, said, value) for value, truth, said in mixed[:_CONFUSIONS]]


def _pairs(folder: Path, room: Room) -> tuple[list[Pair], int]:
    """(the pictures that an evaluation wrote, how many found no room)."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], 0
    pairs = []
    for entry in index:
        before = room.left
        truth, found = (room.embed(_inside(folder, entry[side]), 640) for side in ("truth", "found"))
        if truth is None or found is None:
            room.left = before
            continue
        words = f"{entry['right']} right, {entry['wrong']} wrong, {entry['missed']} missed, error {entry['lrp']:.2f}"
        pairs.append(Pair(entry["kind"], entry["image"], truth, found, words))
    return pairs, len(index) - len(pairs)


def _inside(folder: Path, name: str) -> Path:
    """A file below a folder. Raises ValueError for a name that leads out of it, as a picture of somebody's that the page would show."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is not in {folder}")
    return file


def _curation(run: Path, values: Mapping[str, Any], room: Room) -> list[Embedded]:
    """The two pictures of a curation."""
    numbers = ", ".join(f"{label(key)} {number(key, value)}" for key, value in values.items() if isinstance(value, int))
    examples = [row for row in read_json(run / "outcome.json").get("examples", []) if row["pictures"]]
    rows = "; ".join(f"{' '.join(row['title'].split())}: {count(len(row['pictures']), 'image')}" for row in examples)
    shown = (
        (
            "curation.png",
            "What was kept",
            f"Images kept of each class, and scores of the pool and of what was kept: {numbers}.",
        ),
        ("examples.png", "Examples", f"Rows of images that were kept or left out. {rows}"),
    )
    pictures = []
    for file, title, alt in shown:
        if (run / file).is_file() and (source := room.embed(run / file, 1400)):
            pictures.append(Embedded(source, alt, title))
    return pictures


def _predicted(folder: Path, room: Room) -> list[Embedded]:
    """Some of the pictures that a prediction drew, spread over all of them."""
    if (folder / "index.json").is_file():  # those of an evaluation
        return []
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    files = [files[place] for place in spread(len(files), _PREDICTED)]
    names = [file.relative_to(folder).as_posix() for file in files]
    sources = [room.embed(file, 480) for file in files]
    return [Embedded(s, f"{name} with what was found", name) for name, s in zip(names, sources, strict=True) if s]


def _line(command: CommandName | None, recorded: str, environment: Mapping[str, Any]) -> str:
    """The command line of a run, as it was typed."""
    arguments = [str(word) for word in environment.get("arguments", [])]
    if arguments and not arguments[0].startswith("-"):  # the sub-command of ssld
        return shlex.join(["ssld", *arguments])
    known = command or _RECORDED.get(recorded) or recorded
    script = next((kind.script for name, kind in KINDS.items() if name == known), None)
    return shlex.join(["python", script, *arguments]) if script and arguments else ""


def _environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions as (name, value) lines."""
    keys = ("started", "machine", "python", "cores", "processes", "threads")
    lines = [(key, str(record[key])) for key in keys if record.get(key) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items() if version)
    return [*lines, ("versions", versions)] if versions else lines
