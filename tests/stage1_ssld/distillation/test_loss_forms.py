"""Every loss against its definition in float64 NumPy, written from the papers; gradients against central differences of that definition."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.stage1_ssld.distillation import losses

Loss = Callable[[Tensor, Tensor], Tensor]
Form = Callable[[np.ndarray, np.ndarray], float]
IMAGES, CLASSES = 6, 9


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    result: np.ndarray = z - np.log(np.exp(z).sum(1, keepdims=True))
    return result


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p||q), rows summed."""
    return float(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0).sum())


def softmax(z: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.exp(log_softmax(z))
    return result


def kl_form(temperature: float) -> Form:
    return lambda s, t: temperature**2 * divergence(softmax(t / temperature), softmax(s / temperature))


def cross_entropy_form(s: np.ndarray, t: np.ndarray) -> float:
    return float(-(softmax(t) * log_softmax(s)).sum())


def jensen_shannon_form(s: np.ndarray, t: np.ndarray) -> float:
    middle = (softmax(s) + softmax(t)) / 2
    return (divergence(softmax(t), middle) + divergence(softmax(s), middle)) / 2


def dist_form(beta: float, gamma: float) -> Form:
    def form(s: np.ndarray, t: np.ndarray) -> float:
        p, q = softmax(s), softmax(t)
        rows = [1 - np.corrcoef(p[image], q[image])[0, 1] for image in range(len(p))]
        columns = [1 - np.corrcoef(p[:, label], q[:, label])[0, 1] for label in range(p.shape[1])]
        return float(len(p) * (beta * np.mean(rows) + gamma * np.mean(columns)))

    return form


def decoupled_form(alpha: float, beta: float, temperature: float) -> Form:
    def form(s: np.ndarray, t: np.ndarray) -> float:
        total = 0.0
        for p, q in zip(softmax(s / temperature), softmax(t / temperature), strict=True):
            target = q.argmax()
            two_p, two_q = np.array([p[target], 1 - p[target]]), np.array([q[target], 1 - q[target]])
            rest_p, rest_q = np.delete(p, target), np.delete(q, target)
            total += alpha * divergence(two_q, two_p)
            total += beta * divergence(rest_q / rest_q.sum(), rest_p / rest_p.sum())
        return temperature**2 * total

    return form


def bernoulli_form(s: np.ndarray, t: np.ndarray) -> float:
    p, q = 1 / (1 + np.exp(-s)), 1 / (1 + np.exp(-t))
    return divergence(q, p) + divergence(1 - q, 1 - p)


def cosine_form(s: np.ndarray, t: np.ndarray) -> float:
    return float(sum(1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(s, t, strict=True)))


def smooth_l1_form(s: np.ndarray, t: np.ndarray) -> float:
    away = np.abs(s - t)
    return float(np.where(away < 1, away**2 / 2, away - 0.5).mean(1).sum())


def cells(z: Tensor) -> Tensor:
    """[B,N,D] of 3 cells and 3 dimensions."""
    return z.unflatten(1, (3, 3))


def standardized(form: Form) -> Form:
    def apply(z: np.ndarray) -> np.ndarray:
        result: np.ndarray = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)
        return result

    return lambda s, t: form(apply(s), apply(t))


def entropy_form(z: np.ndarray, _: np.ndarray) -> float:
    return float(-(softmax(z) * log_softmax(z)).sum())


