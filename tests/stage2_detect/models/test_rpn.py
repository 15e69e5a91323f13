"""RPN: losses against float64 NumPy, proposals against a loop over images and levels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import ops

from ssld.stage2_detect.models import anchors, assign, boxes, sampling
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.rpn import RPN, RPNHead

STRIDES, SIZES = (8, 16), (16.0, 32.0)
GRID = [(8, 12), (4, 6)]
IMAGE_SIZES = torch.tensor([[64, 96], [50, 70], [64, 64]])


def make(**options: Any) -> RPN:
    torch.manual_seed(0)
    rpn = RPN(channels=6, strides=STRIDES, anchor_sizes=SIZES, **options)
    for parameter in rpn.parameters():  # larger than at the start, so that proposals differ from anchors
        torch.nn.init.normal_(parameter, std=0.25)
    return rpn


def features(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 6, *grid, generator=generator) for grid in GRID]


def targets() -> Targets:
    """Three images with 2, 0 and 1 objects."""
    expected = torch.zeros(3, 2, 4)
    expected[0] = torch.tensor([[10.0, 12.0, 30.0, 28.0], [40.0, 5.0, 80.0, 50.0]])
    expected[2, 0] = torch.tensor([3.0, 3.0, 20.0, 18.0])
    labels = torch.tensor([[4, 0], [-1, -1], [2, -1]])
    return Targets(expected, labels, torch.tensor([11, 12, 13]))


def flat(rpn: RPN, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, A], deltas [B, A, 4] and anchors, put in order by loops."""
    logits, deltas = [], []
    for feature in maps:
        score, delta = rpn.head(feature)
        _, R, H, W = score.shape
        for y in range(H):
            for x in range(W):
                for r in range(R):
                    logits.append(score[:, r, y, x])
                    deltas.append(delta[:, 4 * r : 4 * r + 4, y, x])
    grids = [(m.shape[-2], m.shape[-1]) for m in maps]
    grid = anchors.grid_anchors(grids, torch.device("cpu"), strides=STRIDES, sizes=SIZES, ratios=(0.5, 1.0, 2.0))
    return torch.stack(logits, dim=1), torch.stack(deltas, dim=1), grid


def test_losses_equal_numpy() -> None:
    rpn = make(samples_per_image=64, positive_iou=0.5)
    truth, maps = targets(), features()
    _, losses = rpn(maps, IMAGE_SIZES, truth)
    logits, deltas, grid = (t.detach() for t in flat(rpn, maps))
    cls_sum, box_sum, positives = 0.0, 0.0, 0
    for i in range(3):
        present = truth.labels_BG[i : i + 1] >= 0
        assigned = assign.assign(
            grid[None], truth.boxes_BG4[i : i + 1], present, positive_iou=0.5, negative_iou=0.3, low_quality=True
        )
        priority = sampling.hash_priority(truth.seeds_B[i : i + 1], len(grid), 0)
        chosen = sampling.sample(assigned.labels_BA, priority, count=64, positive_fraction=0.5)
        for place in chosen.index_BS[0][chosen.valid_BS[0]].tolist():
            positive = bool(assigned.labels_BA[0, place] == 1)
            x = logits[i, place].double().item()
            cls_sum += np.log1p(np.exp(-x if positive else x))
            if positive:
                positives += 1
                ax1, ay1, ax2, ay2 = grid[place].double().tolist()
                gx1, gy1, gx2, gy2 = truth.boxes_BG4[i, assigned.objects_BA[0, place]].double().tolist()
                expected = np.array(
                    [
                        ((gx1 + gx2) - (ax1 + ax2)) / 2 / (ax2 - ax1),
                        ((gy1 + gy2) - (ay1 + ay2)) / 2 / (ay2 - ay1),
                        np.log((gx2 - gx1) / (ax2 - ax1)),
                        np.log((gy2 - gy1) / (ay2 - ay1)),
                    ]
                )
                box_sum += np.abs(deltas[i, place].double().numpy() - expected).sum()
    assert positives > 3
    assert losses["loss_rpn_cls"].item() == pytest.approx(cls_sum / (64 * 3), rel=1e-5)
    assert losses["loss_rpn_box"].item() == pytest.approx(box_sum / (64 * 3), rel=1e-5)


