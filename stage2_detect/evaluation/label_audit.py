"""Labels to look at first: where the detections of an evaluation and the labels contradict each other, as `label_audit.json` and `label_audit.jpg`.

Matches, kinds of errors and calibration are hotcoco's. Kinds of errors: Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection
Errors", section 2. Calibration: the expected calibration error of Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3. Boxes are
compared, for detectors with masks too. Crowd regions are not labels, and detections of their class on them are not counted.

Reasons of a finding; an object is listed under one of them:
    no_label: a detection from the score threshold on that overlaps no label.
    other_class: one on a label of another class that no detection of its own class finds.
    other_box: one that overlaps a label of its class, but too little, and no other detection finds this label.
    not_found: any other label that no detection of its class finds, whatever its score.

The order is by `agreement`, the share of comparable cases without a contradiction: of the detections with a similar score, how many are on a
label; of the labels of the class, how many are found. Where a detector is right in 98 % of such cases, the other 2 % are worth a look; where it
is right in half of them, it says little about the labels.

Legend: D detections, G labels of one image.
"""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import torch
from PIL import Image

from ssld.shared.files import short_names, write_atomically
from ssld.shared.run_dir import RunDir
from ssld.shared.training.batch_sheet import sheet_of
from ssld.shared.wording import count, weakness
from ssld.stage2_detect.data.coco import CocoData, CocoImage, Id
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.evaluation.coco_ap import detection_table, image_numbers, numbered_dataset
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections

FILE, SHEET = "label_audit.json", "label_audit.jpg"
REASONS = {
    "no_label": "detected without a label",
    "other_class": "detected as another class",
    "other_box": "detected with another box",
    "not_found": "labeled but not found",
}
IOU, LEAST_IOU = 0.5, 0.1
"""overlap from which a detection and a label are one object; below the second there is no overlap (TIDE's values)"""
LISTED, DRAWN = 100, 12
_BINS = 10
_ERRORS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
_LONGEST = 480  # pixels; longer side of a part of an image on the sheet


@dataclass(frozen=True)
class Finding:
    """A contradiction between detections and labels.

    Attributes:
        image: number of the image, from 1.
        detection: row of the table of detections; None for `not_found`.
        label: row of the labels of the data set; None for `no_label`.
        agreement: as above, 0..1.
        strength: order of equal agreement: the score of a detection; labels that are not found follow, from -1 to 0 by their area.
    """

    reason: str
    image: int
    detection: int | None
    label: int | None
    agreement: float
    strength: float


def write_audit(
    run: RunDir, data: CocoData, detections: Mapping[Id, Detections], *, folder: Path, score_threshold: float
) -> list[Path]:
    """Write the audit of an evaluation into its run directory and a line into its log, on the main rank.

    Args:
        data: read with `training=False`.
        detections: by image id, boxes in pixels of the original image.
        folder: folder of the images, which file names are relative to.
        score_threshold: lowest score of the detections of the first three reasons.

    Returns:
        The files written; without findings there is no sheet.
    """
    audit = audit_labels(data, detections, folder=folder, score_threshold=score_threshold)
    write_atomically(run.path / FILE, json.dumps(audit) + "\n")
    files = [run.path / FILE]
    if audit["drawn"]:
        content = io.BytesIO()
        sheet_of(drawn_findings(data, audit["findings"][: audit["drawn"]])).save(content, "JPEG", quality=90)
        write_atomically(run.path / SHEET, content.getvalue())
        files.append(run.path / SHEET)
    else:
        (run.path / SHEET).unlink(missing_ok=True)
    run.log(describe(audit, files[-1]))
    if audit["findings"] and audit["tide"] and (weak := weakness(audit["tide"]["AP50"])):
        run.log(weak)
    return files


def audit_labels(
    data: CocoData, detections: Mapping[Id, Detections], *, folder: Path, score_threshold: float
) -> dict[str, Any]:
    """Compare detections with labels; arguments as of `write_audit`, returns the content of `label_audit.json`, as docs/data.md describes it.

    Raises:
        ValueError: an unknown image, a label out of range, or a number that is not finite.
    """
    number = image_numbers(data)
    table_D7 = detection_table(data, detections, number)
    truth = numbered_dataset(data, number, masks=False)
    ground_truth = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(table_D7), "bbox")
    evaluation.evaluate()
    diagnostics = evaluation.image_diagnostics(iou_thr=IOU, score_thr=score_threshold)
    calibration = evaluation.calibration(n_bins=_BINS, iou_threshold=IOU)
    found = find(truth["annotations"], table_D7, diagnostics, calibration, score_threshold)
    records = {number[record.image_id]: record for record in data.images}
    first_label = _first_labels(truth["annotations"])
    listed = [_entry(data, records[one.image], folder, one, table_D7, first_label) for one in found[:LISTED]]
    counted = Counter(one.reason for one in found)
    regular = [row for row in truth["annotations"] if not row["iscrowd"]]
    return {
        "score_threshold": score_threshold,
        "iou": IOU,
        "images": len(data.images),
        "labels": len(regular),
        "detections": int((table_D7[:, 5] >= score_threshold).sum()),
        "counts": {reason: counted[reason] for reason in REASONS},
        "drawn": min(DRAWN, len(listed)),
        "image_ids": list(dict.fromkeys(entry["image_id"] for entry in listed)),
        "findings": listed,
        "tide": _tide(evaluation) if regular else None,
        "calibration": _calibration(calibration) if len(table_D7) else None,
    }


