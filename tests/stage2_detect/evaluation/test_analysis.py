"""Counts, confusions and curves: by hand, against plain loops, and against pycocotools' precision table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssld.stage2_detect.data.coco import CocoData, Id, read_coco
from ssld.stage2_detect.evaluation import analysis
from ssld.stage2_detect.evaluation.analysis import analyse, counts, curve, describe, report
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.models.batch import Detections


def truth(tmp_path: Path, objects: list[tuple[Id, int, list[float], int]], images: list[Id], classes: int) -> CocoData:
    """`objects`: (image, class, xywh, crowd)."""
    content = {
        "images": [{"id": one, "file_name": f"{one}.png", "width": 200, "height": 200} for one in images],
        "annotations": [
            {"id": n + 1, "image_id": image, "category_id": k + 1, "bbox": box, "iscrowd": crowd}
            for n, (image, k, box, crowd) in enumerate(objects)
        ],
        "categories": [{"id": k + 1, "name": "abcdefgh"[k]} for k in range(classes)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return read_coco(tmp_path / "truth.json", None, training=False)


def said(rows: list[tuple[int, list[float], float]]) -> Detections:
    """`rows`: (class, xywh, score)."""
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in rows], dtype=torch.float32).reshape(-1, 4)
    return Detections(boxes, torch.tensor([row[2] for row in rows]), torch.tensor([row[0] for row in rows]).long())


def test_by_hand(tmp_path: Path) -> None:
    """Two images, classes a and b. Every detection's fate is written beside it."""
    objects: list[Any] = [
        (1, 0, [0, 0, 10, 10], 0),  # found
        (1, 0, [50, 0, 10, 10], 0),  # taken for b
        (1, 1, [0, 50, 10, 10], 0),  # missed: found below the threshold only
        (2, 1, [0, 0, 20, 20], 0),  # found
        (2, 0, [100, 0, 50, 50], 1),  # crowd of a
    ]
    data = truth(tmp_path, objects, [1, 2, 3], 2)
    detections: dict[Id, Detections] = {
        1: said(
            [
                (0, [0, 0, 10, 9], 0.9),  # right
                (0, [0, 0, 10, 10], 0.8),  # wrong: the object is taken
                (1, [50, 0, 10, 10], 0.7),  # wrong: it is an a
                (1, [0, 50, 10, 10], 0.4),  # right, below the threshold
            ]
        ),
        2: said(
            [
                (1, [0, 0, 20, 11], 0.95),  # right: IoU 0.55
                (0, [110, 10, 10, 10], 0.9),  # on the crowd: neither
                (1, [110, 10, 10, 10], 0.9),  # wrong: the crowd is of another class
                (0, [80, 0, 30, 30], 0.9),  # wrong: a third of it is on the crowd
            ]
        ),
        3: said([(1, [0, 0, 5, 5], 0.5)]),  # wrong, exactly at the threshold
    }
    one = analyse(data, detections, score_threshold=0.5)
    assert {key: value.tolist() for key, value in counts(one).items()} == {
        "right": [1, 1],
        "wrong": [2, 3],
        "missed": [1, 1],
    }
    #                                      a  b  background
    assert one.confusions.tolist() == [[1, 1, 0], [0, 1, 1], [2, 2, 0]]
    row_a, row_b = report(one, {"a": 0.25, "b": None})["classes"]
    assert (row_a["precision"], row_a["recall"], row_a["f1"]) == (1 / 3, 1 / 2, 2 / 5)
    assert (row_b["precision"], row_b["recall"], row_b["f1"]) == (1 / 4, 1 / 2, 2 / 6)
    assert row_a["AP"] == 0.25
    assert row_a["best_f1"] == 0.5  # at 0.9: one right, one wrong, one missed
    assert row_a["best_f1_score"] == pytest.approx(0.9)
    assert (row_b["best_f1"], row_b["best_f1_score"]) == (pytest.approx(2 / 3), pytest.approx(0.95))
    whole = report(one, {})["all_classes"]
    assert (whole["right"], whole["wrong"], whole["missed"], whole["precision"]) == (2, 5, 2, 2 / 7)


