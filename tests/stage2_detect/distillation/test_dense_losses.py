"""Distillation losses of one-stage detectors against float64 closed forms, values and gradients."""

import numpy as np
import pytest
import torch
from closed_forms import check, draw, entropy, sigmoid, softmax
from torch import Tensor

from ssld.stage2_detect.distillation import losses
from ssld.stage2_detect.models.focal_losses import focal_loss

K, N, E = 5, 12, 9


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
    focal = focal_loss(student, labels, alpha=0.5, gamma=2.0) / 0.5
    torch.testing.assert_close(actual, focal, rtol=1e-4, atol=1e-6)


def test_adaptive_normalizer() -> None:
    logits = draw(N, K)
    expected = (sigmoid(logits.double().numpy()) ** 1.8).sum()
    assert losses.adaptive_normalizer(logits).item() == pytest.approx(expected, rel=1e-5)