def find(
    labels: Sequence[Mapping[str, Any]],
    table_D7: np.ndarray,
    diagnostics: Mapping[str, Any],
    calibration: Mapping[str, Any],
    score_threshold: float,
) -> list[Finding]:
    """List the findings, the most suspicious first.

    Args:
        labels: COCO annotations with ids 1, 2, ...
        table_D7: as from `detection_table`; the ids of detections are their rows, from 1.
        diagnostics, calibration: hotcoco's.
        score_threshold: lowest score of the detections.
    """
    status = diagnostics["gt_status"]
    regular = [row for row in labels if not row["iscrowd"]]
    unmatched = {row["id"]: row for row in regular if status.get(row["id"]) == "fn"}
    class_counts = Counter(row["category_id"] for row in regular)
    missed = Counter(row["category_id"] for row in unmatched.values())
    precisions = [one["avg_accuracy"] for one in calibration["bins"]]
    findings: list[Finding] = []

    def add(reason: str, detection: int, label: int | None) -> None:
        score = float(table_D7[detection - 1, 5])
        similar = precisions[min(int(score * _BINS), _BINS - 1)]
        place = None if label is None else label - 1
        findings.append(Finding(reason, int(table_D7[detection - 1, 0]), detection - 1, place, similar, score))

    for detection, label in _displaced(table_D7, unmatched, diagnostics["dt_status"], score_threshold):
        add("other_box", detection, label)
        del unmatched[label]
    taken: dict[int, list[np.ndarray]] = defaultdict(
        list
    )  # boxes by image: an object that is detected as two classes is one finding
    for one in sorted(diagnostics["label_errors"], key=lambda error: -error["dt_score"]):
        box_4 = table_D7[one["dt_id"] - 1, 1:5]
        if one["type"] == "wrong_label":
            if unmatched.pop(one["gt_id"], None) is None:
                continue
            add("other_class", one["dt_id"], one["gt_id"])
        elif not taken[one["image_id"]] or _overlaps(box_4[None], taken[one["image_id"]]).max() < IOU:
            add("no_label", one["dt_id"], None)
        taken[one["image_id"]].append(box_4)
    largest = max((row["area"] for row in regular), default=0) or 1
    for row in unmatched.values():
        recall = 1 - missed[row["category_id"]] / class_counts[row["category_id"]]
        findings.append(Finding("not_found", row["image_id"], None, row["id"] - 1, recall, row["area"] / largest - 1))
    return sorted(findings, key=lambda one: (-one.agreement, -one.strength, one.image))


def _displaced(
    table_D7: np.ndarray,
    unmatched: Mapping[int, Mapping[str, Any]],
    status: Mapping[int, str],
    score_threshold: float,
) -> Iterable[tuple[int, int]]:
    """Yield (id of a detection, id of a label): wrong detections that overlap an unmatched label of their class, the best first, each label once."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for detection in np.flatnonzero(table_D7[:, 5] >= score_threshold) + 1:
        if status.get(int(detection)) == "fp":
            by_image[int(table_D7[detection - 1, 0])].append(int(detection))
    labels_of: dict[int, list[int]] = defaultdict(list)
    for label, row in unmatched.items():
        labels_of[row["image_id"]].append(label)
    pairs = []
    for image in sorted(by_image.keys() & labels_of.keys()):
        of_image, labels = by_image[image], labels_of[image]
        places = [detection - 1 for detection in of_image]
        overlaps_DG = _overlaps(table_D7[places, 1:5], [unmatched[label]["bbox"] for label in labels])
        classes_G = np.array([unmatched[label]["category_id"] for label in labels])
        near_DG = (overlaps_DG >= LEAST_IOU) & (table_D7[places, 6][:, None] == classes_G)
        pairs += [(float(overlaps_DG[d, g]), of_image[d], labels[g]) for d, g in zip(*near_DG.nonzero(), strict=True)]
    detections_used, labels_used = set[int](), set[int]()
    for _, detection, label in sorted(pairs, key=lambda pair: -pair[0]):
        if detection not in detections_used and label not in labels_used:
            detections_used.add(detection)
            labels_used.add(label)
            yield detection, label


def _overlaps(boxes_D4: np.ndarray, others_G4: Sequence[Any]) -> np.ndarray:
    """Compute IoU [D, G] of boxes x, y, width, height."""
    others = np.asarray(others_G4, dtype=np.float64)
    return np.asarray(hotcoco.primitives.bbox_iou(boxes_D4, others, [False] * len(others)))


def _first_labels(annotations: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the row of the first label of each image."""
    first: dict[int, int] = {}
    for row in annotations:
        first.setdefault(row["image_id"], row["id"] - 1)
    return first


