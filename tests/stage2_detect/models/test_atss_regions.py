"""ATSS and the regions of dense distillation against float64 loops over objects and anchors."""

import math

import numpy as np
import pytest
import torch

from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.models.anchors import grid_anchors
from ssld.stage2_detect.models.assign import Assignment
from ssld.stage2_detect.models.atss import Thresholds, assign_atss
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.gfl import GFL

STRIDES = (8, 16, 32)
GRIDS = [(12, 16), (6, 8), (3, 4)]
COUNTS = [rows * columns for rows, columns in GRIDS]
CANDIDATES = 9
CPU = torch.device("cpu")


def anchors() -> torch.Tensor:
    return grid_anchors(GRIDS, CPU, strides=STRIDES, sizes=[8.0 * stride for stride in STRIDES], ratios=(1.0,))


def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Three images with 6, 2 and no objects; the padding is not at zero, so that using it would show."""
    draw = np.random.default_rng(5)
    corners = draw.uniform(0, 70, (3, 6, 2))
    sides = draw.uniform(12, 60, (3, 6, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], axis=-1)).float()
    boxes[0, 1] = boxes[0, 0] + 3  # two that claim the same anchors
    present = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])
    return boxes, present


def iou(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def atss_by_hand(boxes: np.ndarray, ddof: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(label, object, threshold of each object, unbiased threshold) of one image, arXiv 1912.02424 algorithm 1."""
    all_anchors = anchors().double().numpy()
    centers = (all_anchors[:, :2] + all_anchors[:, 2:]) / 2
    best, owner = np.full(len(all_anchors), -1.0), np.full(len(all_anchors), -1)
    thresholds, unbiased = [], []
    for number, box in enumerate(boxes):
        near: list[int] = []
        start = 0
        for count in COUNTS:
            away = np.hypot(*(centers[start : start + count] - (box[:2] + box[2:]) / 2).T)
            near += list(start + np.argsort(away, kind="stable")[:CANDIDATES])
            start += count
        ious = np.array([iou(box, all_anchors[k]) for k in near])
        thresholds.append(ious.mean() + ious.std(ddof=ddof))
        unbiased.append(ious.mean() + ious.std(ddof=1))
        for k, overlap in zip(near, ious, strict=True):
            x, y = centers[k]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= thresholds[-1] and inside and overlap > best[k]:
                best[k], owner[k] = overlap, number
    return (owner >= 0).astype(int), np.maximum(owner, 0), np.array(thresholds), np.array(unbiased)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("chunk", [2**24, 1])
def test_atss(unbiased: bool, chunk: int) -> None:
    boxes, present = scenes()
    assigned, thresholds = assign_atss(
        anchors(), COUNTS, boxes, present, candidates=CANDIDATES, unbiased_std=unbiased, chunk_elements=chunk
    )
    for image in range(3):
        count = int(present[image].sum())
        labels, objects, positive, region = atss_by_hand(boxes[image, :count].double().numpy(), int(unbiased))
        np.testing.assert_array_equal(assigned.labels_BA[image].numpy(), labels)
        np.testing.assert_array_equal(assigned.objects_BA[image].numpy(), objects)
        np.testing.assert_allclose(thresholds.positive_BG[image, :count].numpy(), positive, rtol=1e-5)
        np.testing.assert_allclose(thresholds.region_BG[image, :count].numpy(), region, rtol=1e-5)
        assert torch.isinf(thresholds.positive_BG[image, count:]).all()
    assert assigned.labels_BA.sum(dim=1).min() == 0
    assert assigned.labels_BA[0].sum() > 6


def test_atss_of_a_batch_without_any_object() -> None:
    assigned, thresholds = assign_atss(
        anchors(), COUNTS, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), candidates=CANDIDATES
    )
    assert isinstance(assigned, Assignment)
    assert assigned.labels_BA.shape == (2, sum(COUNTS))
    assert not assigned.labels_BA.any()
    assert isinstance(thresholds, Thresholds)
    assert thresholds.region_BG.shape == (2, 0)


@pytest.mark.parametrize("overlap", ["anchor", "union"])
@pytest.mark.parametrize(("gamma", "chunk"), [(0.25, 2**22), (0.0, 2**22), (0.25, 3 * 252 * 4), (0.25, 1)])
def test_valuable_region(overlap: regions.Overlap, gamma: float, chunk: int) -> None:
    boxes, present = scenes()
    _, thresholds = assign_atss(anchors(), COUNTS, boxes, present, candidates=CANDIDATES)
    assert len(anchors()) == 252  # so that a chunk of 3 * 252 * 4 has four of the six objects
    weight = regions.valuable_region(
        anchors(), boxes, thresholds.region_BG, gamma=gamma, overlap=overlap, chunk_elements=chunk
    )
    all_anchors = anchors().double().numpy()
    expected = np.zeros((3, len(all_anchors)))
    for image in range(3):
        for number in range(int(present[image].sum())):
            box = boxes[image, number].double().numpy()
            threshold = thresholds.region_BG[image, number].item()
            for k, anchor in enumerate(all_anchors):
                shared = np.prod(np.clip(np.minimum(box[2:], anchor[2:]) - np.maximum(box[:2], anchor[:2]), 0, None))
                area = np.prod(anchor[2:] - anchor[:2])
                share = shared / area if overlap == "anchor" else iou(box, anchor)
                away = ((box[:2] + box[2:] - anchor[:2] - anchor[2:]) / 2) ** 2
                around = (np.maximum(box[2:], anchor[2:]) - np.minimum(box[:2], anchor[:2])) ** 2
                x = share - away.sum() / around.sum()
                if gamma * threshold <= x < threshold:
                    expected[image, k] = max(expected[image, k], iou(box, anchor))
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-6)
    assert (weight[0] > 0).sum() > 10
    assert not weight[2].any()


