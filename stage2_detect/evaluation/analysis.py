"""Metrics beside AP: precision, recall and F1 of each class at a score threshold, confusions, precision-recall curves.

Detections are matched as COCO does at one IoU (https://cocodataset.org/#detection-eval): within a class, in order of falling scores, each
detection is matched with the free object of the highest IoU. One that overlaps a crowd region of its class instead is neither right nor wrong.
The curves are those of COCO's precision table at this IoU, which uses the 100 best detections of a class in an image; the counts use all of
them. Confusions are matched across classes, among the detections and objects above the threshold that have no match; so the diagonal, rows and
columns of the matrix add up to the counts of the table.

Each image has its LRP error too, by which a report chooses the images to draw.

Legend: I images (in a chunk), D detections (of an image, or of all), G objects of an image, K classes, R 101 recall
points. All images of a chunk are matched at once: the loop is over the rank of a detection in its image.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssld.shared.wording import count, padded, printable, width_of
from ssld.stage2_detect.data.coco import CocoData, CocoImage, Id
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.boxes import pairwise_intersection

WRONG, RIGHT, IGNORED = 0, 1, -1
IOU = 0.5
RECALLS_R = np.linspace(0, 1, 101)
MOST = 100
"""best detections of a class per image that COCO's curves use"""
MOST_LINES = 20
"""classes in the log's table"""
_CHUNK = 256  # images matched at once: bounds the memory


