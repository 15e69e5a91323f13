"""What AP does not say: precision, recall and F1 of each class at a score threshold, confusions, precision-recall curves.

Detections are matched as COCO does at one IoU (https://cocodataset.org/#detection-eval): within a class, best scores
first, each takes the free object with the highest IoU. One that overlaps a crowd region of its class instead is neither
right nor wrong. The curves are those of COCO's precision table at this IoU, which looks at the 100 best detections of a class in an image; the
counts look at all of them. Confusions are looked for among what is left
over above the threshold, across classes; so the matrix' diagonal, rows and columns add up to the counts of the table.

Each image has one number too: the LRP error of what was found in it, which picks the pictures that a report shows.

Legend: I images (in a chunk), D detections (of an image, or of all), G objects of an image, K classes, R 101 recall
points. All images of a chunk are matched at once: the loop is over the rank of a detection in its image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.boxes import pairwise_intersection

WRONG, RIGHT, IGNORED = 0, 1, -1
IOU = 0.5
RECALLS_R = np.linspace(0, 1, 101)
MOST = 100
"""detections of a class in an image that COCO's curves look at, the best ones"""
_CHUNK = 256  # images that are matched at once: bounds the memory


@dataclass(frozen=True)
class Analysis:
    """Every detection of a set with what became of it, by image and falling score.

    Attributes:
        class_names: of the K classes.
        score_threshold: lowest score of what `counts` and `confusions` look at.
        objects_K: objects that are no crowd regions.
        labels_D, scores_D: of the detections.
        states_D: RIGHT, WRONG or IGNORED.
        ranks_D: how many detections of the same class in the same image are better.
        confusions: int64 [K + 1, K + 1], rows truth, columns what was said; the last of both is background.
        image_ids: of the I images, in COCO's order.
        counts_I3: int64, right, wrong and missed of each image above the threshold.
        lrp_I: LRP error of each image at the threshold, 0 (all found, boxes exact) to 1; NaN where there was nothing to find and nothing was said.
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


def analyse(ground_truth: CocoData, detections: Mapping[Id, Detections], *, score_threshold: float) -> Analysis:
    """Match the detections of a set (boxes in original-image pixels) with its objects, read with `training=False`."""
    if ground_truth.training:
        raise ValueError("the ground truth must be read with training=False: crowd regions count here")
    classes = len(ground_truth.class_names)
    # The order of images decides between equal scores; this is COCO's.
    records = sorted(ground_truth.images, key=lambda record: (isinstance(record.image_id, str), record.image_id))
    confusions = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    objects_K = np.zeros(classes, dtype=np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    pictures: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        truth_IG6 = _padded([_object_rows(r.file_boxes_N4, r.labels_N, r.crowd_N) for r in chunk])
        found_ID6 = _padded([_detection_rows(detections.get(record.image_id)) for record in chunk])
        overlaps_IDG = _overlaps(found_ID6[..., :4], truth_IG6[..., :4], truth_IG6[..., 5] == 1)
        states_ID, taken_IG = _match(found_ID6, truth_IG6, overlaps_IDG, IOU)
        regular_IG = (truth_IG6[..., 4] >= 0) & (truth_IG6[..., 5] == 0)
        objects_K += np.bincount(truth_IG6[..., 4][regular_IG].astype(np.int64), minlength=classes)
        confusions += _confusions(
            found_ID6, truth_IG6, overlaps_IDG, states_ID, taken_IG, classes, score_threshold, IOU
        )
        pictures.append(_of_images(found_ID6, regular_IG, overlaps_IDG, states_ID, taken_IG, score_threshold, IOU))
        real_ID = found_ID6[..., 4] >= 0
        labels_ID = found_ID6[..., 4].astype(np.int64)
        columns = (labels_ID, found_ID6[..., 5], states_ID, _ranks(labels_ID))
        parts.append(tuple(column[real_ID] for column in columns))
    # The matching sees single detections: those below the threshold have taken no object from one above it, but may have
    # taken one that only they found.
    confusions[:classes, classes] = objects_K - confusions[:classes, :classes].sum(1)
    labels_D, scores_D, states_D, ranks_D = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts_I3, lrp_I = (np.concatenate(column) for column in zip(*pictures, strict=True))
    image_ids = tuple(record.image_id for record in records)
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
    """int64 [K] each: `right` and `wrong` detections with at least the threshold's score, and `missed` objects."""
    seen_D = analysis.scores_D >= analysis.score_threshold
    right, wrong = (
        np.bincount(analysis.labels_D[seen_D & (analysis.states_D == state)], minlength=len(analysis.objects_K))
        for state in (RIGHT, WRONG)
    )
    return {"right": right, "wrong": wrong, "missed": analysis.objects_K - right}


