"""Photos of the report: each embedded once, drawn in the browser with annotations and detections on top, and those on which two detectors differ.

Reads the annotation file and the photos that an evaluation names in its config.yaml, and its detections.json, when the page is written. An image's
error is its LRP error (arXiv:1807.01696) at the evaluation's score threshold, the same as that of the best and worst images. Does not import torch.

Legend: G objects of an image, D its detections with a score of at least the threshold, best first.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ssld.pipelines.reports.budget import Budget
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import short_names
from ssld.shared.wording import count

IOU = 0.5
PHOTO_SIDE = 1024
"""longer side of an embedded photo, in pixels"""
MOST_COMPARED = 6
"""photos of a comparison, half of them in each direction where both have enough"""
_LEAST_DIFFERENCE = 0.005  # smaller differences round to 0.00
_THUMBNAIL = 350  # pixels: about the width of a photo on the page, for which names are placed
_LETTER, _LINE = 7.6, 14.0  # pixels: width of a letter, height of a line of 11 px text
_LARGER = 14 / 11  # of the text of best and worst images on a wide screen, where their photos are smaller
_LONGEST_NAME = 24
_GOLDEN = 222.5  # degrees of the golden ratio: colors of neighboring classes are far apart
Id = int | str


@dataclass(frozen=True)
class Truth:
    """One image of an annotation file: its size in pixels, and its objects as float64 x1, y1, x2, y2, class numbers and crowd flags."""

    name: str
    width: int
    height: int
    boxes_G4: np.ndarray
    labels_G: np.ndarray
    crowd_G: np.ndarray


@dataclass(frozen=True)
class Detected:
    """Detections of one image, best first: float64 x1, y1, x2, y2, class numbers and scores."""

    boxes_D4: np.ndarray
    labels_D: np.ndarray
    scores_D: np.ndarray


_NOTHING = Detected(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0))


@dataclass(frozen=True)
class Evaluation:
    """Annotations and detections of one evaluation.

    Attributes:
        folder: folder of the photos.
        threshold: lowest score of a detection.
        upright: whether photos that EXIF turns without a change of size are read upright.
    """

    class_names: list[str]
    images: dict[Id, Truth]
    detections: dict[Id, Detected]
    folder: Path
    threshold: float
    upright: bool

    def of(self, image_id: Id) -> Detected:
        """Return the detections of an image."""
        return self.detections.get(image_id, _NOTHING)


@dataclass(frozen=True)
class Outcome:
    """Matches of one image.

    Attributes:
        right_D, ignored_D: detections that match an object; that lie on a crowd region.
        error: LRP error, 0 (all objects detected, boxes exact) to 1; None without objects and detections.
    """

    right_D: np.ndarray
    ignored_D: np.ndarray
    right: int
    wrong: int
    missed: int
    error: float | None

    @property
    def text(self) -> str:
        """Counts and error, in words."""
        words = f"{self.right} right, {self.wrong} wrong, {self.missed} missed"
        return words if self.error is None else f"{words}, error {self.error:.2f}"


@dataclass(frozen=True)
class Panel:
    """One drawing of a photo: title, counts in words, SVG element."""

    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class Drawn:
    """One photo drawn in several panels, with a caption and its classes as (name, CSS color)."""

    name: str
    caption: str
    panels: list[Panel]
    classes: list[tuple[str, str]]


@dataclass(frozen=True)
class ComparedPhotos:
    """Photos with the largest difference between two detectors.

    Attributes:
        better, worse: photos on which the first detector has the smaller and the larger error, the largest difference first.
        gained, lost: numbers of all such images.
        images: number of evaluated images.
        left_out: chosen photos that are missing or did not fit into the page.
    """

    better: list[Drawn]
    worse: list[Drawn]
    gained: int
    lost: int
    images: int
    threshold: float
    left_out: int


class Photos:
    """Photos of a page, each embedded once, however often it is drawn.

    Attributes:
        budget: bytes left for all images of the page.
        embedded: (id, data: URL, width, height) of each photo, in the pixels of its annotations.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._ids: dict[str, str | None] = {}
        self.embedded: list[tuple[str, str, int, int]] = []

    def add(self, evaluation: Evaluation, truth: Truth) -> str | None:
        """Embed the photo of an image and return its id; None if it is missing, unreadable, of another size, or has no room."""
        folder = os.path.abspath(evaluation.folder)
        file = os.path.normpath(os.path.join(folder, truth.name))
        if not file.startswith(f"{folder}{os.sep}"):
            return None
        if file not in self._ids:
            source = self._encode(Path(file), truth, upright=evaluation.upright)
            self._ids[file] = f"photo-{len(self.embedded)}" if source else None
            if source:
                self.embedded.append((f"photo-{len(self.embedded)}", source, truth.width, truth.height))
        return self._ids[file]

    def _encode(self, file: Path, truth: Truth, *, upright: bool) -> str | None:
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as stored:
                turned = ImageOps.exif_transpose(stored)
                fitting = [image for image in (turned, stored) if image.size == (truth.width, truth.height)]
                if not fitting:
                    return None
                return self.budget.encode(fitting[0] if upright else fitting[-1], PHOTO_SIDE)
        except Exception:  # PIL raises many kinds of exceptions for damaged files
            return None