CASES: dict[str, tuple[Loss, Form]] = {
    "kl at 4": (lambda s, t: losses.kl(s, t, temperature=4.0), kl_form(4.0)),
    "soft_cross_entropy": (losses.soft_cross_entropy, cross_entropy_form),
    "jensen_shannon": (losses.jensen_shannon, jensen_shannon_form),
    "dist": (losses.dist, dist_form(1.0, 1.0)),
    "dist, weighted": (lambda s, t: losses.dist(s, t, beta=0.5, gamma=2.0), dist_form(0.5, 2.0)),
    "decoupled_kd": (losses.decoupled_kd, decoupled_form(1.0, 1.0, 1.0)),
    "decoupled_kd at 4": (lambda s, t: losses.decoupled_kd(s, t, 1.0, 8.0, 4.0), decoupled_form(1.0, 8.0, 4.0)),
    "decoupled_kd, alpha": (lambda s, t: losses.decoupled_kd(s, t, alpha=3.0, beta=0.0), decoupled_form(3.0, 0.0, 1.0)),
    "bernoulli_kl": (losses.bernoulli_kl, bernoulli_form),
    "pooled": (losses.pooled, cosine_form),
    "entropy": (lambda s, t: losses.entropy(s), entropy_form),
    "spatial": (lambda s, t: losses.spatial(cells(s), cells(t)), smooth_l1_form),
    "standardized kl": (
        lambda s, t: losses.kl(losses.standardize_logits(s), losses.standardize_logits(t), 2.0),
        standardized(kl_form(2.0)),
    ),
}
PLAIN: list[Loss] = [losses.symmetric_kl, losses.kl, losses.jensen_shannon, losses.dist, losses.decoupled_kd]
PLAIN.append(losses.bernoulli_kl)
FEATURES: list[Loss] = [losses.pooled, lambda s, t: losses.spatial(cells(s), cells(t))]


