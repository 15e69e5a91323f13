"""Soft labels cut to m classes and one bucket for the rest, against float64 references and against all logits."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.stage1_ssld import data_config
from ssld.stage1_ssld.data.batch import View, collate
from ssld.stage1_ssld.data.soft_labels import SoftLabels, encode, missing_record, record_layout
from ssld.stage1_ssld.distillation import losses

Loss = Callable[[Tensor, Tensor], Tensor]
STORED = [name for name, loss in data_config.LOSSES.items() if loss.stored]
LOSSES: dict[str, Loss] = {name: getattr(losses, name) for name in STORED}


def logits(seed: int, images: int, classes: int, scale: float = 3.0) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed)) * scale


def stored(teacher_BK: Tensor, top: int, precision: str) -> SoftLabels:
    """The soft labels as a loader hands them over after they went through a store's records."""
    layout = record_layout(top, teacher_BK.shape[1], precision)
    records = np.frombuffer(encode(teacher_BK, top, layout).tobytes(), layout)
    pixels = torch.zeros(3, 1, 1, dtype=torch.uint8)
    soft = collate([View(pixels, 0, "", [], record) for record in records]).soft
    assert soft is not None
    return soft


def loss_and_gradient(loss: Loss, student_BK: Tensor, soft: SoftLabels) -> tuple[float, Tensor]:
    student_BK = student_BK.clone().requires_grad_()
    value = loss(soft.comparable(student_BK), soft.logits_BM)
    value.backward()
    assert student_BK.grad is not None
    return value.item(), student_BK.grad


def live(loss: Loss, student_BK: Tensor, teacher_BK: Tensor) -> tuple[float, Tensor]:
    student_BK = student_BK.clone().requires_grad_()
    value = loss(student_BK, teacher_BK)
    value.backward()
    assert student_BK.grad is not None
    return value.item(), student_BK.grad


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- float64 references: written from the definitions, one image at a time


def buckets(values_K: np.ndarray, kept: list[int]) -> np.ndarray:
    """Probabilities of the kept classes and of all others together."""
    probs = np.exp(values_K - values_K.max())
    probs /= probs.sum()
    rest = sum(probs[k] for k in range(len(probs)) if k not in kept)
    return np.array([*(probs[k] for k in kept), rest])


def reference(name: str, student_K: np.ndarray, teacher_K: np.ndarray, kept: list[int]) -> float:
    s, t = buckets(student_K, kept), buckets(teacher_K, kept)

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * np.log(a / b)).sum())

    match name:
        case "symmetric_kl":
            return 0.5 * (kl(t, s) + kl(s, t))
        case "kl":
            return kl(t, s)
        case "soft_cross_entropy":
            return float(-(t * np.log(s)).sum())
        case "jensen_shannon":
            return 0.5 * (kl(t, (s + t) / 2) + kl(s, (s + t) / 2))
    raise AssertionError(name)


@pytest.mark.parametrize("name", STORED)
def test_loss_and_gradient_are_those_of_the_definition(name: str) -> None:
    student, teacher = logits(1, 4, 7), logits(2, 4, 7)
    soft = stored(teacher, 3, "fp32")
    value, gradient = loss_and_gradient(LOSSES[name], student, soft)
    s, t = student.double().numpy(), teacher.double().numpy()
    kept = [list(np.argsort(-row)[:3]) for row in t]
    assert soft.classes_Bm is not None
    assert soft.classes_Bm.tolist() == kept
    assert soft.first_B.tolist() == [classes[0] for classes in kept]

    def total(values: np.ndarray) -> float:
        return sum(reference(name, a, b, k) for a, b, k in zip(values, t, kept, strict=True))

    assert value == pytest.approx(total(s), rel=1e-5)
    step = 1e-5
    for image, k in itertools.product(range(4), range(7)):
        high, low = s.copy(), s.copy()
        high[image, k] += step
        low[image, k] -= step
        assert gradient[image, k].item() == pytest.approx((total(high) - total(low)) / (2 * step), abs=2e-6)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_with_every_class_kept_it_is_the_live_teacher(name: str, precision: str, allowed: float) -> None:
    student, teacher = logits(3, 16, 100), logits(4, 16, 100)
    value, gradient = loss_and_gradient(LOSSES[name], student, stored(teacher, 100, precision))
    expected, expected_gradient = live(LOSSES[name], student, teacher)
    assert value == pytest.approx(expected, rel=allowed)
    assert distance(gradient, expected_gradient) < allowed