def read_evaluation(run: Path, files: dict[Path, Any] | None = None) -> Evaluation | None:
    """Read the annotations and detections of an evaluation; None if a file is missing or damaged.

    Args:
        files: annotation files that were read before, by path; new ones are added.
    """
    try:
        settings = read_yaml(run / "config.yaml")
        annotations, folder = Path(settings["annotations"]), Path(settings["images"])
        known = files if files is not None else {}
        if annotations not in known:
            known[annotations] = _read_annotations(annotations)
        names, numbers, images = known[annotations]
        threshold = _number(_read(run / "analysis.json")["score_threshold"])
        found = _read_detections(run / "detections.json", numbers, threshold)
        orientation = _read(run / "result.json")["metrics"].get("orientation", {}).get("val", {})
        upright = orientation.get("convention", "upright") == "upright"
    except (OSError, UserError, *MALFORMED):
        return None
    return Evaluation(names, images, found, folder, threshold, upright)


def match(truth: Truth, detected: Detected) -> Outcome:
    """Match detections with objects as COCO does at an IoU of 0.5, within each class, and compute the image's LRP error.

    Each right detection adds (1 - IoU) / (1 - 0.5) to the error, each wrong one and each missed object 1; the sum is divided by their number.
    """
    overlaps_DG, shares_DG = _overlaps(detected.boxes_D4, truth.boxes_G4)
    free_G = ~truth.crowd_G
    right_D = np.zeros(len(detected.labels_D), dtype=bool)
    ignored_D = right_D.copy()
    apart = 0.0
    for d, label in enumerate(detected.labels_D):
        same_G = truth.labels_G == label
        near_G = np.flatnonzero(same_G & free_G & (overlaps_DG[d] >= IOU))
        if len(near_G):
            best = near_G[::-1][overlaps_DG[d, near_G[::-1]].argmax()]  # the last of equal ones, as COCO does
            free_G[best], right_D[d] = False, True
            apart += (1 - overlaps_DG[d, best]) / (1 - IOU)
        elif (same_G & truth.crowd_G & (shares_DG[d] >= IOU)).any():
            ignored_D[d] = True
    right, wrong, missed = int(right_D.sum()), int((~right_D & ~ignored_D).sum()), int(free_G.sum())
    number = right + wrong + missed
    error = (apart + wrong + missed) / number if number else None
    return Outcome(right_D, ignored_D, right, wrong, missed, error)


def compare(better: Evaluation, base: Evaluation, names: tuple[str, str], photos: Photos) -> ComparedPhotos | None:
    """Draw the photos with the largest difference in error between two evaluations; None if they are not of the same images or thresholds.

    Args:
        names: of the two rows.
    """
    if better.images.keys() != base.images.keys() or better.threshold != base.threshold:
        return None
    differences: list[tuple[float, Id]] = []
    for image_id, truth in better.images.items():
        errors = [match(truth, one.of(image_id)).error for one in (better, base)]
        # Without objects and without detections nothing is wrong.
        first, second = (0.0 if error is None else error for error in errors)
        differences.append((second - first, image_id))
    rising = sorted(differences, key=lambda pair: pair[0])
    lost = [pair for pair in rising if pair[0] <= -_LEAST_DIFFERENCE]
    gained = [pair for pair in reversed(rising) if pair[0] >= _LEAST_DIFFERENCE]
    half = MOST_COMPARED // 2
    most_gained = max(half, MOST_COMPARED - len(lost))
    chosen = gained[:most_gained], lost[: MOST_COMPARED - min(most_gained, len(gained))]
    # Both directions in turn, in case the page has no room for all.
    order = [pair for n in range(MOST_COMPARED) for part in chosen for pair in part[n : n + 1]]
    drawn = {image_id: _triple(better, base, names, image_id, difference, photos) for difference, image_id in order}
    first_part, second_part = ([one for _, image_id in part if (one := drawn[image_id]) is not None] for part in chosen)
    left_out = sum(one is None for one in drawn.values())
    return ComparedPhotos(
        first_part, second_part, len(gained), len(lost), len(better.images), better.threshold, left_out
    )


