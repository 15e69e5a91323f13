"""Geometry against float64 NumPy and torchvision."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import boxes


def random_boxes(*shape: int, seed: int = 0, extent: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * extent * 0.8
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2, generator=generator) * extent * 0.3), dim=-1)


def test_iou_equals_torchvision_and_is_zero_for_empty_boxes() -> None:
    first, second = random_boxes(2, 7, seed=1), random_boxes(2, 9, seed=2)
    first[0, 3:] = 0  # padding
    second[1, 4, 2:] = second[1, 4, :2]  # no area
    actual = boxes.pairwise_iou(first, second)
    for i in range(2):
        expected = ops.box_iou(first[i].double(), second[i].double()).nan_to_num(0)
        torch.testing.assert_close(actual[i].double(), expected, atol=1e-6, rtol=0)
    assert (actual[0, 3:] == 0).all()
    empty = torch.zeros(2, 3, 4)
    assert (boxes.pairwise_iou(empty, empty) == 0).all()
    assert boxes.pairwise_iou(first[:, :0], second).shape == (2, 0, 9)


def test_areas_in_common_and_iou_of_pairs_are_the_diagonal_of_all_with_all() -> None:
    first, second = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0)).cumsum(-1).view(2, 7, 4)
    first[0] = second[0]
    torch.testing.assert_close(
        boxes.paired_intersection(first, second), boxes.pairwise_intersection(first, second).diagonal()
    )
    assert boxes.pairwise_intersection(first, second).diagonal().max() > 0
    torch.testing.assert_close(boxes.paired_iou(first, second), boxes.pairwise_iou(first, second).diagonal())
    assert boxes.paired_iou(first, second)[0] == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)])
def test_deltas_follow_the_definition_and_lead_back(weights: tuple[float, ...]) -> None:
    target, reference = random_boxes(50, seed=3), random_boxes(50, seed=4)
    t, r = target.double().numpy(), reference.double().numpy()
    size, ref_size = t[:, 2:] - t[:, :2], r[:, 2:] - r[:, :2]
    shift = ((t[:, :2] + t[:, 2:]) - (r[:, :2] + r[:, 2:])) / 2 / ref_size
    expected = np.concatenate((shift, np.log(size / ref_size)), axis=1) * np.array(weights)
    deltas = boxes.encode(target, reference, weights)
    np.testing.assert_allclose(deltas.numpy(), expected, atol=1e-4)
    torch.testing.assert_close(boxes.decode(deltas, reference, weights), target, atol=1e-4, rtol=0)


def test_decoding_bounds_the_size_and_broadcasts_over_classes() -> None:
    reference = torch.tensor([[10.0, 10.0, 20.0, 30.0]])
    deltas = torch.tensor([[[0.0, 0.0, 50.0, 0.0], [1.0, 0.0, 0.0, 50.0], [0.0, 0.0, 0.0, 0.0]]])
    decoded = boxes.decode(deltas, reference[:, None], (1.0, 1.0, 1.0, 1.0))[0]
    assert (decoded[0, 2] - decoded[0, 0]).item() == pytest.approx(10 * 1000 / 16)
    assert (decoded[1, 3] - decoded[1, 1]).item() == pytest.approx(20 * 1000 / 16)
    assert decoded[2].tolist() == reference[0].tolist()
    assert math.log(62.5) == boxes.LOG_SIZE_LIMIT


def test_gradients_of_the_box_code() -> None:
    reference = random_boxes(4, seed=5).double()
    deltas = (torch.rand(4, 4, dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: boxes.decode(d, reference, (10, 10, 5, 5)), deltas)
    target = random_boxes(4, seed=6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: boxes.encode(t, reference, (10, 10, 5, 5)), target)


def test_deltas_of_padding_are_finite() -> None:
    empty = torch.zeros(1, 4)
    some = torch.tensor([[5.0, 5.0, 9.0, 9.0]])
    for first, second in [(empty, empty), (empty, some), (some, empty)]:
        assert boxes.encode(first, second, (10, 10, 5, 5)).isfinite().all()


def test_clipping_uses_each_images_size() -> None:
    wild = torch.tensor([-5.0, -6.0, 300.0, 200.0]).expand(2, 3, 4)
    sizes = torch.tensor([[50, 80], [60, 70]])
    clipped = boxes.clip(wild, sizes)
    assert clipped[0, 1].tolist() == [0, 0, 80, 50]
    assert clipped[1, 2].tolist() == [0, 0, 70, 60]
    per_class = boxes.clip(wild[:, :, None].expand(2, 3, 5, 4), sizes)
    assert per_class.shape == (2, 3, 5, 4)
    assert per_class[1, 0, 4].tolist() == [0, 0, 70, 60]


def test_take() -> None:
    source = random_boxes(2, 6)
    index = torch.tensor([[3, 0], [5, 5]])
    assert torch.equal(boxes.take(source, index), torch.stack((source[0, [3, 0]], source[1, [5, 5]])))
    assert boxes.take(source[:, :0], index).shape == (2, 2, 4)


def test_nms_by_class_equals_a_loop_over_classes() -> None:
    # Image-sized coordinates and many classes: shifting classes apart in float32 would move boxes by hundredths of a
    # pixel.
    candidates, classes = random_boxes(600, seed=10, extent=1000.0), torch.arange(600) % 80
    candidates[80:] = candidates[:520] + torch.randn(520, 4, generator=torch.Generator().manual_seed(1)) * 40
    candidates = candidates.clamp(min=0)
    candidates[:, 2:] = torch.maximum(candidates[:, 2:], candidates[:, :2] + 1)
    scores = torch.rand(600, generator=torch.Generator().manual_seed(11))
    actual = boxes.class_nms(candidates, scores, classes, 0.5)
    expected = []
    for number in range(80):
        index = (classes == number).nonzero()[:, 0]
        expected += index[ops.nms(candidates[index], scores[index], 0.5)].tolist()
    assert set(actual.tolist()) == set(expected)
    assert 80 < len(actual) < 600
    assert (scores[actual].diff() <= 0).all()
    assert len(boxes.class_nms(candidates[:0], scores[:0], classes[:0], 0.5)) == 0


def test_nms_class_by_class_is_nms_of_all_classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    corners = 40 * torch.rand(300, 2, generator=draw)
    candidates = torch.cat((corners, corners + 5 + 30 * torch.rand(300, 2, generator=draw)), dim=1)
    scores, classes = torch.rand(300, generator=draw), torch.randint(0, 4, (300,), generator=draw)
    together = boxes.class_nms(candidates, scores, classes, 0.5)
    monkeypatch.setattr(boxes, "_MANY", 10)
    one_by_one = boxes.class_nms(candidates, scores, classes, 0.5)
    assert together.tolist() == one_by_one.tolist()
    assert 20 < len(together) < 250


@pytest.mark.parametrize("most", [1, 7, 30, 1000])
@pytest.mark.parametrize("overlap", [1.0, 40.0])
def test_the_best_of_a_nms_are_its_first(most: int, overlap: float) -> None:
    """Also where hardly any box stays, so that the best few of all boxes leave too few, and where scores are equal."""
    draw = torch.Generator().manual_seed(5)
    corners = overlap * torch.rand(400, 2, generator=draw)
    candidates = torch.cat((corners, corners + 20 + torch.rand(400, 2, generator=draw)), dim=1)
    scores, classes = (10 * torch.rand(400, generator=draw)).round(), torch.randint(0, 9, (400,), generator=draw)
    everything = boxes.class_nms(candidates, scores, classes, 0.5)
    assert boxes.class_nms(candidates, scores, classes, 0.5, most=most).tolist() == everything[:most].tolist()
    assert len(everything) < 400
