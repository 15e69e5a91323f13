"""Anchors against a loop that follows the definition."""

from typing import Any

import numpy as np
import torch

from ssld.stage2_detect.models.anchors import grid_anchors

CPU = torch.device("cpu")


def test_anchors_follow_the_definition() -> None:
    grids, strides, sizes, ratios = [(3, 5), (2, 3)], (4, 8), (32.0, 64.0), (0.5, 1.0, 2.0)
    expected = [
        (x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2)
        for (rows, columns), stride, size in zip(grids, strides, sizes, strict=True)
        for y in range(rows)
        for x in range(columns)
        for w, h in [(size / np.sqrt(ratio), size * np.sqrt(ratio)) for ratio in ratios]
    ]
    ours = grid_anchors(grids, CPU, strides=strides, sizes=sizes, ratios=ratios)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), np.array(expected), rtol=1e-6)


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