def draw_pair(evaluation: Evaluation, name: str, photos: Photos, image_id: Id | None = None) -> Drawn | None:
    """Draw the photo with this file name with its annotations and its detections; None if the photo cannot be embedded.

    Args:
        image_id: its id, which tells it apart from others of the same name; without it, a name that is not unique is not drawn.
    """
    named = [one for one, truth in evaluation.images.items() if Path(truth.name).name == name]
    chosen = image_id if image_id is not None else named[0] if len(named) == 1 else None
    if chosen not in named:
        return None
    truth, detected = evaluation.images[chosen], evaluation.of(chosen)
    photo = photos.add(evaluation, truth)
    if photo is None:
        return None
    outcome = match(truth, detected)
    panels = [
        _truth_panel(evaluation, truth, photo, _LARGER),
        _detection_panel(evaluation, truth, detected, outcome, photo, "Detections", _LARGER),
    ]
    return Drawn(name if len(named) == 1 else truth.name, "", panels, _classes(evaluation, truth, detected))


def class_color(label: int) -> str:
    """Return the CSS color of a class."""
    return f"hsl({label * _GOLDEN % 360:.0f} 95% {(60, 70, 50)[label // 8 % 3]}%)"


def _triple(
    better: Evaluation, base: Evaluation, names: tuple[str, str], image_id: Id, difference: float, photos: Photos
) -> Drawn | None:
    truth = better.images[image_id]
    photo = photos.add(better, truth)
    if photo is None:
        return None
    outcomes = [match(truth, one.of(image_id)) for one in (base, better)]
    panels = [_truth_panel(better, truth, photo)]
    for evaluation, name, outcome in zip((base, better), names[::-1], outcomes, strict=True):
        panels.append(_detection_panel(evaluation, truth, evaluation.of(image_id), outcome, photo, name))
    sign = "smaller" if difference > 0 else "larger"
    caption = f"error {abs(difference):.2f} {sign} with {names[0]}"
    return Drawn(
        short_names(one.name for one in better.images.values())[truth.name],
        caption,
        panels,
        _classes(better, truth, base.of(image_id), better.of(image_id)),
    )


def _truth_panel(evaluation: Evaluation, truth: Truth, photo: str, larger: float = 1.0) -> Panel:
    texts = [
        evaluation.class_names[label] + (" (crowd)" if crowd else "")
        for label, crowd in zip(truth.labels_G, truth.crowd_G, strict=True)
    ]
    number = int((~truth.crowd_G).sum())
    solid = np.ones(len(texts), dtype=bool)
    return Panel(
        "Annotations", count(number, "object"), _svg(truth, photo, truth.boxes_G4, truth.labels_G, texts, solid, larger)
    )


def _detection_panel(
    evaluation: Evaluation,
    truth: Truth,
    detected: Detected,
    outcome: Outcome,
    photo: str,
    title: str,
    larger: float = 1.0,
) -> Panel:
    texts = [
        f"{evaluation.class_names[label]} {score:.2f}"
        for label, score in zip(detected.labels_D, detected.scores_D, strict=True)
    ]
    solid_D = outcome.right_D | outcome.ignored_D
    return Panel(title, outcome.text, _svg(truth, photo, detected.boxes_D4, detected.labels_D, texts, solid_D, larger))


def _classes(evaluation: Evaluation, truth: Truth, *detected: Detected) -> list[tuple[str, str]]:
    labels = sorted({int(label) for part in (truth.labels_G, *(one.labels_D for one in detected)) for label in part})
    return [(evaluation.class_names[label], class_color(label)) for label in labels]


def _svg(
    truth: Truth,
    photo: str,
    boxes_N4: np.ndarray,
    labels_N: np.ndarray,
    texts: Sequence[str],
    solid_N: np.ndarray,
    larger: float,
) -> str:
    """Draw boxes with their names on a photo: solid lines, or dashed ones where `solid_N` is false.

    The page sets the size of lines and text. Names that would cover another one at the size of a thumbnail have the class `more`: the page shows
    them in the full-size view only. `larger` is the size of the text that has to have room, as a multiple of 11 px.
    """
    unit = truth.width / _THUMBNAIL
    parts = [
        f'<svg viewBox="0 0 {truth.width} {truth.height}" style="--unit: {unit:.3f}px" aria-hidden="true"><use href="#{photo}"/>'
    ]
    areas: list[tuple[float, float, float, float]] = []
    names = []
    for (left, top, right, bottom), label, text, solid in zip(boxes_N4.tolist(), labels_N, texts, solid_N, strict=True):
        dashed = "" if solid else ' class="dashed"'
        color = class_color(int(label))
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0):.1f}" height="{max(bottom - top, 0):.1f}" stroke="{color}"{dashed}/>'
        )
        short = text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"
        x, y, free = _place(
            truth, (left, top, right, bottom), len(short) * _LETTER * larger * unit, _LINE * larger * unit, areas
        )
        more = "" if free else ' class="more"'
        names.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(short)}</text>')
    return "".join([*parts, *names, "</svg>"])


