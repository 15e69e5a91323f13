"""Losses of one-stage detectors and of their distillation against float64 closed forms, values and gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stage2_detect import dense_losses, distillation_losses

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


def check(ours: Callable[[Tensor], Tensor], closed: Callable[[np.ndarray], np.ndarray], x: Tensor) -> None:
    """Values in float32 and in bf16's input against the closed form, and the gradient of the sum against its differences."""
    wanted = closed(x.double().numpy())
    torch.testing.assert_close(ours(x).double(), torch.from_numpy(wanted), rtol=2e-5, atol=2e-6)
    assert ours(x.bfloat16()).dtype == torch.float32
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert leaf.grad is not None
    slope, step = np.zeros(x.shape), 1e-5
    for place in np.ndindex(*x.shape):
        there = x.double().numpy()
        there[place] += step
        back = there.copy()
        back[place] -= 2 * step
        slope[place] = (closed(there).sum() - closed(back).sum()) / (2 * step)
    torch.testing.assert_close(leaf.grad.double(), torch.from_numpy(slope), rtol=1e-3, atol=1e-5)


def test_focal_loss() -> None:
    y = (draw(N, K, seed=1) > 0).float()

    def closed(x: np.ndarray) -> np.ndarray:
        p, t = sigmoid(x), y.double().numpy()
        right = np.where(t == 1, p, 1 - p)
        return np.where(t == 1, 0.3, 0.7) * (1 - right) ** 1.5 * -np.log(right)

    check(lambda x: dense_losses.focal_loss(x, y, alpha=0.3, gamma=1.5), closed, draw(N, K))


def test_quality_focal_loss() -> None:
    y = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) * (draw(N, K, seed=1) > 0)

    def closed(x: np.ndarray) -> np.ndarray:
        p, t = sigmoid(x), y.double().numpy()
        return np.abs(t - p) ** 2 * entropy(p, t)

    check(lambda x: dense_losses.quality_focal_loss(x, y), closed, draw(N, K))


def test_distribution_focal_loss_and_expectation() -> None:
    distances = torch.tensor([0.0, 0.25, 1.0, 3.999, 7.9, 5.5])

    def closed(x: np.ndarray) -> np.ndarray:
        p = softmax(x)
        rows, left = np.arange(6), np.floor(distances.double().numpy()).astype(int)
        share = distances.double().numpy() - left
        return -(1 - share) * np.log(p[rows, left]) - share * np.log(p[rows, left + 1])

    check(lambda x: dense_losses.distribution_focal_loss(x, distances), closed, draw(6, E))
    check(dense_losses.expected_distance, lambda x: (softmax(x) * np.arange(E)).sum(-1), draw(6, E))
    # The loss is lowest where the two bins share the mass by nearness.
    peak = torch.full((1, E), -40.0)
    peak[0, 2:4] = torch.tensor([0.7, 0.3]).log()
    entropy_of_it = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert dense_losses.distribution_focal_loss(peak, torch.tensor([2.3])).item() == pytest.approx(
        entropy_of_it, rel=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_soft_divergence_and_localization_distillation(temperature: float) -> None:
    teacher = draw(N, 4, E, seed=3)

    def divergence(x: np.ndarray) -> np.ndarray:
        q, p = softmax(teacher.double().numpy() / temperature), softmax(x / temperature)
        return temperature**2 * (q * np.log(q / p)).mean(-1)

    check(lambda x: distillation_losses.soft_divergence(x, teacher, temperature), divergence, draw(N, 4, E))
    check(
        lambda x: distillation_losses.localization_distillation(x, teacher, temperature),
        lambda x: divergence(x).mean(-1),
        draw(N, 4, E),
    )
    assert distillation_losses.localization_distillation(teacher, teacher, temperature).abs().max() < 1e-6


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

    def ours(x: Tensor) -> Tensor:
        return distillation_losses.adaptive_distillation(x, teacher, beta=beta, gamma=gamma, form=form)  # type: ignore[arg-type]

    check(ours, closed, draw(N, K))


@pytest.mark.parametrize("form", ["paper", "code", "focal"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_adaptive_distillation_of_saturated_logits_is_finite(form: str, gamma: float) -> None:
    extreme = torch.tensor([-200.0, -40.0, 0.0, 40.0, 200.0])
    student, teacher = (grid.flatten() for grid in torch.meshgrid(extreme, extreme, indexing="ij"))
    student = student.clone().requires_grad_()
    loss = distillation_losses.adaptive_distillation(student, teacher, gamma=gamma, form=form)  # type: ignore[arg-type]
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_adaptive_distillation_is_still_where_both_agree() -> None:
    """The code's form is not 0 there, but has no slope (specified so; the paper's form is 0)."""
    teacher = draw(N, K, seed=5)
    student = teacher.clone().requires_grad_()
    loss = distillation_losses.adaptive_distillation(student, teacher, form="code")
    loss.sum().backward()
    assert loss.min() > 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    assert distillation_losses.adaptive_distillation(teacher, teacher, form="paper").abs().max() < 1e-6


def test_adaptive_distillation_becomes_the_focal_loss_for_a_sure_teacher() -> None:
    student, y = draw(N, K), (draw(N, K, seed=1) > 0).float()
    ours = distillation_losses.adaptive_distillation(student, 100 * (2 * y - 1), gamma=2.0)
    focal = dense_losses.focal_loss(student, y, alpha=0.5, gamma=2.0) / 0.5
    torch.testing.assert_close(ours, focal, rtol=1e-4, atol=1e-6)


def test_adaptive_normalizer() -> None:
    logits = draw(N, K)
    wanted = (sigmoid(logits.double().numpy()) ** 1.8).sum()
    assert distillation_losses.adaptive_normalizer(logits).item() == pytest.approx(wanted, rel=1e-5)
