"""The best and the worst images: ranked by LRP errors worked out by hand, drawn with the truth beside what was found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.stage2_detect.data.coco import CocoData, Id, read_coco
from ssld.stage2_detect.evaluation.analysis import analyse
from ssld.stage2_detect.evaluation.drawing import class_color, draw_objects
from ssld.stage2_detect.evaluation.files import best_and_worst, draw_best_and_worst, truth_of
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.mask_targets import decode_rle


def scenes(folder: Path, objects: list[dict[str, Any]], count: int) -> CocoData:
    """Grey images of 100 x 100 pixels with ids 1, 2, ...; `objects` are annotations without ids."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in range(1, count + 1)]
    for one in images:
        Image.new("RGB", (100, 100), (120, 120, 120)).save(folder / str(one["file_name"]))
    annotations = [{"id": n, "iscrowd": 0, **one} for n, one in enumerate(objects, 1)]
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    with_shapes = any("segmentation" in one for one in objects)
    return read_coco(folder / "truth.json", folder, training=False, segmentations=with_shapes)


def said(*rows: tuple[int, list[float], float]) -> Detections:
    """`rows`: (class, xyxy, score)."""
    boxes_N4 = torch.tensor([box for _, box, _ in rows]).reshape(-1, 4)
    return Detections(boxes_N4, torch.tensor([row[2] for row in rows]), torch.tensor([row[0] for row in rows]).long())


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    box = {"category_id": 5, "bbox": [10, 10, 20, 40]}
    two = [{"image_id": 3, **box}, {"image_id": 3, "category_id": 6, "bbox": [60, 10, 30, 30]}]
    crowd = {"image_id": 5, "category_id": 6, "bbox": [0, 0, 50, 50], "iscrowd": 1}
    return scenes(tmp_path, [{"image_id": 1, **box}, {"image_id": 2, **box}, *two, crowd], 6)


FOUND: dict[Id, Detections] = {
    1: said((0, [10.0, 10.0, 30.0, 50.0], 0.9)),  # exact
    2: said((0, [10.0, 10.0, 30.0, 40.0], 0.9), (1, [0.0, 0.0, 5.0, 5.0], 0.6)),  # IoU 0.75, and one that is not there
    3: said((0, [10.0, 10.0, 30.0, 50.0], 0.4)),  # two missed: the one found is below the threshold
    4: said((0, [0.0, 0.0, 9.0, 9.0], 0.8)),  # nothing there
    5: said((1, [5.0, 5.0, 20.0, 20.0], 0.8)),  # on the crowd region: neither right nor wrong
}


def test_errors_by_hand(data: CocoData) -> None:
    one = analyse(data, FOUND, score_threshold=0.5)
    assert one.image_ids == (1, 2, 3, 4, 5, 6)
    assert one.counts_I3.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 2], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert one.lrp_I[:4] == pytest.approx([0, (0.25 / 0.5 + 1) / 2, 1, 1])
    assert np.isnan(one.lrp_I[4:]).all()  # nothing to find but a crowd region, nothing wrong
    below = analyse(data, FOUND, score_threshold=0.3)
    assert below.lrp_I[2] == pytest.approx(1 / 2)


def test_the_sums_are_those_of_the_whole_set(data: CocoData) -> None:
    """Against the definition in loops, on random boxes."""
    draw = np.random.default_rng(0)
    detections: dict[Id, Detections] = {}
    for record in data.images:
        corners = draw.uniform(0, 60, (30, 2))
        boxes = np.concatenate([corners, corners + draw.uniform(15, 40, (30, 2))], 1)
        near = np.array([[10, 10, 30, 50]]) + draw.uniform(-3, 3, (6, 4))
        boxes_N4 = torch.from_numpy(np.concatenate([boxes, near])).float()
        labels_N, scores_N = torch.from_numpy(draw.integers(0, 2, 36)), torch.from_numpy(draw.uniform(0, 1, 36)).float()
        detections[record.image_id] = Detections(boxes_N4, scores_N, labels_N)
    one = analyse(data, detections, score_threshold=0.5)
    for row, record in enumerate(data.images):
        mine, right, apart, taken = detections[record.image_id], 0, 0.0, set()
        order = torch.argsort(-mine.scores_N)
        wrong = 0
        for n in order.tolist():
            if mine.scores_N[n] < 0.5:
                break
            options = [
                (_iou(mine.boxes_N4[n].double().numpy(), box.astype(np.float64)), g)
                for g, box in enumerate(record.boxes_N4)
                if record.labels_N[g] == mine.labels_N[n] and g not in taken and not record.crowd_N[g]
            ]
            iou, best = max(options, default=(0.0, -1))
            if iou >= 0.5:
                taken.add(best)
                right, apart = right + 1, apart + (1 - iou) / 0.5
            else:
                wrong += not _on_a_crowd(mine.boxes_N4[n].numpy(), int(mine.labels_N[n]), record)
        missed = int((~record.crowd_N).sum()) - right
        assert one.counts_I3[row].tolist() == [right, wrong, missed]
        assert one.lrp_I[row] == pytest.approx((apart + wrong + missed) / (right + wrong + missed), abs=1e-6)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    return float(sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod()))


