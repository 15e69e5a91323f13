"""A dense student under a teacher: what its terms are made of, what they do not depend on, and what is never saved."""

import math

import numpy as np
import pytest
import torch
from tiny_dense import K, batch, detector

from ssld.shared.distributed.ranks import Ranks
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.distillation.adl import ADL
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.losses import (
    adaptive_distillation,
    localization_distillation,
    soft_divergence,
)
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.dense import HeadPass, grids_of
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.retinanet import RetinaNet


def test_terms_of_ld_are_their_formulas() -> None:
    student, teacher = detector("gfl", 0), detector("gfl", 1)
    terms = LDConfig(kd_vlr_weight=3.0, imitation_weight=0.5, imitated_cells="inside", normalization="reference")
    model = DistilledDense(student, FrozenDetector(teacher), terms).train()
    images, targets = batch()
    losses = model(images, targets)
    assert isinstance(losses, dict)
    with torch.no_grad():
        features, teacher_features = student.features(images), teacher.features(images)
        (logits, bins), (teacher_logits, teacher_bins) = student.dense(features), teacher.dense(teacher_features)
        grids = grids_of(features)
        assert isinstance(student.dense, GFL)
        assigned, thresholds = student.dense.assign(grids, images.sizes_B2, targets)
        anchors = student.dense.anchors(grids, torch.device("cpu"))
        region = regions.valuable_region(anchors, targets.boxes_BG4, thresholds.region_BG)
        positive = assigned.labels_BA == 1
        ld = localization_distillation(bins, teacher_bins, 10.0)
        kd = soft_divergence(logits, teacher_logits, 2.0)
        inside = regions.inside_objects(anchors, targets.boxes_BG4, targets.labels_BG >= 0)
        level = torch.cat([torch.full((rows * columns,), number) for number, (rows, columns) in enumerate(grids)])
        error = torch.cat(
            [(a - b).square().mean(1).flatten(1) for a, b in zip(features, teacher_features, strict=True)], dim=1
        )

        def means(values: torch.Tensor, chosen: torch.Tensor) -> float:
            return sum(
                values[chosen & (level == number)].mean().item()
                for number in range(5)
                if (chosen & (level == number)).any()
            )

        assert positive.any()
        assert (region > 0).any()
        expected = {
            "loss_ld": 0.25 * (student.dense.scores(logits) * ld)[positive].sum().item(),
            "loss_ld_vlr": 0.25 / 4 * (region * ld).sum().item(),
            "loss_kd": 10 * means(kd, positive),
            "loss_kd_vlr": 3 * means(kd, region > 0),
            "loss_imitation": 0.5 * means(error, inside),
        }
    assert {name: losses[name].item() for name in expected} == {
        name: pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }
    assert set(losses) == {*expected, "loss_cls", "loss_box", "loss_dfl"}


def test_global_is_the_reference_at_two_images_and_does_not_grow_with_more() -> None:
    student, teacher = detector("gfl", 0), detector("gfl", 1)
    results = {}
    for images in (2, 6):
        for normalization in ("global", "reference"):
            terms = LDConfig(normalization=normalization)
            losses = DistilledDense(student, FrozenDetector(teacher), terms).train()(*batch(images))
            assert isinstance(losses, dict)
            results[images, normalization] = {name: loss.item() for name, loss in losses.items()}
    assert results[2, "global"] == pytest.approx(results[2, "reference"], rel=1e-5)
    assert results[6, "global"] == pytest.approx(results[2, "global"], rel=1e-4)
    assert results[6, "reference"]["loss_ld"] == pytest.approx(3 * results[2, "reference"]["loss_ld"], rel=1e-4)


