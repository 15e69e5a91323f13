"""Losses of the RoI heads against float64 NumPy, over ranks, without objects, and for each kind of box loss."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_roi_heads import SIZES, STRIDES, WEIGHTS, K, cascade, losses_of, make, maps, proposals, targets
from torch import Tensor
from torchvision import ops

from ssld.shared.distributed.ranks import Ranks
from ssld.stage2_detect.models import boxes, pooling
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.box_losses import BoxLoss
from ssld.stage2_detect.models.roi_heads import RoIHeads
from ssld.stage2_detect.models.rpn import Proposals


def _losses_by_numpy(heads: RoIHeads, rois: Tensor, labels: list[int], goal: Tensor) -> tuple[float, float]:
    """Sums over RoIs [N, 5] with classes (K is background) and, for objects, their boxes."""
    cls_sum = box_sum = 0.0
    for roi, label, target in zip(rois, labels, goal, strict=True):
        candidates = roi[None, None, 1:].expand(2, -1, -1)
        pooled = pooling.pool_rois(maps(), candidates, torch.ones(2, 1, dtype=torch.bool), strides=STRIDES, size=3)
        logits, deltas = heads.heads[0](pooled[int(roi[0])][None])
        x = logits[0].detach().double().numpy()
        cls_sum += np.log(np.exp(x).sum()) - x[label]
        if label < K:
            expected = boxes.encode(target.double(), roi[1:].double(), WEIGHTS).numpy()
            box_sum += np.abs(deltas[0, label].detach().double().numpy() - expected).sum()
    return cls_sum, box_sum


def test_losses_equal_numpy() -> None:
    heads = make(samples_per_image=10_000, positive_fraction=1.0)
    candidates, truth = proposals(), targets()
    losses, *_ = losses_of(heads, maps(), candidates, SIZES, truth)
    rois, labels, expected = [], [], []
    for i in range(2):
        present = truth.labels_BG[i] >= 0
        objects = truth.boxes_BG4[i][present]
        for roi in torch.cat((candidates.boxes_BR4[i][candidates.valid_BR[i]], objects)):
            iou = ops.box_iou(roi[None].double(), objects.double())[0]
            labels.append(int(truth.labels_BG[i][iou.argmax()]) if iou.max() >= 0.5 else K)
            rois.append(torch.cat((torch.tensor([float(i)]), roi)))
            expected.append(objects[iou.argmax()])
    assert 5 < sum(label < K for label in labels) < len(labels)
    cls_sum, box_sum = _losses_by_numpy(heads, torch.stack(rois), labels, torch.stack(expected))
    assert losses["loss_cls"].item() == pytest.approx(cls_sum / len(rois), rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(box_sum / len(rois), rel=1e-5)


def halves_of(candidates: Proposals, truth: Targets) -> list[tuple[list[Tensor], Proposals, Tensor, Targets]]:
    """The image of the batch that each of two ranks has."""
    return [
        (
            [m[i : i + 1] for m in maps()],
            Proposals(candidates.boxes_BR4[i : i + 1], candidates.valid_BR[i : i + 1]),
            SIZES[i : i + 1],
            Targets(truth.boxes_BG4[i : i + 1], truth.labels_BG[i : i + 1], truth.seeds_B[i : i + 1]),
        )
        for i in range(2)
    ]


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Counts summed over ranks, gradients averaged over ranks: the whole batch's loss is the mean of the ranks' losses."""
    candidates, truth = proposals(), targets()
    whole, *_ = losses_of(make(samples_per_image=20), maps(), candidates, SIZES, truth)
    counts: list[Tensor] = []
    halves = halves_of(candidates, truth)

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    for half in halves:
        losses_of(make(samples_per_image=20), *half, Ranks(total=note))
    assert len(counts) == 2
    both = Ranks(2, lambda _: counts[0] + counts[1])
    ranks = [losses_of(make(samples_per_image=20), *half, both)[0] for half in halves]
    for name in whole:
        assert (ranks[0][name] + ranks[1][name]).item() / 2 == pytest.approx(whole[name].item(), rel=1e-5)


