"""Anchors against a loop that follows the definition."""

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssld.stage2_detect.models.anchors import grid_anchors

CPU = torch.device("cpu")


class Uploads(TorchDispatchMode):
    """Notes copies from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_cpu = any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in args)
        if on_cpu and isinstance(result, torch.Tensor) and result.device.type != "cpu":
            self.copies.append(func._schema.name)
        return result


def test_anchors_follow_the_definition() -> None:
    grids, strides, sizes, ratios = [(3, 5), (2, 3)], (4, 8), (32.0, 64.0), (0.5, 1.0, 2.0)
    expected = [
        (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
        for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True)
        for y in range(rows)
        for x in range(columns)
        for w, h in [(size / np.sqrt(ratio), size * np.sqrt(ratio)) for ratio in ratios]
    ]
    actual = grid_anchors(grids, CPU, strides=strides, sizes=sizes, ratios=ratios)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), np.array(expected), rtol=1e-6)


def test_each_coordinate_is_rounded_once() -> None:
    """float64 NumPy, then float32, to the bit: also far from the origin and for sides that float32 does not have."""
    grids, strides, sizes, ratios = [(40, 70), (3, 301)], (4, 128), (17.3, 413.1), (0.3, 0.7, 1.9)
    scales = tuple(2 ** (third / 3) for third in range(3))
    expected = [
        (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
        for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True)
        for y in range(rows)
        for x in range(columns)
        for scale in scales
        for w, h in [(size * scale / np.sqrt(ratio), size * scale * np.sqrt(ratio)) for ratio in ratios]
    ]
    actual = grid_anchors(grids, CPU, strides=strides, sizes=sizes, ratios=ratios, scales=scales)
    np.testing.assert_array_equal(actual.numpy(), np.array(expected).astype(np.float32))


def test_anchors_are_made_on_the_device() -> None:
    with Uploads() as uploads:
        torch.ones(2).to("meta")
        assert uploads.copies == ["aten::_to_copy"]
        anchors = grid_anchors([(7, 9)], torch.device("meta"), strides=(8,), sizes=(32.0,), ratios=(0.5, 1.0))
    assert len(uploads.copies) == 1
    assert anchors.device.type == "meta"
    assert anchors.shape == (7 * 9 * 2, 4)


def test_sides_are_not_rounded() -> None:
    (anchor,) = grid_anchors([(1, 1)], CPU, strides=(4,), sizes=(32.0,), ratios=(0.5,))
    assert anchor[2].item() == np.float32(32 * np.sqrt(2) / 2)


def test_anchors_are_shared_and_usable_after_inference_mode() -> None:
    options: dict[str, Any] = {"strides": (4,), "sizes": (17.0,), "ratios": (1.0,)}
    with torch.inference_mode():
        first = grid_anchors([(2, 2)], CPU, **options)
    assert grid_anchors([(2, 2)], CPU, **options) is first
    weight = torch.ones(4, requires_grad=True)
    (first * weight).sum().backward()
    assert weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grid_anchors([(2, 3)], CPU, **options).dtype == torch.float32