def test_terms_on_all_negatives_and_on_general_instances() -> None:
    student, teacher = detector("gfl", 0), detector("gfl", 1)
    terms = LDConfig(
        valuable_region="negatives",
        ld_weight=0,
        kd_weight=0,
        imitation_weight=0.5,
        imitated_cells="gi",
        normalization="reference",
    )
    images, targets = batch()
    losses = DistilledDense(student, FrozenDetector(teacher), terms).train()(images, targets)
    assert isinstance(losses, dict)
    with torch.no_grad():
        features, teacher_features = student.features(images), teacher.features(images)
        (logits, bins), (teacher_logits, teacher_bins) = student.dense(features), teacher.dense(teacher_features)
        grids = grids_of(features)
        assert isinstance(student.dense, GFL)
        labels = student.dense.assign(grids, images.sizes_B2, targets)[0].labels_BA
        ld = localization_distillation(bins, teacher_bins, 10.0)
        assert losses["loss_ld_vlr"].item() == pytest.approx(
            0.25 / 4 * (logits.sigmoid().amax(-1) * ld)[labels == 0].sum().item(), rel=1e-4
        )
        counts = [rows * columns for rows, columns in grids]
        every = torch.arange(sum(counts)).expand(2, -1)
        boxes = [student.dense.decode(values, every, grids) for values in (bins, teacher_bins)]
        cells = regions.general_instances(logits, teacher_logits, boxes[0], boxes[1], counts)
        error = torch.cat(
            [(a - b).square().mean(1).flatten(1) for a, b in zip(features, teacher_features, strict=True)], dim=1
        )
        means = [
            e[c].mean().item() for e, c in zip(error.split(counts, dim=1), cells.split(counts, dim=1), strict=True)
        ]
    assert losses["loss_imitation"].item() == pytest.approx(0.5 * sum(means), rel=1e-4)


@pytest.mark.parametrize("form", ["paper", "code", "focal"])
def test_adaptive_distillation_counts_all_but_ignored_anchors(form: str) -> None:
    student, teacher = detector("retinanet", 0), detector("retinanet", 1)
    model = DistilledDense(student, FrozenDetector(teacher), ADLConfig(weight=2.0, form=form)).train()
    images, targets = batch()
    losses = model(images, targets)
    assert isinstance(losses, dict)
    with torch.no_grad():
        features = student.features(images)
        logits, _ = student.dense(features)
        teacher_logits, _ = teacher.dense(teacher.features(images))
        assigned = student.dense.assign(grids_of(features), images.sizes_B2, targets)
        counts = assigned.labels_BA >= 0
        assert not counts.all()
        loss = adaptive_distillation(logits, teacher_logits, form=form)[counts].sum()  # type: ignore[arg-type]
        mass = (teacher_logits.double().sigmoid() ** 1.8).sum()
    assert losses["loss_adl"].item() == pytest.approx(2 * loss.item() / mass.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("gfl", LDConfig(imitation_weight=1.0)),
        ("gfl", LDConfig(imitation_weight=1.0, imitated_cells="gi")),
        ("retinanet", ADLConfig()),
    ],
)
def test_a_student_equal_to_its_teacher_learns_nothing_from_it(kind: str, terms: LDConfig | ADLConfig) -> None:
    student, teacher = detector(kind, 0), detector(kind, 0)
    losses = DistilledDense(student, FrozenDetector(teacher), terms).train()(*batch())
    assert isinstance(losses, dict)
    own = {"loss_cls", "loss_box", "loss_dfl"}
    of_the_teacher = [loss for name, loss in losses.items() if name not in own]
    assert len(of_the_teacher) == (4 if kind == "gfl" else 1)
    torch.stack(of_the_teacher).sum().backward()
    assert max(loss.item() for loss in of_the_teacher) < 1e-5
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-4


@pytest.mark.parametrize(("kind", "terms"), [("gfl", LDConfig()), ("retinanet", ADLConfig())])
def test_no_object_in_the_batch_is_finite_and_every_head_has_a_gradient(kind: str, terms: LDConfig | ADLConfig) -> None:
    student, teacher = detector(kind, 0), detector(kind, 1)
    images, targets = batch()
    nothing = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0).long(), targets.seeds_B)
    losses = DistilledDense(student, FrozenDetector(teacher), terms).train()(images, nothing)
    assert isinstance(losses, dict)
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in student.dense.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_teacher_is_no_part_of_the_module() -> None:
    student, teacher = detector("gfl", 0), detector("gfl", 1)
    model = DistilledDense(student, FrozenDetector(teacher), LDConfig())
    assert {name.removeprefix("student.") for name in model.state_dict()} == set(student.state_dict())
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in student.parameters())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    model.eval()
    assert len(model(batch()[0])) == 2


