"""COCO AP on cases computed by hand, equal numbers from both backends, and detections as COCO results JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoData, Id, read_coco
from ssld.stage2_detect.data.coco_json import write_results
from ssld.stage2_detect.evaluation.coco_ap import choose_backend, coco_ap
from ssld.stage2_detect.models.batch import Detections

BACKENDS = ["pycocotools", "hotcoco"]


def truth(folder: Path, annotations: list[dict], image_ids: tuple[Id, ...] = (1, 2)) -> CocoData:
    raw = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 400} for i in image_ids],
        "annotations": [{"id": number, **row} for number, row in enumerate(annotations)],  # from 0: pycocotools' bug
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(raw))
    return read_coco(path, None, training=False)


def detected(*rows: tuple[float, ...]) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(boxes_N4=table[:, :4], scores_N=table[:, 4], labels_N=table[:, 5].long())


CAT = {"image_id": 1, "category_id": 9, "bbox": [10, 10, 100, 100]}
CAT_2 = {"image_id": 2, "category_id": 9, "bbox": [50, 50, 100, 100]}
HIT, HIT_2 = (10, 10, 110, 110), (50, 50, 150, 150)


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    def test_perfect(self, backend: str, tmp_path: Path) -> None:
        dog = {"image_id": 2, "category_id": 4, "bbox": [0, 0, 20, 20]}
        result = coco_ap(
            truth(tmp_path, [CAT, dog]), {1: detected((*HIT, 1, 0)), 2: detected((0, 0, 20, 20, 1, 1))}, backend
        )
        for key in ("AP", "AP50", "AP75", "APs", "APl", "AR1", "AR10", "AR100", "ARs", "ARl"):
            assert result[key] == pytest.approx(1), key
        assert result["APm"] is None
        assert result["ARm"] is None
        assert result["per_class"] == {"cat": pytest.approx(1), "dog": pytest.approx(1)}
        json.dumps(result, allow_nan=False)

    def test_one_missed(self, backend: str, tmp_path: Path) -> None:
        """Precision 1 up to recall 0.5: 51 of the 101 recall points."""
        result = coco_ap(truth(tmp_path, [CAT, CAT_2]), {1: detected((*HIT, 0.9, 0))}, backend)
        assert result["AP"] == pytest.approx(51 / 101)
        assert result["AR100"] == pytest.approx(0.5)

    def test_duplicate_below_costs_nothing_above_costs_precision(self, backend: str, tmp_path: Path) -> None:
        data = truth(tmp_path, [CAT, CAT_2])
        late: dict[Id, Detections] = {1: detected((*HIT, 0.9, 0), (*HIT, 0.1, 0)), 2: detected((*HIT_2, 0.8, 0))}
        assert coco_ap(data, late, backend)["AP"] == pytest.approx(1)
        early: dict[Id, Detections] = {
            1: detected((*HIT, 0.9, 0), (*HIT, 0.85, 0)),
            2: detected((*HIT_2, 0.8, 0)),
        }  # hit, miss, hit
        assert coco_ap(data, early, backend)["AP"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)

    def test_wrong_class(self, backend: str, tmp_path: Path) -> None:
        result = coco_ap(truth(tmp_path, [CAT]), {1: detected((*HIT, 0.9, 1))}, backend)
        assert result["AP"] == 0
        assert result["per_class"] == {"cat": 0, "dog": None}

    def test_crowd_is_no_object_and_swallows_detections(self, backend: str, tmp_path: Path) -> None:
        crowd = {"image_id": 1, "category_id": 9, "bbox": [200, 200, 150, 150], "iscrowd": 1}
        data = truth(tmp_path, [CAT, crowd])
        inside = detected((*HIT, 0.5, 0), (210, 210, 240, 240, 0.9, 0), (250, 250, 300, 300, 0.8, 0))
        assert coco_ap(data, {1: inside}, backend)["AP"] == pytest.approx(1)
        outside = detected((*HIT, 0.5, 0), (150, 10, 180, 40, 0.9, 0))
        assert coco_ap(data, {1: outside}, backend)["AP"] == pytest.approx(0.5)

    def test_iou_just_above_and_below_a_threshold(self, backend: str, tmp_path: Path) -> None:
        """A box of the same left top and width: IoU is the ratio of the heights. Ten thresholds from 0.5 to 0.95."""
        data = truth(tmp_path, [CAT])
        for height, passed in [(49.9, 0), (50.1, 1), (74.9, 5), (75.1, 6), (94.9, 9), (95.1, 10)]:
            result = coco_ap(data, {1: detected((10, 10, 110, 10 + height, 1, 0))}, backend)
            assert result["AP"] == pytest.approx(passed / 10)
            assert result["AP50"] == pytest.approx(float(passed >= 1))
            assert result["AP75"] == pytest.approx(float(passed >= 6))

    def test_no_detections_and_no_objects(self, backend: str, tmp_path: Path) -> None:
        data = truth(tmp_path, [CAT])
        nothings: list[dict[Id, Detections]] = [{}, {1: detected(), 2: detected()}]
        for nothing in nothings:
            result = coco_ap(data, nothing, backend)
            assert result["AP"] == result["AR100"] == 0
        empty = coco_ap(truth(tmp_path, []), {1: detected((*HIT, 1, 0))}, backend)
        assert empty["AP"] is None
        assert empty["per_class"] == {"cat": None, "dog": None}

    def test_real_truth_as_detections(self, backend: str, shared_data: Callable) -> None:
        root = shared_data("coco-mini")
        for split in ("train", "val"):
            data = read_coco(root / "annotations" / f"instances_{split}.json", root / "images", training=False)
            result = coco_ap(data, own_boxes(data), backend)
            assert result["AP"] == pytest.approx(1, abs=1e-9)
            assert {round(ap, 9) for ap in result["per_class"].values() if ap is not None} == {1}

    def test_bad_input(self, backend: str, tmp_path: Path) -> None:
        data = truth(tmp_path, [CAT])
        with pytest.raises(ValueError, match="image 1 is not finite"):
            coco_ap(data, {1: detected((*HIT, float("nan"), 0))}, backend)
        with pytest.raises(ValueError, match="not finite"):
            coco_ap(data, {1: detected((0, 0, float("inf"), 1, 1, 0))}, backend)
        with pytest.raises(ValueError, match="detections for image 3"):
            coco_ap(data, {3: detected()}, backend)
        with pytest.raises(ValueError, match=r"label outside 0\.\.1"):
            coco_ap(data, {1: detected((*HIT, 1, 2))}, backend)
        with pytest.raises(ValueError, match="training=False"):
            coco_ap(read_coco(tmp_path / "truth.json", None, training=True), {}, backend)


def own_boxes(data: CocoData) -> dict[Id, Detections]:
    """The ground truth as detections of score 1, without the crowds, which no detector submits."""
    result = {}
    for record in data.images:
        boxes, labels = record.boxes_N4[~record.crowd_N], torch.from_numpy(record.labels_N[~record.crowd_N])
        result[record.image_id] = Detections(torch.from_numpy(boxes), torch.ones(len(labels)), labels)
    return result


def random_case(folder: Path, seed: int) -> tuple[CocoData, dict[Id, Detections]]:
    """String and number ids, categories with holes, crowds, boxes of all sizes, equal scores, more than 100 detections."""
    rng = np.random.default_rng(seed)
    image_ids: list[Id] = [*rng.permutation(1000)[:12].tolist(), *(f"img{i}" for i in rng.permutation(12))]
    annotations: list[dict[str, Any]] = []
    detections: dict[Id, Detections] = {}
    for image_id in image_ids:
        count = int(rng.integers(0, 15))
        corner, side = (
            rng.uniform(0, 250, (count, 2)),
            rng.choice([12, 60, 140], count)[:, None] * rng.uniform(0.5, 1.5, (count, 2)),
        )
        labels = rng.integers(0, 4, count)
        for box, label in zip(np.concatenate([corner, side], 1).tolist(), labels, strict=True):
            row = {"image_id": image_id, "category_id": [77, 5, 1, 90][label], "bbox": box, "id": len(annotations)}
            annotations.append(
                row
                | ({"iscrowd": 1} if rng.random() < 0.15 else {})
                | ({"area": box[2] * 9} if rng.random() < 0.3 else {})
            )
        again = np.repeat(np.arange(count), 2)
        boxes = np.concatenate([corner, corner + side], 1)[again] + rng.normal(0, 4, (len(again), 4))
        noise = rng.uniform(0, 200, (130 if rng.random() < 0.2 else 5, 2))
        boxes = np.concatenate([boxes, np.concatenate([noise, noise + rng.uniform(5, 150, noise.shape)], 1)])
        guess = np.concatenate([labels[again], rng.integers(0, 4, len(noise))])
        table = np.column_stack([boxes, rng.uniform(0, 1, len(boxes)).round(2), guess])
        if rng.random() < 0.85:
            detections[image_id] = detected(*table.tolist())
    raw = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 400} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in (77, 5, 1, 90, 300)],
    }
    path = folder / "random.json"
    path.write_text(json.dumps(raw))
    return read_coco(path, None, training=False), detections


@pytest.mark.parametrize("seed", range(5))
def test_backends_agree(tmp_path: Path, seed: int) -> None:
    data, detections = random_case(tmp_path, seed)
    fast, slow = (coco_ap(data, detections, backend) for backend in ("hotcoco", "pycocotools"))
    assert 0.05 < slow["AP"] < 0.95
    for key in ("per_class", "per_class_AR"):
        names = fast.pop(key), slow.pop(key)
        assert names[0].pop("class 300") is names[1].pop("class 300") is None
        assert names[0] == pytest.approx(names[1], abs=1e-12)
    assert None not in slow.values()
    assert fast == pytest.approx(slow, abs=1e-12)


def test_order_of_images_does_not_matter(tmp_path: Path) -> None:
    data, detections = random_case(tmp_path, 9)
    assert coco_ap(data, dict(reversed(detections.items()))) == coco_ap(data, detections)


def test_choose_backend() -> None:
    assert [choose_backend(one) for one in ("auto", "hotcoco", "pycocotools")] == ["hotcoco", "hotcoco", "pycocotools"]
    with pytest.raises(UserError, match="unknown COCO backend 'fast'"):
        choose_backend("fast")


def test_json_round_trip(tmp_path: Path) -> None:
    data, detections = random_case(tmp_path, 0)
    path = tmp_path / "detections.json"
    write_results(detections, data.category_ids, path)
    rows = json.loads(path.read_text())
    assert {row["category_id"] for row in rows} == {77, 5, 1, 90}
    assert {row["image_id"] for row in rows} == {key for key, value in detections.items() if len(value.scores_N)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detections.json", "random.json"]
    label_of = {category_id: label for label, category_id in enumerate(data.category_ids)}
    tables: dict[Id, list[tuple[float, ...]]] = {image_id: [] for image_id in detections}
    for row in rows:
        x, y, width, height = row["bbox"]
        tables[row["image_id"]].append((x, y, x + width, y + height, row["score"], label_of[row["category_id"]]))
    back = {image_id: detected(*table) for image_id, table in tables.items()}
    for image_id, one in detections.items():
        assert torch.equal(back[image_id].scores_N, one.scores_N)
        assert torch.equal(back[image_id].labels_N, one.labels_N)
        assert (back[image_id].boxes_N4 - one.boxes_N4).abs().max() <= 0.0021
    assert coco_ap(data, back)["AP"] == pytest.approx(coco_ap(data, detections)["AP"], abs=1e-3)
