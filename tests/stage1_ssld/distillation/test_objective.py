"""The objective: terms by name and weight, human labels where they count, and the warning about a first loss that cannot be."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.mixing import Mixed, mix_batch
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data_config import LOSSES, DataConfig, LossConfig
from ssld.stage1_ssld.distillation import losses
from ssld.stage1_ssld.distillation.objective import (
    Objective,
    cross_entropy,
    evaluate_term,
    implausible_start,
    statistics_warning,
)

ALL = ("symmetric_kl", "kl", "soft_cross_entropy", "jensen_shannon", "dist", "decoupled_kd", "bernoulli_kl")


def test_every_row_of_the_table_has_its_function() -> None:
    """Names, settings and what is compared, read off the functions of losses.py."""
    assert {name for name, loss in LOSSES.items() if loss.compares == "logits"} == set(ALL)
    for name, loss in LOSSES.items():
        parameters = inspect.signature(getattr(losses, name)).parameters
        assert set(loss.settings) <= set(parameters)
        first = next(iter(parameters))
        assert first == {"logits": "student_logits_BK", "pooled": "student_BD", "spatial": "student_BND"}[loss.compares]


def logits(images: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(images, classes, generator=generator) * 2 for _ in range(2))
    return student, teacher


def hard_loss(z: Tensor, labels: list[int]) -> np.ndarray:
    """-log softmax at the label of each image, in float64."""
    z64 = z.double().numpy()
    log_p = z64 - np.log(np.exp(z64).sum(1, keepdims=True))
    return np.array([-log_p[image, label] for image, label in enumerate(labels)])


@pytest.mark.parametrize("name", ALL)
def test_a_term_alone_is_the_loss_of_that_name(name: str) -> None:
    student, teacher = logits()
    parts = Objective([LossConfig.model_validate(name)], 0.0)(student, SoftLabels(teacher), torch.zeros(5).long())
    assert list(parts) == ["loss"]
    torch.testing.assert_close(parts["loss"], getattr(losses, name)(student, teacher))
    assert parts["loss"].item() > 0


def test_settings_of_a_term() -> None:
    student, teacher = logits()
    config = LossConfig(name="kl", temperature=3.0, standardize=True)
    a, b = losses.standardize_logits(student), losses.standardize_logits(teacher)
    torch.testing.assert_close(evaluate_term(config, student, teacher), losses.kl(a, b, 3.0))
    config = LossConfig(name="decoupled_kd", temperature=3.0, beta=8.0)
    expected = losses.decoupled_kd(student, teacher, alpha=1.0, beta=8.0, temperature=3.0)
    torch.testing.assert_close(evaluate_term(config, student, teacher), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dist", "beta": 2.0}, "dist has no beta; leave it at 1, or use decoupled_kd"),
        ({"name": "dist", "temperature": 2.0}, "dist has no temperature; leave it at 1, or use kl or decoupled_kd"),
    ],
)
def test_settings_that_a_term_does_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig.model_validate(settings)


def test_several_terms_by_name_and_weight() -> None:
    student, teacher = logits()
    labels = torch.tensor([0, 3, NO_LABEL, 1, NO_LABEL])
    terms = [
        LossConfig(name="symmetric_kl", weight=0.5),
        LossConfig(name="kl", temperature=4.0, weight=2.0),
        LossConfig(name="kl"),
    ]
    parts = Objective(terms, 0.25)(student, SoftLabels(teacher), labels)
    assert list(parts) == ["loss", "symmetric_kl", "kl", "kl_2", "cross_entropy"]
    hard = hard_loss(student[[0, 1, 3]], [0, 3, 1]).sum()
    assert parts["cross_entropy"].item() == pytest.approx(hard, rel=1e-5)
    symmetric = losses.symmetric_kl(student, teacher).item()
    hot, cold = losses.kl(student, teacher, 4.0).item(), losses.kl(student, teacher).item()
    assert parts["kl"].item() == pytest.approx(hot, rel=1e-5)
    assert parts["kl_2"].item() == pytest.approx(cold, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(0.5 * symmetric + 2 * hot + cold + 0.25 * hard, rel=1e-5)


def test_no_label_no_gradient() -> None:
    student, teacher = logits()
    student.requires_grad_()
    labels = torch.tensor([NO_LABEL, 3, NO_LABEL, 1, NO_LABEL])
    Objective([], 1.0)(student, None, labels)["loss"].backward()
    assert student.grad is not None
    p = student.detach().double().softmax(-1)
    expected = p - torch.nn.functional.one_hot(labels.clamp(min=0), 4)
    expected[[0, 2, 4]] = 0
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-6)
    # and by default a label is not even looked at: SSLD learns from the teacher alone
    one = Objective([LossConfig(name="symmetric_kl")], 0.0)(student, SoftLabels(teacher), labels)["loss"]
    other = Objective([LossConfig(name="symmetric_kl")], 0.0)(student, SoftLabels(teacher), labels * 0 + 99)["loss"]
    assert one.item() == other.item()


def test_a_mixed_image_has_both_labels_by_their_shares() -> None:
    student, _ = logits()
    labels = torch.tensor([0, 3, NO_LABEL, 1, 2])
    partners, shares = torch.tensor([1, 2, 0, 3, 4]), torch.tensor([0.75, 0.5, 0.25, 1.0, 0.0])
    value = cross_entropy(student, labels, Mixed(torch.empty(0), partners, shares))
    own, partner = hard_loss(student, [0, 3, 0, 1, 2]), hard_loss(student, [3, 0, 0, 1, 2])
    own[2], partner[1] = 0, 0  # without a label
    expected = (shares.numpy() * own + (1 - shares.numpy()) * partner).sum()
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits() -> None:
    student, teacher = (z.bfloat16() for z in logits())
    labels = torch.tensor([0, 3, NO_LABEL, 1, 2])
    parts = Objective([LossConfig(name="kl")], 1.0)(student, SoftLabels(teacher), labels)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    exact = Objective([LossConfig(name="kl")], 1.0)(student.float(), SoftLabels(teacher.float()), labels)
    torch.testing.assert_close(parts, exact)


class Waits(TorchDispatchMode):
    """Collects the operators that a host waits for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.result: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2"):
            self.result.add(name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    student, teacher = logits()
    student.requires_grad_()
    labels = torch.tensor([0, 3, NO_LABEL, 1, 2])
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    data = DataConfig.model_validate({"train": ["x"], "mixup": 1.0, "cutmix": 1.0})
    objective = Objective([LossConfig.model_validate(name) for name in ALL], 1.0)
    with Waits() as waits:
        for seed in range(4):
            objective(student, SoftLabels(teacher), labels, mix_batch(pixels, data, seed))["loss"].backward()
    assert waits.result == set()
    with Waits() as waits:
        assert student[labels >= 0].sum().item() != 0
    assert waits.result >= {"index", "_local_scalar_dense"}  # the collector does collect


@pytest.mark.parametrize("name", ALL)
def test_an_untrained_student_is_plausible(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(32, 100, generator=generator) * scale for scale in (0.3, 4.0))
    objective = Objective([LossConfig.model_validate(name)], 0.5)
    labels, nothing = torch.arange(32), torch.zeros(32, 100)
    loss = objective(student, SoftLabels(teacher), labels)["loss"]
    uniform = objective(nothing, SoftLabels(teacher), labels)["loss"]
    assert implausible_start(loss, uniform, 32) is None


def test_a_sure_student_in_another_order_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 100, generator=generator) * 6
    student, nothing = teacher.flip(-1), torch.zeros(32, 100)
    objective, labels = Objective([LossConfig(name="symmetric_kl")], 0.0), torch.zeros(32).long()
    loss = objective(student, SoftLabels(teacher), labels)["loss"]
    uniform = objective(nothing, SoftLabels(teacher), labels)["loss"]
    warning = implausible_start(loss, uniform, 32)
    assert warning is not None
    assert "\n" not in warning
    assert warning.startswith(
        f"warning: the first loss is {loss.item() / 32:.3g} per image, a student with uniform predictions has "
        f"{uniform.item() / 32:.3g}: before any training the student is confident in classes that the teacher rules out. Check that"
    )
    for what in (
        "starts from the intended weights",
        "classes are in the teacher's order",
        "the teacher (or the store)",
    ):
        assert what in warning


