"""Box losses against float64 NumPy and torchvision, values and gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import box_losses
from ssld.stage2_detect.models.box_losses import BoxLoss

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
Reference = Callable[[np.ndarray, np.ndarray], np.ndarray]


def some(count: int = 40) -> tuple[Tensor, Tensor]:
    """Predicted and target deltas, at distances from 0.01 to 4."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 0.3, 1.0, 4.0]).repeat(count // 4)[:, None]
    target = torch.randn(count, 4, generator=generator)
    deltas = target + spread * torch.randn(count, 4, generator=generator)
    return deltas, target


def boxes_of(deltas: np.ndarray) -> np.ndarray:
    x, y = deltas[:, 0] / 10, deltas[:, 1] / 10
    w, h = (np.exp(np.minimum(deltas[:, i] / 5, math.log(1000 / 16))) for i in (2, 3))
    return np.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), axis=1)


def l1(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.abs(deltas - target).sum(axis=1)


def smooth_l1(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
    d = np.abs(deltas - target)
    return np.where(d < 0.7, d**2 / 1.4, d - 0.35).sum(axis=1)


def balanced_l1(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The integral of the gradient that the paper asks for, by the trapezium rule."""
    d = np.abs(deltas - target)
    steps = np.linspace(0, 1, 4001)[:, None, None] * d
    b = np.exp(1.5 / 0.5) - 1
    slope = np.where(steps < 0.7, 0.5 * np.log(b * np.minimum(steps, 0.7) / 0.7 + 1), 1.5)
    return (np.diff(steps, axis=0) * (slope[1:] + slope[:-1]) / 2).sum(axis=0).sum(axis=1)


def overlap(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    union = (first[:, 2:] - first[:, :2]).prod(axis=1) + (second[:, 2:] - second[:, :2]).prod(axis=1) - shared
    hull = np.maximum(first[:, 2:], second[:, 2:]) - np.minimum(first[:, :2], second[:, :2])
    return shared / union, union, hull


def giou(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
    iou, union, hull = overlap(boxes_of(deltas), boxes_of(target))
    return 1 - iou + 1 - union / hull.prod(axis=1)


def ciou_with(alpha: np.ndarray | None, deltas: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the weight of its last term, which `alpha` fixes."""
    iou, _, hull = overlap(boxes_of(deltas), boxes_of(target))
    away = (deltas[:, :2] - target[:, :2]) / 10
    angles = [np.arctan(np.exp(side[:, 2] / 5) / np.exp(side[:, 3] / 5)) for side in (deltas, target)]
    aspect = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    if alpha is None:
        alpha = aspect / (1 - iou + aspect + 1e-10)
    return 1 - iou + (away**2).sum(axis=1) / (hull**2).sum(axis=1) + alpha * aspect, alpha


def ciou(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
    return ciou_with(None, deltas, target)[0]


KINDS: dict[str, tuple[dict[str, Any], Reference]] = {
    "l1": ({}, l1),
    "smooth_l1": ({"beta": 0.7}, smooth_l1),
    "balanced_l1": ({"beta": 0.7, "alpha": 0.5, "gamma": 1.5}, balanced_l1),
    "giou": ({}, giou),
    "ciou": ({}, ciou),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_equal_numpy(name: str) -> None:
    options, reference = KINDS[name]
    deltas, target = some()
    actual = BoxLoss(name=name, weight=3.0, **options)(deltas, target, WEIGHTS)  # type: ignore[arg-type]
    assert actual.dtype == torch.float32
    expected = 3 * reference(deltas.double().numpy(), target.double().numpy())
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=2e-6)  # 1 - IoU cancels


@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_differences_of_numpy(name: str) -> None:
    options, reference = KINDS[name]
    deltas, expected = some()
    deltas.requires_grad_()
    BoxLoss(name=name, **options)(deltas, expected, WEIGHTS).sum().backward()  # type: ignore[arg-type]
    at, target = deltas.detach().double().numpy(), expected.double().numpy()
    if name == "ciou":  # the weight of the aspect ratio is a constant
        _, alpha = ciou_with(None, at, target)

        def reference(deltas: np.ndarray, target: np.ndarray) -> np.ndarray:
            return ciou_with(alpha, deltas, target)[0]

    step = 1e-6
    for column in range(4):
        shift = step * np.eye(4)[column]
        slope = (reference(at + shift, target) - reference(at - shift, target)) / (2 * step)
        assert deltas.grad is not None
        np.testing.assert_allclose(deltas.grad[:, column].numpy(), slope, rtol=1e-3, atol=2e-5)


def test_iou_losses_equal_torchvision_on_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    corner = 100 * torch.rand(2, 50, 2, generator=generator)
    both = torch.cat((corner, corner + 1 + 60 * torch.rand(2, 50, 2, generator=generator)), dim=2)
    pairs = (
        (box_losses.generalized_iou, ops.generalized_box_iou_loss),
        (box_losses.complete_iou, ops.complete_box_iou_loss),
    )
    for actual, reference in pairs:
        values, gradients = [], []
        for function in (actual, reference):
            predicted = both[0].clone().requires_grad_()
            value = function(predicted, both[1])
            value.sum().backward()
            values.append(value.detach())
            gradients.append(predicted.grad)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_balanced_l1_promotes_small_distances_and_limits_large_ones() -> None:
    """Gradients of the paper's figure 5: above smooth L1's near zero, gamma from beta on, no step between."""
    distance = torch.tensor([0.0, 0.1, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 5.0, 1e6], requires_grad=True)
    zero = torch.zeros(8)
    box_losses.balanced_l1(distance[:, None], zero[:, None], alpha=0.5, gamma=1.5, beta=1.0).sum().backward()
    b = math.exp(3) - 1
    expected = [0, 0.5 * math.log(0.1 * b + 1), 0.5 * math.log(0.5 * b + 1), 1.5, 1.5, 1.5, 1.5, 1.5]
    assert distance.grad is not None
    np.testing.assert_allclose(distance.grad.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_alike_is_zero(name: str) -> None:
    deltas = torch.zeros(3, 4, requires_grad=True)
    loss = BoxLoss(name=name)(deltas, torch.zeros(3, 4), WEIGHTS)  # type: ignore[arg-type]
    loss.sum().backward()
    assert (loss.abs() < 1e-6).all()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_huge_and_tiny_predictions_stay_finite(name: str) -> None:
    deltas = torch.tensor([[1e3, -1e3, 1e4, 1e4], [0.0, 0.0, -1e4, -1e4], [0.0, 0.0, -1e4, 1e4]], requires_grad=True)
    loss = BoxLoss(name=name)(deltas, torch.ones(3, 4), WEIGHTS)  # type: ignore[arg-type]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()


def test_a_prediction_is_limited_as_its_box_is() -> None:
    """Beyond a size ratio of 1000 / 16 the prediction does not count as larger still."""
    limit = 5 * math.log(1000 / 16)
    predicted = box_losses.unit_boxes(torch.tensor([[0.0, 0.0, limit, 3 * limit]]), WEIGHTS)
    torch.testing.assert_close(predicted, torch.tensor([[-31.25, -31.25, 31.25, 31.25]]))


def test_float32_whatever_comes_in() -> None:
    deltas, expected = some()
    half = BoxLoss(name="ciou")(deltas.bfloat16(), expected.bfloat16(), WEIGHTS)
    assert torch.equal(half, BoxLoss(name="ciou")(deltas.bfloat16().float(), expected.bfloat16().float(), WEIGHTS))
