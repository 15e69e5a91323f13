"""A detector under its teacher: what is learnt from which image, what is saved, what a teacher may be, and the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from shared.backbones import input_settings
from shared.errors import UserError
from shared.model_file import read_metadata
from stage2_detect import train
from stage2_detect.coco import read_coco
from stage2_detect.config import ResizeConfig
from stage2_detect.detector_file import load_detector, save_detector
from stage2_detect.distillation import DistilledDetector, inside_maps
from stage2_detect.model_config import DetectorConfig
from stage2_detect.models.batch import ImageBatch, Targets
from stage2_detect.models.build import build_detector
from stage2_detect.models.rcnn import RCNN
from stage2_detect.teacher_detector import FrozenDetector, open_teacher

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def architecture(fpn_channels: int) -> DetectorConfig:
    return DetectorConfig(
        fpn_channels=fpn_channels,
        rpn={"anchor_sizes": [8, 16, 32, 64, 128], "samples": 32, "train_post_nms": 40, "val_post_nms": 30},
        roi={"hidden": 32, "samples": 24},
    )


def detector(seed: int, fpn_channels: int = 16) -> RCNN:
    """Random weights whose answers are far from uniform, with channels of different means in the maps."""
    torch.manual_seed(seed)
    body = timm.create_model("test_resnet", features_only=True)
    inputs = input_settings(body, {})
    model = build_detector(architecture(fpn_channels), classes=2, body=body, arch="test_resnet", inputs=inputs)
    assert isinstance(model, RCNN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("roi_heads") and ".logits." in name:
                parameter.normal_(std=0.5)
    return model


def batch(labelled: int = 2, unlabelled: int = 2, seed: int = 0) -> tuple[ImageBatch, Targets]:
    """Pictures of unequal sizes; the unlabelled ones come with objects that nobody may look at."""
    generator = torch.Generator().manual_seed(seed)
    count = labelled + unlabelled
    pixels = torch.randint(0, 256, (count, 3, 64, 96), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 96], [64, 70], [40, 64]])[:count]
    corners = torch.rand(count, 3, 2, generator=generator) * 30
    sides = 8 + torch.rand(count, 3, 2, generator=generator) * 24
    targets = Targets(
        torch.cat((corners, corners + sides), dim=-1),
        torch.randint(0, 2, (count, 3), generator=generator),
        torch.arange(count) + 17,
        labelled_B=torch.arange(count) < labelled,
    )
    return ImageBatch(pixels, sizes, torch.ones(count)), targets


def first(images: ImageBatch, count: int) -> ImageBatch:
    return ImageBatch(images.pixels_BCHW[:count], images.sizes_B2[:count], images.scales_B[:count])


# What is learnt from which image


@pytest.mark.parametrize("fpn_channels", [16, 24])
def test_the_terms_are_those_of_the_definition(fpn_channels: int) -> None:
    student, teacher = detector(1), FrozenDetector(detector(2, fpn_channels))
    model = DistilledDetector(student, teacher, pkd_weight=2.0, roi_weight=3.0, temperature=1.5).train()
    assert len(model.adapters) == (4 if fpn_channels == 24 else 0)
    images, targets = batch()
    losses = model(images, targets)
    with torch.no_grad():
        features, guides = student.features(images), teacher.features(images)
        assert [guide.shape[1] for guide in guides] == [fpn_channels] * 5
        correlation = 0.0
        for level, stride in enumerate((4, 8, 16, 32)):
            maps = model.adapters[level](features[level]) if model.adapters else features[level]
            mask = inside_maps(images.sizes_B2, maps, stride).numpy()
            s, t = (x.double().numpy().transpose(1, 0, 2, 3)[:, mask] for x in (maps, guides[level]))
            correlation += np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
        assert losses["loss_pkd"].item() == pytest.approx(2 * correlation, rel=1e-4)

        assert isinstance(teacher.model, RCNN)
        own = [maps[:2] for maps in features]
        _, sampled = student.losses(own, images.sizes_B2[:2], targets.first(2))
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
    for pkd_weight, roi_weight, extra in ((1.0, 0.0, {"loss_pkd"}), (0.0, 1.0, {"loss_roi_kd"})):
        model = DistilledDetector(
            detector(1), FrozenDetector(detector(2, 24)), pkd_weight=pkd_weight, roi_weight=roi_weight
        )
        assert len(model.adapters) == (4 if pkd_weight else 0)
        losses = model.train()(images, targets)
        assert losses.keys() == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"} | extra


def test_unlabelled_images_add_nothing_to_the_students_own_losses() -> None:
    images, targets = batch()
    student = detector(1).train()
    alone = student(first(images, 2), targets.first(2))
    torch.stack(list(alone.values())).sum().backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student = detector(1)
    both = DistilledDetector(student, FrozenDetector(detector(2))).train()(images, targets)
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
    blank = Targets(
        targets.boxes_BG4.clone(), targets.labels_BG.clone(), targets.seeds_B, labelled_B=targets.labelled_B
    )
    blank.boxes_BG4[2:], blank.labels_BG[2:] = 0.0, -1
    results = [
        DistilledDetector(detector(1), FrozenDetector(detector(2))).train()(images, some) for some in (targets, blank)
    ]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_unlabelled_images_do_teach() -> None:
    images, targets = batch()
    teacher = FrozenDetector(detector(2))

    def gradient(count: int) -> Tensor:
        student = detector(1)
        model = DistilledDetector(student, teacher, pkd_weight=1.0, roi_weight=1.0).train()
        losses = model(first(images, count), targets.first(count))
        (losses["loss_pkd"] + losses["loss_roi_kd"]).backward()
        grad = student.pyramid.fpn.layer_blocks[0][0].weight.grad
        assert grad is not None
        return grad

    assert not torch.allclose(gradient(2), gradient(4), rtol=0.1)


def test_a_batch_without_labels_or_in_the_wrong_order_is_a_mistake_of_the_caller() -> None:
    images, targets = batch()
    model = DistilledDetector(detector(1), FrozenDetector(detector(2))).train()
    for flags in ([False, True, True, True], [False] * 4):
        wrong = Targets(targets.boxes_BG4, targets.labels_BG, targets.seeds_B, labelled_B=torch.tensor(flags))
        with pytest.raises(AssertionError):
            model(images, wrong)
    whole = Targets(targets.boxes_BG4, targets.labels_BG, targets.seeds_B)
    assert "loss_pkd" in model(images, whole)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    images, targets = batch()
    losses = DistilledDetector(detector(3).eval(), FrozenDetector(detector(3)))
    losses.training = True  # the student stays in evaluation mode, with the statistics its teacher uses
    values = losses(images, targets)
    assert values["loss_pkd"].item() == pytest.approx(0, abs=1e-5)
    assert values["loss_roi_kd"].item() == pytest.approx(0, abs=1e-8)


# The teacher is furniture


def test_the_teacher_stays_frozen_and_outside() -> None:
    teacher_model = detector(2, 24)
    before = {name: tensor.clone() for name, tensor in teacher_model.state_dict().items()}
    model = DistilledDetector(detector(1), FrozenDetector(teacher_model)).train()
    assert not teacher_model.training
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "adapters"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student", "adapters"}
    images, targets = batch()
    torch.stack(list(model(images, targets).values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher_model.state_dict().items())
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in model.adapters)  # type: ignore[union-attr, operator]


def test_in_evaluation_it_is_the_student() -> None:
    images, _ = batch()
    student = detector(1).eval()
    expected = student(images)
    found = DistilledDetector(student, FrozenDetector(detector(2))).eval()(images)
    assert [len(one.scores_N) for one in found] == [len(one.scores_N) for one in expected]
    assert all(torch.equal(a.boxes_N4, b.boxes_N4) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def teacher_detector(tiny_coco: Any, tmp_path: Path) -> Path:
    """A teacher's file: wider maps, its own mean, the classes in another order than the training set's."""
    model = detector(2, 24)
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True, class_names=["tall", "wide"])
    return write_teacher(tmp_path / "teacher.safetensors", model, data)


def write_teacher(path: Path, model: RCNN, data: Any) -> Path:
    body = timm.create_model("test_resnet", features_only=True)
    inputs = input_settings(body, {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.3, 0.4], "input_size": [3, 64, 64]})
    config, resize = architecture(24), ResizeConfig(val_short_side=64, val_long_side=64)
    save_detector(
        path, model, config=config, resize=resize, arch="test_resnet", inputs=inputs, data=data, licence="mit"
    )
    return path


def test_a_teacher_answers_in_the_students_class_order_and_with_its_own_mean(teacher_detector: Path) -> None:
    model = load_detector(teacher_detector).model
    assert isinstance(model, RCNN)
    assert model.mean_C11.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
    images, _ = batch()
    asked: Settings = {"device": torch.device("cpu"), "channels_last": False}
    teacher = open_teacher(teacher_detector, ["wide", "tall"], (4, 8, 16, 32, 64), **asked)
    features = teacher.features(images)
    torch.testing.assert_close(
        features[0], model.features(images)[0], rtol=1e-4, atol=1e-5
    )  # the teacher's norm is folded
    rois = torch.tensor([[5.0, 5, 40, 40], [10, 3, 60, 30]]).repeat(4, 1, 1)
    valid = torch.ones(4, 2, dtype=torch.bool)
    mapped, own = teacher.classify(features, rois, valid), model.roi_heads.classify(features, rois, valid)
    torch.testing.assert_close(mapped, own[:, [1, 0, 2]])
    assert teacher.facts["licence"] == "mit"
    with pytest.raises(UserError, match=r"its maps have strides \[4, 8, 16, 32, 64\], the student's \[8, 16\]"):
        open_teacher(teacher_detector, ["wide", "tall"], (8, 16), **asked)


# The command


@pytest.fixture
def distilled_settings(train_settings: Settings, teacher_detector: Path, tmp_path: Path) -> Settings:
    """Half of each batch has no annotations; nobody is asked how good the teacher is."""
    draw = np.random.default_rng(8)
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for number in range(7):
        picture = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / "deep" / f"{number}.png")
    distill = {"teacher": str(teacher_detector), "check_ap": 0.0, "check_images": 3}
    return train_settings | {"distill": distill, "unlabeled": str(tmp_path / "pictures"), "batch_size": 4}


def test_the_command_writes_these_files(
    distilled_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    teacher_detector: Path,
    files_below: Callable[[Path], set[str]],
) -> None:
    settings = distilled_settings | {"ema": {"decay": 0.9}, "precision": "bf16"}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    parts = ("model.safetensors", "ema.safetensors", "adapters.safetensors", "optimizer.safetensors", "state.json")
    assert {name for name in files_below(run) if not name.startswith("pictures/")} == {
        ".lock",
        "analysis.json",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "result.json",
        "detector.safetensors",
        *(f"checkpoints/step_{step:08d}/{name}" for step in (4, 6) for name in (*parts, "COMPLETE")),
    }
    log = (run / "log.txt").read_text()
    assert f"teacher {teacher_detector}: AP 0.00 on 3 images of {settings['data']['val_annotations']}" in log
    assert f"teacher {teacher_detector} (faster_rcnn on test_resnet): loss_pkd x6, loss_roi_kd x1" in log
    assert "7 pictures without annotations" in log
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss_pkd" in line]
    assert len(steps) == 6
    for line in steps:
        own = [line[f"loss_{name}"] for name in ("rpn_cls", "rpn_box", "cls", "box", "pkd", "roi_kd")]
        assert line["loss"] == pytest.approx(sum(own), rel=1e-3)
    metadata = read_metadata(run / "detector.safetensors", kind="detector")
    assert metadata["teacher"]["content_sha256"] == read_metadata(teacher_detector)["content_sha256"]
    assert metadata["licence"] == "mit"

    adapters = load_file(run / "checkpoints/step_00000006/adapters.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in adapters.items()} == {
        f"{level}.{part}": shape for level in range(4) for part, shape in (("weight", (24, 16, 1, 1)), ("bias", (24,)))
    }
    earlier = load_file(run / "checkpoints/step_00000004/adapters.safetensors")
    assert all(not torch.equal(adapters[f"{level}.weight"], earlier[f"{level}.weight"]) for level in range(4))
    # An undistilled run has the same tensors in its file and in its model's checkpoint.
    plain = {key: value for key, value in settings.items() if key not in ("distill", "unlabeled", "ema")}
    assert call(train.main, arguments(plain | {"steps": 1}, "plain")) == 0
    tensors = load_file(tmp_path / "plain" / "detector.safetensors").keys()
    assert load_file(run / "detector.safetensors").keys() == tensors
    assert load_file(run / "checkpoints/step_00000006/model.safetensors").keys() == tensors
    load_detector(run / "detector.safetensors")


def test_resumes_to_the_same_bits(
    distilled_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, metrics_of: Callable[[Path], Any]
) -> None:
    settings = distilled_settings | {"ema": {"decay": 0.9}}
    assert call(train.main, arguments(settings, "whole")) == 0
    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    last = "checkpoints/step_00000006"
    for file in ("detector", f"{last}/model", f"{last}/ema", f"{last}/adapters", f"{last}/optimizer"):
        whole, parts = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole), file
    lines = {line["step"]: line for line in metrics_of(tmp_path / "whole") if "loss_pkd" in line}
    assert len(lines) == 6
    assert all(lines[line["step"]] == line for line in metrics_of(tmp_path / "parts") if "loss_pkd" in line)


def test_the_teacher_does_not_change_where_the_student_starts(
    distilled_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    """So that a run with and one without it compare."""
    optim = distilled_settings["optim"] | {"lr": 1e-30}
    settings = distilled_settings | {"steps": 1, "optim": optim}
    assert call(train.main, arguments(settings, "with")) == 0
    plain = {key: value for key, value in settings.items() if key not in ("distill", "unlabeled")}
    assert call(train.main, arguments(plain, "without")) == 0
    one, two = (load_file(tmp_path / name / "detector.safetensors") for name in ("with", "without"))
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-20) for name in one)


def test_two_ranks_distil_as_one(
    distilled_settings: Settings,
    arguments: Arguments,
    scripts: Any,
    call: Call,
    tmp_path: Path,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Without PKD, whose statistics are those of a process's images."""
    settings = distilled_settings | {"steps": 4, "batch_size": 8}
    settings["distill"] = settings["distill"] | {"pkd_weight": 0, "roi_weight": 2.0}
    assert call(train.main, arguments(settings, "one")) == 0
    done = scripts.run("stage2_detect/train.py", *arguments(settings, "two"), ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert sum("loss_roi_kd" in line for line in one) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss_cls", "loss_box", "loss_roi_kd"):
            assert a.get(name) == (pytest.approx(b[name], rel=1e-4, abs=1e-5) if name in b else None), (name, a, b)


def test_user_errors(
    distilled_settings: Settings,
    arguments: Arguments,
    user_error: Callable[..., str],
    tmp_path: Path,
    teacher_detector: Path,
) -> None:
    def message(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return user_error(train.main, arguments(distilled_settings | changes, "bad"))

    distill = distilled_settings["distill"]
    weak = message(distill=distill | {"check_ap": 0.2})
    assert f"distill.teacher: {teacher_detector}: AP 0.00 on 3 images" in weak
    assert "below 20 (distill.check_ap 0.2): it was trained on other images or at another size" in weak
    assert not list((tmp_path / "bad").rglob("*.safetensors"))

    data = dict(distilled_settings["data"])
    for part in ("train", "val"):
        content = json.loads(Path(data[f"{part}_annotations"]).read_text())
        content["categories"][0]["name"] = "round"
        data[f"{part}_annotations"] = str(tmp_path / f"{part}.json")
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    other = message(data=data)
    assert "its 2 classes are not the 2 of the training annotations: only the training annotations has 'round'" in other

    nothing = message(distill=distill | {"pkd_weight": 0, "roi_weight": 0})
    assert "pkd_weight and roi_weight are both 0" in nothing
    assert "give distill.teacher" in message(distill=None)
    assert "no such file" in message(distill=distill | {"teacher": str(tmp_path / "nowhere.safetensors")})
    assert f"unlabeled: image folder {tmp_path / 'nowhere'} does not exist" in message(
        unlabeled=str(tmp_path / "nowhere")
    )
    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}" in message(unlabeled=str(tmp_path / "empty"))
    assert "0 labelled and 4 unlabelled images of a batch of 4" in message(labeled_ratio=0.05)
    assert "the folder holds 7 pictures" in message(batch_size=20)


def test_without_evaluation_images_the_teacher_is_tried_on_training_images(
    distilled_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    data = {key: value for key, value in distilled_settings["data"].items() if "val" not in key}
    assert call(train.main, arguments(distilled_settings | {"data": data, "steps": 1})) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"AP 0.00 on 3 images of {data['train_annotations']}" in log
