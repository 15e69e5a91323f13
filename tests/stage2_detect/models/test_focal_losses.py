"""Losses of one-stage detectors against float64 closed forms, values and gradients."""

import math

import numpy as np
import pytest
import torch
from closed_forms import check, draw, entropy, sigmoid, softmax
from torchvision.ops import sigmoid_focal_loss

from ssld.stage2_detect.models import focal_losses

K, N, E = 5, 12, 9


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
def test_focal_loss(gamma: float) -> None:
    labels = torch.tensor([-1, 0, 4, -1, 2, -1, 1, -1, 3, -1, 0, -1])
    there = labels.numpy()[:, None] == np.arange(K)

    def closed(x: np.ndarray) -> np.ndarray:
        right = np.where(there, sigmoid(x), 1 - sigmoid(x))
        return np.where(there, 0.3, 0.7) * (1 - right) ** gamma * -np.log(right)

    check(lambda x: focal_losses.focal_loss(x, labels, alpha=0.3, gamma=gamma), closed, draw(N, K))


def test_focal_loss_is_torchvisions() -> None:
    labels = torch.randint(-1, K, (3, 50), generator=torch.Generator().manual_seed(6))
    actual = draw(3, 50, K, scale=6.0).requires_grad_()
    reference = actual.detach().double().requires_grad_()
    losses = focal_losses.focal_loss(actual, labels)
    expected = sigmoid_focal_loss(reference, (labels[..., None] == torch.arange(K)).double())
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=1e-7)
    losses.sum().backward()
    expected.sum().backward()
    assert actual.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(actual.grad.double(), reference.grad, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_losses_of_saturated_logits_are_finite(gamma: float) -> None:
    extreme = torch.tensor([[-200.0, -40.0, 0.0, 40.0, 200.0]] * 6)
    logits = extreme.clone().requires_grad_()
    loss = focal_losses.focal_loss(logits, torch.arange(-1, 5), gamma=gamma)
    quality = focal_losses.quality_focal_loss(logits, torch.eye(6, 5))
    (loss + quality).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # A confident mistake costs its logit, a confident hit nothing.
    assert loss[0].tolist() == pytest.approx([0, 0, 0.75 * 0.5**gamma * math.log(2), 30, 150])
    assert [loss[1, 0].item(), loss[5, 4].item()] == pytest.approx([50, 0])
    assert [quality[0, 0].item(), quality[4, 4].item()] == pytest.approx([200, 0])


def test_quality_focal_loss() -> None:
    y = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) * (draw(N, K, seed=1) > 0)

    def closed(x: np.ndarray) -> np.ndarray:
        p, t = sigmoid(x), y.double().numpy()
        return np.abs(t - p) ** 2 * entropy(p, t)

    check(lambda x: focal_losses.quality_focal_loss(x, y), closed, draw(N, K))


def test_distribution_focal_loss_and_expectation() -> None:
    distances = torch.tensor([0.0, 0.25, 1.0, 3.999, 7.9, 5.5])

    def closed(x: np.ndarray) -> np.ndarray:
        p = softmax(x)
        rows, left = np.arange(6), np.floor(distances.double().numpy()).astype(int)
        share = distances.double().numpy() - left
        return -(1 - share) * np.log(p[rows, left]) - share * np.log(p[rows, left + 1])

    check(lambda x: focal_losses.distribution_focal_loss(x, distances), closed, draw(6, E))
    check(focal_losses.expected_distance, lambda x: (softmax(x) * np.arange(E)).sum(-1), draw(6, E))
    # The loss is lowest where the two bins share the mass by nearness.
    peak = torch.full((1, E), -40.0)
    peak[0, 2:4] = torch.tensor([0.7, 0.3]).log()
    entropy_of_it = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert focal_losses.distribution_focal_loss(peak, torch.tensor([2.3])).item() == pytest.approx(
        entropy_of_it, rel=1e-5
    )