def test_classes_without_objects_or_detections(tmp_path: Path) -> None:
    data = truth(tmp_path, [(1, 0, [0, 0, 10, 10], 0)], [1], 3)
    one = analyse(data, {1: said([(1, [0, 0, 10, 10], 0.9)])}, score_threshold=0.5)
    assert one.confusions.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    rows = report(one, {})["classes"]
    assert [row["precision"] for row in rows] == [None, 0, None]
    assert [row["recall"] for row in rows] == [0, None, None]
    assert [row["f1"] for row in rows] == [0, 0, None]
    assert [row["best_f1"] for row in rows] == [0, None, None]
    none = analyse(data, {}, score_threshold=0.5)
    assert counts(none)["missed"].tolist() == [1, 0, 0]
    only = curve(none, 0)
    assert only is not None
    assert not only.precision_R.any()
    assert only.best_score is None


def random_set(tmp_path: Path, seed: int) -> tuple[CocoData, dict[Id, Detections]]:
    """Crowded images with crowd regions, string and integer ids, equal scores, images without detections or objects."""
    draw = np.random.default_rng(seed)
    images: list[Id] = [*(int(i) for i in draw.permutation(25)), "x", "b"]
    objects: list[Any] = []
    detections: dict[Id, Detections] = {}
    for image in images:
        mine = []
        for _ in range(int(draw.integers(0, 9))):
            box = [*draw.integers(0, 120, 2), *draw.integers(15, 70, 2)]
            objects.append((image, int(draw.integers(0, 4)), [float(v) for v in box], int(draw.random() < 0.2)))
            mine.append(objects[-1])
        rows: list[Any] = []
        for _, label, box, _ in mine * 2:
            moved = (np.array(box) + draw.integers(-9, 10, 4)).clip([0, 0, 1, 1]).tolist()
            label = label if draw.random() < 0.7 else int(draw.integers(0, 4))
            rows.append((label, moved, float(draw.integers(1, 21) / 20)))
        for _ in range(int(draw.integers(0, 5))):
            box = [*draw.integers(0, 120, 2), *draw.integers(15, 70, 2)]
            rows.append((int(draw.integers(0, 4)), [float(v) for v in box], float(draw.integers(1, 21) / 20)))
        if rows and draw.random() < 0.9:
            detections[image] = said([rows[i] for i in draw.permutation(len(rows))])
    return truth(tmp_path, objects, images, 5), detections


def iou_of(box: list[float], other: list[float], crowd: bool) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    inner = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return inner / (areas[0] if crowd else areas[0] + areas[1] - inner)