def _on_a_crowd(box: np.ndarray, label: int, record: Any) -> bool:
    for crowd in record.boxes_N4[record.crowd_N & (record.labels_N == label)]:
        sides = np.clip(np.minimum(box[2:], crowd[2:]) - np.maximum(box[:2], crowd[:2]), 0, None)
        if sides.prod() / (box[2:] - box[:2]).prod() >= 0.5:
            return True
    return False


def test_which_are_shown(data: CocoData) -> None:
    one = analyse(data, FOUND, score_threshold=0.5)
    assert best_and_worst(one) == {"best": [0, 1], "worst": [2, 3]}  # two mistakes before one; none in both
    assert best_and_worst(one, most=1) == {"best": [0], "worst": [2]}
    nothing = analyse(data, {}, score_threshold=0.5)
    assert best_and_worst(nothing) == {"best": [], "worst": [2, 0, 1]}  # nothing right is nobody's best


def test_pictures_and_their_index(data: CocoData, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "best_9_truth.jpg").touch()  # of an evaluation before
    one = analyse(data, FOUND, score_threshold=0.5)
    files = draw_best_and_worst(folder, data, FOUND, one)
    assert sorted(files) == sorted(folder.iterdir())
    index = json.loads((folder / "index.json").read_text())
    assert [entry["image"] for entry in index] == ["1.png", "2.png", "3.png", "4.png"]
    assert index[1] == {
        "kind": "best",
        "truth": "best_2_truth.jpg",
        "detections": "best_2_detections.jpg",
        "image": "2.png",
        "image_id": 2,
        "lrp": 0.75,
        "right": 1,
        "wrong": 1,
        "missed": 0,
    }
    with Image.open(folder / "worst_1_truth.jpg") as truth, Image.open(folder / "worst_1_detections.jpg") as detections:
        assert max(truth.size) <= 560
        assert truth.size == detections.size
        left, top = (round(v * truth.width / 100) for v in (10, 30))
        border = np.array(truth.convert("RGB"))[top - 3 : top + 3, left : left + 2].reshape(-1, 3).mean(0)
        assert np.abs(border - class_color(0)).max() < 60  # the left edge of the cat's box
        assert np.ptp(np.array(detections.convert("RGB")).astype(int)) < 40  # below the threshold: nothing is drawn


def test_an_annotation_has_no_score_on_its_name(data: CocoData) -> None:
    grey = Image.new("RGB", (640, 480), (120, 120, 120))
    box_14 = torch.tensor([[100.0, 100.0, 400.0, 400.0]])
    inked = [
        (
            np.array(draw_objects(grey, Detections(box_14, torch.tensor([score]), torch.tensor([0])), ["cat"])) != 120
        ).sum()
        for score in (0.5, float("nan"))
    ]
    assert inked[1] < inked[0]  # a shorter plate: "cat", not "cat 0.50"


def test_truth_with_shapes_and_crowds(tmp_path: Path) -> None:
    square = [[10.0, 10.0, 30.0, 10.0, 30.0, 50.0, 10.0, 50.0]]
    counts = {"size": [100, 100], "counts": [0, 100, 9900]}  # the first column
    objects = [
        {"image_id": 1, "category_id": 6, "bbox": [10, 10, 20, 40], "segmentation": square},
        {"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 100], "segmentation": counts, "iscrowd": 1},
    ]
    drawn = truth_of(scenes(tmp_path, objects, 1).images[0], 2)
    assert drawn.boxes_N4.tolist() == [[10, 10, 30, 50], [0, 0, 1, 100]]
    assert drawn.labels_N.tolist() == [1, 2]  # the third name: the first class' crowd regions
    assert drawn.scores_N.isnan().all()
    assert drawn.masks is not None
    first, second = (decode_rle(mask).astype(bool) for mask in drawn.masks)
    assert first.sum() == 20 * 40
    assert first[10:50, 10:30].all()
    assert second.sum() == 100
    assert second[:, 0].all()
