"""Losses of one-stage detectors and of their distillation against float64 closed forms, values and gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ssld.stage2_detect.distillation import losses
from ssld.stage2_detect.models import focal_losses

K, N, E = 5, 12, 9


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def entropy(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def check(actual: Callable[[Tensor], Tensor], closed: Callable[[np.ndarray], np.ndarray], x: Tensor) -> None:
    """Values in float32 and in bf16's input against the closed form, and the gradient of the sum against its differences."""
    expected = closed(x.double().numpy())
    torch.testing.assert_close(actual(x).double(), torch.from_numpy(expected), rtol=2e-5, atol=2e-6)
    assert actual(x.bfloat16()).dtype == torch.float32
    leaf = x.clone().requires_grad_()
    actual(leaf).sum().backward()
    assert leaf.grad is not None
    slope, step = np.zeros(x.shape), 1e-5
    for place in np.ndindex(*x.shape):
        there = x.double().numpy()
        there[place] += step
        back = there.copy()
        back[place] -= 2 * step
        slope[place] = (closed(there).sum() - closed(back).sum()) / (2 * step)
    torch.testing.assert_close(leaf.grad.double(), torch.from_numpy(slope), rtol=1e-3, atol=1e-5)


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


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_soft_divergence_and_localization_distillation(temperature: float) -> None:
    teacher = draw(N, 4, E, seed=3)

    def divergence(x: np.ndarray) -> np.ndarray:
        q, p = softmax(teacher.double().numpy() / temperature), softmax(x / temperature)
        return temperature**2 * (q * np.log(q / p)).mean(-1)

    check(lambda x: losses.soft_divergence(x, teacher, temperature), divergence, draw(N, 4, E))
    check(
        lambda x: losses.localization_distillation(x, teacher, temperature),
        lambda x: divergence(x).mean(-1),
        draw(N, 4, E),
    )
    assert losses.localization_distillation(teacher, teacher, temperature).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["paper", "code", "focal"])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 2.0), (0.5, 1.0)])
def test_adaptive_distillation(form: str, beta: float, gamma: float) -> None:
    teacher = draw(N, K, seed=4)

    def closed(x: np.ndarray) -> np.ndarray:
        q, p = sigmoid(teacher.double().numpy()), sigmoid(x)
        kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
        if form == "focal":
            return np.where(q >= 0.5, 1 - p, p) ** gamma * kl
        weight = (1 - np.exp(-(kl + beta * entropy(q, q)))) ** gamma
        return weight * (0.5 * entropy(p, q) if form == "code" else kl)

    def actual(x: Tensor) -> Tensor:
        return losses.adaptive_distillation(x, teacher, beta=beta, gamma=gamma, form=form)  # type: ignore[arg-type]

    check(actual, closed, draw(N, K))


@pytest.mark.parametrize("form", ["paper", "code", "focal"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_adaptive_distillation_of_saturated_logits_is_finite(form: str, gamma: float) -> None:
    extreme = torch.tensor([-200.0, -40.0, 0.0, 40.0, 200.0])
    student, teacher = (grid.flatten() for grid in torch.meshgrid(extreme, extreme, indexing="ij"))
    student = student.clone().requires_grad_()
    loss = losses.adaptive_distillation(student, teacher, gamma=gamma, form=form)  # type: ignore[arg-type]
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_adaptive_distillation_is_still_where_both_agree() -> None:
    """The code's form is not 0 there, but has no slope (specified so; the paper's form is 0)."""
    teacher = draw(N, K, seed=5)
    student = teacher.clone().requires_grad_()
    loss = losses.adaptive_distillation(student, teacher, form="code")
    loss.sum().backward()
    assert loss.min() > 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    assert losses.adaptive_distillation(teacher, teacher, form="paper").abs().max() < 1e-6


def test_adaptive_distillation_becomes_the_focal_loss_for_a_sure_teacher() -> None:
    student, labels = draw(N, K), torch.arange(N) % (K + 1) - 1
    sure = torch.where(labels[:, None] == torch.arange(K), 100.0, -100.0)
    actual = losses.adaptive_distillation(student, sure, gamma=2.0)
    focal = focal_losses.focal_loss(student, labels, alpha=0.5, gamma=2.0) / 0.5
    torch.testing.assert_close(actual, focal, rtol=1e-4, atol=1e-6)


def test_adaptive_normalizer() -> None:
    logits = draw(N, K)
    expected = (sigmoid(logits.double().numpy()) ** 1.8).sum()
    assert losses.adaptive_normalizer(logits).item() == pytest.approx(expected, rel=1e-5)
