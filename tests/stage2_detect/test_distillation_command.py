"""Detectors distilled by the command: the teacher's file, what is written, resumption, ranks, users' mistakes."""

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
from tiny_distillation import architecture, batch, detector

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import input_settings
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import train
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.detector_file import load_detector, save_detector
from ssld.stage2_detect.distillation.teacher import open_teacher
from ssld.stage2_detect.models.rcnn import RCNN

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


@pytest.fixture
def teacher_detector(tiny_coco: Any, tmp_path: Path) -> Path:
    """A teacher's file: wider maps, its own mean, the classes in another order than the training set's."""
    model = detector(2, 24)
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True, class_names=["tall", "wide"])
    return write_teacher(tmp_path / "teacher.safetensors", model, data)


def write_teacher(path: Path, model: RCNN, data: Any) -> Path:
    body = timm.create_model("test_resnet", features_only=True)
    inputs = input_settings(body, {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.3, 0.4], "input_size": [3, 64, 64]})
    config, resize = architecture(24), ResizeConfig(short_side=64, long_side=64)
    save_detector(
        path, model, config=config, resize=resize, arch="test_resnet", inputs=inputs, data=data, licence="mit"
    )
    return path


def test_a_teacher_answers_in_the_students_class_order_and_with_its_own_mean(teacher_detector: Path) -> None:
    model = load_detector(teacher_detector).model
    assert isinstance(model, RCNN)
    assert model.normalize.mean_C11.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
    images, _ = batch()
    options: Settings = {"device": torch.device("cpu"), "channels_last": False}
    teacher = open_teacher(teacher_detector, ["wide", "tall"], (4, 8, 16, 32, 64), **options)
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
        open_teacher(teacher_detector, ["wide", "tall"], (8, 16), **options)


def test_a_teacher_that_sees_nothing_is_refused(teacher_detector: Path, tiny_coco: Any, tmp_path: Path) -> None:
    """Also where no image checks its AP."""
    model = load_detector(teacher_detector).model
    assert isinstance(model, RCNN)
    torch.nn.init.zeros_(model.get_parameter("roi_heads.heads.0.logits.weight"))
    names = ["tall", "wide"]
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True, class_names=names)
    file = write_teacher(tmp_path / "blind.safetensors", model, data)
    with pytest.raises(UserError) as caught:
        open_teacher(file, ["wide", "tall"], (4, 8, 16, 32, 64), device=torch.device("cpu"), channels_last=False)
    assert str(caught.value).startswith(f"distill.teacher: {file}: its outputs are the same for every image: ")


# The command


@pytest.fixture
def distilled_settings(train_settings: Settings, teacher_detector: Path, tmp_path: Path) -> Settings:
    """Half of each batch has no annotations; a teacher of any AP is accepted."""
    draw = np.random.default_rng(8)
    (tmp_path / "unlabeled" / "deep").mkdir(parents=True)
    for number in range(7):
        image = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(tmp_path / "unlabeled" / "deep" / f"{number}.png")
    distill = {"teacher": str(teacher_detector), "check_ap": 0.0, "check_images": 3}
    return train_settings | {"distill": distill, "unlabeled": str(tmp_path / "unlabeled"), "batch_size": 4}


def test_the_command_writes_these_files(
    distilled_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    teacher_detector: Path,
    files_below: Callable[[Path], set[str]],
    training_files: Callable[..., set[str]],
) -> None:
    settings = distilled_settings | {"ema": {"decay": 0.9}, "precision": "bf16"}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    files = {name for name in files_below(run) if not name.startswith("pictures/")}
    assert files == training_files("model", "ema", "adapters", "optimizer")
    log = (run / "log.txt").read_text()
    assert f"teacher {teacher_detector}: AP 0.00 on 3 images of {settings['data']['val_annotations']}" in log
    assert f"teacher {teacher_detector} (faster_rcnn on test_resnet): loss_pkd x6, loss_roi_kd x1" in log
    assert "7 unlabeled images" in log
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
    settings = distilled_settings | {"ema": {"decay": 0.9}, "unit_scale": True}
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


@pytest.mark.slow
def test_two_ranks_distil_as_one(
    distilled_settings: Settings,
    on_one_and_two: Callable[..., Any],
) -> None:
    """Without PKD, whose statistics are those of a process's images."""
    settings = distilled_settings | {"steps": 4, "batch_size": 8, "unit_scale": True}
    settings["distill"] = settings["distill"] | {"pkd_weight": 0, "roi_weight": 2.0}
    _, lines = on_one_and_two(train.main, "stage2_detect/train.py", settings)
    assert sum("loss_roi_kd" in line for line in lines) == 4


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
    assert "pkd_weight, cwd_weight and roi_weight are 0" in nothing
    assert "give distill.teacher" in message(distill=None)
    assert "no such file" in message(distill=distill | {"teacher": str(tmp_path / "nowhere.safetensors")})
    nowhere = tmp_path / "nowhere"
    assert f"unlabeled: {nowhere}: no such image, video, folder or list" in message(unlabeled=str(nowhere))
    train_images = str(distilled_settings["data"]["train_images"])
    assert "no unlabeled image is left" in message(unlabeled=[train_images, train_images])
    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}" in message(unlabeled=str(tmp_path / "empty"))
    assert "0 labeled and 4 unlabeled images of a batch of 4" in message(labeled_ratio=0.05)
    assert "but only 7 unlabeled images are left" in message(batch_size=20)


def test_without_evaluation_images_the_teacher_is_tried_on_training_images(
    distilled_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    data = {key: value for key, value in distilled_settings["data"].items() if "val" not in key}
    assert call(train.main, arguments(distilled_settings | {"data": data, "steps": 1})) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"AP 0.00 on 3 images of {data['train_annotations']}" in log


def test_the_teacher_is_compiled_too(
    distilled_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, compiled: list[torch.nn.Module]
) -> None:
    assert call(train.main, arguments(distilled_settings | {"compile": True, "steps": 1}, "compiled")) == 0
    assert [any(p.requires_grad for p in net.parameters()) for net in compiled] == [True, False]
    assert call(train.main, arguments(distilled_settings | {"steps": 1}, "plain")) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("plain", "compiled")]
    plain, other = ({k: v for k, v in json.loads(line).items() if k.startswith("loss")} for line in lines)
    assert other == pytest.approx(plain, rel=1e-4)
