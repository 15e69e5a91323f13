"""Findings of a check of a COCO file, and the repairs that a cleaned copy applies.

Training stops at the first fault of a file (`coco_rows.py`) and drops unusable boxes (`coco.py`). A check reports all findings of the same rules, on
three levels: a note is a fact; a warning is a problem that training or evaluation handles, by reading another value or leaving a row out; a fault
stops a run or makes its scores worthless.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssld.shared.wording import some
from ssld.stage2_detect.data.coco_json import Convention, with_orientation

Level = Literal["note", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("note", "warning", "fault")


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: note, warning or fault.
        file: name of the file.
        text: the problem and its effect on training or evaluation.
        fix: change in a cleaned copy, if there is one.
    """

    level: Level
    file: str
    text: str
    fix: str | None = None


@dataclass
class Repair:
    """Changes of a cleaned copy of a file; rows are identified by their position in the file.

    Each dropped row has a cause for the tally; an empty cause is no loss, since an equal row stays.
    """

    drop_images: dict[int, str] = field(default_factory=dict)
    drop_annotations: dict[int, str] = field(default_factory=dict)
    drop_categories: set[int] = field(default_factory=set)
    image_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    annotation_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    category_values: dict[int, dict[str, Any]] = field(default_factory=dict)
    new_categories: list[dict[str, Any]] = field(default_factory=list)
    orientation: Convention | None = None

    def set_annotation(self, index: int, **values: Any) -> None:
        """Set values of an annotation."""
        self.annotation_values.setdefault(index, {}).update(values)

    def apply(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the cleaned copy, without the annotations of dropped images and categories."""
        images = _rows(content["images"], self.image_values, self.drop_images)
        categories = _rows(content["categories"], self.category_values, self.drop_categories) + self.new_categories
        known, classes = ({row["id"] for row in rows} for rows in (images, categories))
        annotations = _rows(content["annotations"], self.annotation_values, self.drop_annotations)
        annotations = [row for row in annotations if row["image_id"] in known and row["category_id"] in classes]
        content = with_orientation(content, self.orientation) if self.orientation else content
        return {**content, "images": images, "annotations": annotations, "categories": categories}


def _rows(rows: list[dict[str, Any]], values: dict[int, dict[str, Any]], drop: Container[int]) -> list[dict[str, Any]]:
    return [{**row, **values.get(index, {})} for index, row in enumerate(rows) if index not in drop]


def first_ids(ids: Sequence[Any]) -> str:
    """Return the first ids of a list for a message: `id 4`, or `first ids: 4, 7, 9, ...`."""
    return f"id {ids[0]}" if len(ids) == 1 else f"first ids: {some(ids)}"
