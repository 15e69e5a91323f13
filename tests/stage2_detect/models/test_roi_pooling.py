"""Pooling of RoIs: levels by area, values against torchvision one RoI at a time, and the gradient of those values."""

from typing import Any

import pytest
import torch
from tiny_roi_heads import CHANNELS, STRIDES, make, maps, proposals
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import pooling


def test_levels_follow_the_area() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 3000.0])
    rois = torch.cat((torch.zeros(8, 2), sides[:, None].expand(8, 2)), dim=1)
    assert pooling.roi_levels(rois, STRIDES).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pooling.roi_levels(torch.zeros(1, 4), STRIDES).tolist() == [0]


def test_pooling_equals_one_roi_at_a_time() -> None:
    features = maps()
    found = proposals()
    found.boxes_BR4[0, 0] = torch.tensor([0.0, 0.0, 160.0, 128.0])
    pooled = pooling.pool_rois(features, found.boxes_BR4, found.valid_BR, strides=STRIDES, size=3).unflatten(0, (2, 30))
    levels = pooling.roi_levels(found.boxes_BR4, STRIDES)
    assert len(levels[found.valid_BR].unique()) > 1
    for i in range(2):
        for r in range(30):
            if not found.valid_BR[i, r]:
                assert (pooled[i, r] == 0).all()
                continue
            level = int(levels[i, r])
            expected = ops.roi_align(
                features[level][i : i + 1], [found.boxes_BR4[i, r : r + 1]], 3, 1 / STRIDES[level], 0, aligned=True
            )
            torch.testing.assert_close(pooled[i, r], expected[0])


def test_pooling_has_the_gradient_of_its_values() -> None:
    """The map is linear in the features, so <J v, w> = <v, J' w> for any v and w."""
    features = [m.requires_grad_() for m in maps()]
    found = proposals(count=60)

    def pool(levels: list[Tensor]) -> Tensor:
        return pooling.pool_rois(levels, found.boxes_BR4, found.valid_BR, strides=STRIDES, size=3)

    generator = torch.Generator().manual_seed(3)
    other = [torch.randn(m.shape, generator=generator) for m in features]
    out = pool(features)
    weight = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad((out * weight).sum(), features[:3])  # no RoI is large enough for the fourth
    left = sum((g.double() * v).sum().item() for g, v in zip(gradients, other, strict=False))
    assert left == pytest.approx((pool(other).double() * weight).sum().item(), rel=1e-4)


def test_nothing_to_pool() -> None:
    nothing = pooling.pool_rois(
        maps(), torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.bool), strides=STRIDES, size=3
    )
    assert nothing.shape == (8, CHANNELS, 3, 3)
    assert (nothing == 0).all()


def test_pooling_is_as_told() -> None:
    heads, found = make(sampling_ratio=2, aligned=False), proposals()
    options: dict[str, Any] = {"strides": STRIDES, "size": 3, "sampling_ratio": 2, "aligned": False}
    pooled = pooling.pool_rois(maps(), found.boxes_BR4, found.valid_BR, **options)
    torch.testing.assert_close(heads.classify(maps(), found.boxes_BR4, found.valid_BR), heads.heads[0](pooled)[0])
    other = make().classify(maps(), found.boxes_BR4, found.valid_BR)
    assert (other - heads.heads[0](pooled)[0]).abs().max() > 0.01
