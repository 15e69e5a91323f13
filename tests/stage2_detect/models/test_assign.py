"""Assignment against a loop over boxes and objects, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.models.assign import assign


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared) if shared else 0.0


def _by_loop(boxes: Tensor, objects: Tensor, positive: float, negative: float, low_quality: bool) -> tuple[list, list]:
    iou = np.array([[_iou(b, o) for o in objects.double().numpy()] for b in boxes.double().numpy()])
    iou = iou.reshape(len(boxes), len(objects))
    labels, owners = [], []
    for row in iou:
        best = row.max() if len(row) else -1.0
        labels.append(1 if best >= positive else 0 if best < negative else -1)
        owners.append(int(row.argmax()) if len(row) else 0)
    if low_quality:
        for column in iou.T:
            for index in np.flatnonzero((column == column.max()) & (column > 0)):
                labels[index] = 1
    return labels, owners


@pytest.fixture
def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Three images with 5, 0 and 2 objects among 400 boxes on a grid of quarters, so that ties are exact."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 200, (3, 400, 2), generator=generator) / 4
    boxes = torch.cat((corner, corner + torch.randint(8, 100, (3, 400, 2), generator=generator) / 4), dim=-1)
    boxes[:, 200:] = boxes[:, :200]  # every box twice: ties
    objects = torch.zeros(3, 5, 4)
    present = torch.zeros(3, 5, dtype=torch.bool)
    for image, count in enumerate([5, 0, 2]):
        objects[image, :count] = boxes[image, :count] + torch.randint(-8, 8, (count, 4), generator=generator) / 4
        present[image, :count] = True
    return boxes, objects, present


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(("positive", "negative"), [(0.7, 0.3), (0.5, 0.5)])
@pytest.mark.parametrize("chunk_elements", [1, 2400, 2**24])  # one object, two objects, all at a time
def test_equals_the_loop(
    scene: tuple[Tensor, Tensor, Tensor], positive: float, negative: float, low_quality: bool, chunk_elements: int
) -> None:
    boxes, objects, present = scene
    actual = assign(
        boxes,
        objects,
        present,
        positive_iou=positive,
        negative_iou=negative,
        low_quality=low_quality,
        chunk_elements=chunk_elements,
    )
    for i in range(3):
        labels, owners = _by_loop(boxes[i], objects[i][present[i]], positive, negative, low_quality)
        assert actual.labels_BA[i].tolist() == labels
        touched = actual.ious_BA[i] > 0
        assert actual.objects_BA[i][touched].tolist() == np.array(owners)[touched.numpy()].tolist()
    assert (actual.labels_BA[1] == 0).all()
    assert {1, 0} <= set(actual.labels_BA[0].tolist())


def test_an_object_that_touches_nothing_claims_nothing() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]])
    far = torch.tensor([[[500.0, 500.0, 501.0, 501.0]]])
    present = torch.tensor([[True]])
    actual = assign(boxes, far, present, positive_iou=0.7, negative_iou=0.3, low_quality=True)
    assert actual.labels_BA.tolist() == [[0, 0]]


def test_no_object_slots_at_all() -> None:
    actual = assign(
        torch.rand(2, 6, 4),
        torch.zeros(2, 0, 4),
        torch.zeros(2, 0, dtype=torch.bool),
        positive_iou=0.5,
        negative_iou=0.5,
    )
    assert (actual.labels_BA == 0).all()
    assert (actual.ious_BA == -1).all()


def test_a_box_shared_by_all_images_may_be_expanded() -> None:
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 12.0, 12.0]])
    objects = torch.tensor([[[0.0, 0.0, 8.0, 8.0]], [[4.0, 4.0, 12.0, 12.0]]])
    actual = assign(
        anchors.expand(2, -1, -1), objects, torch.ones(2, 1, dtype=torch.bool), positive_iou=0.7, negative_iou=0.3
    )
    assert actual.labels_BA.tolist() == [[1, 0], [0, 1]]
