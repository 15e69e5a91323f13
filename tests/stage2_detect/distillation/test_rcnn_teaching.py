"""A detector under its teacher: what is learnt from which image; the teacher stays frozen, and outside of what is saved and evaluated."""

import numpy as np
import pytest
import torch
from tiny_distillation import batch, detector
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK
from ssld.stage2_detect.distillation.losses import inside_maps
from ssld.stage2_detect.distillation.rcnn import DistilledRCNN
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.rcnn import RCNN


def first(images: ImageBatch, count: int) -> ImageBatch:
    return ImageBatch(images.pixels_BCHW[:count], images.sizes_B2[:count], images.scales_B[:count])


# What is learnt from which image


@pytest.mark.parametrize("fpn_channels", [16, 24])
def test_the_terms_are_those_of_the_definition(fpn_channels: int) -> None:
    student, teacher = detector(1), FrozenDetector(detector(2, fpn_channels))
    model = DistilledRCNN(student, teacher, pkd_weight=2.0, roi_weight=3.0, temperature=1.5).train()
    assert len(model.maps.adapters) == (4 if fpn_channels == 24 else 0)
    images, targets = batch()
    losses = model(images, targets)
    with torch.no_grad():
        features, guides = student.features(images), teacher.features(images)
        assert [guide.shape[1] for guide in guides] == [fpn_channels] * 5
        correlation = 0.0
        for level, stride in enumerate((4, 8, 16, 32)):
            maps = model.maps.adapters[level](features[level]) if model.maps.adapters else features[level]
            mask = inside_maps(images.sizes_B2, maps, stride).numpy()
            s, t = (x.double().numpy().transpose(1, 0, 2, 3)[:, mask] for x in (maps, guides[level]))
            correlation += np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
        assert losses["loss_pkd"].item() == pytest.approx(2 * correlation, rel=1e-4)

        assert isinstance(teacher.model, RCNN)
        own = [maps[:2] for maps in features]
        _, (sampled, _) = student.losses(own, images.sizes_B2[:2], targets.first(2), ONE_RANK)
        proposals, _ = student.rpn([maps[2:] for maps in features], images.sizes_B2[2:])
        best = proposals.boxes_BR4[:, :24], proposals.valid_BR[:, :24]
        total, count = 0.0, 0
        for rois, valid, images_of in ((sampled.rois_BR4, sampled.valid_BR, slice(2)), (*best, slice(2, 4))):
            s, t = (
                one.roi_heads.classify([level[images_of] for level in maps], rois, valid).double().numpy() / 1.5
                for one, maps in ((student, features), (teacher.model, guides))
            )
            log_s, log_t = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (s, t))
            divergence = 0.5 * ((np.exp(log_t) - np.exp(log_s)) * (log_t - log_s)).sum(1)
            total += 1.5**2 * divergence[valid.flatten().numpy()].sum()
            count += int(valid.sum())
        assert count > 50
        assert losses["loss_roi_kd"].item() == pytest.approx(3 * total / count, rel=1e-4)


def test_each_term_can_be_left_out() -> None:
    images, targets = batch()
    for pkd_weight, cwd_weight, roi_weight, extra in (
        (1.0, 0.0, 0.0, {"loss_pkd"}),
        (0.0, 1.0, 0.0, {"loss_cwd"}),
        (0.0, 0.0, 1.0, {"loss_roi_kd"}),
    ):
        weights = {"pkd_weight": pkd_weight, "cwd_weight": cwd_weight, "roi_weight": roi_weight}
        model = DistilledRCNN(detector(1), FrozenDetector(detector(2, 24)), **weights)
        assert len(model.maps.adapters) == (0 if roi_weight else 4)
        losses = model.train()(images, targets)
        assert losses.keys() == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"} | extra


def test_unlabeled_images_add_nothing_to_the_students_own_losses() -> None:
    images, targets = batch()
    student = detector(1).train()
    alone = student(first(images, 2), targets.first(2))
    torch.stack(list(alone.values())).sum().backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student = detector(1)
    both = DistilledRCNN(student, FrozenDetector(detector(2))).train()(images, targets)
    torch.stack([both[name] for name in alone]).sum().backward()
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-6, atol=1e-7)
    for name, parameter in student.named_parameters():
        reference = expected[name]
        if reference is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-6)


def test_their_annotations_are_not_looked_at() -> None:
    images, targets = batch()
    blank = Targets(targets.boxes_BG4.clone(), targets.labels_BG.clone(), targets.seeds_B, labeled_B=targets.labeled_B)
    blank.boxes_BG4[2:], blank.labels_BG[2:] = 0.0, -1
    results = [
        DistilledRCNN(detector(1), FrozenDetector(detector(2))).train()(images, some) for some in (targets, blank)
    ]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_unlabeled_images_do_teach() -> None:
    images, targets = batch()
    teacher = FrozenDetector(detector(2))

    def gradient(count: int) -> Tensor:
        student = detector(1)
        model = DistilledRCNN(student, teacher, pkd_weight=1.0, roi_weight=1.0).train()
        losses = model(first(images, count), targets.first(count))
        (losses["loss_pkd"] + losses["loss_roi_kd"]).backward()
        grad = student.pyramid.fpn.layer_blocks[0][0].weight.grad
        assert grad is not None
        return grad

    assert not torch.allclose(gradient(2), gradient(4), rtol=0.1)


def test_a_batch_without_labels_or_in_the_wrong_order_is_a_mistake_of_the_caller() -> None:
    images, targets = batch()
    model = DistilledRCNN(detector(1), FrozenDetector(detector(2))).train()
    for flags in ([False, True, True, True], [False] * 4):
        wrong = Targets(targets.boxes_BG4, targets.labels_BG, targets.seeds_B, labeled_B=torch.tensor(flags))
        with pytest.raises(AssertionError):
            model(images, wrong)
    whole = Targets(targets.boxes_BG4, targets.labels_BG, targets.seeds_B)
    assert "loss_pkd" in model(images, whole)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    images, targets = batch()
    losses = DistilledRCNN(detector(3).eval(), FrozenDetector(detector(3)))
    losses.training = True  # the student stays in evaluation mode, with the statistics its teacher uses
    values = losses(images, targets)
    assert values["loss_pkd"].item() == pytest.approx(0, abs=1e-5)
    assert values["loss_roi_kd"].item() == pytest.approx(0, abs=1e-8)


# The teacher is furniture


def test_the_teacher_stays_frozen_and_outside() -> None:
    teacher_model = detector(2, 24)
    before = {name: tensor.clone() for name, tensor in teacher_model.state_dict().items()}
    model = DistilledRCNN(detector(1), FrozenDetector(teacher_model)).train()
    assert not teacher_model.training
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "maps"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student", "maps"}
    images, targets = batch()
    torch.stack(list(model(images, targets).values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher_model.state_dict().items())
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in model.maps.adapters)  # type: ignore[union-attr, operator]


def test_in_evaluation_it_is_the_student() -> None:
    images, _ = batch()
    student = detector(1).eval()
    expected = student(images)
    actual = DistilledRCNN(student, FrozenDetector(detector(2))).eval()(images)
    assert [len(one.scores_N) for one in actual] == [len(one.scores_N) for one in expected]
    assert all(torch.equal(a.boxes_N4, b.boxes_N4) for a, b in zip(actual, expected, strict=True))
