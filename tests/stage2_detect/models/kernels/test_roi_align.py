"""RoIAlign on the CPU against torchvision's kernel and float64, pooling in both ways, and the switch between them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from ssld.stage2_detect.models import kernels, pooling
from ssld.stage2_detect.models.kernels import roi_align as module
from ssld.stage2_detect.models.kernels.roi_align import pool_by_level, roi_align


def _map(channels: int = 5) -> Tensor:
    return torch.randn(2, channels, 20, 30, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


def _rois(count: int = 70) -> Tensor:
    """Of the map at scale 1/4 (120 x 80), many reaching over its border; the first ones are degenerate."""
    random = torch.Generator().manual_seed(1)
    center = torch.rand(count, 2, generator=random) * torch.tensor([140.0, 100.0]) - 10
    half = torch.rand(count, 2, generator=random).square() * 60
    rois = torch.cat(((torch.arange(count) % 2)[:, None].float(), center - half, center + half), dim=1)
    rois[0, 1:] = 0  # empty
    rois[1, 1:] = torch.tensor([300.0, 300.0, 320.0, 320.0])  # outside
    rois[2, 1:] = torch.tensor([50.0, 50.0, 40.0, 40.0])  # inside out
    rois[3, 1:] = torch.tensor([0.0, 0.0, 120.0, 80.0])  # everything
    rois[4, 1:] = torch.tensor([-1e6, -1e6, -1e6, -1e6])
    return rois


def _bilinear(map_HW: np.ndarray, y: float, x: float) -> float:
    """As Detectron2 and torchvision define it: border values up to a pixel outside, 0 farther out."""
    H, W = map_HW.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return 0.0
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    top, left = min(int(y), H - 2), min(int(x), W - 2)
    down, right = y - top, x - left
    square = map_HW[top : top + 2, left : left + 2]
    return float(np.array([1 - down, down]) @ square @ np.array([1 - right, right]))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_values_and_gradients_are_torchvisions(ratio: int, aligned: bool) -> None:
    feature, rois = _map().requires_grad_(), _rois()
    actual = roi_align(feature, rois, 7, 1 / 4, sampling_ratio=ratio, aligned=aligned)
    reference = torchvision_roi_align(feature, rois, 7, 1 / 4, ratio, aligned)
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=2e-6)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    (our_slope,) = torch.autograd.grad((actual * weight).sum(), feature)
    (their_slope,) = torch.autograd.grad((reference * weight).sum(), feature)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-4, atol=2e-5)


def test_values_are_those_of_the_definition() -> None:
    """Sample by sample in float64, with as many samples as pixels, aligned."""
    feature, rois = _map(1), _rois(12)
    actual = roi_align(feature, rois, 3, 1 / 4)[:, 0].double().numpy()
    for (image, *corners), pooled in zip(rois.double().numpy(), actual, strict=True):
        x1, y1, x2, y2 = (corner / 4 - 0.5 for corner in corners)
        height, width = (y2 - y1) / 3, (x2 - x1) / 3
        down, right = max(int(np.ceil(height)), 0), max(int(np.ceil(width)), 0)
        for row in range(3):
            for column in range(3):
                samples = [
                    _bilinear(
                        feature[int(image), 0].double().numpy(),
                        y1 + (row + (i + 0.5) / down) * height,
                        x1 + (column + (j + 0.5) / right) * width,
                    )
                    for i in range(down)
                    for j in range(right)
                ]
                expected = float(np.mean(samples)) if samples else 0.0
                assert pooled[row, column] == pytest.approx(expected, abs=1e-5)


def test_gradient_in_float64() -> None:
    feature = _map(2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: roi_align(f, _rois(8), 2, 1 / 4), feature, fast_mode=True)


def test_memory_format_chunks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rois, threads = _rois(), torch.get_num_threads()

    def both(feature: Tensor) -> tuple[Tensor, Tensor]:
        feature = feature.requires_grad_()
        pooled = roi_align(feature, rois, 7, 1 / 4)
        (slope,) = torch.autograd.grad(pooled.square().sum(), feature)
        return pooled, slope

    expected = both(_map())
    results = [both(_map().contiguous())]
    monkeypatch.setattr(module, "_CHUNK", 16)
    results.append(both(_map()))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        results.append(both(_map()))
    finally:
        torch.set_num_threads(threads)
    for pooled, slope in results:
        assert torch.equal(pooled, expected[0])
        assert torch.equal(slope, expected[1])


def test_no_rois() -> None:
    feature = _map().requires_grad_()
    pooled = roi_align(feature, torch.zeros(0, 5), 7, 1 / 4)
    assert pooled.shape == (0, 5, 7, 7)
    (slope,) = torch.autograd.grad(pooled.sum(), feature)
    assert (slope == 0).all()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_pooling_in_the_plain_way_is_the_same(aligned: bool, ratio: int) -> None:
    """Values and gradients of RoIs on several levels, some of them not valid: as on a GPU, where no value may decide a shape."""
    strides = (1, 2, 4)  # RoIs of 28 and of 56 px begin a level
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(2, 5, 80 // stride, 120 // stride, generator=generator) for stride in strides]
    boxes, valid = _rois()[:, 1:].view(2, 35, 4), torch.arange(70).view(2, 35) % 4 < 3
    options: dict[str, Any] = {"strides": strides, "size": 3, "sampling_ratio": ratio, "aligned": aligned}

    def pooled_and_slopes() -> tuple[Tensor, list[Tensor]]:
        features = [one.clone().requires_grad_() for one in maps]
        pooled = pooling.pool_rois(features, boxes, valid, **options)
        return pooled, list(torch.autograd.grad(pooled.square().sum(), features))

    fast = pooled_and_slopes()
    with kernels.plain():
        plain = pooled_and_slopes()
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=2e-6)
    for actual, expected in zip(fast[1], plain[1], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    for pooled in (fast[0], plain[0]):
        assert (pooled[~valid.flatten()] == 0).all()


def test_levels_are_put_in_place_to_the_bit() -> None:
    features = [_map(), _map()[..., ::2, ::2].contiguous(), _map()[..., ::4, ::4].contiguous()]
    rois, level = _rois(), torch.arange(70) % 4  # 3 is no level

    def pool(index: int, some: Tensor) -> Tensor:
        return torchvision_roi_align(features[index], some, 3, 1 / (4 * 2**index), 0, True)

    assert torch.equal(pooling._pool_on_all_levels(pool, rois, level, 3), pool_by_level(pool, rois, level, 3))


def test_the_switch_comes_back_after_an_error() -> None:
    def fail() -> None:
        with kernels.plain():
            assert (kernels.enabled(), kernels.on_host(torch.zeros(1))) == (False, False)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert (kernels.enabled(), kernels.on_host(torch.zeros(1))) == (True, True)


def test_options_reach_the_pooling() -> None:
    features = [_map(), _map()[..., ::2, ::2].contiguous()]
    rois = torch.tensor([[[8.0, 4.0, 60.0, 50.0], [0.0, 0.0, 120.0, 80.0]]])
    for ratio, aligned in ((2, False), (0, True)):
        pooled = pooling.pool_rois(
            features,
            rois,
            torch.ones(1, 2, dtype=torch.bool),
            strides=(4, 8),
            size=7,
            sampling_ratio=ratio,
            aligned=aligned,
        )
        expected = torchvision_roi_align(
            features[0][:1], torch.cat((torch.zeros(2, 1), rois[0]), dim=1), 7, 1 / 4, ratio, aligned
        )
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=2e-6)
