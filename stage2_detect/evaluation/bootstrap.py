"""Intervals of box AP by a bootstrap over the evaluation images, for one detector and for the difference between two.

The images are drawn with replacement (Efron 1979, "Bootstrap methods: another look at the jackknife"), and the AP of each draw is computed as COCO
defines it. Detections are matched once, on all images; a draw only weights them by how often their image was drawn, which gives the AP of the drawn
data set exactly, except for the order of equal scores. Two detectors share the draws (a paired bootstrap), so that images which are hard for both do
not widen the interval of their difference. The interval covers the choice of the images, not the seed of the training.

Legend: I images, D detections, K classes, T IoU thresholds, R recall points, B draws, P right detections of a class.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import file_sha256
from ssld.shared.run_dir import read_result
from ssld.shared.run_identity import input_digest
from ssld.shared.wording import FEW_IMAGES, count, verdict
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.evaluation.analysis import (
    IGNORED,
    MOST,
    RECALLS_R,
    RIGHT,
    chunks,
    in_order,
    ranks,
)
from ssld.stage2_detect.models.batch import Detections

IOUS_T = np.linspace(0.5, 0.95, 10)
DRAWS = 1000
_LARGEST = 1e9  # larger numbers are no pixels, and their products would overflow
_PERCENTILES = (2.5, 97.5)
_VALUES_AT_ONCE = 2_000_000  # draws times detections of a class: bounds the memory of a block of draws


@dataclass(frozen=True)
class Matches:
    """Detections of a data set, sorted by falling score, with their matches at each IoU threshold.

    Attributes:
        objects_IK: int64, objects per image and class, without crowd regions.
        images_D, labels_D: int64, row of the image and class; at most the 100 best detections per image and class.
        states_DT: int8, RIGHT, WRONG or IGNORED (`analysis.py`).
    """

    objects_IK: np.ndarray
    images_D: np.ndarray
    labels_D: np.ndarray
    states_DT: np.ndarray


def match_detections(ground_truth: CocoData, detections: Mapping[Id, Detections]) -> Matches:
    """Match the detections of a data set (boxes in pixels of the original images) with its objects, read with `training=False`."""
    classes, records = len(ground_truth.class_names), in_order(ground_truth)
    objects_IK = np.zeros((len(records), classes), dtype=np.int64)
    for row, record in enumerate(records):
        objects_IK[row] = np.bincount(record.labels_N[~record.crowd_N], minlength=classes)
    columns: list[list[np.ndarray]] = [[], [], [], []]
    done = 0
    for chunk in chunks(ground_truth, detections):
        states_IDT = np.stack([chunk.match(iou)[0] for iou in IOUS_T], axis=-1)
        labels_ID = chunk.detections_ID6[..., 4].astype(np.int64)
        kept_ID = (labels_ID >= 0) & (ranks(labels_ID) < MOST)
        rows_ID = np.broadcast_to(done + np.arange(len(kept_ID))[:, None], kept_ID.shape)
        done += len(kept_ID)
        values: tuple[np.ndarray, ...] = (chunk.detections_ID6[..., 5], rows_ID, labels_ID, states_IDT.astype(np.int8))
        for column, value in zip(columns, values, strict=True):
            column.append(value[kept_ID])
    scores_D, images_D, labels_D, states_DT = (np.concatenate(column) for column in columns)
    order = np.argsort(-scores_D, kind="stable")
    return Matches(objects_IK, images_D[order], labels_D[order], states_DT[order])


def draw_weights(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Draw data sets of the same number of images with replacement; return how often each image was drawn, int64 [draws, I]."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)


def average_precision(matches: Matches, weights_BI: np.ndarray) -> np.ndarray:
    """Compute COCO's box AP (all sizes, at most 100 detections) of weighted data sets.

    Args:
        weights_BI: how often each of the I images occurs in each of B data sets.

    Returns:
        float64 [B, T, K]; NaN for a class without objects in a data set.
    """
    objects_BK = weights_BI @ matches.objects_IK
    ap_BTK = np.full((len(weights_BI), len(IOUS_T), objects_BK.shape[1]), np.nan)
    for label in range(objects_BK.shape[1]):
        members = np.flatnonzero(matches.labels_D == label)
        images_D, states_DT = matches.images_D[members], matches.states_DT[members]
        defined_B = np.flatnonzero(objects_BK[:, label])
        size = max(1, _VALUES_AT_ONCE // max(1, len(members)))
        for start in range(0, len(defined_B), size):
            block_B = defined_B[start : start + size]
            weights_BD = weights_BI[block_B[:, None], images_D]
            ap_BTK[block_B, :, label] = _class_ap(weights_BD, states_DT, objects_BK[block_B, label])
    return ap_BTK


def _class_ap(weights_BD: np.ndarray, states_DT: np.ndarray, objects_B: np.ndarray) -> np.ndarray:
    """Return the AP of one class, float64 [B, T]; every data set has objects of it."""
    # The smallest number of right detections with at least each recall, as the comparison of floats in pycocotools decides it.
    needed_BR = np.ceil(RECALLS_R * objects_B[:, None])
    needed_BR -= (needed_BR - 1) / objects_B[:, None] >= RECALLS_R
    needed_BR += needed_BR / objects_B[:, None] < RECALLS_R
    row_B1 = np.arange(len(objects_B))[:, None]
    offset_B1 = row_B1 * (int(objects_B.max()) + 2)  # keeps the rows apart in one sorted list
    all_BD = weights_BD.cumsum(1)
    ap_BT = np.zeros((len(objects_B), states_DT.shape[1]))
    for threshold in range(states_DT.shape[1]):
        states_D = states_DT[:, threshold]
        right_P = np.flatnonzero(states_D == RIGHT)
        if not len(right_P):
            continue
        ignored = (states_D == IGNORED).any()
        counted_BD = (weights_BD * (states_D != IGNORED)).cumsum(1) if ignored else all_BD
        right_BP = weights_BD[:, right_P].cumsum(1)
        precision_BP = right_BP / np.maximum(counted_BD[:, right_P], 1)
        envelope_BP = np.maximum.accumulate(precision_BP[:, ::-1], axis=1)[:, ::-1]
        padded_BP = np.concatenate([envelope_BP, np.zeros((len(objects_B), 1))], axis=1)  # recall that is not reached
        place = np.searchsorted((right_BP + offset_B1).ravel(), (needed_BR + offset_B1).ravel())
        place_BR = place.reshape(needed_BR.shape) - row_B1 * len(right_P)
        ap_BT[:, threshold] = np.take_along_axis(padded_BP, place_BR, axis=1).mean(1)
    return ap_BT


def draw_ap(matches: Matches, draws: int = DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Compute box AP and AP50 on all images and on each draw; the same draws for every detector with the same images and objects.

    Returns:
        {"AP": float64 [1 + draws], "AP50": ...} as fractions, the value on all images first; fewer draws if some have no objects.
    """
    images = len(matches.objects_IK)
    weights_BI = np.concatenate([np.ones((1, images), dtype=np.int64), draw_weights(images, draws, seed)])
    ap_BTK = average_precision(matches, weights_BI[(weights_BI @ matches.objects_IK).any(1)])
    return {"AP": np.nanmean(ap_BTK, axis=(1, 2)), "AP50": np.nanmean(ap_BTK[:, 0], axis=1)}