@pytest.mark.parametrize("normalization", ["global", "rank"])
def test_the_adaptive_loss_on_two_ranks(normalization: str) -> None:
    """Two processes whose teachers are sure of 3 and of 5 classes: divided by the mean of both, or each by its own."""
    grids = [(2, 2), (1, 1), (1, 1), (1, 1), (1, 1)]
    anchors = 9 * 8
    head, ranks = RetinaNet(classes=K, channels=16), Ranks(2, lambda mass: mass.new_tensor(8.0))
    teacher = torch.full((1, anchors, K), -100.0)
    teacher[0, :3, 0] = 100.0
    student = torch.full((1, anchors, K), -100.0)
    student[0, :3, 0] = 2.0
    features = [torch.empty(1, 1, *grid) for grid in grids]
    learns, teaches = (HeadPass(features, (logits, torch.zeros(1, anchors, 4))) for logits in (student, teacher))
    nothing = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), torch.zeros(1).long())
    term = ADLConfig(weight=0.5, normalization=normalization)
    losses = ADL(term, head, ranks).losses(learns, teaches, torch.tensor([[16, 16]]), nothing)
    # A sure teacher leaves the focal loss, (1 - p)^2 * -log p, p = sigmoid(2), for three classes.
    p = 1 / (1 + math.exp(-2))
    one = 3 * (1 - p) ** 2 * -math.log(p)
    assert losses["loss_adl"].item() == pytest.approx(0.5 * (one * 2 / 8 if normalization == "global" else one / 3), rel=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "terms"), [("gfl", LDConfig(imitation_weight=1.0, kd_vlr_weight=1.0)), ("retinanet", ADLConfig())]
)
def test_autocast_leaves_losses_in_float32(kind: str, terms: LDConfig | ADLConfig) -> None:
    student, teacher = detector(kind, 0), detector(kind, 1)
    on = {"pkd_weight": 1.0, "cwd_weight": 1.0, "cwd_class_weight": 1.0}
    model = DistilledDense(student, FrozenDetector(teacher), terms, **on).train()
    plain = model(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert isinstance(losses, dict)
    assert isinstance(plain, dict)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(plain[name].item(), rel=0.1), name
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and not name.startswith("pyramid.body"):
            assert parameter.grad is not None, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("kind", "terms"), [("gfl", LDConfig()), ("retinanet", ADLConfig())])
def test_cwd_of_class_maps_takes_each_class_of_each_anchor_as_a_channel(kind: str, terms: LDConfig | ADLConfig) -> None:
    student, teacher = detector(kind, 0), detector(kind, 1)
    model = DistilledDense(student, FrozenDetector(teacher), terms, cwd_class_weight=3.0, cwd_temperature=2.0).train()
    images, targets = batch()
    losses = model(images, targets)
    assert isinstance(losses, dict)
    expected = 0.0
    with torch.no_grad():
        features = student.features(images)
        grids = grids_of(features)
        pairs = [one.dense(one.features(images))[0].double() for one in (student, teacher)]
        start, per_cell = 0, pairs[0].shape[1] // sum(rows * columns for rows, columns in grids)
        for (rows, columns), stride in zip(grids, student.pyramid.strides, strict=True):
            end = start + rows * columns * per_cell
            for image, (height, width) in enumerate(images.sizes_B2.tolist()):
                y, x = np.divmod(np.arange(rows * columns), columns)
                shown = (y * stride < height) & (x * stride < width)
                s, t = (one[image, start:end].reshape(rows * columns, -1).numpy()[shown] / 2 for one in pairs)
                p, q = (np.exp(one) / np.exp(one).sum(0) for one in (s, t))
                expected += 4 * (q * np.log(q / p)).sum(0).mean() / len(images.sizes_B2)
            start = end
    assert losses["loss_cwd_class"].item() == pytest.approx(3 * expected, rel=1e-3)
