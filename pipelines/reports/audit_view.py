"""Labels to look at first: the part of the page on the `label_audit.json` and `label_audit.jpg` of an evaluation. Does not import torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld.shared.errors import MALFORMED
from ssld.shared.wording import count, weakness

FILE, SHEET = "label_audit.json", "label_audit.jpg"
LEAST_AGREEMENT = 0.5
"""smallest share of found labels of a class from which a label that is not found is shown: below it the detector has not learned the class"""
_NAMES = 12
_REASONS = {
    "no_label": ("confident detection where no label is", "confident detections where no label is"),
    "other_class": (
        "confident detection of another class on a label",
        "confident detections of another class on a label",
    ),
    "other_box": (
        "confident detection that overlaps its label by less than half",
        "confident detections that overlap their labels by less than half",
    ),
    "not_found": ("label that no detection finds", "labels that no detection finds"),
}
_KINDS = {
    "Cls": "right box, wrong class",
    "Loc": "right class, inexact box",
    "Both": "wrong class and inexact box",
    "Dupe": "second detection of an object",
    "Bkg": "detection where no object is",
    "Miss": "object without a detection",
}


@dataclass(frozen=True)
class LabelAudit:
    """Content of the section.

    Attributes:
        counts: numbers of findings of each reason, in words; empty without findings.
        weak: sentence on a detector too weak to audit labels, or None.
        left_out: labels that are not found, but in classes of which fewer than half of the labels are.
        names: file names of the images of the first findings.
        more: number of further images with listed findings.
        drawn: number of findings on the sheet; 0 if it has none of the findings that are shown.
        AP50: as a fraction; None without labels.
        gains: (kind of error, AP50 gained if all errors of this kind were corrected, as a fraction).
        calibration: expected calibration error, as a fraction; None without detections.
    """

    labels: int
    images: int
    score_threshold: float
    counts: str
    weak: str | None
    left_out: int
    names: list[str]
    more: int
    drawn: int
    AP50: float | None
    gains: list[tuple[str, float]]
    calibration: float | None


def read_audit(run: Path) -> LabelAudit | None:
    """Read the label audit of an evaluation; None if it has none. Raises one of MALFORMED for a damaged file."""
    file = run / FILE
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    listed = record["findings"]
    known = [finding for finding in listed if not _unlearned(finding)]
    counts = {reason: _whole(record["counts"][reason]) for reason in _REASONS}
    left_out = len(listed) - len(known)
    if left_out:  # the list is in descending order of agreement, so the findings beyond its end have even less
        left_out += counts["not_found"] - sum(finding["reason"] == "not_found" for finding in listed)
    counts["not_found"] -= left_out
    names = list(dict.fromkeys(str(finding["file_name"]) for finding in known))
    tide, calibration = record["tide"], record["calibration"]
    return LabelAudit(
        labels=_whole(record["labels"]),
        images=_whole(record["images"]),
        score_threshold=_number(record["score_threshold"]),
        counts=", ".join(count(number, *_REASONS[reason]) for reason, number in counts.items() if number),
        weak=None if tide is None or not listed else weakness(_number(tide["AP50"])),
        left_out=left_out,
        names=names[:_NAMES],
        more=len(names[_NAMES:]),
        drawn=_whole(record["drawn"]) if known else 0,
        AP50=None if tide is None else _number(tide["AP50"]),
        gains=[] if tide is None else [(words, _number(tide["gains"][kind])) for kind, words in _KINDS.items()],
        calibration=None if calibration is None else _number(calibration["error"]),
    )


def images_of(run: Path) -> int | None:
    """Return the number of evaluated images that the label audit of an evaluation records; None without a sound one."""
    try:
        audit = read_audit(run)
    except (OSError, *MALFORMED):
        return None
    return audit.images if audit else None


def _unlearned(finding: dict[str, Any]) -> bool:
    """Return whether a finding is a label that is not found, of a class that is seldom found. Raises ValueError for an unknown reason."""
    if finding["reason"] not in _REASONS:
        raise ValueError(finding["reason"])
    return bool(_number(finding["agreement"]) < LEAST_AGREEMENT and finding["reason"] == "not_found")


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number
