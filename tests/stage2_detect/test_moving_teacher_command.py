"""Trainings under a moving teacher by the command: what is written, resumption, ranks, a collapse, users' mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import train
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.distillation.moving import SemiSupervised
from ssld.stage2_detect.training import collapse

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


@pytest.fixture
def moving_settings(train_settings: Settings, tmp_path: Path) -> Settings:
    """Two of four images are unlabeled after two steps; a random detector has scores above 0.2."""
    draw = np.random.default_rng(8)
    (tmp_path / "unlabeled" / "deep").mkdir(parents=True)
    for number in range(5):
        image = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(tmp_path / "unlabeled" / "deep" / f"{number}.png")
    moving = {"unlabeled": str(tmp_path / "unlabeled"), "burn_in": 2, "score_threshold": 0.2, "box_jitter": 3}
    return train_settings | {"moving_teacher": moving}


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings | {"moving_teacher": settings["moving_teacher"] | changes}


def test_the_command_writes_these_files(
    moving_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    metrics_of: Callable[[Path], Any],
    files_below: Callable[[Path], set[str]],
    training_files: Callable[..., set[str]],
) -> None:
    settings = {key: value for key, value in moving_settings.items() if key != "moving_teacher"}
    given = moving_settings["moving_teacher"]
    given = given | {"class_thresholds": '{"wide": 0.25}'}
    flags = [word for key, value in given.items() for word in (f"--moving_teacher.{key}", str(value))]
    assert call(train.main, arguments(settings | {"precision": "bf16"}, "run", *flags)) == 0
    run = tmp_path / "run"
    files = {name for name in files_below(run) if not name.startswith("pictures/")}
    assert files == training_files("model", "ema", "optimizer")
    log = (run / "log.txt").read_text()
    assert f"5 unlabeled images of {tmp_path / 'unlabeled'}" in log
    assert "2 labeled + 2 unlabeled images per batch, 2 labeled ones in the burn-in" in log
    assert "moving teacher: a copy until step 2, then an average with decay up to 0.999, evaluated and exported" in log
    own = {"loss", "loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "step", "lr", "grad_norm"}
    unlabeled = {f"loss_unlabeled_{name}" for name in ("rpn_cls", "rpn_box", "cls", "box")}
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert [line.keys() for line in lines] == [own] * 2 + [
        own | unlabeled | {"pseudo_boxes", "certain_boxes", "agreement"}
    ] * 4
    for line in lines[2:]:
        assert line["loss"] == pytest.approx(
            sum(value for name, value in line.items() if name.startswith("loss_")), rel=1e-3
        )
        assert line["pseudo_boxes"] > 0
        assert 0 <= line["agreement"] <= 1
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["images_seen"] == 6 * 2 + 4 * 2
    metadata = read_metadata(run / "detector.safetensors", kind="detector")
    assert metadata["weights"] == "ema"
    assert (metadata["moving_teacher"]["ratio"], metadata["moving_teacher"]["class_thresholds"]) == (
        0.5,
        {"wide": 0.25},
    )
    average = load_file(run / "checkpoints/step_00000006/ema.safetensors")
    written = load_file(run / "detector.safetensors")
    assert average.keys() == written.keys()
    assert all(torch.equal(average[name], written[name]) for name in written)
    load_detector(run / "detector.safetensors")


@pytest.mark.parametrize("kind", ["faster_rcnn", "gfl"])
def test_resumes_to_the_same_bits(
    kind: str,
    moving_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    metrics_of: Callable[[Path], Any],
) -> None:
    settings = moving_settings | {"val_loss": True}
    if kind == "gfl":
        settings = changed(settings, score_threshold=0.005, dense_share=0.1)
        settings |= {"model": {"kind": "gfl", "fpn_channels": 16, "dense": {"convolutions": 1}}}
    assert call(train.main, arguments(settings, "whole")) == 0
    assert call(train.main, arguments(settings | {"steps": 3}, "parts")) == 0
    assert call(train.main, arguments(settings, "parts")) == 0
    assert "resumed from step_00000003" in (tmp_path / "parts" / "log.txt").read_text()
    last = "checkpoints/step_00000006"
    for file in ("detector", f"{last}/model", f"{last}/ema", f"{last}/optimizer"):
        whole, parts = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole), file
    model, average = (load_file(tmp_path / "whole" / last / f"{name}.safetensors") for name in ("model", "ema"))
    assert any(not torch.equal(model[name], average[name]) for name in model)
    lines = {line["step"]: line for line in metrics_of(tmp_path / "whole") if "loss" in line}
    others = [line for line in metrics_of(tmp_path / "parts") if "loss" in line and line["step"] in lines]
    assert len(lines) == len(others) == 6
    assert all(lines[line["step"]] == line for line in others)


def test_in_the_burn_in_nothing_but_the_batch_differs_from_a_plain_training(
    moving_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    """The batch of two labeled images: the same weights as a training with that batch."""
    settings = moving_settings | {"steps": 3, "save_every": 100}
    assert call(train.main, arguments(settings, "moving")) == 0
    plain = {key: value for key, value in settings.items() if key != "moving_teacher"}
    optim = plain["optim"] | {"reference_batch": 2}
    assert (
        call(train.main, arguments(plain | {"batch_size": 2, "steps": 3, "save_every": 2, "optim": optim}, "plain"))
        == 0
    )
    one, two = (
        load_file(tmp_path / name / "checkpoints/step_00000002/model.safetensors") for name in ("moving", "plain")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)
    average = load_file(tmp_path / "moving" / "checkpoints/step_00000002/ema.safetensors")
    assert all(torch.equal(average[name], one[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_train_as_one(moving_settings: Settings, on_one_and_two: Callable[..., Any]) -> None:
    """An R-CNN; for one-stage detectors test_moving_teacher.py adds up the sums of two ranks."""
    _, lines = on_one_and_two(train.main, "stage2_detect/train.py", moving_settings | {"steps": 4})
    assert sum("loss_unlabeled_cls" in line for line in lines) == 2
    assert all(line["pseudo_boxes"] > 0 for line in lines if "pseudo_boxes" in line)


def test_a_collapse_is_told_and_the_last_good_file_is_kept(
    moving_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, boxes = SemiSupervised._measure, iter([8.0, 8.0, 8.0, 0.5, 0.5, 0.5])

    def falling(self: SemiSupervised, *values: Any) -> None:
        measure(self, *values)
        self.measured["pseudo_boxes"] = torch.tensor(next(boxes))

    monkeypatch.setattr(SemiSupervised, "_measure", falling)
    settings = moving_settings | {"steps": 7, "save_every": 1}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    log = (run / "log.txt").read_text()
    assert "warning: step 6: the moving teacher collapses: 0.5 pseudo-boxes per image after up to 8, agreement" in log
    good = run / "detector_last_good.safetensors"
    assert f"warning: the moving teacher has collapsed; {good} is the last good file" in log
    assert read_metadata(good)["step"] == 5
    load_detector(good)
    assert good.name in json.loads((run / "result.json").read_text())["outputs"]


def test_a_teacher_without_boxes_stops_the_run_which_goes_on_with_a_lower_threshold(
    moving_settings: Settings,
    arguments: Arguments,
    call: Call,
    user_error: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collapse, "_ENOUGH", 6)
    monkeypatch.setattr(collapse, "_ENOUGH_STEPS", 3)
    line = user_error(train.main, arguments(changed(moving_settings, score_threshold=1.0))).splitlines()
    assert len(line) == 1
    assert line[0].startswith(
        "moving_teacher: the teacher has found no object with a score of 1 or more in the first 6 unlabeled images; "
    )
    assert not (tmp_path / "run" / "result.json").exists()
    assert call(train.main, arguments(moving_settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "changed since the last start: moving_teacher.score_threshold: 1.0 -> 0.2" in log
    assert "resumed from step_00000004" in log


def test_user_errors(
    moving_settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path
) -> None:
    def message(plain: Settings | None = None, **changes: Any) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return user_error(train.main, arguments(changed(moving_settings, **changes) | (plain or {}), "bad"))

    (tmp_path / "empty").mkdir()
    for ratio in (0, 1, -0.5):
        assert "moving_teacher.ratio: has to be " in message(ratio=ratio)
    assert f"moving_teacher.unlabeled: no images in {tmp_path / 'empty'}" in message(unlabeled=str(tmp_path / "empty"))
    assert "moving_teacher.unlabeled: is an empty list" in message(unlabeled=[])
    assert "moving_teacher.ratio: 4 labeled and 0 unlabeled images of a batch of 4 do not divide" in message(ratio=0.01)
    assert "but only 5 unlabeled images are left" in message({"batch_size": 12})
    assert "moving_teacher.burn_in: 6 of 6 steps, so no unlabeled image is used" in message(burn_in=6)
    assert "'round' is no class of the training annotations (wide, tall)" in message(class_thresholds={"round": 0.5})
    assert "moving_teacher: box_jitter: one copy has no spread" in message(box_jitter=1)
    assert "moving_teacher: images: the folder of COCO JSON files, and unlabeled has none" in message(images="photos")
    assert "moving_teacher: adl: has the settings of dense_loss adaptive" in message(adl={})
    assert "moving_teacher.dense_loss: applies to one-stage detectors" in message(dense_loss="adaptive")
    assert "moving_teacher.weight: with 0 nothing is learned" in message(weight=0)
    gfl = {"model": {"kind": "gfl"}}
    assert "moving_teacher.soft: one-stage detectors learn from scores" in message(gfl, soft=False)
    assert "ema: the moving teacher is the average of the weights" in message({"ema": {"decay": 0.9}})
    assert "give distill or moving_teacher" in message({"distill": {"teacher": "x.safetensors"}})
    assert "unlabeled: belongs to training without a moving teacher" in message({"unlabeled": str(tmp_path / "empty")})
    assert "set augment.auto_augment_unlabeled to false" in message({"augment": {"auto_augment": True}})
    assert not list((tmp_path / "bad").rglob("*.safetensors"))
