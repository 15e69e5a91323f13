"""RoI heads: pooling against torchvision one RoI at a time, losses against float64 NumPy, detections against a loop."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import ops

from stage2_detect.losses import BoxLoss
from stage2_detect.models import assign, boxes, pooling, sampling
from stage2_detect.models.batch import Detections, ImageBatch, Targets
from stage2_detect.models.postprocess import Suppression, to_original
from stage2_detect.models.roi_heads import BoxHead, BoxStage, RoIHeads
from stage2_detect.models.rpn import Proposals

STRIDES = (4, 8, 16, 32)
CHANNELS, K = 5, 3
SIZES = torch.tensor([[128, 160], [100, 150]])
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def maps() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, CHANNELS, 128 // s, 160 // s, generator=generator) for s in (*STRIDES, 64)]


def proposals(count: int = 30, seed: int = 1) -> Proposals:
    """Boxes of 1 to 128 px; the last third of the second image is padding."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(2, count, 2, generator=generator) * torch.tensor([160.0, 128.0])
    half = torch.exp(torch.rand(2, count, 2, generator=generator) * 4.2)
    found = torch.cat((centre - half, centre + half), dim=-1)
    for image, objects in enumerate(targets().boxes_BG4):  # some that match
        found[image, :9] = objects.repeat(3, 1) + torch.randint(-3, 4, (9, 4), generator=generator)
    found = boxes.clip(found, SIZES)
    valid = ((found[..., 2:] - found[..., :2]) >= 1).all(dim=-1)
    valid[1, 2 * count // 3 :] = False
    order = valid.long().argsort(dim=1, descending=True, stable=True)  # as proposals come: padding at the end
    found, valid = boxes.take(found, order), valid.gather(1, order)
    return Proposals(torch.where(valid[..., None], found, 0.0), valid)


def targets() -> Targets:
    wanted = torch.zeros(2, 3, 4)
    wanted[0, :2] = torch.tensor([[10.0, 12.0, 60.0, 48.0], [40.0, 5.0, 150.0, 120.0]])
    wanted[1] = torch.tensor([[3.0, 3.0, 40.0, 38.0], [70.0, 20.0, 120.0, 90.0], [5.0, 60.0, 9.0, 66.0]])
    return Targets(wanted, torch.tensor([[2, 0, -1], [1, 1, 0]]), torch.tensor([5, 6]))


def make(**options: Any) -> RoIHeads:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "classes": K,
        "channels": CHANNELS,
        "hidden": 16,
        "pool_size": 3,
        "samples_per_image": 24,
    }
    heads = RoIHeads(**(defaults | options))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return heads


def predict_no_shift(heads: RoIHeads) -> None:
    for name, parameter in heads.named_parameters():
        if ".deltas." in name:
            torch.nn.init.zeros_(parameter)


def detect(heads: RoIHeads, features: list[Tensor], found: Proposals, images: ImageBatch) -> list[Detections]:
    """Detections in original coordinates."""
    network = heads.detect_network(features, found, images.sizes_B2)
    parts = zip(network, images.sizes_B2, images.scales_B, strict=True)
    return [to_original(detections, size, scale)[0] for detections, size, scale in parts]


# Pooling


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


# Losses


def _losses_by_numpy(heads: RoIHeads, rois: Tensor, labels: list[int], wanted: Tensor) -> tuple[float, float]:
    """Sums over RoIs [N, 5] with classes (K is background) and, for objects, their boxes."""
    cls_sum = box_sum = 0.0
    for roi, label, target in zip(rois, labels, wanted, strict=True):
        found = roi[None, None, 1:].expand(2, -1, -1)
        pooled = pooling.pool_rois(maps(), found, torch.ones(2, 1, dtype=torch.bool), strides=STRIDES, size=3)
        logits, deltas = heads.heads[0](pooled[int(roi[0])][None])
        x = logits[0].detach().double().numpy()
        cls_sum += np.log(np.exp(x).sum()) - x[label]
        if label < K:
            expected = boxes.encode(target.double(), roi[1:].double(), WEIGHTS).numpy()
            box_sum += np.abs(deltas[0, label].detach().double().numpy() - expected).sum()
    return cls_sum, box_sum


def test_losses_equal_numpy() -> None:
    heads = make(samples_per_image=10_000, positive_fraction=1.0)
    found, truth = proposals(), targets()
    losses, _ = heads.losses(maps(), found, SIZES, truth)
    rois, labels, wanted = [], [], []
    for i in range(2):
        present = truth.labels_BG[i] >= 0
        objects = truth.boxes_BG4[i][present]
        for roi in torch.cat((found.boxes_BR4[i][found.valid_BR[i]], objects)):
            iou = ops.box_iou(roi[None].double(), objects.double())[0]
            labels.append(int(truth.labels_BG[i][iou.argmax()]) if iou.max() >= 0.5 else K)
            rois.append(torch.cat((torch.tensor([float(i)]), roi)))
            wanted.append(objects[iou.argmax()])
    assert 5 < sum(label < K for label in labels) < len(labels)
    cls_sum, box_sum = _losses_by_numpy(heads, torch.stack(rois), labels, torch.stack(wanted))
    assert losses["loss_cls"].item() == pytest.approx(cls_sum / len(rois), rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(box_sum / len(rois), rel=1e-5)


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Counts summed over ranks, gradients averaged over ranks: the whole batch's loss is the mean of the ranks' losses."""
    found, truth = proposals(), targets()
    whole, _ = make(samples_per_image=20).losses(maps(), found, SIZES, truth)
    counts: list[Tensor] = []
    halves = [
        (
            [m[i : i + 1] for m in maps()],
            Proposals(found.boxes_BR4[i : i + 1], found.valid_BR[i : i + 1]),
            SIZES[i : i + 1],
            Targets(truth.boxes_BG4[i : i + 1], truth.labels_BG[i : i + 1], truth.seeds_B[i : i + 1]),
        )
        for i in range(2)
    ]

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    for half in halves:
        make(samples_per_image=20, total=note).losses(*half)
    assert len(counts) == 2
    heads = make(samples_per_image=20, total=lambda _: counts[0] + counts[1], world_size=2)
    ranks = [heads.losses(*half)[0] for half in halves]
    for name in whole:
        assert (ranks[0][name] + ranks[1][name]).item() / 2 == pytest.approx(whole[name].item(), rel=1e-5)


@pytest.mark.parametrize("slots", [0, 2])
def test_no_objects_train_background_alone(slots: int) -> None:
    heads = make()
    empty = Targets(torch.zeros(2, slots, 4), torch.full((2, slots), -1), torch.arange(2))
    losses, _ = heads.losses(maps(), proposals(), SIZES, empty)
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
    losses, _ = heads.losses(maps(), nothing, SIZES, empty)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in heads.parameters())


def test_sampled_counts() -> None:
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    make(samples_per_image=12, total=note).losses(maps(), proposals(), SIZES, targets())
    assert counts == [24]
    counts.clear()
    make(samples_per_image=1000, total=note).losses(maps(), proposals(), SIZES, targets())
    found = proposals()  # at most a quarter of 1,000 are positive, so everything is taken
    assert counts == [int(found.valid_BR.sum()) + 5]


# Detections


def _detect_by_loop(heads: RoIHeads, found: Proposals, scales: list[float]) -> list[list[tuple]]:
    result = []
    pooled = pooling.pool_rois(maps(), found.boxes_BR4, found.valid_BR, strides=STRIDES, size=3).unflatten(0, (2, -1))
    for i, scale in enumerate(scales):
        height, width = SIZES[i].tolist()
        logits, deltas = heads.heads[0](pooled[i][found.valid_BR[i]])
        rois = found.boxes_BR4[i][found.valid_BR[i]]
        rows = []
        for label in range(K):
            decoded = ops.clip_boxes_to_image(boxes.decode(deltas[:, label], rois, WEIGHTS), (height, width))
            scores = logits.softmax(dim=1)[:, label]
            decoded, scores = decoded[scores > heads.score_threshold], scores[scores > heads.score_threshold]
            for place in ops.nms(decoded, scores, heads.suppression.iou).tolist():
                rows.append((scores[place].item(), label, *decoded[place].tolist()))
        rows = sorted(rows, reverse=True)[: heads.detections_per_image]
        original = (math.floor(width / scale + 0.5), math.floor(height / scale + 0.5))
        final = []
        for score, label, *corners in rows:
            x1, x2 = (min(c / scale, original[0]) for c in corners[0::2])
            y1, y2 = (min(c / scale, original[1]) for c in corners[1::2])
            if x2 > x1 and y2 > y1:
                final.append((score, label, x1, y1, x2, y2))
        result.append(final)
    return result


@pytest.mark.parametrize("limit", [1000, 7])
def test_detections_equal_the_loop(limit: int) -> None:
    heads = make(score_threshold=0.2, suppression=Suppression(iou=0.3), detections_per_image=limit).eval()
    found, scales = proposals(), [0.8, 1.3]
    images = ImageBatch(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), SIZES, torch.tensor(scales))
    with torch.no_grad():
        expected = _detect_by_loop(heads, found, scales)
    ours = detect(heads, maps(), found, images)
    for detections, rows in zip(ours, expected, strict=True):
        assert len(rows) > 5
        table = np.array(rows)
        np.testing.assert_allclose(detections.scores_N.numpy(), table[:, 0], rtol=1e-5)
        assert detections.labels_N.tolist() == table[:, 1].tolist()
        np.testing.assert_allclose(detections.boxes_N4.numpy(), table[:, 2:], atol=1e-3)
        assert detections.boxes_N4.dtype == torch.float32


def test_boxes_without_area_are_dropped() -> None:
    heads = make(score_threshold=0.0).eval()
    predict_no_shift(heads)
    rois = torch.tensor([[[10.0, 10.0, 30.0, 40.0], [160.0, 20.0, 170.0, 40.0]]])  # the second lies beside the image
    images = ImageBatch(torch.zeros(1, 3, 128, 160, dtype=torch.uint8), SIZES[:1], torch.ones(1))
    (found,) = detect(heads, [m[:1] for m in maps()], Proposals(rois, torch.ones(1, 2, dtype=torch.bool)), images)
    assert len(found.scores_N) == K
    assert (found.boxes_N4 == rois[0, 0]).all()


def test_nothing_found() -> None:
    images = ImageBatch(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), SIZES, torch.ones(2))
    nothing = Proposals(torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool))
    for found in detect(make().eval(), maps(), nothing, images):
        assert found.boxes_N4.shape == (0, 4)
        assert found.scores_N.shape == found.labels_N.shape == (0,)


# Stages


def test_later_stages_relabel_the_refined_rois_of_the_first() -> None:
    """With deltas of zero every stage sees the same RoIs, and only the IoU that makes a positive differs."""
    stages = [
        BoxStage(iou, weights, 1 / 3) for iou, weights in ((0.5, WEIGHTS), (0.6, (20, 20, 10, 10)), (0.9, WEIGHTS))
    ]
    heads = make(stages=stages, class_agnostic=True, samples_per_image=1000, positive_fraction=1.0)
    predict_no_shift(heads)
    truth, found = targets(), proposals()
    losses, _ = heads.losses(maps(), found, SIZES, truth)
    assert list(losses) == ["loss_cls_0", "loss_box_0", "loss_cls_1", "loss_box_1", "loss_cls_2", "loss_box_2"]
    for number, stage in enumerate(stages):
        total, count = 0.0, 0
        for i in range(2):
            objects = truth.boxes_BG4[i][truth.labels_BG[i] >= 0]
            for roi in torch.cat((found.boxes_BR4[i][found.valid_BR[i]], objects)):
                iou = ops.box_iou(roi[None], objects)[0]
                count += 1
                if iou.max() >= stage.iou:
                    total += boxes.encode(objects[iou.argmax()], roi, stage.weights).abs().sum().item()
        assert losses[f"loss_box_{number}"].item() == pytest.approx(total / count / 3, rel=1e-4)


def test_stages_average_their_scores_and_the_last_one_places_the_boxes() -> None:
    stages = [BoxStage(0.5, WEIGHTS), BoxStage(0.6, (20.0, 20.0, 10.0, 10.0))]
    heads = make(stages=stages, class_agnostic=True, score_threshold=0.0, suppression=Suppression(iou=1.0)).eval()
    rois = torch.tensor([[[10.0, 10.0, 50.0, 60.0]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    features = [m[:1] for m in maps()]
    images = ImageBatch(torch.zeros(1, 3, 128, 160, dtype=torch.uint8), SIZES[:1], torch.ones(1))
    (found,) = detect(heads, features, Proposals(rois, valid), images)
    scores, current = [], rois
    for stage, head in zip(stages, heads.heads, strict=True):
        logits, deltas = head(pooling.pool_rois(features, current, valid, strides=STRIDES, size=3))
        scores.append(logits.softmax(dim=1))
        current = boxes.clip(boxes.decode(deltas[:, 0], current[0], stage.weights)[None], SIZES[:1])
    mean = ((scores[0] + scores[1]) / 2)[0, :K]
    torch.testing.assert_close(found.scores_N, mean.sort(descending=True).values)
    torch.testing.assert_close(found.boxes_N4, current[0].expand(K, 4))


def test_head_starts_as_the_reference_has_it() -> None:
    torch.manual_seed(0)
    head = BoxHead(features=256, hidden=128, classes=40, class_agnostic=False)
    assert head.logits.weight.shape == (41, 128)
    assert head.deltas.weight.shape == (160, 128)
    assert head.logits.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.deltas.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert head.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 256), rel=0.01)
    assert all((layer.bias == 0).all() for layer in (head.fc1, head.fc2, head.logits, head.deltas))


def cascade(**options: Any) -> Any:
    stages = [BoxStage(0.5, WEIGHTS), BoxStage(0.6, (20.0, 20.0, 10.0, 10.0)), BoxStage(0.7, (30.0, 30.0, 15.0, 15.0))]
    return make(
        **({"stages": stages, "class_agnostic": True, "samples_per_image": 1000, "positive_fraction": 1.0} | options)
    )


def test_scores_of_the_last_stages_rois() -> None:
    """Every classifier sees the RoIs that two refinements lead to, and none sees its own."""
    heads = cascade(score_threshold=0.0, suppression=Suppression(iou=1.0), score_rois="last").eval()
    rois = torch.tensor([[[10.0, 10.0, 50.0, 60.0]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    features = [m[:1] for m in maps()]
    (found,) = heads.detect_network(features, Proposals(rois, valid), SIZES[:1])
    for stage, head in list(zip(heads.stages, heads.heads, strict=True))[:2]:
        _, deltas = head(pooling.pool_rois(features, rois, valid, strides=STRIDES, size=3))
        rois = boxes.clip(boxes.decode(deltas[:, 0], rois[0], stage.weights)[None], SIZES[:1])
    pooled = pooling.pool_rois(features, rois, valid, strides=STRIDES, size=3)
    mean = torch.stack([head(pooled)[0].softmax(dim=1) for head in heads.heads]).mean(dim=0)[0, :K]
    torch.testing.assert_close(found.scores_N, mean.sort(descending=True).values)
    last = boxes.decode(heads.heads[2](pooled)[1][:, 0], rois[0], heads.stages[2].weights)
    torch.testing.assert_close(found.boxes_N4, boxes.clip(last[None], SIZES[:1])[0].expand(K, 4))
    own = cascade(score_threshold=0.0, suppression=Suppression(iou=1.0)).eval()
    (other,) = own.detect_network(features, Proposals(rois, valid), SIZES[:1])
    assert (other.scores_N - found.scores_N).abs().max() > 1e-3


def test_objects_are_appended_again_at_each_stage() -> None:
    """Stages then have more and more RoIs; a RoI on its object has no distance to go."""
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    heads = cascade(add_objects_each_stage=True, total=note)
    predict_no_shift(heads)
    found, truth = proposals(), targets()
    losses, sampled = heads.losses(maps(), found, SIZES, truth)
    valid = int(found.valid_BR.sum())
    assert counts == [valid + 5, valid + 10, valid + 15]
    assert sampled.valid_BR.sum() == valid + 5
    for number, stage in enumerate(heads.stages):
        total = 0.0
        for i in range(2):
            objects = truth.boxes_BG4[i][truth.labels_BG[i] >= 0]
            for roi in found.boxes_BR4[i][found.valid_BR[i]]:
                iou = ops.box_iou(roi[None], objects)[0]
                if iou.max() >= stage.iou:
                    total += boxes.encode(objects[iou.argmax()], roi, stage.weights).abs().sum().item()
        assert losses[f"loss_box_{number}"].item() == pytest.approx(total / counts[number], rel=1e-4)


def test_refined_rois_without_area_drop_out() -> None:
    counts: list[int] = []

    def note(count: Tensor) -> Tensor:
        counts.append(int(count))
        return count

    heads = cascade(total=note)
    predict_no_shift(heads)
    with torch.no_grad():
        heads.heads[0].deltas.bias[0] = 10.0  # to the right by the RoI's own width
    found, truth = proposals(), targets()
    losses, sampled = heads.losses(maps(), found, SIZES, truth)
    left = sampled.rois_BR4[..., 2] < SIZES[:, 1:]
    assert counts[0] == sampled.valid_BR.sum()
    assert counts[1] == counts[2] == (sampled.valid_BR & left).sum()
    assert counts[1] < counts[0]
    assert all(loss.isfinite() for loss in losses.values())


# What the first stage was trained on


def test_the_sampled_rois_are_those_of_the_loss() -> None:
    heads: Any = make(samples_per_image=16)
    truth = targets()
    losses, sampled = heads.losses(maps(), proposals(), SIZES, truth)
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
    torch.testing.assert_close(heads.classify(maps(), sampled.rois_BR4, sampled.valid_BR), sampled.logits_NK)
    classes = torch.where(sampled.positive_BR, truth.labels_BG.gather(1, sampled.objects_BR), K)
    expected = torch.nn.functional.cross_entropy(
        sampled.logits_NK[sampled.valid_BR.flatten()], classes[sampled.valid_BR]
    )
    torch.testing.assert_close(losses["loss_cls"], expected)
    sampled.logits_NK.sum().backward()
    assert heads.heads[0].fc1.weight.grad is not None
    assert heads.heads[0].fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["random", "first", "libra"])
def test_kinds_of_sampling(kind: Any) -> None:
    heads, found, truth = make(samples_per_image=12, sampling_kind=kind, libra_bins=4), proposals(), targets()
    _, sampled = heads.losses(maps(), found, SIZES, truth)
    rois = torch.cat((found.boxes_BR4, truth.boxes_BG4), dim=1)
    valid = torch.cat((found.valid_BR, truth.labels_BG >= 0), dim=1)
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


def test_pooling_is_as_told() -> None:
    heads, found = make(sampling_ratio=2, aligned=False), proposals()
    options: dict[str, Any] = {"strides": STRIDES, "size": 3, "sampling_ratio": 2, "aligned": False}
    pooled = pooling.pool_rois(maps(), found.boxes_BR4, found.valid_BR, **options)
    torch.testing.assert_close(heads.classify(maps(), found.boxes_BR4, found.valid_BR), heads.heads[0](pooled)[0])
    other = make().classify(maps(), found.boxes_BR4, found.valid_BR)
    assert (other - heads.heads[0](pooled)[0]).abs().max() > 0.01


# Box losses


LOSSES = [
    BoxLoss("l1"),
    BoxLoss("smooth_l1", beta=0.3),
    BoxLoss("balanced_l1", weight=2.0),
    BoxLoss("giou", weight=5.0),
    BoxLoss("ciou", weight=10.0),
    BoxLoss("ciou", weight=10.0, per_positive=True),
]


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_box_losses_are_of_positives_and_their_class(loss: BoxLoss, class_agnostic: bool) -> None:
    heads, truth = make(samples_per_image=40, box_loss=loss, class_agnostic=class_agnostic), targets()
    losses, sampled = heads.losses(maps(), proposals(), SIZES, truth)
    pooled = pooling.pool_rois(maps(), sampled.rois_BR4, sampled.valid_BR, strides=STRIDES, size=3)
    deltas = heads.heads[0](pooled)[1].unflatten(0, (2, -1))
    total, positives = 0.0, 0
    for i, r in sampled.positive_BR.nonzero().tolist():
        index = sampled.objects_BR[i, r]
        row = 0 if class_agnostic else truth.labels_BG[i, index]
        wanted = boxes.encode(truth.boxes_BG4[i, index], sampled.rois_BR4[i, r], WEIGHTS)
        total += loss(deltas[i, r, row][None], wanted[None], WEIGHTS).item()
        positives += 1
    assert positives > 5
    expected = total / sampled.valid_BR.sum().item()
    if loss.per_positive:
        expected *= K / positives
    assert losses["loss_box"].item() == pytest.approx(expected, rel=1e-4)


def test_ranks_agree_on_positives_too() -> None:
    """Where the loss is divided by the positives, they are those of all ranks."""
    found, truth = proposals(), targets()
    options: dict[str, Any] = {"samples_per_image": 20, "box_loss": LOSSES[-1]}
    whole, _ = make(**options).losses(maps(), found, SIZES, truth)
    halves = [
        (
            [m[i : i + 1] for m in maps()],
            Proposals(found.boxes_BR4[i : i + 1], found.valid_BR[i : i + 1]),
            SIZES[i : i + 1],
            Targets(truth.boxes_BG4[i : i + 1], truth.labels_BG[i : i + 1], truth.seeds_B[i : i + 1]),
        )
        for i in range(2)
    ]
    counts: list[Tensor] = []

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    for half in halves:
        make(total=note, **options).losses(*half)
    assert len(counts) == 4  # RoIs and positives of either rank
    sums = [counts[0] + counts[2], counts[1] + counts[3]]
    ranks = []
    for half in halves:
        answers = iter(sums)
        ranks.append(make(total=lambda _, answers=answers: next(answers), world_size=2, **options).losses(*half)[0])
    for name in whole:
        assert (ranks[0][name] + ranks[1][name]).item() / 2 == pytest.approx(whole[name].item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("rois", [0, 30])
def test_no_object_gives_zeros_whatever_is_predicted(loss: BoxLoss, rois: int) -> None:
    heads = cascade(box_loss=loss, add_objects_each_stage=True)
    with torch.no_grad():
        heads.heads[2].deltas.bias.fill_(1e30)  # whose loss is infinite, or whose box has no size
    found = proposals()
    found = Proposals(found.boxes_BR4, found.valid_BR & (torch.arange(30) < rois))
    empty = Targets(torch.zeros(2, 1, 4), torch.full((2, 1), -1), torch.arange(2))
    losses, _ = heads.losses(maps(), found, SIZES, empty)
    assert all(losses[f"loss_box_{number}"].item() == 0 for number in range(3))
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not (".deltas." in name and parameter.grad.any()), name


# Precision


def test_bf16_keeps_geometry_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the heads multiply is bf16: from their deltas on, RoIs are those of float32 arithmetic to the bit."""
    heads = cascade(box_loss=LOSSES[-2])
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
        losses, _ = heads.losses(features, proposals(), SIZES, targets())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for number in range(2):
        assert torch.equal(deltas[number], deltas[number].bfloat16().float()), "the head did compute in bf16"
        start = pooled_from[number]
        moved = boxes.decode(deltas[number][:, 0].view(start.shape), start, heads.stages[number].weights)
        assert pooled_from[number + 1].dtype == torch.float32
        assert torch.equal(pooled_from[number + 1], boxes.clip(moved, SIZES))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in heads.eval().detect_network([m.detach() for m in features], proposals(), SIZES):
            assert found.boxes_N4.dtype == found.scores_N.dtype == torch.float32