def _propose_by_loop(rpn: RPN, maps: list[Tensor], pre: int, post: int) -> list[Tensor]:
    logits, deltas, grid = (t.detach() for t in flat(rpn, maps))
    counts = [h * w * 3 for h, w in GRID]
    result = []
    for i, (height, width) in enumerate(IMAGE_SIZES.tolist()):
        kept_boxes, scores = [], []
        for level_logits, level_deltas, level_anchors in zip(
            logits[i].split(counts), deltas[i].split(counts), grid.split(counts), strict=True
        ):
            order = level_logits.argsort(descending=True)[:pre]
            candidates = ops.clip_boxes_to_image(
                boxes.decode(level_deltas[order], level_anchors[order], (1, 1, 1, 1)), (height, width)
            )
            large = ops.remove_small_boxes(candidates, rpn.min_size)
            candidates, level_scores = candidates[large], level_logits[order][large]
            kept = ops.nms(candidates, level_scores, rpn.nms_iou)
            kept_boxes.append(candidates[kept])
            scores.append(level_scores[kept])
        best = torch.cat(scores).argsort(descending=True)[:post]
        result.append(torch.cat(kept_boxes)[best])
    return result


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("min_size", [1.0, 12.0])
def test_proposals_equal_the_loop(training: bool, min_size: float) -> None:
    rpn = make(
        min_size=min_size,
        pre_nms_top_n_train=120,
        post_nms_top_n_train=70,
        pre_nms_top_n_test=60,
        post_nms_top_n_test=40,
    ).train(training)
    maps = features()
    proposals, losses = rpn(maps, IMAGE_SIZES)
    assert losses == {}
    expected = _propose_by_loop(rpn, maps, *((120, 70) if training else (60, 40)))
    assert proposals.boxes_BR4.dtype == torch.float32
    assert not proposals.boxes_BR4.requires_grad
    for i in range(3):
        actual = proposals.boxes_BR4[i][proposals.valid_BR[i]]
        torch.testing.assert_close(actual, expected[i])
        assert proposals.valid_BR[i, : len(actual)].all(), "padding stands at the end"
        height, width = IMAGE_SIZES[i].tolist()
        assert actual.min() >= 0
        assert actual[:, 2].max() <= width
        assert actual[:, 3].max() <= height


def test_images_without_objects_train_objectness_alone() -> None:
    rpn = make()
    empty = Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64), torch.arange(3))
    _, losses = rpn(features(), IMAGE_SIZES, empty)
    assert losses["loss_rpn_box"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.count_nonzero()) == ("deltas" not in name), name


def test_loss_divides_by_the_wished_number_of_samples() -> None:
    few, many = make(samples_per_image=1000), make(samples_per_image=4000)  # there are 360 anchors
    _, first = few(features(), IMAGE_SIZES, targets())
    _, second = many(features(), IMAGE_SIZES, targets())
    for name in first:
        assert first[name].item() == pytest.approx(4 * second[name].item(), rel=1e-6)


def test_sampling_follows_the_seed_or_the_order() -> None:
    truth = targets()
    other = Targets(truth.boxes_BG4, truth.labels_BG, truth.seeds_B + 1)
    maps = features()
    random, ordered = make(samples_per_image=32), make(samples_per_image=32, sampling="first")
    first, again, third = (random(maps, IMAGE_SIZES, t)[1]["loss_rpn_cls"].item() for t in (truth, truth, other))
    assert first == again
    assert first != third
    assert len({ordered(maps, IMAGE_SIZES, t)[1]["loss_rpn_cls"].item() for t in (truth, other)}) == 1


def test_head_starts_as_the_reference_has_it() -> None:
    torch.manual_seed(0)
    head = RPNHead(channels=64, anchors_per_cell=3)
    for layer in (head.conv, head.objectness, head.deltas):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert layer.bias is not None
        assert not layer.bias.count_nonzero()
