"""A detector under its moving teacher: its average, pseudo-boxes and their certainty, what is learned from which image, and what is left alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import tiny_distillation
import torch
from timm.utils import ModelEmaV3
from tiny_dense import batch as dense_batch
from tiny_dense import detector as dense_detector
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.shared.models.backbones import input_settings
from ssld.stage2_detect.distill_config import MovingTeacherConfig
from ssld.stage2_detect.distillation.losses import adaptive_distillation
from ssld.stage2_detect.distillation.moving import SemiSupervised
from ssld.stage2_detect.distillation.pseudo_boxes import of_class, pseudo_targets, shifted, spread
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.anchors import grids_of
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.mask_targets import ImageMasks
from ssld.stage2_detect.models.rcnn import RCNN

LABELED = 2


def settings(**changes: Any) -> MovingTeacherConfig:
    return MovingTeacherConfig.model_validate({"unlabeled": "photos", "score_threshold": 0.2, **changes})


def last(images: ImageBatch) -> ImageBatch:
    """The unlabeled images, in the weak view that equals the strong one."""
    return ImageBatch(images.pixels_BCHW[LABELED:], images.sizes_B2[LABELED:], images.scales_B[LABELED:])


def inverted(images: ImageBatch) -> ImageBatch:
    """The unlabeled images in a weak view that differs from the strong one."""
    return replace(last(images), pixels_BCHW=255 - last(images).pixels_BCHW)


def under_teacher(student: RCNN | DenseDetector, teacher: Any, config: MovingTeacherConfig) -> SemiSupervised:
    heads = student.roi_heads if isinstance(student, RCNN) else student.dense
    assert config.score_threshold is not None
    thresholds = torch.full((heads.classes,), config.score_threshold)
    return SemiSupervised(student, FrozenDetector(teacher), config, thresholds).train()


# The average


def test_the_teacher_is_a_copy_until_the_burn_in_ends_then_an_average() -> None:
    """The closed form of the average with a decay of 1 - (1 + t)^(-2/3), at most 0.6, t counted from the end of the burn-in."""
    net = torch.nn.Linear(1, 1, bias=False)
    ema = ModelEmaV3(net, decay=0.6, use_warmup=True, update_after_step=3)
    weights = [5.0, -2.0, 7.0, 1.0, 4.0, 9.0, -3.0]
    expected = 0.0
    for step, weight in enumerate(weights, 1):
        with torch.no_grad():
            net.weight.fill_(weight)
        ema.update(net, step=step)
        after = step - 4
        decay = min(0.6, 1 - (1 + after) ** (-2 / 3)) if after > 0 else 0.0
        expected = decay * expected + (1 - decay) * weight
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-6)
        if step <= 4:
            assert ema.module.weight.item() == weight


# Pseudo-boxes


def test_pseudo_boxes_are_the_detections_above_the_threshold_of_their_class() -> None:
    draw = np.random.default_rng(0)
    corners = draw.uniform(0, 20, (2, 9, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + draw.uniform(1, 9, (2, 9, 2)).astype(np.float32)], -1)
    boxes[0, 3, 2] = boxes[0, 3, 0]  # without area
    scores, labels = draw.uniform(0.2, 1, (2, 9)).astype(np.float32), draw.integers(0, 3, (2, 9))
    scores[0, 3], scores[1, 0], labels[1, 0] = 1.0, 0.5, 0
    thresholds = np.array([0.5, 0.9, 0.3], np.float32)
    found = [
        Detections(torch.from_numpy(b), torch.from_numpy(s), torch.from_numpy(k))
        for b, s, k in zip(boxes, scores, labels, strict=True)
    ]
    targets = pseudo_targets(found, torch.from_numpy(thresholds), torch.tensor([4, 5]))
    assert targets.seeds_B.tolist() == [4, 5]
    for image in range(2):
        area = (boxes[image, :, 2] - boxes[image, :, 0]) * (boxes[image, :, 3] - boxes[image, :, 1])
        chosen = (scores[image] >= thresholds[labels[image]]) & (area > 0)
        assert 0 < chosen.sum() < 9
        present = targets.labels_BG[image] >= 0
        assert np.array_equal(targets.boxes_BG4[image][present].numpy(), boxes[image][chosen])
        assert np.array_equal(targets.labels_BG[image][present].numpy(), labels[image][chosen])


def test_shifted_copies_are_uniform_and_depend_on_the_image_alone() -> None:
    boxes = torch.tensor([[[10.0, 20, 30, 60], [0, 0, 8, 4]]]).repeat(2, 1, 1)
    copies = shifted(boxes, torch.tensor([7, 8]), 4000)
    shares = (copies - boxes[:, :, None]) / (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)[:, :, None]
    assert shares.abs().max() <= 0.06
    low, high = shares.flatten(0, 2).amin(0), shares.flatten(0, 2).amax(0)
    assert (low < -0.0599).all()
    assert (high > 0.0599).all()
    assert shares.mean((0, 1, 2)).abs().max() < 0.001
    assert shares.std((0, 1, 2)).numpy() == pytest.approx(np.full(4, 0.12 / np.sqrt(12)), rel=0.02)
    alone = shifted(boxes[1:], torch.tensor([8]), 4000)
    assert torch.equal(alone[0], copies[1])
    assert not torch.equal(copies[0], copies[1])


def test_spread_is_that_of_numpy() -> None:
    draw = np.random.default_rng(1)
    refined = draw.normal(30, 4, (2, 3, 6, 4))
    boxes = np.array([[[0.0, 0, 20, 10], [1, 1, 5, 41], [2, 3, 9, 9]]]).repeat(2, 0)
    sides = boxes[..., 2:] - boxes[..., :2]
    expected = refined.std(axis=2, ddof=1).mean(-1) / (0.5 * (sides[..., 0] + sides[..., 1]))
    actual = spread(torch.from_numpy(refined), torch.from_numpy(boxes))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    boxes_of = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    labels = torch.tensor([[0, 4, 2], [1, 1, -1]])
    chosen = of_class(boxes_of, labels)
    assert torch.equal(chosen[0, 1], boxes_of[0, 1, 4])
    assert torch.equal(of_class(boxes_of[:, :, :1], labels), boxes_of[:, :, 0])


# R-CNN


def rcnn_step(config: MovingTeacherConfig, student: RCNN, teacher: RCNN) -> tuple[SemiSupervised, dict[str, Tensor]]:
    images, targets = tiny_distillation.batch()
    model = under_teacher(student, teacher, config)
    losses = model(images, targets, last(images))
    assert isinstance(losses, dict)
    return model, losses


def test_losses_of_an_rcnn_are_those_on_pseudo_boxes_of_the_weak_view() -> None:
    """From the parts: the teacher's detections as targets of the detector's own losses, without the sides that are uncertain."""
    student, teacher = tiny_distillation.detector(1), tiny_distillation.detector(2)
    config = settings(soft=False, weight=3.0, box_spread=0.034)
    images, targets = tiny_distillation.batch()
    weak = inverted(images)
    model = under_teacher(student, teacher, config)
    losses = model(images, targets, weak)
    assert isinstance(losses, dict)
    with torch.no_grad():
        features = [maps[LABELED:] for maps in student.features(images)]
        guides = teacher.features(weak)
        found = teacher.detect_network(guides, weak)
        pseudo = pseudo_targets(found, torch.full((2,), 0.2), targets.seeds_B[LABELED:])
        copies = shifted(pseudo.boxes_BG4, pseudo.seeds_B, 10)
        certain = torch.zeros_like(pseudo.labels_BG, dtype=torch.bool)
        for image, place in (pseudo.labels_BG >= 0).nonzero().tolist():
            one = copies[image : image + 1, place]
            height, width = weak.sizes_B2[image].tolist()
            one = torch.stack((one[..., 0::2].clamp(0, width), one[..., 1::2].clamp(0, height)), -1).flatten(-2)
            maps = [level[image : image + 1] for level in guides]
            proposals = type(student.rpn(maps, weak.sizes_B2[image : image + 1])[0])(one, torch.ones(1, 10).bool())
            boxes, _ = teacher.roi_heads.score(maps, proposals, weak.sizes_B2[image : image + 1])
            refined = boxes[0, :, pseudo.labels_BG[image, place]].double().numpy()
            x1, y1, x2, y2 = pseudo.boxes_BG4[image, place].tolist()
            certain[image, place] = bool(refined.std(0, ddof=1).mean() / (0.5 * (x2 - x1 + y2 - y1)) < 0.034)
        present = pseudo.labels_BG >= 0
        assert 0 < certain.sum() < present.sum()
        own, _ = student.losses(features, weak.sizes_B2, replace(pseudo, regressed_BG=certain), ONE_RANK)
    for name, value in own.items():
        assert losses[name.replace("loss_", "loss_unlabeled_")].item() == pytest.approx(3 * value.item(), rel=1e-4), (
            name
        )
    assert model.measured["pseudo_boxes"].item() == pytest.approx(present.sum().item() / 2)
    assert model.measured["certain_boxes"].item() == pytest.approx(certain.sum().item() / 2)
    assert 0 <= model.measured["agreement"] <= 1


def test_sides_of_uncertain_boxes_are_not_learned_but_their_class_is() -> None:
    student = tiny_distillation.detector(1).train()
    images, targets = tiny_distillation.batch(labeled=4, unlabeled=0)
    features = [maps.detach() for maps in student.features(images)]
    fitted = torch.zeros_like(targets.labels_BG, dtype=torch.bool)
    results = [
        student.losses(features, images.sizes_B2, replace(targets, regressed_BG=mask), ONE_RANK)[0]
        for mask in (None, ~fitted, fitted)
    ]
    assert {name: value.item() for name, value in results[0].items()} == {n: v.item() for n, v in results[1].items()}
    for name in ("loss_rpn_box", "loss_box"):
        assert results[0][name] > 0
        assert results[2][name] == 0
    for name in ("loss_rpn_cls", "loss_cls"):
        assert results[2][name] == results[0][name]


def test_a_detector_equal_to_its_teacher_has_no_gradient_from_soft_classes() -> None:
    student = tiny_distillation.detector(3)
    _, losses = rcnn_step(settings(), student, tiny_distillation.detector(3))
    assert losses["loss_unlabeled_cls"].item() == pytest.approx(0, abs=1e-7)
    losses["loss_unlabeled_cls"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-7, name
    model, losses = rcnn_step(settings(), tiny_distillation.detector(1), tiny_distillation.detector(3))
    assert losses["loss_unlabeled_cls"] > 1e-3
    assert model.measured["agreement"] < 1


def test_labeled_images_have_the_detectors_own_losses() -> None:
    student = tiny_distillation.detector(1)
    _, losses = rcnn_step(settings(), student, tiny_distillation.detector(2))
    images, targets = tiny_distillation.batch()
    first = ImageBatch(images.pixels_BCHW[:LABELED], images.sizes_B2[:LABELED], images.scales_B[:LABELED])
    own = student.train()(first, targets.first(LABELED))
    for name, value in own.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-7)
    assert losses.keys() == {*own, *(name.replace("loss_", "loss_unlabeled_") for name in own)}


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_masks_are_learned_from_labeled_images_alone(kind: str) -> None:
    torch.manual_seed(0)
    config = DetectorConfig.model_validate(
        tiny_distillation.architecture(16).model_dump() | {"kind": kind, "mask": {"hidden": 8, "convolutions": 1}}
    )
    nets = []
    for _ in range(2):
        body = timm.create_model("test_resnet", features_only=True)
        inputs = input_settings(body, {})
        nets.append(build_detector(config, classes=2, body=body, arch="test_resnet", inputs=inputs))
    images, targets = tiny_distillation.batch()
    polygons = [[[[x1, y1, x2, y1, x2, y2]] for x1, y1, x2, y2 in boxes] for boxes in targets.boxes_BG4.tolist()]
    shapes = tuple(ImageMasks(tuple(one), np.tile(np.eye(2, 3), (3, 1, 1))) for one in polygons)
    student = nets[0]
    assert isinstance(student, RCNN)
    model = under_teacher(student, nets[1], settings())
    losses = model(images, replace(targets, masks=shapes), last(images))
    assert isinstance(losses, dict)
    own = {name for name in losses if "unlabeled" not in name}
    assert losses["loss_mask"] > 0
    assert losses.keys() - own == {name.replace("loss_", "loss_unlabeled_") for name in own - {"loss_mask"}}
    assert len(own) == (5 if kind == "mask_rcnn" else 9)


def test_without_unlabeled_images_it_is_the_detector() -> None:
    student = tiny_distillation.detector(1)
    model = under_teacher(student, tiny_distillation.detector(2), settings())
    images, targets = tiny_distillation.batch(labeled=4, unlabeled=0)
    assert {name: value.item() for name, value in model(images, targets).items()} == {
        name: value.item() for name, value in student(images, targets).items()
    }
    assert model.measured == {}
    assert len(model.eval()(images)) == 4


def test_no_pseudo_box_is_no_fault_of_a_step() -> None:
    model, losses = rcnn_step(
        settings(score_threshold=1.0), tiny_distillation.detector(1), tiny_distillation.detector(2)
    )
    assert model.measured["pseudo_boxes"] == 0
    assert losses["loss_unlabeled_box"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(value) for value in losses.values())


def test_the_teacher_is_outside_of_the_module() -> None:
    teacher = tiny_distillation.detector(2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    model, losses = rcnn_step(settings(), tiny_distillation.detector(1), teacher)
    torch.stack(list(losses.values())).sum().backward()
    assert {name.split(".")[0] for name in model.state_dict()} == {"student"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


# One-stage detectors


def dense_step(
    kind: str, config: MovingTeacherConfig, seeds: tuple[int, int]
) -> tuple[SemiSupervised, dict[str, Tensor]]:
    images, targets = dense_batch(4)
    targets = replace(targets, labeled_B=torch.arange(4) < LABELED)
    model = under_teacher(dense_detector(kind, seeds[0]), dense_detector(kind, seeds[1]), config)
    losses = model(images, targets, last(images))
    assert isinstance(losses, dict)
    return model, losses


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_losses_of_one_stage_detectors_are_their_formulas(kind: str) -> None:
    config = settings(weight=2.0, dense_share=0.05, score_threshold=0.015)
    images, targets = dense_batch(4)
    weak = inverted(images)
    student, teacher = dense_detector(kind, 0), dense_detector(kind, 1)
    model = under_teacher(student, teacher, config)
    losses = model(images, replace(targets, labeled_B=torch.arange(4) < LABELED), weak)
    assert isinstance(losses, dict)
    with torch.no_grad():
        features, guides = student.features(last(images)), teacher.features(weak)
        grids = grids_of(features)
        (logits, values), (guide_logits, guide_values) = student.dense(features), teacher.dense(guides)
        every = torch.arange(logits.shape[1]).expand(2, -1)
        boxes, guide_boxes = (student.dense.decode(v, every, grids).double().numpy() for v in (values, guide_values))
    p, q = (1 / (1 + np.exp(-one.double().numpy())) for one in (logits, guide_logits))
    quality = (q - p) ** 2 * -(q * np.log(p) + (1 - q) * np.log(1 - p))
    best = q.max(-1)
    total = giou_total = mass = 0.0
    for image in range(2):
        region = np.argsort(-best[image], kind="stable")[: int(np.ceil(0.05 * best.shape[1]))]
        a, b = boxes[image][region], guide_boxes[image][region]
        shared = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
        around = (np.maximum(a[:, 2:], b[:, 2:]) - np.minimum(a[:, :2], b[:, :2])).prod(1)
        union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
        giou_total += (best[image][region] * (1 - shared / union + (around - union) / around)).sum()
        mass += best[image][region].sum()
        total += quality[image].sum()
    assert mass > 1, best
    assert losses["loss_unlabeled_cls"].item() == pytest.approx(2 * total / mass, rel=1e-3)
    assert losses["loss_unlabeled_box"].item() == pytest.approx(2 * giou_total / mass, rel=1e-3)
    assert model.measured["pseudo_boxes"] > 0


def test_adaptive_weighting_is_that_of_adl() -> None:
    model, losses = dense_step(
        "retinanet", settings(dense_loss="adaptive", adl={"form": "code", "weight": 0.5}, weight=1), (0, 1)
    )
    images, _ = dense_batch(4)
    weak = last(images)
    student, teacher = model.student, model.teacher.model
    assert isinstance(student, DenseDetector)
    assert isinstance(teacher, DenseDetector)
    with torch.no_grad():
        logits, guides = (net.dense(net.features(weak))[0] for net in (student, teacher))
        loss = adaptive_distillation(logits, guides, form="code").sum() / (guides.double().sigmoid() ** 1.8).sum()
    assert losses["loss_unlabeled_cls"].item() == pytest.approx(0.5 * loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_unlabeled_images_weigh_a_quarter_under_one_stage_detectors(kind: str) -> None:
    assert settings(weight=None).unlabeled_weight(dense=False) == 1
    (_, usual), (_, whole) = (dense_step(kind, settings(weight=weight), (0, 1)) for weight in (None, 1))
    for name, loss in usual.items():
        factor = 0.25 if name.startswith("loss_unlabeled_") else 1
        assert loss.item() == pytest.approx(factor * whole[name].item(), rel=1e-6)


@pytest.mark.parametrize(("kind", "loss"), [("gfl", "quality"), ("retinanet", "quality"), ("retinanet", "adaptive")])
def test_a_dense_detector_equal_to_its_teacher_has_no_gradient(kind: str, loss: str) -> None:
    model, losses = dense_step(kind, settings(dense_loss=loss), (3, 3))
    parts = [value for name, value in losses.items() if "unlabeled" in name]
    torch.stack(parts).sum().backward()
    assert model.measured["agreement"] in (0, 1)
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", ["rcnn", "gfl"])
def test_two_ranks_divide_by_common_counts(kind: str) -> None:
    """On two ranks with one unlabeled image each, the mean of the losses is the loss on both images at once."""

    def step(some: list[int], ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images, targets = tiny_distillation.batch() if kind == "rcnn" else dense_batch(4)
        order = torch.tensor([0, *some] if len(some) == 1 else [0, 1, *some])
        part = ImageBatch(images.pixels_BCHW[order], images.sizes_B2[order], images.scales_B[order])
        chosen = Targets(targets.boxes_BG4[order], targets.labels_BG[order], targets.seeds_B[order])
        chosen = replace(chosen, labeled_B=order < LABELED)
        weak = ImageBatch(images.pixels_BCHW[some], images.sizes_B2[some], images.scales_B[some])
        config = settings() if kind == "rcnn" else settings(dense_share=0.05)
        nets = [tiny_distillation.detector(seed) if kind == "rcnn" else dense_detector("gfl", seed) for seed in (1, 2)]
        nets[0].ranks = ranks
        model = under_teacher(nets[0], nets[1], config)
        losses = model(part, chosen, weak)
        assert isinstance(losses, dict)
        return {name: value for name, value in losses.items() if "unlabeled" in name}, model.measured

    seen: list[list[Tensor]] = [[], []]
    for rank in (0, 1):
        step([LABELED + rank], Ranks(2, lambda value, rank=rank: seen[rank].append(value) or value))  # type: ignore[misc, func-returns-value]

    def totals(rank: int) -> Ranks:
        sums: Iterator[Tensor] = iter([a + b for a, b in zip(*seen, strict=True)])
        return Ranks(2, lambda _: next(sums))

    parts = [step([LABELED + rank], totals(rank)) for rank in (0, 1)]
    whole, measured = step([LABELED, LABELED + 1], ONE_RANK)
    for name, value in whole.items():
        mean = (parts[0][0][name] + parts[1][0][name]) / 2
        assert mean.item() == pytest.approx(value.item(), rel=1e-4), name
    for name, value in measured.items():
        assert parts[0][1][name].item() == parts[1][1][name].item() == pytest.approx(value.item()), name