def logits(scale: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    s, t = scale * np.random.default_rng(seed).standard_normal((2, IMAGES, CLASSES))
    return s.astype(np.float32).astype(np.float64), t.astype(np.float32).astype(np.float64)


def value_and_gradient(loss: Loss, s: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray]:
    student = torch.from_numpy(s).float().requires_grad_()
    value = loss(student, torch.from_numpy(t).float())
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad is not None
    return value.item(), student.grad.double().numpy()


def slope(form: Form, s: np.ndarray, t: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences; the error is about step squared, 1e-10."""
    gradient = np.zeros_like(s)
    for place in np.ndindex(*s.shape):
        up, down = s.copy(), s.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (form(up, t) - form(down, t)) / (2 * step)
    return gradient


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str, scale: float) -> None:
    loss, form = CASES[name]
    s, t = logits(scale)
    value, gradient = value_and_gradient(loss, s, t)
    assert value == pytest.approx(form(s, t), rel=2e-5, abs=1e-6)
    expected = slope(form, s, t)
    assert np.abs(expected).max() > 1e-3
    # Correlations divide by deviations: float32's rounding of a probability near 1 counts more there.
    rough = 10 if name.startswith("dist") else 1
    np.testing.assert_allclose(gradient, expected, rtol=2e-4 * rough, atol=2e-6 * rough * np.abs(expected).max())


@pytest.mark.parametrize("loss", [*PLAIN, *FEATURES], ids=lambda loss: loss.__name__)
def test_zero_and_flat_at_equality(loss: Loss) -> None:
    _, t = logits(3.0, seed=5)
    value, gradient = value_and_gradient(loss, t, t)
    assert value == pytest.approx(0, abs=5e-6)
    assert np.abs(gradient).max() < 2e-6
    assert loss(*(torch.from_numpy(z).float() for z in logits(3.0, seed=6))).item() > 0.1


@pytest.mark.parametrize("loss", [*PLAIN, losses.soft_cross_entropy], ids=lambda loss: loss.__name__)
def test_finite_at_saturation(loss: Loss) -> None:
    sure = np.array([[1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 1e4, -1e4], [1e4, 1e4, 1e4, 1e4], [0.0, -1e4, 0.0, 0.0]])
    for s, t in ((sure, sure[:, ::-1].copy()), (sure, sure), (sure, np.zeros_like(sure)), (np.zeros_like(sure), sure)):
        value, gradient = value_and_gradient(loss, s, t)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_values_at_saturation() -> None:
    s, t = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([[-1e4, 1e4, -1e4]])
    assert losses.jensen_shannon(s, t).item() == pytest.approx(np.log(2), rel=1e-6)
    assert losses.soft_cross_entropy(s, t).item() == pytest.approx(2e4, rel=1e-6)
    assert losses.kl(s, t, temperature=100.0).item() == pytest.approx(100**2 * 200, rel=1e-6)
    assert losses.bernoulli_kl(s, t).item() == pytest.approx(2e4, rel=1e-6)
    # Target class: 2e4 away from it; among the other two the student is as sure of the first as the teacher is in doubt.
    assert losses.decoupled_kd(s, t, beta=0.0).item() == pytest.approx(2e4, rel=1e-6)
    assert losses.decoupled_kd(s, t, alpha=0.0).item() == pytest.approx(0.5 * 2e4 - np.log(2), rel=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    a, b = (torch.from_numpy(z).float() for z in logits(20.0, seed=2))
    assert losses.jensen_shannon(a, b).item() == pytest.approx(losses.jensen_shannon(b, a).item(), rel=1e-6)
    assert 0 < losses.jensen_shannon(a, b).item() <= IMAGES * np.log(2)


def test_decoupled_parts_make_up_the_kl_divergence() -> None:
    """KL = TCKD + (1 - p_target) * NCKD for every image (equation 6 of the paper)."""
    s, t = (torch.from_numpy(z).float() for z in logits(2.0, seed=3))
    for row_s, row_t in zip(s[:, None], t[:, None], strict=True):
        rest = 1 - row_t.softmax(-1).max().item()
        assert losses.decoupled_kd(row_s, row_t, 1.0, rest).item() == pytest.approx(
            losses.kl(row_s, row_t).item(), rel=1e-4
        )


def test_dist_sees_the_whole_batch() -> None:
    """Twice the same batch is twice the loss; parts of a batch are not the whole: the correlations over the images are of the batch."""
    s, t = (torch.from_numpy(z).float() for z in logits(2.0, seed=4))
    whole = losses.dist(s, t).item()
    assert losses.dist(torch.cat([s, s]), torch.cat([t, t])).item() == pytest.approx(2 * whole, rel=1e-5)
    assert losses.dist(s[:3], t[:3]).item() + losses.dist(s[3:], t[3:]).item() != pytest.approx(whole, rel=1e-2)
    rows = losses.dist(s, t, gamma=0.0).item()
    assert losses.dist(s[:3], t[:3], gamma=0.0).item() + losses.dist(s[3:], t[3:], gamma=0.0).item() == pytest.approx(
        rows, rel=1e-5
    )


def test_standardized_logits_forget_shift_and_scale() -> None:
    z = torch.from_numpy(logits(2.0)[0]).float()
    standard = losses.standardize_logits(z)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(IMAGES), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.var(-1, unbiased=True), torch.ones(IMAGES))
    torch.testing.assert_close(losses.standardize_logits(7 * z - 3), standard, atol=1e-5, rtol=1e-5)
    flat = torch.zeros(2, 5, requires_grad=True)
    losses.standardize_logits(flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


BUCKET_LOSSES: dict[str, tuple[Loss, Callable[[np.ndarray, np.ndarray], float]]] = {
    "symmetric_kl": (losses.symmetric_kl, lambda p, q: (divergence(p, q) + divergence(q, p)) / 2),
    "kl": (losses.kl, lambda p, q: divergence(q, p)),
    "soft_cross_entropy": (losses.soft_cross_entropy, lambda p, q: float(-(q * np.log(p)).sum())),
    "jensen_shannon": (losses.jensen_shannon, lambda p, q: (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2),
}  # fmt: skip


@pytest.mark.parametrize("name", BUCKET_LOSSES)
def test_log_probabilities_over_buckets(name: str) -> None:
    """Three classes on their own and one bucket for the other six: the same losses, of four probabilities."""
    loss, form = BUCKET_LOSSES[name]
    s, t = logits(2.0, seed=8)

    def merged(z: np.ndarray) -> np.ndarray:
        p = softmax(z)
        return np.concatenate([p[:, :3], p[:, 3:].sum(1, keepdims=True)], axis=1)

    def of_logits(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = student.log_softmax(-1)
        return loss(torch.cat([log_p[:, :3], log_p[:, 3:].logsumexp(-1, keepdim=True)], -1), teacher)

    value, gradient = value_and_gradient(of_logits, s, np.log(merged(t)))
    assert value == pytest.approx(form(merged(s), merged(t)), rel=1e-5)
    expected = slope(lambda a, b: form(merged(a), merged(b)), s, t)
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("loss", [*PLAIN, losses.soft_cross_entropy], ids=lambda loss: loss.__name__)
def test_half_precision_logits_are_judged_in_float32(loss: Loss) -> None:
    s, t = (torch.from_numpy(z).bfloat16() for z in logits(5.0, seed=9))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(s.float(), t.float()), rtol=1e-6, atol=0)