def _entry(
    data: CocoData,
    record: CocoImage,
    folder: Path,
    one: Finding,
    table_D7: np.ndarray,
    first_label: Mapping[int, int],
) -> dict[str, Any]:
    """Convert a finding to JSON values, with the ids and names of the annotation file."""
    path = Path(record.path)
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else record.path
    entry: dict[str, Any] = {"image_id": record.image_id, "file_name": name, "reason": one.reason}
    entry |= {"class": None, "score": None, "box": None, "label_id": None, "label_class": None, "label_box": None}
    if one.detection is not None:
        row = table_D7[one.detection]
        entry |= {"class": data.class_names[int(row[6]) - 1], "score": round(float(row[5]), 5)}
        entry["box"] = row[1:5].round(2).tolist()
    if one.label is not None:
        place = one.label - first_label[one.image]
        label_class = data.class_names[int(record.labels_N[place])]
        entry |= {"label_id": record.annotation_ids[place], "label_class": label_class}
        entry["label_box"] = record.file_boxes_N4[place].tolist()
    return entry | {"agreement": round(one.agreement, 4)}


def _tide(evaluation: Any) -> dict[str, Any]:
    errors = evaluation.tide_errors(pos_thr=IOU, bg_thr=LEAST_IOU)
    gains = {kind: round(float(errors["delta_ap"][kind]), 6) for kind in _ERRORS}
    return {"AP50": errors["ap_base"], "gains": gains, "counts": {kind: errors["counts"][kind] for kind in _ERRORS}}


def _calibration(calibration: Mapping[str, Any]) -> dict[str, Any]:
    bins = []
    for one in calibration["bins"]:
        score, precision = (one[key] if one["count"] else None for key in ("avg_confidence", "avg_accuracy"))
        limits = {"low": one["bin_lower"], "high": one["bin_upper"]}
        bins.append(limits | {"score": score, "precision": precision, "detections": one["count"]})
    return {"error": calibration["ece"], "bins": bins}


def describe(audit: Mapping[str, Any], file: Path) -> str:
    """Format an audit as a line of the log."""
    counts = audit["counts"]
    total = sum(counts.values())
    if not total:
        return "label audit: no label contradicts the detections"
    parts = ", ".join(f"{counts[reason]} {words}" for reason, words in REASONS.items() if counts[reason])
    of = f"{count(audit['labels'], 'label')} and {count(audit['detections'], 'detection')} on {count(audit['images'], 'image')}"
    return f"label audit: {count(total, 'object')} to look at, of {of}: {parts}; the first are in {file}"


def drawn_findings(data: CocoData, findings: Sequence[Mapping[str, Any]]) -> list[tuple[Image.Image, str]]:
    """Draw the detection and the label of each finding on the part of its image around them; the caption is file name and reason."""
    records = {record.image_id: record for record in data.images}
    file_names = short_names(record.path for record in data.images)
    names = [*data.class_names, *(f"label: {name}" for name in data.class_names)]
    images = []
    for one in findings:
        record = records[one["image_id"]]
        rows = []  # x, y, width, height, score, place in `names`
        if one["box"]:
            rows.append([*one["box"], one["score"], data.class_names.index(one["class"])])
        if one["label_box"]:
            place = len(data.class_names) + data.class_names.index(one["label_class"])
            rows.append([*one["label_box"], float("nan"), place])
        table_N6 = np.array(rows, dtype=np.float64)
        table_N6[:, 2:4] += table_N6[:, :2]
        image = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
        area = _around(table_N6[:, :4], image.size)
        part = image.crop(area)
        factor = _LONGEST / max(part.size)
        part = part.resize((max(1, round(part.width * factor)), max(1, round(part.height * factor))))
        boxes_N4 = torch.from_numpy((table_N6[:, :4] - [*area[:2], *area[:2]]) * factor)
        objects = Detections(boxes_N4, torch.from_numpy(table_N6[:, 4]), torch.from_numpy(table_N6[:, 5]).long())
        images.append(
            (draw_objects(part, objects, names, legend=True), f"{file_names[record.path]}: {REASONS[one['reason']]}")
        )
    return images


def _around(boxes_N4: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Choose the part of an image of (width, height) that shows boxes with as much again on each side, and a third of the image at least."""
    low_2, high_2 = boxes_N4[:, :2].min(0), boxes_N4[:, 2:].max(0)
    side = max(3 * float((high_2 - low_2).max()), max(size) / 3)
    edges = []
    for middle, whole in zip((low_2 + high_2) / 2, size, strict=True):
        start = min(max(0, round(middle - side / 2)), max(0, whole - round(side)))
        edges.append((start, min(whole, start + max(1, round(side)))))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom
