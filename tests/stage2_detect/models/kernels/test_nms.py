"""NMS of many rows at once against torchvision's, row by row: on the CPU's threads, in rounds as on a GPU, and plain."""

import contextlib

import pytest
import torch
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import kernels
from ssld.stage2_detect.models.kernels import nms
from ssld.stage2_detect.models.kernels.nms import nms_masks

IOU = 0.5


def clusters(B: int, N: int, seed: int) -> Tensor:
    """Boxes [B, N, 4] around a few places, so that many overlap."""
    draw = torch.Generator().manual_seed(seed)
    places = 100 * torch.rand(B, 6, 2, generator=draw)
    center = places[:, torch.randint(0, 6, (N,), generator=draw)] + 8 * torch.randn(B, N, 2, generator=draw)
    half = 10 + 6 * torch.rand(B, N, 2, generator=draw)
    return torch.cat((center - half, center + half), dim=-1).clamp(min=0)


def by_row(boxes_BN4: Tensor, scores_BN: Tensor, valid_BN: Tensor, iou: float = IOU) -> list[list[int]]:
    kept = []
    for boxes_N4, scores_N, valid_N in zip(boxes_BN4, scores_BN, valid_BN, strict=True):
        index = valid_N.nonzero()[:, 0]
        kept.append(sorted(index[ops.nms(boxes_N4[index], scores_N[index], iou)].tolist()))
    return kept


@pytest.fixture(params=["threads", "one thread", "rounds", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of computing, on the CPU."""
    if request.param == "rounds":
        monkeypatch.setattr(kernels, "on_host", lambda tensor: False)  # as on a GPU
    if request.param == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return str(request.param)


def test_every_way_equals_torchvisions_nms_of_the_valid_boxes(way: str) -> None:
    batches = [clusters(3, count, seed=count) for count in (200, 1, 61)]
    draw = torch.Generator().manual_seed(1)
    scores = [torch.rand(batch.shape[:2], generator=draw) for batch in batches]
    scores[2] = (10 * scores[2]).round()  # many are equal: the first is kept
    valid = [torch.rand(batch.shape[:2], generator=draw) > 0.3 for batch in batches]
    valid[0][2] = False
    with kernels.plain() if way == "plain" else contextlib.nullcontext():
        masks = nms_masks(batches, scores, valid, IOU)
    for mask, boxes, score, allowed in zip(masks, batches, scores, valid, strict=True):
        assert [row.nonzero()[:, 0].tolist() for row in mask] == by_row(boxes, score, allowed)
    assert 10 < masks[0][0].sum() < valid[0][0].sum() / 2, "the boxes overlap"


def test_a_chain_longer_than_the_rounds(way: str) -> None:
    """Each box overlaps the next alone, in the order of the scores, so that every second one is dropped."""
    count = 5 * nms._ROUNDS + 3
    left = 6.0 * torch.arange(count)
    boxes_N4 = torch.stack((left, torch.zeros(count), left + 20, torch.full((count,), 10.0)), dim=1)
    assert ops.box_iou(boxes_N4[:1], boxes_N4[1:3])[0].gt(IOU).tolist() == [True, False]
    scores_N = torch.linspace(1, 0, count)
    kept_N = nms_masks([boxes_N4[None]], [scores_N[None]], [torch.ones(1, count, dtype=torch.bool)], IOU)[0][0]
    assert kept_N.tolist() == [place % 2 == 0 for place in range(count)]


@pytest.mark.parametrize("iou", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8])
def test_overlaps_equal_to_the_threshold_and_equal_scores(way: str, iou: float) -> None:
    """Boxes on a small grid: many overlap by exactly a tenth, a half or three fifths, which float32 rounds up or down."""
    draw = torch.Generator().manual_seed(5)
    corners = torch.randint(0, 6, (40, 30, 2), generator=draw)
    boxes_BN4 = torch.cat((corners, corners + torch.randint(1, 11, (40, 30, 2), generator=draw)), dim=-1).float()
    scores_BN = torch.randint(0, 8, (40, 30), generator=draw).float()
    valid_BN = torch.rand(40, 30, generator=draw) > 0.2
    overlaps = torch.stack([ops.box_iou(boxes_N4, boxes_N4) for boxes_N4 in boxes_BN4])
    assert (overlaps == torch.tensor(iou)).sum() > 20
    (mask,) = nms_masks([boxes_BN4], [scores_BN], [valid_BN], iou)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == by_row(boxes_BN4, scores_BN, valid_BN, iou)


def test_a_long_chain_among_other_boxes_and_rows(way: str) -> None:
    """One row needs as many rounds as it has boxes, in another order than theirs; the others need few."""
    count = 3 * nms._ROUNDS + 1
    left = 4.0 * torch.arange(count)  # each overlaps the next two
    chain_N4 = torch.stack((left, torch.zeros(count), left + 20, torch.full((count,), 10.0)), dim=1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    boxes_BN4 = torch.stack((chain_N4[order], *clusters(2, count, seed=9)))
    scores_BN = torch.stack((-order.float(), *torch.rand(2, count, generator=torch.Generator().manual_seed(3))))
    valid_BN = torch.ones(3, count, dtype=torch.bool)
    valid_BN[0, order == 1] = False
    (mask,) = nms_masks([boxes_BN4], [scores_BN], [valid_BN], 0.4)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == by_row(boxes_BN4, scores_BN, valid_BN, 0.4)


def test_boxes_that_are_none_drop_nothing(way: str) -> None:
    """Sides in the wrong order, NaN and infinity, as a diverged network gives them."""
    nan, inf = float("nan"), float("inf")
    bad = [[9.0, 9, 0, 0], [9, 0, 0, 9], [nan, 0, 9, 9], [0, 0, 9, nan], [-inf, -inf, inf, inf], [0, 0, inf, inf]]
    boxes_N4 = torch.tensor([*bad, [0, 0, 9, 9], [0, 0, 9, 8], *bad])
    batch = boxes_N4[None], torch.linspace(1, 0, len(boxes_N4))[None], torch.ones(1, len(boxes_N4), dtype=torch.bool)
    (mask,) = nms_masks([batch[0]], [batch[1]], [batch[2]], IOU)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == by_row(*batch)
    assert not mask[0, len(bad) + 1]


def test_boxes_without_area_are_kept(way: str) -> None:
    boxes_N4 = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 9, 9], [0, 0, 9, 9]])
    kept = nms_masks([boxes_N4[None]], [torch.ones(1, 4)], [torch.ones(1, 4, dtype=torch.bool)], IOU)[0][0]
    assert kept.tolist() == [True, True, True, False]


def test_no_box(way: str) -> None:
    empty = torch.zeros(2, 0)
    (mask,) = nms_masks([torch.zeros(2, 0, 4)], [empty], [empty.bool()], IOU)
    assert mask.shape == (2, 0)
