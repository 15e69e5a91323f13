"""Pooling of RoIs: levels by area, values against torchvision one RoI at a time, and the gradient of those values."""

from typing import Any

import pytest
import torch
from tiny_roi_heads import CHANNELS, STRIDES, make, maps, proposals
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

from ssld.stage2_detect.models import kernels, pooling
from ssld.stage2_detect.models.kernels.roi_align import roi_align


def test_levels_follow_the_area() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 3000.0])
    rois = torch.cat((torch.zeros(8, 2), sides[:, None].expand(8, 2)), dim=1)
    assert pooling.roi_levels(rois, STRIDES).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pooling.roi_levels(torch.zeros(1, 4), STRIDES).tolist() == [0]


def test_pooling_equals_one_roi_at_a_time() -> None:
    features = maps()
    detections = proposals()
    detections.boxes_BR4[0, 0] = torch.tensor([0.0, 0.0, 160.0, 128.0])
    pooled = pooling.pool_rois(features, detections.boxes_BR4, detections.valid_BR, strides=STRIDES, size=3).unflatten(
        0, (2, 30)
    )
    levels = pooling.roi_levels(detections.boxes_BR4, STRIDES)
    assert len(levels[detections.valid_BR].unique()) > 1
    for i in range(2):
        for r in range(30):
            if not detections.valid_BR[i, r]:
                assert (pooled[i, r] == 0).all()
                continue
            level = int(levels[i, r])
            expected = ops.roi_align(
                features[level][i : i + 1], [detections.boxes_BR4[i, r : r + 1]], 3, 1 / STRIDES[level], 0, aligned=True
            )
            torch.testing.assert_close(pooled[i, r], expected[0])


def test_pooling_has_the_gradient_of_its_values() -> None:
    """The map is linear in the features, so <J v, w> = <v, J' w> for any v and w."""
    features = [m.requires_grad_() for m in maps()]
    detections = proposals(count=60)

    def pool(levels: list[Tensor]) -> Tensor:
        return pooling.pool_rois(levels, detections.boxes_BR4, detections.valid_BR, strides=STRIDES, size=3)

    generator = torch.Generator().manual_seed(3)
    other = [torch.randn(m.shape, generator=generator) for m in features]
    out = pool(features)
    weight = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad((out * weight).sum(), features[:3])  # no RoI is large enough for the fourth
    left = sum((g.double() * v).sum().item() for g, v in zip(gradients, other, strict=False))
    assert left == pytest.approx((pool(other).double() * weight).sum().item(), rel=1e-4)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation returned, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.bytes[storage.data_ptr()] = max(storage.nbytes(), self.bytes.get(storage.data_ptr(), 0))
        return result


@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_needs_the_memory_of_one_result(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the result there is never more than the pooled features of a chunk, whatever the number of levels."""
    chunk = 8
    monkeypatch.setattr(pooling, "_CHUNK", chunk)
    features = [m[..., :6, :6].contiguous().requires_grad_(training) for m in maps()[:4]]  # small beside what is pooled
    rois = proposals(count=60)
    with kernels.plain(), Allocations() as allocations, torch.set_grad_enabled(training):
        pooled = pooling.pool_rois(features, rois.boxes_BR4, rois.valid_BR, strides=STRIDES, size=14)
    assert pooled.requires_grad == training
    row = CHANNELS * 14 * 14 * 4
    large = {address for address, count in allocations.bytes.items() if count > chunk * row}
    assert large == {pooled.untyped_storage().data_ptr()}
    assert sum(count == chunk * row for count in allocations.bytes.values()) > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_chunks_have_the_values_and_gradients_of_torchvision(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 7, the last of them shorter, against torchvision's own autograd, one level at a time."""
    monkeypatch.setattr(pooling, "_CHUNK", 7)
    strides = (1, 2, 4)  # of which RoIs of 28 and of 56 px begin a level
    generator = torch.Generator().manual_seed(4)
    features = [
        torch.randn(2, CHANNELS, 128 // s, 160 // s, generator=generator).to(memory_format=layout).requires_grad_()
        for s in strides
    ]
    rois = proposals(count=60)
    contiguous, addresses = set(), set()

    def record(feature: Tensor, *args: Any, **options: Any) -> Tensor:
        contiguous.add(feature.is_contiguous())
        addresses.add(feature.data_ptr())
        return roi_align(feature, *args, **options)

    monkeypatch.setattr(pooling, "roi_align", record)
    with kernels.plain():
        pooled = pooling.pool_rois(features, rois.boxes_BR4, rois.valid_BR, strides=strides, size=3)
    # torchvision's CUDA kernel makes no copy of a contiguous map: there is one per level, whatever the number of chunks.
    assert contiguous == {True}
    assert len(addresses) == len(strides)
    expected = torch.zeros_like(pooled)
    levels = torch.where(rois.valid_BR, pooling.roi_levels(rois.boxes_BR4, strides), -1)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        image, place = (levels == level).nonzero(as_tuple=True)
        boxes_5 = torch.cat((image[:, None].float(), rois.boxes_BR4[image, place]), dim=1)
        values = ops.roi_align(feature, boxes_5, 3, 1 / stride, 0, aligned=True)
        expected = expected.index_add(0, image * 60 + place, values)
    torch.testing.assert_close(pooled, expected)
    weight = torch.randn(pooled.shape, generator=generator)
    gradients = [torch.autograd.grad((one * weight).sum(), features) for one in (pooled, expected)]
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)
    assert all(gradient.abs().max() > 0 for gradient in gradients[1])


def test_nothing_to_pool() -> None:
    nothing = pooling.pool_rois(
        maps(), torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.bool), strides=STRIDES, size=3
    )
    assert nothing.shape == (8, CHANNELS, 3, 3)
    assert (nothing == 0).all()


def test_pooling_is_as_told() -> None:
    heads, detections = make(sampling_ratio=2, aligned=False), proposals()
    options: dict[str, Any] = {"strides": STRIDES, "size": 3, "sampling_ratio": 2, "aligned": False}
    pooled = pooling.pool_rois(maps(), detections.boxes_BR4, detections.valid_BR, **options)
    torch.testing.assert_close(
        heads.classify(maps(), detections.boxes_BR4, detections.valid_BR), heads.heads[0](pooled)[0]
    )
    other = make().classify(maps(), detections.boxes_BR4, detections.valid_BR)
    assert (other - heads.heads[0](pooled)[0]).abs().max() > 0.01