@pytest.mark.parametrize(
    ("loss", "uniform", "fine"),
    [
        (9.0, 10.0, True),
        (14.9, 10.0, True),
        (15.1, 10.0, False),
        (0.9, 0.1, True),  # a near-uniform teacher: below a nat the ratio is meaningless
        (1.1, 0.1, False),
        (-0.0001, 0.1, True),  # rounding, where student and teacher are the same network
        (-0.1, 0.1, False),
        (float("nan"), 1.0, False),
        (float("inf"), 1.0, False),
    ],
)
def test_limits_of_the_plausible(loss: float, uniform: float, fine: bool) -> None:
    warning = implausible_start(torch.tensor(loss * 8), torch.tensor(uniform * 8), 8)
    assert (warning is None) == fine


@pytest.mark.parametrize(
    ("agreement", "share", "warns"), [(0.049, 0.81, True), (0.05, 0.81, False), (0.049, 0.8, False)]
)
def test_limits_of_the_warning_about_batch_statistics(agreement: float, share: float, warns: bool) -> None:
    values = {"agreement": agreement, "student_entropy": share * math.log(100)}
    warning = statistics_warning(values, 100)
    assert (warning is not None) == warns
    if warning:
        assert warning.startswith("warning: ")
        assert "4.9 % of the first images" in warning
        assert "student.batchnorm: eval keeps the running statistics" in warning
    assert statistics_warning({}, 100) is None  # feature losses alone
