"""Table at the end of a pipeline: scores of each backbone as a classifier and in a detector.

Numbers come from the stages' result.json, as fractions, and are printed in percent. A number that no stage measured is printed as "-". Does not
import torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld.pipelines.config import PipelineConfig, TableConfig
from ssld.shared.config.settings import validate
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import read_result

COLUMNS = ("backbone", "top-1", "agreement", "detector AP", "AP50")
_CLASSIFIER, _DETECTOR = ("top1", "agreement"), ("AP", "AP50")
NONE = "-"
_RECORD = "pipeline.json"  # beside the run directories
SMOKE = "smoke sizes: these numbers only show that everything runs"


@dataclass(frozen=True)
class Record:
    """Record of a pipeline beside its run directories, from which a report can be written with no other input."""

    name: str
    smoke: bool
    pipeline: PipelineConfig


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, and a fraction or None for each column after the first."""

    name: str
    values: tuple[float | None, ...]

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        return (self.name, *(NONE if value is None else f"{100 * value:.1f}" for value in self.values))


def table_rows(table: TableConfig, output: Path) -> list[Row]:
    """Return the rows, with None for stages in `output` that are not finished."""
    rows = []
    for name, row in table.rows.items():
        classifier = _metrics(output, row.classifier)
        detector = _metrics(output, row.detector)
        values = [_fraction(classifier, key) for key in _CLASSIFIER] + [_fraction(detector, key) for key in _DETECTOR]
        rows.append(Row(name, tuple(values)))
    return rows


def gain(table: TableConfig, rows: list[Row]) -> Row | None:
    """Return the difference between the two rows of `table.gain`; None without them."""
    if table.gain is None:
        return None
    by_name = {row.name: row for row in rows}
    better, base = (by_name[name] for name in table.gain)
    pairs = zip(better.values, base.values, strict=True)
    values = tuple(None if a is None or b is None else a - b for a, b in pairs)
    return Row(f"{better.name} - {base.name}", values)


def gain_cells(row: Row) -> tuple[str, ...]:
    """Return the row of differences as text, with signs."""
    return (row.name, *(NONE if value is None else f"{100 * value:+.1f}" for value in row.values))


def write_record(output: Path, record: Record) -> None:
    """Write the record into the folder of the run directories."""
    content = {"name": record.name, "smoke": record.smoke, "pipeline": record.pipeline.model_dump(mode="json")}
    write_atomically(output / _RECORD, json.dumps(content, indent=1) + "\n")


def read_record(output: Path) -> Record | None:
    """Read the record in a folder; None if there is none. Raises UserError if it is unreadable."""
    file = output / _RECORD
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, smoke, pipeline = (content[key] for key in ("name", "smoke", "pipeline"))
        pipeline.items()
    except (OSError, *MALFORMED):
        raise UserError(f"{file}: not readable; delete it and give --pipeline") from None
    return Record(str(name), bool(smoke), validate(PipelineConfig, pipeline, source=str(file)))


def table_text(table: TableConfig, output: Path, *, smoke: bool = False) -> str:
    """Return the table as aligned lines, with a note if the run was a smoke run."""
    rows = table_rows(table, output)
    difference = gain(table, rows)
    cells = [COLUMNS, *(row.cells() for row in rows), *([gain_cells(difference)] if difference else [])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = [_line(line, widths) for line in cells]
    if difference:
        lines.insert(len(lines) - 1, "-" * len(lines[0]))
    if smoke:
        lines.append(SMOKE)
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "    ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)])


def _metrics(output: Path, stage: str | None) -> dict[str, Any]:
    result = read_result(output / stage) if stage else None
    metrics = result.get("metrics") if isinstance(result, dict) else {}
    return metrics if isinstance(metrics, dict) else {}


def _fraction(metrics: dict[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if isinstance(value, int | float) and not abs(value) > 1e9 else None