@dataclass(frozen=True)
class Analysis:
    """Matched detections of a data set, by image and falling score.

    Attributes:
        class_names: of the K classes.
        score_threshold: lowest score that `counts` and `confusions` use.
        objects_K: number of objects without crowd regions.
        labels_D, scores_D: of the detections.
        states_D: RIGHT, WRONG or IGNORED.
        ranks_D: number of better detections of the same class in the same image.
        confusions: int64 [K + 1, K + 1], rows ground truth, columns detections; the last of both is background.
        image_ids: of the I images, in COCO's order.
        counts_I3: int64, right, wrong and missed per image above the threshold.
        lrp_I: LRP error per image at the threshold, 0 (all detected, boxes exact) to 1; NaN without objects and detections.
    """

    class_names: tuple[str, ...]
    score_threshold: float
    objects_K: np.ndarray
    labels_D: np.ndarray
    scores_D: np.ndarray
    states_D: np.ndarray
    ranks_D: np.ndarray
    confusions: np.ndarray
    image_ids: tuple[Id, ...]
    counts_I3: np.ndarray
    lrp_I: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """Some images, with tables padded to the most rows of an image; the label of padding is -1.

    Attributes:
        truth_IG6: float64, x1, y1, x2, y2, label, crowd.
        detections_ID6: float64, x1, y1, x2, y2, label, score; best first.
        overlaps_IDG: IoU; for crowd regions the share of the detection that lies on them.
    """

    truth_IG6: np.ndarray
    detections_ID6: np.ndarray
    overlaps_IDG: np.ndarray

    def match(self, iou: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the states [I, D], and for each object the rank [I, G] of the detection matched with it, -1 for none."""
        return _match(self.detections_ID6, self.truth_IG6, self.overlaps_IDG, iou)


def in_order(ground_truth: CocoData) -> list[CocoImage]:
    """Return the images in COCO's order, which decides between equal scores."""
    return sorted(ground_truth.images, key=lambda record: (isinstance(record.image_id, str), record.image_id))


def chunks(ground_truth: CocoData, detections: Mapping[Id, Detections]) -> Iterator[Chunk]:
    """Yield the images of a data set in order, as many at once as memory allows. Raises ValueError if it was read with `training=True`."""
    if ground_truth.training:
        raise ValueError("the ground truth must be read with training=False: crowd regions are counted")
    records = in_order(ground_truth)
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        truth_IG6 = _padded([_object_rows(r.file_boxes_N4, r.labels_N, r.crowd_N) for r in chunk])
        detections_ID6 = _padded([_detection_rows(detections.get(record.image_id)) for record in chunk])
        overlaps_IDG = _overlaps(detections_ID6[..., :4], truth_IG6[..., :4], truth_IG6[..., 5] == 1)
        yield Chunk(truth_IG6, detections_ID6, overlaps_IDG)


def analyse(ground_truth: CocoData, detections: Mapping[Id, Detections], *, score_threshold: float) -> Analysis:
    """Match detections (boxes in pixels of the original image) with the objects of a data set read with `training=False`."""
    classes = len(ground_truth.class_names)
    confusions = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    objects_K = np.zeros(classes, dtype=np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    per_image: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in chunks(ground_truth, detections):
        truth_IG6, detections_ID6, overlaps_IDG = chunk.truth_IG6, chunk.detections_ID6, chunk.overlaps_IDG
        states_ID, matched_by_IG = chunk.match(IOU)
        regular_IG = (truth_IG6[..., 4] >= 0) & (truth_IG6[..., 5] == 0)
        objects_K += np.bincount(truth_IG6[..., 4][regular_IG].astype(np.int64), minlength=classes)
        confusions += _confusions(
            detections_ID6, truth_IG6, overlaps_IDG, states_ID, matched_by_IG, classes, score_threshold, IOU
        )
        per_image.append(
            _of_images(detections_ID6, regular_IG, overlaps_IDG, states_ID, matched_by_IG, score_threshold, IOU)
        )
        real_ID = detections_ID6[..., 4] >= 0
        labels_ID = detections_ID6[..., 4].astype(np.int64)
        columns = (labels_ID, detections_ID6[..., 5], states_ID, ranks(labels_ID))
        parts.append(tuple(column[real_ID] for column in columns))
    # Detections below the threshold were matched too, after those above it: they may have an object that no other detection has.
    confusions[:classes, classes] = objects_K - confusions[:classes, :classes].sum(1)
    labels_D, scores_D, states_D, ranks_D = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts_I3, lrp_I = (np.concatenate(column) for column in zip(*per_image, strict=True))
    image_ids = tuple(record.image_id for record in in_order(ground_truth))
    return Analysis(
        ground_truth.class_names,
        score_threshold,
        objects_K,
        labels_D,
        scores_D,
        states_D,
        ranks_D,
        confusions,
        image_ids,
        counts_I3,
        lrp_I,
    )


def counts(analysis: Analysis) -> dict[str, np.ndarray]:
    """Count `right` and `wrong` detections from the threshold on, and `missed` objects: int64 [K] each."""
    counted_D = analysis.scores_D >= analysis.score_threshold
    right, wrong = (
        np.bincount(analysis.labels_D[counted_D & (analysis.states_D == state)], minlength=len(analysis.objects_K))
        for state in (RIGHT, WRONG)
    )
    return {"right": right, "wrong": wrong, "missed": analysis.objects_K - right}


def rates(right: int, wrong: int, missed: int) -> dict[str, float | None]:
    """Compute `precision`, `recall` and `f1` from counts; None where the divisor is 0."""
    return {
        "precision": _ratio(right, right + wrong),
        "recall": _ratio(right, right + missed),
        "f1": _ratio(2 * right, 2 * right + wrong + missed),
    }


@dataclass(frozen=True)
class Curve:
    """Precision and recall of a class over all thresholds.

    Attributes:
        precision_R: highest precision at this recall or a higher one, as COCO interpolates; 0 where the recall is not reached.
        best_f1: highest F1 of any threshold.
        best_score: threshold of `best_f1`.
    """

    precision_R: np.ndarray
    best_f1: float
    best_score: float | None


def curve(analysis: Analysis, label: int) -> Curve | None:
    """Compute the curve of a class, None without objects. The mean of its precision is AP at the IoU of the matching."""
    objects = int(analysis.objects_K[label])
    if not objects:
        return None
    of_class_D = (analysis.labels_D == label) & (analysis.states_D != IGNORED)
    _, right = _right(analysis, of_class_D & (analysis.ranks_D < MOST))
    recall, precision = right / objects, right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place_R = np.searchsorted(recall, RECALLS_R, side="left")
    precision_R = np.append(envelope, 0.0)[place_R]
    scores, right = _right(analysis, of_class_D)
    f1 = 2 * right / (np.arange(1, len(right) + 1) + objects)
    # Equal scores are one threshold: the last of them counts.
    last = np.append(scores[1:] != scores[:-1], True) if len(scores) else np.zeros(0, bool)
    best = int(np.where(last, f1, -1).argmax()) if right.size and right[-1] else None
    return Curve(precision_R, 0.0 if best is None else float(f1[best]), None if best is None else float(scores[best]))


def _right(analysis: Analysis, which_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the falling scores of some detections, and how many right ones there are down to each."""
    scores, right = analysis.scores_D[which_D], analysis.states_D[which_D] == RIGHT
    order = np.argsort(-scores, kind="stable")
    return scores[order], right[order].cumsum()


def report(analysis: Analysis, ap: Mapping[str, float | None]) -> dict[str, Any]:
    """Convert an analysis to JSON values; `ap`, by class name, is added to the rows."""
    counted = counts(analysis)
    totals = {name: int(values.sum()) for name, values in counted.items()}
    rows: list[dict[str, Any]] = []
    curves = {}
    for label, name in enumerate(analysis.class_names):
        of_class = {key: int(values[label]) for key, values in counted.items()}
        one = curve(analysis, label)
        rows.append(
            {
                "class": name,
                "AP": ap.get(name),
                **rates(**of_class),
                **of_class,
                "objects": of_class["right"] + of_class["missed"],
            }
        )
        rows[-1] |= {"best_f1": one.best_f1 if one else None, "best_f1_score": one.best_score if one else None}
        if one:
            curves[name] = one.precision_R.round(6).tolist()
    return {
        "score_threshold": analysis.score_threshold,
        "iou": IOU,
        "all_classes": {**rates(**totals), **totals},
        "classes": rows,
        "confusions": {
            "rows_are": "truth",
            "columns_are": "detections",
            "names": [*analysis.class_names, "background"],
            "counts": analysis.confusions.tolist(),
        },
        "precision_recall": {"recall": RECALLS_R.round(2).tolist(), "precision": curves},
    }


def describe(content: Mapping[str, Any]) -> list[str]:
    """Format a `report` for the log: a table of classes, of many those with the highest and lowest AP, and the most frequent confusions."""
    width = max([5, *(width_of(printable(row["class"])) for row in content["classes"])])
    threshold = content["score_threshold"]
    lines = [
        f"  {'':<{width}} {'AP':>7} {'P':>7} {'R':>7} {'F1':>7} {'objects':>9}   P, R, F1 at a score of {threshold:g}"
    ]
    rows, shown, gap = list(content["classes"]), 0, None
    if len(rows) > MOST_LINES:
        measured = sorted((row for row in rows if row["AP"] is not None), key=lambda row: -row["AP"])
        best, worst = measured[: MOST_LINES // 2], measured[MOST_LINES // 2 :][-(MOST_LINES // 2) :]
        gap = f"  ... {count(len(rows) - len(best) - len(worst), 'more class')}, see analysis.json"
        rows, shown = [*best, *worst], len(best)
    for number, row in enumerate([*rows, {"class": "all", "AP": None, **content["all_classes"]}]):
        if gap and number == shown:
            lines.append(gap)
        cells = (row["AP"], row["precision"], row["recall"], row["f1"])
        objects = row["right"] + row["missed"]
        lines.append(f"  {padded(printable(row['class']), width)} {' '.join(map(_percent, cells))} {objects:>9}")
    names, matrix = content["confusions"]["names"], np.array(content["confusions"]["counts"])[:-1, :-1]
    mixed = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-mixed, axis=None, kind="stable")[:3]
    pairs = [(int(mixed.flat[i]), *(names[n] for n in divmod(int(i), len(matrix)))) for i in order if mixed.flat[i]]
    if pairs:
        lines.append("  confused: " + ", ".join(f"{truth} detected as {label} {n}x" for n, truth, label in pairs))
    return lines


def _object_rows(boxes_G4: np.ndarray, labels_G: np.ndarray, crowd_G: np.ndarray) -> np.ndarray:
    """Build a table of objects, float64 [G, 6]: x1, y1, x2, y2, label, crowd."""
    return np.column_stack([boxes_G4[:, :2], boxes_G4[:, :2] + boxes_G4[:, 2:], labels_G, crowd_G])


def _detection_rows(detections: Detections | None) -> np.ndarray:
    """Build a table of detections, float64 [D, 6]: x1, y1, x2, y2, label, score; best first."""
    if detections is None:
        return np.zeros((0, 6))
    boxes_D4, labels_D, scores_D = (
        part.double().cpu().numpy() for part in (detections.boxes_N4, detections.labels_N, detections.scores_N)
    )
    rows = np.column_stack([boxes_D4, labels_D, scores_D])
    return rows[np.argsort(-scores_D, kind="stable")]


def ranks(labels_ID: np.ndarray) -> np.ndarray:
    """Count the detections with the same label before each, which are better."""
    ranks_ID = np.zeros_like(labels_ID)
    for label in np.unique(labels_ID):
        same_ID = labels_ID == label
        ranks_ID[same_ID] = (same_ID.cumsum(1) - 1)[same_ID]
    return ranks_ID


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Pad tables to [I, most, 6]; the label of padding is -1."""
    table = np.zeros((len(rows), max(1, *(len(one) for one in rows)), 6))
    table[..., 4] = -1
    for place, one in zip(table, rows, strict=True):
        place[: len(one)] = one
    return table


def _overlaps(detections_ID4: np.ndarray, truth_IG4: np.ndarray, crowd_IG: np.ndarray) -> np.ndarray:
    """Compute IoU [I, D, G]; for crowd regions the share of the detection that lies on them."""
    a, b = detections_ID4[:, :, None], truth_IG4[:, None]
    inner = pairwise_intersection(torch.from_numpy(detections_ID4), torch.from_numpy(truth_IG4)).numpy()
    area_ID1, area_I1G = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    union = np.where(crowd_IG[:, None], area_ID1, area_ID1 + area_I1G - inner)
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def _match(
    detections_ID6: np.ndarray, truth_IG6: np.ndarray, overlaps_IDG: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the states [I, D], and for each object the rank [I, G] of the detection matched with it, -1 for none."""
    images = np.arange(len(detections_ID6))
    crowd_IG = truth_IG6[..., 5] == 1
    states_ID = np.full(detections_ID6.shape[:2], WRONG)
    matched_by_IG = np.full(truth_IG6.shape[:2], -1)
    for rank in range(detections_ID6.shape[1]):
        label_I1 = detections_ID6[:, rank, 4][:, None]
        near_IG = (label_I1 >= 0) & (truth_IG6[..., 4] == label_I1) & (overlaps_IDG[:, rank] >= iou)
        free_IG = near_IG & ~crowd_IG & (matched_by_IG < 0)
        best_I = _last_argmax(np.where(free_IG, overlaps_IDG[:, rank], -1))
        right_I = free_IG.any(1)
        matched_by_IG[images[right_I], best_I[right_I]] = rank
        states_ID[right_I, rank] = RIGHT
        states_ID[~right_I & (near_IG & crowd_IG).any(1), rank] = IGNORED
    return states_ID, matched_by_IG


def _confusions(
    detections_ID6: np.ndarray,
    truth_IG6: np.ndarray,
    overlaps_IDG: np.ndarray,
    states_ID: np.ndarray,
    matched_by_IG: np.ndarray,
    classes: int,
    score_threshold: float,
    iou: float,
) -> np.ndarray:
    """Count the confusions [K + 1, K + 1] of a chunk, without the column of missed objects."""
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    images = np.arange(len(detections_ID6))
    labels_ID, scores_ID = detections_ID6[..., 4].astype(np.int64), detections_ID6[..., 5]
    counted_ID = (labels_ID >= 0) & (scores_ID >= score_threshold)
    right_ID = counted_ID & (states_ID == RIGHT)
    np.add.at(matrix, (labels_ID[right_ID], labels_ID[right_ID]), 1)
    # An object matched with a detection below the threshold is free for the others.
    counted_I1 = counted_ID.sum(1)[:, None]
    free_IG = (
        (truth_IG6[..., 4] >= 0) & (truth_IG6[..., 5] == 0) & ((matched_by_IG < 0) | (matched_by_IG >= counted_I1))
    )
    for rank in range(int(counted_I1.max(initial=0))):
        left_I = counted_ID[:, rank] & (states_ID[:, rank] == WRONG)
        near_IG = left_I[:, None] & free_IG & (overlaps_IDG[:, rank] >= iou)
        best_I = _last_argmax(np.where(near_IG, overlaps_IDG[:, rank], -1))
        mixed_I = near_IG.any(1)
        free_IG[images[mixed_I], best_I[mixed_I]] = False
        truth_I = np.where(mixed_I, truth_IG6[images, best_I, 4].astype(np.int64), classes)
        np.add.at(matrix, (truth_I[left_I], labels_ID[left_I, rank]), 1)
    return matrix


def _of_images(
    detections_ID6: np.ndarray,
    regular_IG: np.ndarray,
    overlaps_IDG: np.ndarray,
    states_ID: np.ndarray,
    matched_by_IG: np.ndarray,
    score_threshold: float,
    iou: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute (right, wrong, missed) [I, 3] and the LRP error [I] of a chunk.

    The error is the compact form of "Localization Recall Precision" (arXiv 1807.01696) over all classes: each right
    detection adds (1 - IoU) / (1 - `iou`), each wrong one and each missed object 1; the sum is divided by their number.
    """
    counted_ID = (detections_ID6[..., 4] >= 0) & (detections_ID6[..., 5] >= score_threshold)
    right_I, wrong_I = ((counted_ID & (states_ID == state)).sum(1) for state in (RIGHT, WRONG))
    missed_I = regular_IG.sum(1) - right_I
    overlap_IG = np.take_along_axis(overlaps_IDG, matched_by_IG.clip(0)[:, None], 1)[:, 0]
    matched_IG = (matched_by_IG >= 0) & (matched_by_IG < counted_ID.sum(1)[:, None])  # detections are sorted by score
    apart_I = np.where(matched_IG, (1 - overlap_IG) / (1 - iou), 0).sum(1)
    number_I = right_I + wrong_I + missed_I
    lrp_I = np.divide(apart_I + wrong_I + missed_I, number_I, out=np.full(len(number_I), np.nan), where=number_I > 0)
    return np.stack([right_I, wrong_I, missed_I], 1), lrp_I


def _last_argmax(values_IG: np.ndarray) -> np.ndarray:
    """Return the index [I] of the largest value, the last of equal ones, as COCO does."""
    return values_IG.shape[1] - 1 - values_IG[:, ::-1].argmax(1)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:7.2f}"
