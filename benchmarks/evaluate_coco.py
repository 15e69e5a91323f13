"""Seconds to score 5,000 images: hotcoco against pycocotools on the same arrays, and our counts and confusions beside them.

    python benchmarks/evaluate_coco.py [--images 5000] [--per-image 100] [--classes 80] [--rounds 5]

Objects and detections are drawn: about 7 objects per image, some of them crowd regions, and detections of which half are
moved copies of objects. Both backends get the same arrays, take turns, and must give the same numbers: a difference above
1e-12 is an error. Seconds are those of `coco_ap` from detections to the numbers, our own lines around the backend included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from ssld.stage2_detect.data.coco import CocoData, CocoImage, Id
from ssld.stage2_detect.evaluation import analysis
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.models.batch import Detections


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a set, score it in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--per-image", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    truth, detections = draw(arguments.images, arguments.per_image, arguments.classes)
    objects = sum(len(record.labels_N) for record in truth.images)
    boxes = sum(len(one.scores_N) for one in detections.values())
    print(f"{len(truth.images)} images, {objects} objects, {boxes} detections, {arguments.classes} classes\n")
    works: dict[str, Callable[[], Any]] = {
        "hotcoco": lambda: coco_ap(truth, detections, "hotcoco"),
        "pycocotools": lambda: coco_ap(truth, detections, "pycocotools"),
        "analysis": lambda: analysis.report(analysis.analyse(truth, detections, score_threshold=0.5), {}),
    }
    rounds = [{name: timed(work) for name, work in works.items()} for _ in range(arguments.rounds)]
    compare(rounds[0]["hotcoco"][1], rounds[0]["pycocotools"][1])
    print("| what | seconds, median | as a share of pycocotools |")
    print("| --- | --- | --- |")
    for name in works:
        ratios = sorted(one[name][0] / one["pycocotools"][0] for one in rounds)
        middle = statistics.median(one[name][0] for one in rounds)
        print(f"| {name} | {middle:.2f} | {statistics.median(ratios):.4f} ({ratios[0]:.4f} to {ratios[-1]:.4f}) |")
    return 0


def draw(images: int, per_image: int, classes: int) -> tuple[CocoData, dict[Id, Detections]]:
    """A data set of 640 x 480 images, and detections of it."""
    generator = np.random.default_rng(0)
    records: list[CocoImage] = []
    detections: dict[Id, Detections] = {}
    for image in range(images):
        count = int(generator.poisson(7.2))
        boxes_N4, labels_N = random_boxes(generator, count), generator.integers(0, classes, count)
        corners_N4 = np.concatenate([boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]], 1).astype(np.float32)
        crowd_N = generator.random(count) < 0.01
        areas_N = boxes_N4[:, 2] * boxes_N4[:, 3]
        ids = tuple(range(count))
        records.append(
            CocoImage(image, f"{image}.jpg", 640, 480, corners_N4, labels_N, crowd_N, areas_N, boxes_N4, ids, None)
        )
        copies = generator.integers(0, count, per_image // 2) if count else np.zeros(0, np.int64)
        moved = boxes_N4[copies] * generator.uniform(0.85, 1.15, (len(copies), 4))
        all_M4 = np.concatenate([moved, random_boxes(generator, per_image - len(copies))])
        labels_M = np.concatenate([labels_N[copies], generator.integers(0, classes, per_image - len(copies))])
        scores_M = generator.random(per_image)
        order = np.argsort(-scores_M)
        all_M4[:, 2:] += all_M4[:, :2]
        parts = (all_M4[order].astype(np.float32), scores_M[order].astype(np.float32), labels_M[order])
        boxes, scores, labels = map(torch.from_numpy, parts)
        detections[image] = Detections(boxes, scores, labels)
    names = tuple(f"class {label}" for label in range(classes))
    return CocoData("drawn", False, names, tuple(range(1, classes + 1)), records), detections


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    """float64 xywh inside 640 x 480."""
    sides = np.exp(generator.uniform(np.log(8), np.log(300), (count, 2)))
    return np.concatenate([generator.uniform(0, 1, (count, 2)) * ((640, 480) - sides), sides], 1)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def compare(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises AssertionError where two backends differ."""
    for key, value in expected.items():
        parts = (
            zip(value.values(), metrics[key].values(), strict=True)
            if isinstance(value, dict)
            else [(value, metrics[key])]
        )
        for one, other in parts:
            if (one is None) != (other is None) or (one is not None and abs(one - other) > 1e-12):
                raise AssertionError(f"{key}: {one} and {other}")


if __name__ == "__main__":
    sys.exit(main())