@pytest.mark.parametrize("chunk", [2**22, 3 * 252 * 4])
def test_inside_and_fine_grained_regions(chunk: int) -> None:
    boxes, present = scenes()
    inside = regions.inside_objects(anchors(), boxes, present, chunk_elements=chunk).numpy()
    near = regions.fine_grained(anchors(), boxes, present, chunk_elements=chunk).numpy()
    all_anchors = anchors().double().numpy()
    centers = (all_anchors[:, :2] + all_anchors[:, 2:]) / 2
    for image in range(3):
        objects = boxes[image, : int(present[image].sum())].double().numpy()
        expected_inside = np.zeros(len(all_anchors), dtype=bool)
        expected_near = np.zeros(len(all_anchors), dtype=bool)
        for box in objects:
            expected_inside |= ((centers > box[:2]) & (centers < box[2:])).all(axis=1)
            ious = np.array([iou(box, anchor) for anchor in all_anchors])
            expected_near |= ious > 0.5 * ious.max()
        np.testing.assert_array_equal(inside[image], expected_inside)
        np.testing.assert_array_equal(near[image], expected_near)
    assert inside[0].any()
    assert near[0].any()


def test_what_a_cell_is_to_find_does_not_depend_on_the_padding() -> None:
    """An image of 70 x 96 px by itself, padded to 96 x 96, and beside a larger one: the reference drops the anchors beyond the former."""
    boxes = torch.tensor([[[3.0, 5, 45, 31], [50, 20, 95.5, 69], [5.3, 40.1, 21.7, 69.9]]])
    labels = torch.zeros(1, 3, dtype=torch.int64)
    sizes = torch.tensor([[70, 96]])
    gfl = GFL(classes=2, channels=8)
    targets = Targets(boxes, labels, torch.zeros(1).long())
    results = {}
    for side in (96, 256):
        grids = [(math.ceil(side / stride), math.ceil(side / stride)) for stride in gfl.strides]
        assigned, thresholds = gfl.assign(grids, sizes, targets)
        valid = gfl.valid(grids, sizes)
        assert valid is not None
        all_anchors = gfl.anchors(grids, CPU)
        present = labels >= 0
        inside = regions.inside_objects(all_anchors, boxes, present, valid_BA=valid)
        near = regions.fine_grained(all_anchors, boxes, present, valid_BA=valid)
        region = regions.valuable_region(all_anchors, boxes, thresholds.region_BG, valid_BA=valid)
        assert (assigned.labels_BA[~valid] == -1).all()
        assert not any(chosen[~valid].any() for chosen in (inside, near, region))
        results[side] = [
            thresholds.positive_BG,
            thresholds.region_BG,
            *(
                values[valid]
                for values in (all_anchors[None], assigned.labels_BA, assigned.ious_BA, inside, near, region)
            ),
        ]
    for alone, padded in zip(results[96], results[256], strict=True):
        torch.testing.assert_close(alone, padded, rtol=1e-6, atol=1e-6)
    assert results[96][3].sum() > 3
    # Where the padding counts, as in PaddleDetection, an object's threshold comes from candidates that the image does not have.
    grids = [(256 // stride, 256 // stride) for stride in gfl.strides]
    thresholds = GFL(classes=2, channels=8, ignore_padding=False).assign(grids, sizes, targets)[1]
    assert (thresholds.positive_BG - results[96][0]).abs().max() > 0.01


def test_all_negatives_by_their_score() -> None:
    weight = regions.negatives(torch.tensor([[1, 0, -1, 0]]), torch.tensor([[0.9, 0.5, 0.7, 0.25]]).double())
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[0, 0.5, 0, 0.25]]


@pytest.mark.parametrize("padded", [False, True])
def test_general_instances(padded: bool) -> None:
    """Two images, of the second only a part there is, against NMS in a loop."""
    draw = np.random.default_rng(7)
    A, most = sum(COUNTS), 4
    student, teacher = draw.normal(-1, 2, (2, 2, A, 5))
    corners, sides = draw.uniform(-20, 60, (2, 2, A, 2)), draw.uniform(5, 50, (2, 2, A, 2))
    student_boxes, teacher_boxes = np.concatenate((corners, corners + sides), axis=-1)
    valid = np.ones((2, A), dtype=bool)
    valid[1] = ~padded | (draw.uniform(size=A) < 0.5)
    valid[1, -1] = True
    student_logits, teacher_logits, first_boxes, second_boxes = (
        torch.from_numpy(array).float() for array in (student, teacher, student_boxes, teacher_boxes)
    )
    valid_BA = torch.from_numpy(valid) if padded else None
    results = regions.general_instances(
        student_logits, teacher_logits, first_boxes, second_boxes, COUNTS, valid_BA=valid_BA, most=most
    ).numpy()
    for image in range(2):
        expected, start = [], 0
        for count in COUNTS:
            differences = 1 / (1 + np.exp(-teacher[image])) - 1 / (1 + np.exp(-student[image]))
            scores = np.abs(differences).max(axis=1)
            kept: list[tuple[int, np.ndarray]] = []
            for cell in sorted(range(start, start + count), key=lambda cell: -scores[cell]):
                larger = differences[cell, np.abs(differences[cell]).argmax()] > 0
                box = (teacher_boxes if larger else student_boxes)[image, cell]
                if valid[image, cell] and len(kept) < most and all(iou(box, other) <= 0.3 for _, other in kept):
                    kept.append((cell, box))
            expected += [cell for cell, _ in kept]
            start += count
        assert np.flatnonzero(results[image]).tolist() == sorted(expected)
    assert results[0].sum() > 2 * most
