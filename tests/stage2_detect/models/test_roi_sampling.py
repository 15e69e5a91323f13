"""Which RoIs the heads are trained on: their number, the kinds of sampling, and the samples that are handed on."""

from typing import Any

import pytest
import torch
from tiny_roi_heads import SIZES, K, losses_of, make, maps, proposals, targets
from torch import Tensor
from torchvision import ops

from ssld.shared.distributed.ranks import Ranks
from ssld.stage2_detect.models import assign, boxes, sampling


def test_sampled_counts() -> None:
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    losses_of(make(samples_per_image=12), maps(), proposals(), SIZES, targets(), Ranks(total=note))
    assert counts == [24]
    counts.clear()
    losses_of(make(samples_per_image=1000), maps(), proposals(), SIZES, targets(), Ranks(total=note))
    candidates = proposals()  # at most a quarter of 1,000 are positive, so everything is taken
    assert counts == [int(candidates.valid_BR.sum()) + 5]


def test_the_sampled_rois_are_those_of_the_loss() -> None:
    heads: Any = make(samples_per_image=16)
    truth = targets()
    losses, sampled, logits_NK = losses_of(heads, maps(), proposals(), SIZES, truth)
    assert sampled.rois_BR4.shape == (2, 16, 4)
    assert not sampled.rois_BR4.requires_grad
    assert not (sampled.positive_BR & ~sampled.valid_BR).any()
    assert sampled.positive_BR.sum(dim=1).tolist() == [4, 4]
    for i in range(2):
        for roi, index in zip(
            sampled.rois_BR4[i][sampled.positive_BR[i]], sampled.objects_BR[i][sampled.positive_BR[i]], strict=True
        ):
            iou = ops.box_iou(roi[None], truth.boxes_BG4[i][truth.labels_BG[i] >= 0])[0]
            assert iou.argmax() == index
            assert iou.max() >= 0.5
    torch.testing.assert_close(heads.classify(maps(), sampled.rois_BR4, sampled.valid_BR), logits_NK)
    classes = torch.where(sampled.positive_BR, truth.labels_BG.gather(1, sampled.objects_BR), K)
    expected = torch.nn.functional.cross_entropy(logits_NK[sampled.valid_BR.flatten()], classes[sampled.valid_BR])
    torch.testing.assert_close(losses["loss_cls"], expected)
    logits_NK.sum().backward()
    assert heads.heads[0].fc1.weight.grad is not None
    assert heads.heads[0].fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["random", "first", "libra"])
def test_kinds_of_sampling(kind: Any) -> None:
    heads, candidates, truth = make(samples_per_image=12, sampling=kind, libra_bins=4), proposals(), targets()
    _, sampled, _ = losses_of(heads, maps(), candidates, SIZES, truth)
    rois = torch.cat((candidates.boxes_BR4, truth.boxes_BG4), dim=1)
    valid = torch.cat((candidates.valid_BR, truth.labels_BG >= 0), dim=1)
    assigned = assign.assign(rois, truth.boxes_BG4, truth.labels_BG >= 0, positive_iou=0.5, negative_iou=0.5)
    labels = torch.where(valid, assigned.labels_BA, -1)
    count = {"count": 12, "positive_fraction": 0.25}
    priority = sampling.hash_priority(truth.seeds_B, rois.shape[1], 1)
    if kind == "first":
        priority = sampling.index_priority(truth.seeds_B, rois.shape[1])
    if kind == "libra":
        priority = sampling.spread_priority(labels, assigned.ious_BA, priority, bins=4, **count)  # type: ignore[arg-type]
    expected = sampling.sample(labels, priority, **count)  # type: ignore[arg-type]
    assert torch.equal(sampled.rois_BR4, boxes.take(rois, expected.index_BS))
    assert torch.equal(sampled.positive_BR, expected.positive_BS)