def _place(
    truth: Truth,
    box: tuple[float, float, float, float],
    wide: float,
    high: float,
    areas: list[tuple[float, float, float, float]],
) -> tuple[float, float, bool]:
    """Return the baseline of a name (above its box, inside or below) and whether it covers no earlier one of `areas`, to which it is then added."""
    left, top, _, bottom = box
    margin = 0.2 * high
    x = min(max(left, margin), max(truth.width - wide, margin))
    choices = [y for y in (top, top + high, bottom + high) if high <= y <= truth.height] or [
        min(max(top, 0.0) + high, truth.height)
    ]
    for y in choices:
        area = (x, y - high, x + wide, y)
        if not any(area[0] < o[2] and o[0] < area[2] and area[1] < o[3] and o[1] < area[3] for o in areas):
            areas.append(area)
            return x, y - 0.25 * high, True
    return x, choices[0] - 0.25 * high, False


def _overlaps(boxes_D4: np.ndarray, boxes_G4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of each detection with each object, and the share of the detection that lies on it, both float64 [D, G]."""
    low_DG2 = np.maximum(boxes_D4[:, None, :2], boxes_G4[None, :, :2])
    high_DG2 = np.minimum(boxes_D4[:, None, 2:], boxes_G4[None, :, 2:])
    inner_DG = (high_DG2 - low_DG2).clip(0).prod(2)
    areas_D, areas_G = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (boxes_D4, boxes_G4))
    union_DG = areas_D[:, None] + areas_G[None] - inner_DG
    zeros = np.zeros_like(inner_DG)
    iou_DG = np.divide(inner_DG, union_DG, out=zeros.copy(), where=union_DG > 0)
    share_DG = np.divide(
        inner_DG, np.broadcast_to(areas_D[:, None], inner_DG.shape), out=zeros, where=areas_D[:, None] > 0
    )
    return iou_DG, share_DG


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _read_annotations(file: Path) -> tuple[list[str], dict[Id, int], dict[Id, Truth]]:
    """Read (class names, class number by category id, images by id) of a COCO file; raises one of MALFORMED for values of another type."""
    content = _read(file)
    numbers: dict[Id, int] = {row["id"]: number for number, row in enumerate(content["categories"])}
    rows: dict[Id, list[tuple[list[float], int, bool]]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        box = [_number(value) for value in row["bbox"]]
        rows[row["image_id"]].append((box, numbers[row["category_id"]], bool(row.get("iscrowd", 0))))
    images = {}
    for row in content["images"]:
        objects = rows[row["id"]]
        width, height = int(row["width"]), int(row["height"])
        labels_G = np.array([label for _, label, _ in objects], dtype=np.int64)
        crowd_G = np.array([crowd for _, _, crowd in objects], dtype=bool)
        images[row["id"]] = Truth(
            str(row["file_name"]), width, height, _corners([box for box, _, _ in objects]), labels_G, crowd_G
        )
    return [" ".join(str(row["name"]).split()) for row in content["categories"]], numbers, images


def _read_detections(file: Path, numbers: dict[Id, int], threshold: float) -> dict[Id, Detected]:
    """Read the detections with a score of at least the threshold, by image; raises one of MALFORMED for values of another type."""
    rows: dict[Id, list[tuple[float, list[float], int]]] = {}
    for row in _read(file):
        if (score := _number(row["score"])) >= threshold:
            box = [_number(value) for value in row["bbox"]]
            rows.setdefault(row["image_id"], []).append((score, box, numbers[row["category_id"]]))
    detections = {}
    for image_id, found in rows.items():
        found.sort(key=lambda entry: -entry[0])
        labels_D = np.array([label for _, _, label in found], dtype=np.int64)
        scores_D = np.array([score for score, _, _ in found])
        detections[image_id] = Detected(_corners([box for _, box, _ in found]), labels_D, scores_D)
    return detections


def _corners(boxes: list[list[float]]) -> np.ndarray:
    boxes_N4 = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]], 1)


def _number(value: Any) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(value)
    return number