@pytest.mark.parametrize("slots", [0, 2])
def test_no_objects_train_background_alone(slots: int) -> None:
    heads = make()
    empty = Targets(torch.zeros(2, slots, 4), torch.full((2, slots), -1), torch.arange(2))
    losses, *_ = losses_of(heads, maps(), proposals(), SIZES, empty)
    assert losses["loss_box"].item() == 0
    assert losses["loss_cls"].item() > 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_no_roi_at_all_is_a_loss_of_zero() -> None:
    heads = make()
    nothing = Proposals(torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool))
    empty = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.arange(2))
    losses, *_ = losses_of(heads, maps(), nothing, SIZES, empty)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in heads.parameters())


# Box losses


LOSSES = [
    BoxLoss("l1"),
    BoxLoss("smooth_l1", beta=0.3),
    BoxLoss("balanced_l1", weight=2.0),
    BoxLoss("giou", weight=5.0),
    BoxLoss("ciou", weight=10.0),
    BoxLoss("ciou", weight=10.0, normalization="positives"),
]


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_box_losses_are_of_positives_and_their_class(loss: BoxLoss, class_agnostic: bool) -> None:
    heads, truth = make(samples_per_image=40, box_loss=loss, class_agnostic=class_agnostic), targets()
    losses, sampled, _ = losses_of(heads, maps(), proposals(), SIZES, truth)
    pooled = pooling.pool_rois(maps(), sampled.rois_BR4, sampled.valid_BR, strides=STRIDES, size=3)
    deltas = heads.heads[0](pooled)[1].unflatten(0, (2, -1))
    total, positives = 0.0, 0
    for i, r in sampled.positive_BR.nonzero().tolist():
        index = sampled.objects_BR[i, r]
        row = 0 if class_agnostic else truth.labels_BG[i, index]
        target = boxes.encode(truth.boxes_BG4[i, index], sampled.rois_BR4[i, r], WEIGHTS)
        total += loss(deltas[i, r, row][None], target[None], WEIGHTS).item()
        positives += 1
    assert positives > 5
    expected = total / sampled.valid_BR.sum().item()
    if loss.normalization == "positives":
        expected *= K / positives
    assert losses["loss_box"].item() == pytest.approx(expected, rel=1e-4)


def test_ranks_agree_on_positives_too() -> None:
    """Where the loss is divided by the positives, they are those of all ranks."""
    candidates, truth = proposals(), targets()
    options: dict[str, Any] = {"samples_per_image": 20, "box_loss": LOSSES[-1]}
    whole, *_ = losses_of(make(**options), maps(), candidates, SIZES, truth)
    halves = halves_of(candidates, truth)
    counts: list[Tensor] = []

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    for half in halves:
        losses_of(make(**options), *half, Ranks(total=note))
    assert len(counts) == 4  # RoIs and positives of either rank
    sums = [counts[0] + counts[2], counts[1] + counts[3]]
    ranks = []
    for half in halves:
        totals = iter(sums)
        both = Ranks(2, lambda _, totals=totals: next(totals))  # type: ignore[misc]
        ranks.append(losses_of(make(**options), *half, both)[0])
    for name in whole:
        assert (ranks[0][name] + ranks[1][name]).item() / 2 == pytest.approx(whole[name].item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("rois", [0, 30])
def test_no_object_gives_zeros_whatever_is_predicted(loss: BoxLoss, rois: int) -> None:
    heads = cascade(box_loss=loss, add_gt_each_stage=True)
    with torch.no_grad():
        heads.heads[2].deltas.bias.fill_(1e30)  # whose loss is infinite, or whose box has no size
    candidates = proposals()
    candidates = Proposals(candidates.boxes_BR4, candidates.valid_BR & (torch.arange(30) < rois))
    empty = Targets(torch.zeros(2, 1, 4), torch.full((2, 1), -1), torch.arange(2))
    losses, *_ = losses_of(heads, maps(), candidates, SIZES, empty)
    assert all(losses[f"loss_box_{number}"].item() == 0 for number in range(3))
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not (".deltas." in name and parameter.grad.any()), name