def interval(value_B: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval, (2.5th, 97.5th percentile), of the draws of `draw_ap` or of a difference between two of them."""
    low, high = np.percentile(value_B[1:], _PERCENTILES)
    return float(low), float(high)


def bootstrap_metrics(
    ground_truth: CocoData,
    detections: Mapping[Id, Detections],
    others: Mapping[Id, Detections] | None,
    file: Path | None,
) -> tuple[dict[str, Any], list[str]]:
    """Compute the entries of result.json and the lines of the log on the intervals of an evaluation.

    Args:
        detections, others: detections of the detector, and of the one that it is compared with, both from `read_detections`.
        file: the file of `others`.

    Returns:
        (`intervals`: {"AP": (low, high), "AP50": ...}; with `others` also `compared`: path and sha256 of its file, number of images and objects, and
        per measure {"difference", "low", "high"}; all as fractions; lines of the log). Both are empty if no class has objects.
    """
    matches = match_detections(ground_truth, detections)
    if not matches.objects_IK.any():
        return {}, []
    drawn = draw_ap(matches)
    metrics: dict[str, Any] = {"intervals": {name: interval(value_B) for name, value_B in drawn.items()}}
    texts = [f"{name} {100 * low:.1f} to {100 * high:.1f}" for name, (low, high) in metrics["intervals"].items()]
    images = len(matches.objects_IK)
    few = f"; too narrow to be relied on, since there are only {count(images, 'image')}" * (images < FEW_IMAGES)
    lines = [f"95 % intervals over the images: {', '.join(texts)}{few}"]
    if others is not None and file is not None:
        objects = int(matches.objects_IK.sum())
        compared: dict[str, Any] = {
            "file": str(file),
            "sha256": file_sha256(file),
            "images": images,
            "objects": objects,
        }
        other_drawn = draw_ap(match_detections(ground_truth, others))
        identical = _identical(detections, others)
        for name, value_B in drawn.items():
            difference_B = value_B - other_drawn[name]
            low, high = interval(difference_B)
            compared[name] = {"difference": float(difference_B[0]), "low": low, "high": high}
            conclusion = verdict(low, high, images, identical=identical)
            numbers = f"{100 * difference_B[0]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append(f"{name} compared with {file}: {numbers}: {conclusion}")
        if not identical:
            lines.append(
                "the intervals cover the choice of the images, not the training: another seed can change the difference by more"
            )
        missing = sum(record.image_id not in others for record in ground_truth.images)
        if missing and recorded_annotations(file) is None:
            lines.append(
                f"{file}: no result.json of an evaluation is beside it; {missing} of {count(images, 'image')} have no detections in it "
                "and count as evaluated"
            )
        metrics["compared"] = compared
    return metrics, lines


def _identical(detections: Mapping[Id, Detections], others: Mapping[Id, Detections]) -> bool:
    """Return whether two evaluations have the same boxes, scores and classes, in the same order."""
    return detections.keys() == others.keys() and all(
        torch.equal(one.boxes_N4, others[image_id].boxes_N4)
        and torch.equal(one.scores_N, others[image_id].scores_N)
        and torch.equal(one.labels_N, others[image_id].labels_N)
        for image_id, one in detections.items()
    )


def read_detections(file: Path, ground_truth: CocoData) -> dict[Id, Detections]:
    """Read a `detections.json` on the images of `ground_truth`, without masks.

    Raises:
        UserError: the file is not readable, has numbers that are no box or score, or images or classes that `ground_truth` does not have; or the
            result.json beside it names another annotation file.
    """
    digest = recorded_annotations(file)
    if digest is not None and digest != input_digest(Path(ground_truth.file)):
        raise UserError(
            f"{file}: is an evaluation of another annotation file than {ground_truth.file}; compare evaluations of the same annotations"
        )
    label_of = {category_id: label for label, category_id in enumerate(ground_truth.category_ids)}
    images = {record.image_id for record in ground_truth.images}
    rows: dict[Id, list[list[float]]] = defaultdict(list)
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, list):
            raise TypeError("expected a list of detections")
        for number, row in enumerate(content):
            image_id, category_id = row["image_id"], row["category_id"]
            if image_id not in images:
                raise UserError(
                    f"{file}: image {image_id!r} is not in {ground_truth.file}; compare evaluations of the same annotations"
                )
            if category_id not in label_of:
                raise UserError(
                    f"{file}: category {category_id!r} is not in {ground_truth.file}; compare evaluations of the same annotations"
                )
            x, y, width, height = box = row["bbox"]
            score = row["score"]
            numbers = all(type(value) in (int, float) and abs(value) <= _LARGEST for value in (*box, score))
            if not numbers or width < 0 or height < 0:
                raise UserError(
                    f"{file}: detection {number}: expected a finite score and a box [x, y, width, height] with sizes from 0 on "
                    f"(given: {json.dumps([box, score], default=str)[:80]})"
                )
            rows[image_id].append([x, y, x + width, y + height, score, label_of[category_id]])
    except (OSError, *MALFORMED):
        raise UserError(
            f"{file}: not a file of detections; give the detections.json that `ssld evaluate` wrote for the other detector"
        ) from None
    tables = {image_id: torch.tensor(table, dtype=torch.float64) for image_id, table in rows.items()}
    return {image_id: Detections(table[:, :4], table[:, 4], table[:, 5].long()) for image_id, table in tables.items()}


def recorded_annotations(file: Path) -> str | None:
    """Return the digest of the annotation file that a `detections.json` was evaluated on; None without the result.json of its evaluation."""
    result = read_result(file.parent)
    if result is None or not file.is_file() or result["outputs"].get(file.name) != file_sha256(file):
        return None
    inputs = result.get("inputs")
    digest = inputs.get("annotations") if isinstance(inputs, dict) else None
    return digest if isinstance(digest, str) else None
