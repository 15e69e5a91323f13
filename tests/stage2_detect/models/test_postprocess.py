"""NMS against float64 NumPy one box at a time and against torchvision; detections back in the original image."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import postprocess
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.postprocess import NMS

K = 3


def candidates(count: int = 120, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around a few places, so that many overlap; classes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    places = 100 * torch.rand(6, 2, generator=generator)
    center = places[torch.randint(6, (count,), generator=generator)] + 4 * torch.randn(count, 2, generator=generator)
    half = 10 + 10 * torch.rand(count, 2, generator=generator)
    boxes_D4 = torch.cat((center - half, center + half), dim=1).clamp(min=0)
    classes = (K * torch.rand(count, generator=generator) ** 2).long()
    return boxes_D4, 0.05 + 0.95 * torch.rand(count, generator=generator), classes


def soft_nms_by_loop(boxes: np.ndarray, scores: np.ndarray, kind: str, iou: float, sigma: float) -> np.ndarray:
    """Scores after soft NMS of one class (arXiv 1704.04503, figure 2), one pick after the other."""
    scores, left = scores.copy(), list(range(len(scores)))
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        for other in left:
            low = np.maximum(boxes[best, :2], boxes[other, :2])
            high = np.minimum(boxes[best, 2:], boxes[other, 2:])
            shared = np.maximum(high - low, 0).prod()
            areas = [(boxes[i, 2:] - boxes[i, :2]).prod() for i in (best, other)]
            overlap = shared / (sum(areas) - shared)
            if kind == "soft_gaussian":
                scores[other] *= np.exp(-(overlap**2) / sigma)
            elif overlap >= iou:
                scores[other] *= 1 - overlap
    return scores


def by_loop(boxes_D4: Tensor, scores: Tensor, classes: Tensor, rule: NMS) -> np.ndarray:
    expected = np.zeros(len(scores))
    for label in range(K):
        of_class = (classes == label).numpy()
        expected[of_class] = soft_nms_by_loop(
            boxes_D4.double().numpy()[of_class], scores.double().numpy()[of_class], rule.kind, rule.iou, rule.sigma
        )
    return expected


RULES = [
    NMS("soft_linear", iou=0.3),
    NMS("soft_linear", iou=0.6),
    NMS("soft_gaussian", sigma=0.5),
    NMS("soft_gaussian", sigma=0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_soft_nms_equals_the_loop(rule: NMS) -> None:
    boxes_D4, scores, classes = candidates()
    expected = by_loop(boxes_D4, scores, classes, rule)
    assert (expected < scores.numpy() - 0.01).sum() > 50
    result = postprocess.soft_nms(boxes_D4, scores, classes, rule, most=1000)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("most", [1, 7, 40])
@pytest.mark.parametrize("rule", RULES[::2], ids=str)
def test_the_best_do_not_depend_on_how_many_are_wanted(rule: NMS, most: int) -> None:
    """So the steps may end there."""
    boxes_D4, scores, classes = candidates()
    expected = by_loop(boxes_D4, scores, classes, rule)
    order = np.argsort(-expected)[:most]
    index, result = postprocess.apply_nms(boxes_D4, scores, classes, rule, threshold=0.0, most=most)
    assert index.tolist() == order.tolist()
    np.testing.assert_allclose(result.numpy(), expected[order], rtol=1e-4)


def test_soft_nms_drops_what_falls_to_the_threshold() -> None:
    boxes_D4, scores, classes = candidates()
    rule = RULES[0]
    expected = by_loop(boxes_D4, scores, classes, rule)
    index, result = postprocess.apply_nms(boxes_D4, scores, classes, rule, threshold=0.2, most=1000)
    assert sorted(index.tolist()) == np.flatnonzero(expected > 0.2).tolist()
    assert (result > 0.2).all()


def test_soft_nms_of_one_and_of_none() -> None:
    boxes_D4, scores, classes = candidates(1)
    assert torch.equal(postprocess.soft_nms(boxes_D4, scores, classes, RULES[0], most=100), scores)
    index, result = postprocess.apply_nms(boxes_D4[:0], scores[:0], classes[:0], RULES[2], threshold=0.1, most=9)
    assert index.shape == result.shape == (0,)


def test_twins_leave_one_under_soft_linear() -> None:
    """IoU of 1 takes the whole score of the other."""
    twins = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(2, 1)
    result = postprocess.soft_nms(twins, torch.tensor([0.5, 0.9]), torch.tensor([1, 1]), RULES[0], most=100)
    torch.testing.assert_close(result, torch.tensor([0.0, 0.9]))
    apart = postprocess.soft_nms(twins, torch.tensor([0.5, 0.9]), torch.tensor([1, 0]), RULES[0], most=100)
    torch.testing.assert_close(apart, torch.tensor([0.5, 0.9]))


def test_hard_nms_equals_torchvision() -> None:
    boxes_D4, scores, classes = candidates()
    index, result = postprocess.apply_nms(boxes_D4, scores, classes, NMS(iou=0.4), threshold=0.0, most=30)
    assert index.tolist() == ops.batched_nms(boxes_D4, scores, classes, 0.4)[:30].tolist()
    assert torch.equal(result, scores[index])


@pytest.mark.parametrize("rule", [NMS(iou=0.4), *RULES[::2]], ids=str)
def test_selection_equals_one_class_at_a_time(rule: NMS) -> None:
    """The boxes of one image, one a class and RoI."""
    generator = torch.Generator().manual_seed(5)
    boxes_RK4 = torch.stack([candidates(40, seed)[0] for seed in range(K)], dim=1)
    scores_RK = torch.rand(40, K, generator=generator)
    (result,) = postprocess.select(boxes_RK4[None], scores_RK[None], threshold=0.3, nms=rule, most=25)
    rows = []
    for label in range(K):
        of_class = scores_RK[:, label] > 0.3
        boxes_D4, scores = boxes_RK4[of_class, label], scores_RK[of_class, label]
        if rule.kind == "hard":
            kept = ops.nms(boxes_D4, scores, rule.iou)
            boxes_D4, scores = boxes_D4[kept], scores[kept]
        else:
            lowered = soft_nms_by_loop(
                boxes_D4.double().numpy(), scores.double().numpy(), rule.kind, rule.iou, rule.sigma
            )
            boxes_D4, scores = boxes_D4[lowered > 0.3], torch.from_numpy(lowered[lowered > 0.3])
        rows += [(score, label, *box) for score, box in zip(scores.tolist(), boxes_D4.tolist(), strict=True)]
    table = np.array(sorted(rows, reverse=True)[:25])
    assert len(set(table[:, 1])) == K
    np.testing.assert_allclose(result.scores_N.numpy(), table[:, 0], rtol=1e-4)
    assert result.labels_N.tolist() == table[:, 1].tolist()
    np.testing.assert_allclose(result.boxes_N4.numpy(), table[:, 2:], rtol=1e-6)


@pytest.mark.parametrize("rule", [NMS(iou=0.4), *RULES[::2]], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["box per class", "box of all classes"])
def test_a_batch_equals_its_images_alone(rule: NMS, shared: bool) -> None:
    """Whatever is copied at first: images with fewer than 9 candidates, with more, with none."""
    generator = torch.Generator().manual_seed(6)
    boxes_BRD4 = torch.stack([torch.stack([candidates(40, 3 * i + k)[0] for k in range(K)], dim=1) for i in range(4)])
    boxes_BRD4 = boxes_BRD4[:, :, :1] if shared else boxes_BRD4
    scores_BRK = torch.rand(4, 40, K, generator=generator)
    scores_BRK[1] *= torch.linspace(0.3, 0.35, 40)[:, None]  # two of 120
    scores_BRK[2] = 0
    options: dict[str, Any] = {"threshold": 0.3, "nms": rule, "most": 2}
    together = postprocess.select(boxes_BRD4, scores_BRK, candidates=9, **options)
    alone = [
        postprocess.select(b[None], s[None], candidates=10_000, **options)[0]
        for b, s in zip(boxes_BRD4, scores_BRK, strict=True)
    ]
    assert [len(one.scores_N) for one in alone][2:] == [0, 2]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.boxes_N4, other.boxes_N4)
        assert torch.equal(one.scores_N, other.scores_N)
        assert torch.equal(one.labels_N, other.labels_N)


@pytest.mark.parametrize("rule", [NMS(iou=0.5), NMS("soft_linear", iou=0.5)], ids=str)
def test_more_candidates_are_copied_where_the_first_leave_too_few(rule: NMS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen copies of the best box, then two boxes beside it."""
    copied = []
    copy_best = postprocess._copy_best

    def note(boxes: Tensor, scores: Tensor, classes: int, size: int) -> Tensor:
        copied.append(size)
        return copy_best(boxes, scores, classes, size)

    monkeypatch.setattr(postprocess, "_copy_best", note)
    corners = torch.tensor([0.0] * 16 + [40, 80])
    boxes_BRD4 = torch.stack((corners, corners, corners + 20, corners + 20), dim=-1)[None, :, None]
    scores_BRK = torch.linspace(0.9, 0.2, 18)[None, :, None]
    for most, sizes in ((1, [4]), (3, [12, 18])):
        copied.clear()
        (one,) = postprocess.select(boxes_BRD4, scores_BRK, threshold=0.1, nms=rule, most=most, candidates=4)
        assert copied == sizes
        assert one.boxes_N4[:, 0].tolist() == [0, 40, 80][:most]
        torch.testing.assert_close(one.scores_N, scores_BRK[0, [0, 16, 17][:most], 0])


def test_back_in_the_original_image() -> None:
    """Network sizes are rounded, so the last of them may lie outside the original."""
    boxes_D4 = Detections(
        torch.tensor([[2.0, 3.0, 20.0, 31.0], [30.9, 3.0, 31.0, 31.0], [0.0, 0.0, 31.0, 50.0]]),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([1, 0, 2]),
    )
    original, kept = postprocess.to_original(boxes_D4, torch.tensor([98, 61]), torch.tensor(31 / 61))
    assert kept.tolist() == [True, True, True]
    torch.testing.assert_close(original.boxes_N4[2], torch.tensor([0.0, 0.0, 61.0, 98.0]))
    # 31 / 0.513 is 60.43: in an original of 60 px the second box, from 60.2 on, has no place.
    narrow, kept = postprocess.to_original(boxes_D4, torch.tensor([97, 60]), torch.tensor(0.513))
    assert kept.tolist() == [True, False, True]
    torch.testing.assert_close(narrow.boxes_N4[0], boxes_D4.boxes_N4[0] / 0.513)
    assert narrow.boxes_N4[1, 2] == 60
    assert narrow.scores_N.tolist() == pytest.approx([0.9, 0.7])
    assert narrow.labels_N.tolist() == [1, 2]
