"""What a check of a COCO file finds, and what a cleaned copy of it does about that.

Training is stricter than most tools: it refuses a file whose ids do not fit, and drops boxes of which nothing can be learnt (`coco.py`). A check
reads the same file leniently, so that one look shows every fault, not the first. Three levels: a note is a fact; a warning is something that
training or evaluation handles, by leaving something out; a fault ends a run, or makes its scores worthless.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssld.shared.errors import UserError
from ssld.shared.wording import some
from ssld.stage2_detect.data.coco_json import Convention, with_orientation

Level = Literal["note", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("note", "warning", "fault")


@dataclass(frozen=True)
class Finding:
    """One thing that was found: where, what (with what training makes of it), and what a cleaned copy does about it."""

    level: Level
    file: str
    text: str
    fix: str | None = None


@dataclass
class Repair:
    """What a cleaned copy of a file changes; rows are told by their position in the file."""

    drop_images: set[int] = field(default_factory=set)
    drop_annotations: set[int] = field(default_factory=set)
    drop_categories: set[int] = field(default_factory=set)
    image_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    annotation_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    category_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    new_categories: list[dict[str, Any]] = field(default_factory=list)
    orientation: Convention | None = None

    def set_annotation(self, index: int, **values: Any) -> None:
        self.annotation_values.setdefault(index, {}).update(values)

    def apply(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of the cleaned copy; annotations of images and of categories that go, go too."""
        images = _rows(content["images"], self.image_values, self.drop_images)
        categories = _rows(content["categories"], self.category_values, self.drop_categories) + self.new_categories
        known, classes = ({row["id"] for row in rows} for rows in (images, categories))
        annotations = _rows(content["annotations"], self.annotation_values, self.drop_annotations)
        annotations = [row for row in annotations if row["image_id"] in known and row["category_id"] in classes]
        content = with_orientation(content, self.orientation) if self.orientation else content
        return {**content, "images": images, "annotations": annotations, "categories": categories}


def _rows(rows: list[dict[str, Any]], values: dict[int, dict[str, Any]], drop: set[int]) -> list[dict[str, Any]]:
    return [{**row, **values.get(index, {})} for index, row in enumerate(rows) if index not in drop]


def read_content(file: Path) -> dict[str, Any]:
    """The three lists of a COCO file, whatever is in them. Raises UserError where it is no such file at all."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file}: not a COCO data set: it has no list of objects {key!r}")
    return dict(content)


def is_id(value: Any) -> bool:
    """Whether training takes a value as an id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any, largest: float = math.inf) -> bool:
    """Whether a value is a finite number, not above `largest` in size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < largest


def first_ids(ids: Sequence[Any]) -> str:
    """The first ids of a list, for a message: `id 4`, or `first ids: 4, 7, 9, ...`."""
    return f"id {ids[0]}" if len(ids) == 1 else f"first ids: {some(ids)}"
