"""Distillation losses of feature maps and of RoIs against float64 NumPy, values and gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.distillation.losses import channel_wise, inside_maps, pkd, roi_kd

SIZES = torch.tensor([[60, 96], [64, 33]])


def maps(seed: int, channels: int = 5) -> Tensor:
    """Maps of stride 8 for two images padded to 64 x 96, with an offset and a scale of their own in each channel."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, channels, 8, 12, generator=generator)
    scale = torch.rand(1, channels, 1, 1, generator=generator) * 5 + 0.1
    return noise * scale + torch.randn(1, channels, 1, 1, generator=generator)


def inside() -> Tensor:
    return inside_maps(SIZES, maps(0), 8)


def by_channel(maps_BCHW: Tensor) -> np.ndarray:
    """float64 [C, pixels inside]."""
    mask = inside().numpy()
    return maps_BCHW.detach().double().numpy().transpose(1, 0, 2, 3)[:, mask]


def correlation(student: Tensor, teacher: Tensor) -> np.ndarray:
    return np.array([np.corrcoef(s, t)[0, 1] for s, t in zip(by_channel(student), by_channel(teacher), strict=True)])


def test_a_cell_is_inside_where_it_begins_in_the_image() -> None:
    first, second = inside()
    assert first.shape == (8, 12)
    assert first.all()  # 60 rows: the last cell, from 56, sees padding in its second half
    assert second.sum() == 8 * 5  # 33 columns: cells from 0, 8, 16, 24, 32
    assert second[:, :5].all()
    exact = inside_maps(torch.tensor([[16, 24]]), torch.zeros(1, 1, 8, 12), 8)
    assert exact.sum() == 2 * 3


def test_pkd_is_one_minus_pearson() -> None:
    student, teacher = maps(1), maps(2) + 0.7 * maps(1)
    expected = (1 - correlation(student, teacher)).mean()
    assert pkd(student, teacher, inside()).item() == pytest.approx(expected, rel=1e-6)
    assert 0.2 < expected < 1


def test_pkd_gradient() -> None:
    """d(1 - r)/dx = (r x' - y') / (n sd) with x', y' normalized; zero outside the images."""
    student, teacher = maps(1).requires_grad_(), maps(2) + 0.7 * maps(1)
    pkd(student, teacher, inside()).backward()
    assert student.grad is not None
    x, y = by_channel(student), by_channel(teacher)
    sd = x.std(1, keepdims=True)
    x, y = (x - x.mean(1, keepdims=True)) / sd, (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
    r = (x * y).mean(1, keepdims=True)
    expected = (r * x - y) / (sd * x.shape[1] * len(x))
    np.testing.assert_allclose(by_channel(student.grad), expected, rtol=2e-4, atol=2e-8)
    outside_BCHW = student.grad * ~inside()[:, None]
    assert (outside_BCHW == 0).all()


def test_pkd_sees_neither_scale_nor_offset_nor_padding() -> None:
    student, teacher = maps(1), maps(2)
    value = pkd(student, teacher, inside())
    torch.testing.assert_close(pkd(3 * student - 2, 0.1 * teacher + 5, inside()), value, rtol=1e-4, atol=0)
    padding = ~inside()[:, None]
    assert padding.any()
    torch.testing.assert_close(pkd(student.masked_fill(padding, 1e4), teacher, inside()), value, rtol=0, atol=0)
    assert pkd(student, 2 * student + 1, inside()).item() == pytest.approx(0, abs=1e-6)
    assert pkd(student, -student, inside()).item() == pytest.approx(2, abs=1e-5)


def test_pkd_of_constant_channels_and_of_a_single_pixel() -> None:
    flat = torch.full((2, 5, 8, 12), 0.3, requires_grad=True)
    value = pkd(flat, maps(2), inside())
    assert value.item() == pytest.approx(0.5, abs=1e-4)
    value.backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()
    one = inside_maps(torch.tensor([[32, 32]]), torch.zeros(1, 1, 1, 1), 32)
    single = torch.randn(1, 5, 1, 1, requires_grad=True)
    value = pkd(single, torch.randn(1, 5, 1, 1), one)
    value.backward()
    assert value.item() == 0
    assert single.grad is not None
    assert (single.grad == 0).all()


def test_pkd_in_bf16_is_that_of_the_rounded_maps_in_float32() -> None:
    student, teacher = maps(1).bfloat16(), maps(2).bfloat16()
    value = pkd(student, teacher, inside())
    assert value.dtype == torch.float32
    assert torch.equal(value, pkd(student.float(), teacher.float(), inside()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_roi_kd(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(7, 4, generator=generator) for _ in range(2))
    student.requires_grad_()
    valid = torch.tensor([True, False, True, True, False, True, True])
    value = roi_kd(student, teacher, valid, temperature)
    value.backward()

    def log_softmax(logits: Tensor) -> np.ndarray:
        z = logits.detach().double().numpy() / temperature
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    log_s, log_t = log_softmax(student), log_softmax(teacher)
    s, t = np.exp(log_s), np.exp(log_t)
    forward, reverse = (t * (log_t - log_s)).sum(1), (s * (log_s - log_t)).sum(1)
    expected = temperature**2 * 0.5 * (forward + reverse)
    assert value.item() == pytest.approx(expected[valid].sum(), rel=1e-5)
    gradient = temperature * 0.5 * ((s - t) + s * (log_s - log_t - reverse[:, None]))
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), gradient * valid.numpy()[:, None], rtol=1e-4, atol=1e-6)


def test_roi_kd_of_no_valid_region_is_zero_with_a_gradient() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    value = roi_kd(student, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


# CWD


def cwd_by_hand(student_BPD: np.ndarray, teacher_BPD: np.ndarray, inside_BP: np.ndarray, temperature: float) -> float:
    """arXiv 2011.13256, equations 3 to 5, one channel of one image at a time."""
    values = []
    for student_PD, teacher_PD, inside_P in zip(student_BPD, teacher_BPD, inside_BP, strict=True):
        for s, t in zip(student_PD[inside_P].T / temperature, teacher_PD[inside_P].T / temperature, strict=True):
            p, q = (np.exp(x) / np.exp(x).sum() for x in (s, t))
            values.append(temperature**2 * (q * np.log(q / p)).sum())
    return float(np.mean(values))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_divergence_over_the_positions_of_a_channel(temperature: float) -> None:
    student, teacher = (maps(seed).flatten(2).mT.double() for seed in (0, 1))
    mask = inside().flatten(1)
    expected = cwd_by_hand(student.numpy(), teacher.numpy(), mask.numpy(), temperature)
    student.requires_grad_(True)
    value = channel_wise(student, teacher, mask, temperature)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    # The gradient of KL by the logits is T * (p - q), divided by the number of channels and images.
    p, q = ((x.detach() / temperature).masked_fill(~mask[:, :, None], -np.inf).softmax(1) for x in (student, teacher))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, temperature * (p - q) / 10, rtol=1e-4, atol=1e-8)


def test_cwd_sees_no_offset_and_no_padding() -> None:
    student, teacher = (maps(seed).flatten(2).mT for seed in (0, 1))
    mask = inside().flatten(1)
    value = channel_wise(student, teacher, mask)
    torch.testing.assert_close(channel_wise(student + 3, teacher - 2, mask), value, rtol=1e-4, atol=0)
    padding = ~mask[:, :, None]
    torch.testing.assert_close(channel_wise(student.masked_fill(padding, 1e4), teacher, mask), value, rtol=0, atol=0)
    assert channel_wise(student, student + 1, mask).item() == pytest.approx(0, abs=1e-5)