def by_loops(data: CocoData, detections: dict[Id, Detections], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(right, wrong, missed of each class [3, K], confusions) from detections above the threshold alone."""
    classes = len(data.class_names)
    table, matrix = np.zeros((3, classes), int), np.zeros((classes + 1, classes + 1), int)
    for record in data.images:
        objects = [
            (label, [x, y, x + w, y + h], crowd)
            for label, (x, y, w, h), crowd in zip(record.labels_N, record.file_boxes_N4, record.crowd_N, strict=True)
        ]
        one = detections.get(record.image_id)
        rows = [] if one is None else list(zip(one.labels_N.tolist(), one.boxes_N4.tolist(), one.scores_N.tolist()))  # noqa: B905
        rows = sorted((row for row in rows if row[2] >= threshold), key=lambda row: -row[2])
        free, left = [i for i, (_, _, crowd) in enumerate(objects) if not crowd], []
        for label, box, _ in rows:
            best, best_iou = None, 0.5
            for i in free:
                overlap = iou_of(box, objects[i][1], False)
                if objects[i][0] == label and overlap >= best_iou:
                    best, best_iou = i, overlap
            if best is not None:
                free.remove(best)
                table[0, label] += 1
                matrix[label, label] += 1
            elif not any(c and k == label and iou_of(box, other, True) >= 0.5 for k, other, c in objects):
                table[1, label] += 1
                left.append((label, box))
        for label, box in left:
            best, best_iou = None, 0.5
            for i in free:
                overlap = iou_of(box, objects[i][1], False)
                if overlap >= best_iou:
                    best, best_iou = i, overlap
            matrix[classes if best is None else objects[best][0], label] += 1
            if best is not None:
                free.remove(best)
        for i in free:
            matrix[objects[i][0], classes] += 1
        for label, _, crowd in objects:
            table[2, label] += not crowd
    table[2] -= table[0]
    return table, matrix


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threshold: float) -> None:
    monkeypatch.setattr(analysis, "_CHUNK", 10)  # images of several chunks
    data, detections = random_set(tmp_path, seed)
    one = analyse(data, detections, score_threshold=threshold)
    table, matrix = by_loops(data, detections, threshold)
    assert np.array_equal(np.stack(list(counts(one).values())), table)
    assert np.array_equal(one.confusions, matrix)
    assert (one.states_D == analysis.IGNORED).sum() > 5
    assert np.array_equal(one.confusions.diagonal()[:-1], table[0])
    assert np.array_equal(one.confusions[:-1].sum(1), one.objects_K)
    assert np.array_equal(one.confusions[:, :-1].sum(0), table[0] + table[1])


def pycocotools_tables(data: CocoData, detections: dict[Id, Detections]) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) with numbers for ids, in the order of the ids."""
    order = sorted(data.images, key=lambda record: (isinstance(record.image_id, str), record.image_id))
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, record in enumerate(order, 1):
        columns = (
            record.labels_N.tolist(),
            record.file_boxes_N4.tolist(),
            record.areas_N.tolist(),
            record.crowd_N.tolist(),
        )
        for label, box, area, crowd in zip(*columns, strict=True):
            row = {"image_id": number, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            objects.append(row | {"id": len(objects) + 1})
        one = detections.get(record.image_id, said([]))
        for label, box, score in zip(one.labels_N.tolist(), one.boxes_N4.tolist(), one.scores_N.tolist(), strict=True):
            row = {"image_id": number, "category_id": label, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
            results.append(row | {"id": len(results) + 1, "score": score, "area": row["bbox"][2] * row["bbox"][3]})
    apis = []
    for rows in (objects, results):
        api = COCO()
        api.dataset = {
            "images": [{"id": number} for number in range(1, len(order) + 1)],
            "annotations": rows,
            "categories": [{"id": label} for label in range(len(data.class_names))],
        }
        api.createIndex()
        apis.append(api)
    evaluation = COCOeval(*apis, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    tables: Any = evaluation.eval
    return tables["precision"], tables["recall"]


@pytest.mark.parametrize("seed", range(4))
def test_curves_are_those_of_coco(tmp_path: Path, seed: int) -> None:
    data, detections = random_set(tmp_path, seed)
    precision_TRKAM, recall_TKAM = pycocotools_tables(data, detections)
    one = analyse(data, detections, score_threshold=0.5)
    for label in range(5):
        mine, reference = curve(one, label), precision_TRKAM[0, :, label, 0, 2]
        if mine is None:
            assert (reference == -1).all()
            continue
        np.testing.assert_allclose(mine.precision_R, reference, atol=1e-12)
        assert counts(analyse(data, detections, score_threshold=0))["right"][label] / one.objects_K[
            label
        ] == pytest.approx(recall_TKAM[0, label, 0, 2])
    means = [c.precision_R.mean() for c in (curve(one, label) for label in range(5)) if c is not None]
    assert np.mean(means) == pytest.approx(coco_ap(data, detections)["AP50"])


def test_curves_look_at_a_hundred_detections_of_a_class_as_coco_does(tmp_path: Path) -> None:
    """120 objects in an image, of which the detector finds every second one first, and another class that takes no place of them."""
    places = [[20.0 * (n % 10), 16.0 * (n // 10), 9.0, 9.0] for n in range(120)]
    objects: list[Any] = [*((1, 0, box, 0) for box in places), (1, 1, places[0], 0), (2, 0, places[3], 0)]
    data = truth(tmp_path, objects, [1, 2], 2)
    rows = [(0, places[n] if n % 2 else [190.0, 190.0, 3.0, 3.0], 1 - n / 1000) for n in range(120)]
    detections: dict[Id, Detections] = {1: said([*rows, (1, places[0], 0.99)]), 2: said([(0, places[3], 0.5)])}
    precision_TRKAM, _ = pycocotools_tables(data, detections)
    one = analyse(data, detections, score_threshold=0.5)
    for label in range(2):
        mine = curve(one, label)
        assert mine is not None
        np.testing.assert_allclose(mine.precision_R, precision_TRKAM[0, :, label, 0, 2], atol=1e-12)
    assert counts(one)["right"].tolist() == [61, 1]  # the counts look at all of them


def test_best_f1_is_the_best_of_all_thresholds(tmp_path: Path) -> None:
    data, detections = random_set(tmp_path, 3)
    for label in range(4):
        f1 = {}
        for threshold in np.arange(1, 21, dtype=np.float32) / np.float32(20):  # the scores there are
            right, wrong, missed = (
                int(part[label])
                for part in counts(analyse(data, detections, score_threshold=float(threshold))).values()
            )
            f1[float(threshold)] = 2 * right / (2 * right + wrong + missed)
        one = curve(analyse(data, detections, score_threshold=0.5), label)
        assert one is not None
        assert one.best_f1 == pytest.approx(max(f1.values()))
        assert one.best_score is not None
        assert f1[one.best_score] == pytest.approx(one.best_f1)


def test_report_is_json_and_prints(tmp_path: Path) -> None:
    data, detections = random_set(tmp_path, 0)
    one = report(analyse(data, detections, score_threshold=0.5), coco_ap(data, detections)["per_class"])
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert len(one["precision_recall"]["recall"]) == 101
    assert one["precision_recall"]["precision"].keys() == {"a", "b", "c", "d"}
    lines = describe(one)
    assert len(lines) == 8
    assert lines[5].split() == ["e", "-", "-" if one["classes"][4]["precision"] is None else "0.00", "-", "-", "0"]
    matrix = np.array(one["confusions"]["counts"])[:-1, :-1]
    assert f"{(matrix - np.diag(matrix.diagonal())).max()}x" in lines[-1]


def test_training_data_are_refused(tiny_coco: Any) -> None:
    data = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=True)
    with pytest.raises(ValueError, match="training=False"):
        analyse(data, {}, score_threshold=0.5)


@pytest.mark.parametrize("measured", [80, 0])
def test_a_table_of_many_classes_has_the_best_and_the_worst(measured: int) -> None:
    rows = [
        {"class": f"c{n}", "AP": (n * 37 % 80) / 100 if n < measured else None}
        | {"precision": None, "recall": 0.0, "f1": 0.0, "right": 0, "missed": 1}
        for n in range(80)
    ]
    whole = {"precision": None, "recall": 0.0, "f1": 0.0, "right": 0, "missed": 80}
    confusions = {"names": [*(row["class"] for row in rows), "background"], "counts": np.zeros((81, 81)).tolist()}
    lines = describe({"classes": rows, "all_classes": whole, "confusions": confusions, "score_threshold": 0.5})
    if not measured:
        assert [line.split()[0] for line in lines[1:]] == ["...", "all"]
        assert lines[1] == "  ... 80 more classes, see analysis.json"
        return
    values = [float(line.split()[1]) for line in [*lines[1:11], *lines[12:22]]]
    assert values == [float(n) for n in [*range(79, 69, -1), *range(9, -1, -1)]]
    assert lines[11] == "  ... 60 more classes, see analysis.json"
    assert lines[22].split()[0] == "all"
