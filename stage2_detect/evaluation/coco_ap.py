"""COCO average precision of boxes or masks, by hotcoco or pycocotools, and detections as COCO results JSON.

Metric: https://cocodataset.org/#detection-eval, as pycocotools computes it; hotcoco gives the same bits about a hundred
times faster, and is used unless pycocotools is requested as a check. Both get arrays, never a file, and both of their
precision tables are summarized by the same code.
Known traps are avoided: annotation ids are renumbered from 1 (an id of 0 halves pycocotools' AP), string ids
become numbers, empty detections score 0 (pycocotools: IndexError) and NaN scores are refused (pycocotools: AP 1).
Deliberately absent: plots, confusion matrices (`analysis.py`).

Legend: N objects of one image, D detections of all images, T IoU thresholds, R recall points, K classes, A area ranges,
M detection limits.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import hotcoco
import numpy as np
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.evaluation.analysis import in_order
from ssld.stage2_detect.models.batch import Detections

BACKENDS = ("auto", "hotcoco", "pycocotools")
_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}
_LIMITS = {1: 0, 10: 1, 100: 2}
_MASKS_AT_ONCE = 50_000  # detections whose masks a backend copies at once: bounds the memory, changes no number


def coco_ap(
    ground_truth: CocoData, detections: Mapping[Id, Detections], backend: str = "auto", *, masks: bool = False
) -> dict[str, Any]:
    """Compute COCO's twelve metrics, and AP per class.

    Args:
        ground_truth: read with `training=False`.
        detections: by image id, boxes in pixels of the original image; an image without an entry has none.
        backend: see `choose_backend`.
        masks: compare masks instead of boxes; ground truth and detections must have them (`coco.require_masks`).

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0..1; `per_class` {class name: AP} and
        `per_class_AR` {class name: AR100}. A number that is undefined (no object of that class or size) is None.

    Raises:
        ValueError: an unknown image, a label out of range, or a number that is not finite.
    """
    if ground_truth.training:
        raise ValueError(
            "the ground truth must be read with training=False: crowds and odd boxes count in COCO's scores"
        )
    number = image_numbers(ground_truth)
    detections_D7 = detection_table(ground_truth, detections, number)
    evaluate = _hotcoco_tables if choose_backend(backend) == "hotcoco" else _pycocotools_tables
    dataset = numbered_dataset(ground_truth, number, masks=masks)
    if masks:
        masks_D = _masks(detections, number)
        parts = [evaluate(*group) for group in _groups(dataset, detections_D7, masks_D)]
        precision_TRKAM, recall_TKAM = (np.concatenate(tables, axis=-3) for tables in zip(*parts, strict=True))
    else:
        precision_TRKAM, recall_TKAM = evaluate(dataset, detections_D7, None)

    def ap(area: str = "", at: slice = slice(None), label: slice = slice(None)) -> float | None:
        return _mean(precision_TRKAM[at, :, label, _AREAS[area], _LIMITS[100]])

    def ar(limit: int = 100, area: str = "", label: slice = slice(None)) -> float | None:
        return _mean(recall_TKAM[:, label, _AREAS[area], _LIMITS[limit]])

    result: dict[str, Any] = {"AP": ap(), "AP50": ap(at=slice(0, 1)), "AP75": ap(at=slice(5, 6))}
    result |= {f"AP{area}": ap(area) for area in "sml"}
    result |= {f"AR{limit}": ar(limit) for limit in _LIMITS}
    result |= {f"AR{area}": ar(area=area) for area in "sml"}
    classes = {name: slice(label, label + 1) for label, name in enumerate(ground_truth.class_names)}
    result["per_class"] = {name: ap(label=label) for name, label in classes.items()}
    result["per_class_AR"] = {name: ar(label=label) for name, label in classes.items()}
    return result


def choose_backend(backend: str) -> str:
    """Resolve the backend "auto", which is hotcoco. Raises UserError where the requested one is unknown."""
    if backend not in BACKENDS:
        raise UserError(f"unknown COCO backend {backend!r}, choose one of {', '.join(BACKENDS)}")
    return "hotcoco" if backend == "auto" else backend


def image_numbers(ground_truth: CocoData) -> dict[Id, int]:
    """Number the images 1, 2, ... in the order of their ids, as pycocotools on the original file."""
    return {record.image_id: index for index, record in enumerate(in_order(ground_truth), 1)}


def detection_table(
    ground_truth: CocoData, detections: Mapping[Id, Detections], number: Mapping[Id, int]
) -> np.ndarray:
    """Build a table of all detections by image, float64 [D, 7]: image number, x, y, width, height, score, label + 1.

    Raises:
        ValueError: an unknown image, a label out of range, or a number that is not finite.
    """
    tables = [np.zeros((0, 7))]
    for image_id, of_image in detections.items():
        if image_id not in number:
            raise ValueError(f"detections for image {image_id!r}, which {ground_truth.file} does not have")
        corners_N4, scores_N, labels_N = (
            part.double().cpu().numpy() for part in (of_image.boxes_N4, of_image.scores_N, of_image.labels_N)
        )
        if not (np.isfinite(corners_N4).all() and np.isfinite(scores_N).all()):
            raise ValueError(f"a score or box of image {image_id!r} is not finite")
        if len(labels_N) and not (labels_N.min() >= 0 and labels_N.max() < len(ground_truth.class_names)):
            raise ValueError(f"image {image_id!r} has a label outside 0..{len(ground_truth.class_names) - 1}")
        sides_N2 = corners_N4[:, 2:] - corners_N4[:, :2]
        columns = (np.full(len(scores_N), number[image_id]), corners_N4[:, :2], sides_N2, scores_N, labels_N + 1)
        tables.append(np.column_stack(columns))
    table = np.concatenate(tables)
    return table[np.argsort(table[:, 0], kind="stable")]


def _masks(detections: Mapping[Id, Detections], number: Mapping[Id, int]) -> list[dict[str, Any]]:
    """List the RLE of every detection, in the order of `detection_table`."""
    codes: list[dict[str, Any]] = []
    for image_id in sorted(detections, key=lambda image_id: number[image_id]):
        masks = detections[image_id].masks
        if masks is None:
            raise ValueError(f"the detections of image {image_id!r} have no masks")
        codes += masks
    return codes


def _groups(
    dataset: dict[str, list[dict]], detections_D7: np.ndarray, masks_D: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, list[dict]], np.ndarray, list[dict[str, Any]]]]:
    """Yield the arguments of a backend for a few classes at a time: COCO scores each class by itself."""
    label_D = detections_D7[:, 6].astype(np.int64) - 1
    count_K = np.bincount(label_D, minlength=len(dataset["categories"]))
    ends = [0]
    for label, count in enumerate(count_K.tolist()):
        if count_K[ends[-1] : label].sum() > 0 and count_K[ends[-1] : label].sum() + count > _MASKS_AT_ONCE:
            ends.append(label)
    for first, end in itertools.pairwise([*ends, len(count_K)]):
        annotations = [row for row in dataset["annotations"] if first < row["category_id"] <= end]
        part = dataset | {"annotations": annotations, "categories": dataset["categories"][first:end]}
        places = np.flatnonzero((label_D >= first) & (label_D < end))
        yield part, detections_D7[places], [masks_D[place] for place in places]


def numbered_dataset(ground_truth: CocoData, number: Mapping[Id, int], *, masks: bool) -> dict[str, list[dict]]:
    """Convert a data set to COCO's form with ids 1, 2, ... for images, annotations and categories (label + 1)."""
    images: list[dict] = []
    annotations: list[dict] = []
    for record in ground_truth.images:
        image_number = number[record.image_id]
        images.append({"id": image_number, "file_name": record.path, "height": record.height, "width": record.width})
        columns = (
            record.file_boxes_N4.tolist(),
            record.labels_N.tolist(),
            record.areas_N.tolist(),
            record.crowd_N.tolist(),
        )
        for index, (box, label, area, crowd) in enumerate(zip(*columns, strict=True)):
            annotation = {"id": len(annotations) + 1, "image_id": image_number, "category_id": label + 1}
            if masks and record.segmentations is not None:
                annotation["segmentation"] = record.segmentations[index]
            annotations.append(annotation | {"bbox": box, "area": area, "iscrowd": int(crowd)})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(ground_truth.class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _hotcoco_tables(
    dataset: dict[str, list[dict]], detections_D7: np.ndarray, masks_D: list[dict[str, Any]] | None
) -> tuple[np.ndarray, np.ndarray]:
    truth = hotcoco.COCO(dataset)
    rows: Any = detections_D7
    if masks_D is not None:
        # The rows hold the numbers of these lists: with a list per row, half a million rows take 80 MB more.
        columns = (*detections_D7[:, [0, 6]].astype(np.int64).T.tolist(), detections_D7[:, 5].tolist(), masks_D)
        rows = [
            {"image_id": image, "category_id": category, "score": score, "segmentation": code}
            for image, category, score, code in zip(*columns, strict=True)
        ]
        del columns
    kind = "bbox" if masks_D is None else "segm"
    results = truth.load_res(rows)
    del rows  # hotcoco has copied them
    evaluation = hotcoco.COCOeval(truth, results, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    tables = cast(dict[str, np.ndarray], evaluation.eval)
    return np.asarray(tables["precision"]), np.asarray(tables["recall"])


def _pycocotools_tables(
    dataset: dict[str, list[dict]], detections_D7: np.ndarray, masks_D: list[dict[str, Any]] | None
) -> tuple[np.ndarray, np.ndarray]:
    rows: list[dict] = []
    for image, x, y, width, height, score, category in detections_D7.tolist():
        row = {
            "id": len(rows) + 1,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": [x, y, width, height],
        }
        row |= {"score": score, "area": width * height, "iscrowd": 0}
        if masks_D is not None:
            code = masks_D[len(rows)]
            row |= {"segmentation": code, "area": float(mask_codec.area(code))}
        rows.append(row)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        apis = []
        for annotations in (dataset["annotations"], rows):  # not `loadRes`, which fails on an empty list
            api = COCO()
            api.dataset = dataset | {"annotations": annotations}
            api.createIndex()
            apis.append(api)
        evaluation = COCOeval(*apis, "bbox" if masks_D is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    tables = cast(dict[str, np.ndarray], evaluation.eval)
    return tables["precision"], tables["recall"]


def _mean(table: np.ndarray) -> float | None:
    """Average the defined entries; COCO marks the others by -1."""
    defined = table[table > -1]
    return float(defined.mean()) if defined.size else None