@pytest.mark.parametrize("name", sorted(set(STORED) - {"soft_cross_entropy"}))
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-6), ("fp16", 1e-5)])
def test_nothing_is_left_where_student_and_teacher_agree(name: str, precision: str, allowed: float) -> None:
    """A tail spread evenly would leave 0.14 to 0.84 nats an image."""
    teacher = logits(5, 16, 1000)
    value, gradient = loss_and_gradient(LOSSES[name], teacher, stored(teacher, 10, precision))
    assert abs(value) / 16 < allowed
    assert gradient.abs().max() < 30 * allowed


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("top", [2, 5])
def test_finite_where_probabilities_saturate(name: str, precision: str, top: int) -> None:
    student = torch.tensor([[1e4, -1e4, 0, 0, 0], [-1e4, 1e4, 1e4, 0, 0], [0.0] * 5])
    teacher = torch.tensor([[-1e4, 1e4, 0, 0, 0], [1e4, -1e4, 0, 0, 0], [1e4, 0, 0, 0, -1e4]])
    value, gradient = loss_and_gradient(LOSSES[name], student, stored(teacher, top, precision))
    assert np.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_ten_of_a_thousand_classes_give_nearly_the_live_gradient() -> None:
    """The gap at m = 10. A teacher that is sure of itself (80 % in the first class on average) and an untrained student, and one half way."""
    teacher = logits(6, 256, 1000, scale=1.0)
    teacher[:, 0] += 9
    assert 0.75 < teacher.softmax(-1).amax(-1).mean() < 0.9
    for student in (logits(7, 256, 1000, 0.1), 0.5 * teacher + logits(8, 256, 1000, 0.3)):
        value, gradient = loss_and_gradient(losses.symmetric_kl, student, stored(teacher, 10, "fp16"))
        expected, expected_gradient = live(losses.symmetric_kl, student, teacher)
        assert torch.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.998
        assert 0.9 * expected < value < expected  # coarser distributions are never further apart


def test_a_student_in_bf16_is_compared_in_float32() -> None:
    student, teacher = logits(9, 4, 20).bfloat16(), logits(10, 4, 20)
    soft = stored(teacher, 3, "fp32")
    compared = soft.comparable(student)
    assert compared.dtype == torch.float32
    torch.testing.assert_close(compared, soft.comparable(student.float()))
    torch.testing.assert_close(compared.exp().sum(-1), torch.ones(4))


# ---- records


@pytest.mark.parametrize(
    ("top", "classes", "precision", "size"),
    [(10, 1000, "fp16", 44), (10, 1000, "fp32", 64), (10, 65_536, "fp16", 44), (10, 65_537, "fp16", 64)],
)
def test_size_of_a_record(top: int, classes: int, precision: str, size: int) -> None:
    assert record_layout(top, classes, precision).itemsize == size


def test_records_hold_the_likeliest_classes_and_the_rest() -> None:
    teacher = logits(11, 5, 30)
    records = encode(teacher, 4, record_layout(4, 30, "fp32"))
    values = teacher.double().numpy()
    log_probs = values - np.log(np.exp(values).sum(-1, keepdims=True))
    order = np.argsort(-values, axis=-1)
    np.testing.assert_array_equal(records["classes"], order[:, :4])
    np.testing.assert_allclose(records["log_probs"], np.take_along_axis(log_probs, order, -1)[:, :4], rtol=1e-5)
    rest = np.log(np.exp(np.take_along_axis(log_probs, order, -1)[:, 4:]).sum(-1))
    np.testing.assert_allclose(records["rest"], rest, rtol=1e-5)


def test_the_rest_is_exact_where_the_first_class_has_nearly_everything() -> None:
    """1 - p would be 0 in float32."""
    teacher = torch.zeros(1, 1000)
    teacher[0, 7] = 60
    records = encode(teacher, 1, record_layout(1, 1000, "fp16"))
    assert records["rest"][0] == pytest.approx(np.log(999) - 60, rel=1e-5)


def test_no_rest_where_every_class_is_kept() -> None:
    assert np.isneginf(encode(logits(12, 2, 6), 6, record_layout(6, 6, "fp16"))["rest"]).all()


def test_class_numbers_above_16_bits() -> None:
    teacher = torch.zeros(1, 70_000)
    teacher[0, 69_999] = 9
    records = encode(teacher, 1, record_layout(1, 70_000, "fp16"))
    assert records["classes"].tolist() == [[69_999]]


def test_log_probabilities_beyond_fp16_are_cut() -> None:
    records = encode(torch.tensor([[1e5, -1e5]]), 2, record_layout(2, 2, "fp16"))
    assert records["log_probs"].tolist() == [[0, -60_000]]


def test_missing_soft_labels_are_told_from_any_other() -> None:
    layout = record_layout(2, 5, "fp16")
    assert np.isnan(missing_record(layout)["rest"])
    assert not np.isnan(encode(logits(13, 4, 5), 2, layout)["rest"]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    teacher: Any = logits(14, 2, 5)
    teacher[1, 3] = value
    with pytest.raises(UserError, match=r"^teacher: its logits are not finite; set teacher\.precision: fp32"):
        encode(teacher, 2, record_layout(2, 5, "fp16"))


def test_encoding_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy to the host for each batch, which holds everything; values that are read one by one would be further waits."""
    copies: list[tuple[int, ...]] = []
    copy = Tensor.cpu

    def counted(self: Tensor) -> Tensor:
        copies.append(tuple(self.shape))
        return copy(self)

    monkeypatch.setattr(Tensor, "cpu", counted)
    encode(torch.randn(6, 20), 4, record_layout(4, 20, "fp16"))
    assert copies == [(6, 1 + 1 + 4 + 4)]
