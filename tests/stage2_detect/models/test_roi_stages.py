"""Stages of the RoI heads: how a head starts, the RoIs of later stages, whose scores count, and float32 from stage to stage."""

import math
from typing import Any

import pytest
import torch
from tiny_roi_heads import (
    SIZES,
    STRIDES,
    WEIGHTS,
    K,
    cascade,
    detect,
    losses_of,
    make,
    maps,
    predict_no_shift,
    proposals,
    targets,
)
from torch import Tensor
from torchvision import ops

from ssld.shared.distributed.ranks import Ranks
from ssld.stage2_detect.models import boxes, pooling
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.box_losses import BoxLoss
from ssld.stage2_detect.models.postprocess import NMS
from ssld.stage2_detect.models.roi_heads import BoxHead, BoxStage
from ssld.stage2_detect.models.rpn import Proposals


def test_head_starts_as_the_reference_has_it() -> None:
    torch.manual_seed(0)
    head = BoxHead(
        channels=256,
        pool_size=1,
        hidden=128,
        convolutions=0,
        fully_connected=2,
        norm="none",
        freeze_norm=False,
        classes=40,
        class_agnostic=False,
    )
    assert head.logits.weight.shape == (41, 128)
    assert head.deltas.weight.shape == (160, 128)
    assert head.logits.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.deltas.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert head.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 256), rel=0.01)
    assert head.fc2 is not None
    assert all((layer.bias == 0).all() for layer in (head.fc1, head.fc2, head.logits, head.deltas))


def test_later_stages_relabel_the_refined_rois_of_the_first() -> None:
    """With deltas of zero every stage sees the same RoIs, and only the IoU that makes a positive differs."""
    stages = [
        BoxStage(iou, weights, 1 / 3) for iou, weights in ((0.5, WEIGHTS), (0.6, (20, 20, 10, 10)), (0.9, WEIGHTS))
    ]
    heads = make(stages=stages, class_agnostic=True, samples_per_image=1000, positive_fraction=1.0)
    predict_no_shift(heads)
    truth, candidates = targets(), proposals()
    losses, *_ = losses_of(heads, maps(), candidates, SIZES, truth)
    assert list(losses) == ["loss_cls_0", "loss_box_0", "loss_cls_1", "loss_box_1", "loss_cls_2", "loss_box_2"]
    for number, stage in enumerate(stages):
        total, count = 0.0, 0
        for i in range(2):
            objects = truth.boxes_BG4[i][truth.labels_BG[i] >= 0]
            for roi in torch.cat((candidates.boxes_BR4[i][candidates.valid_BR[i]], objects)):
                iou = ops.box_iou(roi[None], objects)[0]
                count += 1
                if iou.max() >= stage.positive_iou:
                    total += boxes.encode(objects[iou.argmax()], roi, stage.delta_weights).abs().sum().item()
        assert losses[f"loss_box_{number}"].item() == pytest.approx(total / count / 3, rel=1e-4)


def test_stages_average_their_scores_and_the_last_one_places_the_boxes() -> None:
    stages = [BoxStage(0.5, WEIGHTS), BoxStage(0.6, (20.0, 20.0, 10.0, 10.0))]
    heads = make(stages=stages, class_agnostic=True, score_threshold=0.0, nms=NMS(iou=1.0)).eval()
    rois = torch.tensor([[[10.0, 10.0, 50.0, 60.0]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    features = [m[:1] for m in maps()]
    images = ImageBatch(torch.zeros(1, 3, 128, 160, dtype=torch.uint8), SIZES[:1], torch.ones(1))
    (candidates,) = detect(heads, features, Proposals(rois, valid), images)
    scores, current = [], rois
    for stage, head in zip(stages, heads.heads, strict=True):
        logits, deltas = head(pooling.pool_rois(features, current, valid, strides=STRIDES, size=3))
        scores.append(logits.softmax(dim=1))
        current = boxes.clip(boxes.decode(deltas[:, 0], current[0], stage.delta_weights)[None], SIZES[:1])
    mean = ((scores[0] + scores[1]) / 2)[0, :K]
    torch.testing.assert_close(candidates.scores_N, mean.sort(descending=True).values)
    torch.testing.assert_close(candidates.boxes_N4, current[0].expand(K, 4))


def test_scores_of_the_last_stages_rois() -> None:
    """Every classifier sees the RoIs that two refinements lead to, and none sees its own."""
    heads = cascade(score_threshold=0.0, nms=NMS(iou=1.0), score_rois="last").eval()
    rois = torch.tensor([[[10.0, 10.0, 50.0, 60.0]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    features = [m[:1] for m in maps()]
    (candidates,) = heads.detect_network(features, Proposals(rois, valid), SIZES[:1])
    for stage, head in list(zip(heads.stages, heads.heads, strict=True))[:2]:
        _, deltas = head(pooling.pool_rois(features, rois, valid, strides=STRIDES, size=3))
        rois = boxes.clip(boxes.decode(deltas[:, 0], rois[0], stage.delta_weights)[None], SIZES[:1])
    pooled = pooling.pool_rois(features, rois, valid, strides=STRIDES, size=3)
    mean = torch.stack([head(pooled)[0].softmax(dim=1) for head in heads.heads]).mean(dim=0)[0, :K]
    torch.testing.assert_close(candidates.scores_N, mean.sort(descending=True).values)
    last = boxes.decode(heads.heads[2](pooled)[1][:, 0], rois[0], heads.stages[2].delta_weights)
    torch.testing.assert_close(candidates.boxes_N4, boxes.clip(last[None], SIZES[:1])[0].expand(K, 4))
    own = cascade(score_threshold=0.0, nms=NMS(iou=1.0)).eval()
    (other,) = own.detect_network(features, Proposals(rois, valid), SIZES[:1])
    assert (other.scores_N - candidates.scores_N).abs().max() > 1e-3


def test_objects_are_appended_again_at_each_stage() -> None:
    """Stages then have more and more RoIs; a RoI on its object has no distance to go."""
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    heads = cascade(add_gt_each_stage=True)
    predict_no_shift(heads)
    candidates, truth = proposals(), targets()
    losses, sampled, _ = losses_of(heads, maps(), candidates, SIZES, truth, Ranks(total=note))
    valid = int(candidates.valid_BR.sum())
    assert counts == [valid + 5, valid + 10, valid + 15]
    assert sampled.valid_BR.sum() == valid + 5
    for number, stage in enumerate(heads.stages):
        total = 0.0
        for i in range(2):
            objects = truth.boxes_BG4[i][truth.labels_BG[i] >= 0]
            for roi in candidates.boxes_BR4[i][candidates.valid_BR[i]]:
                iou = ops.box_iou(roi[None], objects)[0]
                if iou.max() >= stage.positive_iou:
                    total += boxes.encode(objects[iou.argmax()], roi, stage.delta_weights).abs().sum().item()
        assert losses[f"loss_box_{number}"].item() == pytest.approx(total / counts[number], rel=1e-4)


def test_refined_rois_without_area_drop_out() -> None:
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    heads = cascade()
    predict_no_shift(heads)
    with torch.no_grad():
        heads.heads[0].deltas.bias[0] = 10.0  # to the right by the RoI's own width
    candidates, truth = proposals(), targets()
    losses, sampled, _ = losses_of(heads, maps(), candidates, SIZES, truth, Ranks(total=note))
    left = sampled.rois_BR4[..., 2] < SIZES[:, 1:]
    assert counts[0] == sampled.valid_BR.sum()
    assert counts[1] == counts[2] == (sampled.valid_BR & left).sum()
    assert counts[1] < counts[0]
    assert all(loss.isfinite() for loss in losses.values())


def test_bf16_keeps_geometry_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the heads multiply is bf16: from their deltas on, RoIs are those of float32 arithmetic to the bit."""
    heads = cascade(box_loss=BoxLoss("ciou", weight=10.0))
    features = [m.bfloat16().requires_grad_() for m in maps()]
    pooled_from: list[Tensor] = []
    deltas: list[Tensor] = []
    pool = pooling.pool_rois

    def note(features: Any, rois_BR4: Tensor, valid_BR: Tensor, **options: Any) -> Tensor:
        pooled_from.append(rois_BR4)
        return pool(features, rois_BR4, valid_BR, **options)

    monkeypatch.setattr(pooling, "pool_rois", note)
    for head in heads.heads:
        head.register_forward_hook(lambda _module, _args, out: deltas.append(out[1].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, *_ = losses_of(heads, features, proposals(), SIZES, targets())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for number in range(2):
        assert torch.equal(deltas[number], deltas[number].bfloat16().float()), "the head did compute in bf16"
        start = pooled_from[number]
        moved = boxes.decode(deltas[number][:, 0].view(start.shape), start, heads.stages[number].delta_weights)
        assert pooled_from[number + 1].dtype == torch.float32
        assert torch.equal(pooled_from[number + 1], boxes.clip(moved, SIZES))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for candidates in heads.eval().detect_network([m.detach() for m in features], proposals(), SIZES):
            assert candidates.boxes_N4.dtype == candidates.scores_N.dtype == torch.float32