def rates(right: int, wrong: int, missed: int) -> dict[str, float | None]:
    """`precision`, `recall` and `f1` of counts; None where there is nothing to divide by."""
    return {
        "precision": _ratio(right, right + wrong),
        "recall": _ratio(right, right + missed),
        "f1": _ratio(2 * right, 2 * right + wrong + missed),
    }


@dataclass(frozen=True)
class Curve:
    """Precision and recall of a class over all thresholds; without objects there is none.

    Attributes:
        precision_R: best precision at this recall or a higher one, as COCO interpolates; 0 where recall is not reached.
        best_f1: highest F1 of any threshold.
        best_score: the threshold that has it.
    """

    precision_R: np.ndarray
    best_f1: float
    best_score: float | None


def curve(analysis: Analysis, label: int) -> Curve | None:
    """The curve of a class. The mean of its precision is AP at the matching's IoU."""
    objects = int(analysis.objects_K[label])
    if not objects:
        return None
    mine_D = (analysis.labels_D == label) & (analysis.states_D != IGNORED)
    _, found = _found(analysis, mine_D & (analysis.ranks_D < MOST))
    recall, precision = found / objects, found / np.arange(1, len(found) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place_R = np.searchsorted(recall, RECALLS_R, side="left")
    precision_R = np.append(envelope, 0.0)[place_R]
    scores, found = _found(analysis, mine_D)
    f1 = 2 * found / (np.arange(1, len(found) + 1) + objects)
    last = (
        np.append(scores[1:] != scores[:-1], True) if len(scores) else np.zeros(0, bool)
    )  # equal scores come together
    best = int(np.where(last, f1, -1).argmax()) if found.size and found[-1] else None
    return Curve(precision_R, 0.0 if best is None else float(f1[best]), None if best is None else float(scores[best]))


def _found(analysis: Analysis, which_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(falling scores of some detections, how many of them are right down to each)."""
    scores, right = analysis.scores_D[which_D], analysis.states_D[which_D] == RIGHT
    order = np.argsort(-scores, kind="stable")
    return scores[order], right[order].cumsum()


def report(analysis: Analysis, ap: Mapping[str, float | None]) -> dict[str, Any]:
    """Everything as JSON values; `ap` of each class name is added to its row."""
    found = counts(analysis)
    totals = {name: int(values.sum()) for name, values in found.items()}
    rows: list[dict[str, Any]] = []
    curves = {}
    for label, name in enumerate(analysis.class_names):
        mine = {key: int(values[label]) for key, values in found.items()}
        one = curve(analysis, label)
        rows.append(
            {"class": name, "AP": ap.get(name), **rates(**mine), **mine, "objects": mine["right"] + mine["missed"]}
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


def describe(found: Mapping[str, Any]) -> list[str]:
    """Lines of a `report` for the log: a table of classes, and the most frequent confusions."""
    width = max([5, *(len(row["class"]) for row in found["classes"])])
    threshold = found["score_threshold"]
    lines = [
        f"  {'':<{width}} {'AP':>7} {'P':>7} {'R':>7} {'F1':>7} {'objects':>9}   P, R, F1 at a score of {threshold:g}"
    ]
    for row in [*found["classes"], {"class": "all", "AP": None, **found["all_classes"]}]:
        cells = (row["AP"], row["precision"], row["recall"], row["f1"])
        objects = row["right"] + row["missed"]
        lines.append(f"  {row['class']:<{width}} {' '.join(map(_percent, cells))} {objects:>9}")
    names, matrix = found["confusions"]["names"], np.array(found["confusions"]["counts"])[:-1, :-1]
    mixed = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-mixed, axis=None, kind="stable")[:3]
    pairs = [(int(mixed.flat[i]), *(names[n] for n in divmod(int(i), len(matrix)))) for i in order if mixed.flat[i]]
    if pairs:
        lines.append("  taken for another: " + ", ".join(f"{truth} for {said} {n}x" for n, truth, said in pairs))
    return lines


def _object_rows(boxes_G4: np.ndarray, labels_G: np.ndarray, crowd_G: np.ndarray) -> np.ndarray:
    """float64 [G, 6]: x1, y1, x2, y2, label, crowd."""
    return np.column_stack([boxes_G4[:, :2], boxes_G4[:, :2] + boxes_G4[:, 2:], labels_G, crowd_G])


def _detection_rows(found: Detections | None) -> np.ndarray:
    """float64 [D, 6]: x1, y1, x2, y2, label, score; best first."""
    if found is None:
        return np.zeros((0, 6))
    boxes_D4, labels_D, scores_D = (
        part.double().cpu().numpy() for part in (found.boxes_N4, found.labels_N, found.scores_N)
    )
    rows = np.column_stack([boxes_D4, labels_D, scores_D])
    return rows[np.argsort(-scores_D, kind="stable")]


def _ranks(labels_ID: np.ndarray) -> np.ndarray:
    """How many of the detections before it, which are better, have the label of each."""
    ranks_ID = np.zeros_like(labels_ID)
    for label in np.unique(labels_ID):
        mine_ID = labels_ID == label
        ranks_ID[mine_ID] = (mine_ID.cumsum(1) - 1)[mine_ID]
    return ranks_ID


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """[I, most, 6] with label -1 where there is nothing."""
    table = np.zeros((len(rows), max(1, *(len(one) for one in rows)), 6))
    table[..., 4] = -1
    for place, one in zip(table, rows, strict=True):
        place[: len(one)] = one
    return table


def _overlaps(found_ID4: np.ndarray, truth_IG4: np.ndarray, crowd_IG: np.ndarray) -> np.ndarray:
    """IoU [I, D, G]; with a crowd region the share of the detection that lies on it."""
    a, b = found_ID4[:, :, None], truth_IG4[:, None]
    inner = pairwise_intersection(torch.from_numpy(found_ID4), torch.from_numpy(truth_IG4)).numpy()
    area_ID1, area_I1G = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    union = np.where(crowd_IG[:, None], area_ID1, area_ID1 + area_I1G - inner)
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def _match(
    found_ID6: np.ndarray, truth_IG6: np.ndarray, overlaps_IDG: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """(states [I, D], rank of the detection that took an object [I, G], -1 for none)."""
    images = np.arange(len(found_ID6))
    crowd_IG = truth_IG6[..., 5] == 1
    states_ID = np.full(found_ID6.shape[:2], WRONG)
    taken_IG = np.full(truth_IG6.shape[:2], -1)
    for rank in range(found_ID6.shape[1]):
        label_I1 = found_ID6[:, rank, 4][:, None]
        near_IG = (label_I1 >= 0) & (truth_IG6[..., 4] == label_I1) & (overlaps_IDG[:, rank] >= iou)
        free_IG = near_IG & ~crowd_IG & (taken_IG < 0)
        best_I = _last_argmax(np.where(free_IG, overlaps_IDG[:, rank], -1))
        right_I = free_IG.any(1)
        taken_IG[images[right_I], best_I[right_I]] = rank
        states_ID[right_I, rank] = RIGHT
        states_ID[~right_I & (near_IG & crowd_IG).any(1), rank] = IGNORED
    return states_ID, taken_IG


def _confusions(
    found_ID6: np.ndarray,
    truth_IG6: np.ndarray,
    overlaps_IDG: np.ndarray,
    states_ID: np.ndarray,
    taken_IG: np.ndarray,
    classes: int,
    score_threshold: float,
    iou: float,
) -> np.ndarray:
    """[K + 1, K + 1] of a chunk, but for the column of missed objects."""
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    images = np.arange(len(found_ID6))
    labels_ID, scores_ID = found_ID6[..., 4].astype(np.int64), found_ID6[..., 5]
    seen_ID = (labels_ID >= 0) & (scores_ID >= score_threshold)
    right_ID = seen_ID & (states_ID == RIGHT)
    np.add.at(matrix, (labels_ID[right_ID], labels_ID[right_ID]), 1)
    # An object that only a detection below the threshold took is free for the others.
    ranks_seen_I1 = seen_ID.sum(1)[:, None]
    free_IG = (truth_IG6[..., 4] >= 0) & (truth_IG6[..., 5] == 0) & ((taken_IG < 0) | (taken_IG >= ranks_seen_I1))
    for rank in range(int(ranks_seen_I1.max(initial=0))):
        left_I = seen_ID[:, rank] & (states_ID[:, rank] == WRONG)
        near_IG = left_I[:, None] & free_IG & (overlaps_IDG[:, rank] >= iou)
        best_I = _last_argmax(np.where(near_IG, overlaps_IDG[:, rank], -1))
        mixed_I = near_IG.any(1)
        free_IG[images[mixed_I], best_I[mixed_I]] = False
        truth_I = np.where(mixed_I, truth_IG6[images, best_I, 4].astype(np.int64), classes)
        np.add.at(matrix, (truth_I[left_I], labels_ID[left_I, rank]), 1)
    return matrix


def _of_images(
    found_ID6: np.ndarray,
    regular_IG: np.ndarray,
    overlaps_IDG: np.ndarray,
    states_ID: np.ndarray,
    taken_IG: np.ndarray,
    score_threshold: float,
    iou: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(right, wrong, missed [I, 3]; LRP error [I]) of a chunk.

    The error is the compact form of "Localization Recall Precision" (arXiv:1807.01696) over all classes: each right
    detection adds (1 - IoU) / (1 - `iou`), each wrong one and each missed object 1; the sum is divided by their number.
    """
    seen_ID = (found_ID6[..., 4] >= 0) & (found_ID6[..., 5] >= score_threshold)
    right_I, wrong_I = ((seen_ID & (states_ID == state)).sum(1) for state in (RIGHT, WRONG))
    missed_I = regular_IG.sum(1) - right_I
    overlap_IG = np.take_along_axis(overlaps_IDG, taken_IG.clip(0)[:, None], 1)[:, 0]
    found_IG = (taken_IG >= 0) & (taken_IG < seen_ID.sum(1)[:, None])  # detections are sorted by score
    apart_I = np.where(found_IG, (1 - overlap_IG) / (1 - iou), 0).sum(1)
    number_I = right_I + wrong_I + missed_I
    lrp_I = np.divide(apart_I + wrong_I + missed_I, number_I, out=np.full(len(number_I), np.nan), where=number_I > 0)
    return np.stack([right_I, wrong_I, missed_I], 1), lrp_I


def _last_argmax(values_IG: np.ndarray) -> np.ndarray:
    """Index [I] of the largest value, the last of equal ones: COCO's choice."""
    return values_IG.shape[1] - 1 - values_IG[:, ::-1].argmax(1)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:7.2f}"
