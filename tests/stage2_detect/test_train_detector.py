"""The detector commands end to end on drawn scenes: files, numbers, invariances, user errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssld.shared.files import file_sha256
from ssld.shared.models.backbones import create_classifier, save_backbone
from ssld.shared.models.model_file import read_metadata, read_tensors
from ssld.shared.models.references import parse_reference
from ssld.shared.training.checkpoint import load_checkpoint
from ssld.shared.training.checkpoint_folders import newest_checkpoint
from ssld.stage2_detect import evaluate, train
from ssld.stage2_detect.detector_file import load_detector

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    classifier, inputs = create_classifier(parse_reference("random:test_resnet"), num_classes=3)
    path = tmp_path_factory.mktemp("backbone") / "student.safetensors"
    save_backbone(path, classifier.net, arch="test_resnet", inputs=inputs, classes=3, licence="mit")
    return path


def drawn_images_of(run: Path) -> set[str]:
    """The files in a run's index of drawn images, and the index."""
    index = json.loads((run / "pictures/index.json").read_text())
    assert index
    return {"pictures/index.json", *(f"pictures/{entry[side]}" for entry in index for side in ("truth", "detections"))}


def test_a_resumed_run_keeps_its_sheet_of_images(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, backbone_file: Path
) -> None:
    settings = train_settings | {"backbone": str(backbone_file)}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    with Image.open(run / "batches.jpg") as sheet:
        assert min(sheet.size) > 480  # at least two rows of drawn scenes
    for path in (run / "result.json", run / "detector.safetensors"):
        path.unlink()
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / "batches.jpg").write_bytes(b"that of the first start")
    assert call(train.main, arguments(settings)) == 0
    assert (run / "log.txt").read_text().count("step 6: evaluating") == 2
    assert (run / "batches.jpg").read_bytes() == b"that of the first start"


def test_writes_exactly_these_files_and_the_detector_evaluates(
    train_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    backbone_file: Path,
    files_below: Callable[[Path], set[str]],
    training_files: Callable[..., set[str]],
) -> None:
    fractions = {"evaluate_every": 0.5, "save_every": 0.6, "log_every": None}
    optim = train_settings["optim"] | {"milestones_steps": [0.6]}
    settings = train_settings | {"backbone": str(backbone_file), "optim": optim, **fractions}
    assert call(train.main, arguments(settings)) == 0
    run = tmp_path / "run"
    written = training_files("model", "optimizer") | {"detector_best.safetensors", *drawn_images_of(run)}
    assert files_below(run) == written
    log = (run / "log.txt").read_text()
    tensors = len(load_file(backbone_file))
    assert all(f"step {step}: evaluating 5 images" in log for step in (3, 6))
    assert "warm-up 0 steps, milestones [4]" in log
    assert "step 1/6: " in log
    assert f"loaded {tensors - 2}/{tensors - 2} backbone tensors, 2 head tensors dropped" in log
    metadata = read_metadata(run / "detector.safetensors", kind="detector")
    assert metadata["class_names"] == ["wide", "tall"]
    assert metadata["category_ids"] == [3, 7]
    assert metadata["licence"] == "mit"

    data = settings["data"]
    flags = [
        "--model",
        str(run / "detector.safetensors"),
        "--annotations",
        data["val_annotations"],
        "--images",
        data["val_images"],
    ]
    flags += ["--output", str(tmp_path / "ap"), "--workers", "0", "--device", "cpu", "--threads", "1"]
    flags += ["--expected.AP", "99.5", "--expected.images", "5"]
    assert call(evaluate.main, flags) == 0
    assert files_below(tmp_path / "ap") == {
        ".lock",
        "config.yaml",
        "environment.json",
        "log.txt",
        "result.json",
        "detections.json",
        "analysis.json",
        "label_audit.json",
        "label_audit.jpg",
        *drawn_images_of(tmp_path / "ap"),
    }
    for name in ("analysis.json", *drawn_images_of(run)):  # the same detector on the same images
        assert (run / name).read_bytes() == (tmp_path / "ap" / name).read_bytes()
    trained = json.loads((run / "result.json").read_text())["metrics"]
    evaluated = json.loads((tmp_path / "ap" / "result.json").read_text())["metrics"]
    analysis = json.loads((tmp_path / "ap" / "analysis.json").read_text())
    assert evaluated.pop("per_class_f1") == {row["class"]: row["f1"] for row in analysis["classes"]}
    assert evaluated.pop("at_threshold") == {"score_threshold": 0.5, "iou": 0.5, **analysis["all_classes"]}
    assert evaluated.pop("expected_met") is False
    intervals = evaluated.pop("intervals")
    assert all(low <= evaluated[name] <= high for name, (low, high) in intervals.items())
    assert intervals.keys() == {"AP", "AP50"}
    assert "(expected 99.5), tolerance 0.3" in (tmp_path / "ap" / "log.txt").read_text()
    orientations = trained.pop("orientation")
    assert orientations.keys() == {"train", "val"}
    assert evaluated.pop("orientation") == {"val": orientations["val"]}
    assert {key: trained[key] for key in evaluated} == evaluated
    best = read_metadata(run / "detector_best.safetensors")
    assert trained["best"]["file"] == "detector_best.safetensors"
    assert (trained["best"]["step"], trained["best"]["AP"]) == (best["step"], best["metrics"]["AP"])
    assert "per_class" not in trained["best"]
    assert set(evaluated["per_class"]) == {"wide", "tall"}
    rows = json.loads((tmp_path / "ap" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {3, 7}
    assert {row["image_id"] for row in rows} <= {f"val-{number}" for number in range(5)}

    stored = tmp_path / "ap" / "detections.json"
    again = [str(tmp_path / "again") if word == str(tmp_path / "ap") else word for word in flags]
    assert call(evaluate.main, [*again, "--compare", str(stored)]) == 0
    compared = json.loads((tmp_path / "again" / "result.json").read_text())["metrics"]["compared"]
    assert (compared["images"], compared["sha256"]) == (5, file_sha256(stored))
    assert compared["AP"] == compared["AP50"] == {"difference": 0, "low": 0, "high": 0}


def test_learns_the_scenes(learning_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path) -> None:
    """One color per class: a detector that learns at all detects some of these rectangles. Other seeds reach an AP of 0.4 to 0.95."""
    assert call(train.main, arguments(learning_settings)) == 0
    ap50 = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["AP50"]
    assert ap50 > 0.25, ap50


def test_learning_rates_freezing_and_updates(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, backbone_file: Path
) -> None:
    factors = [1.0, 1.0, 0.1, 0.2, 0.3]
    settings = train_settings | {"backbone": str(backbone_file), "steps": 20, "batch_size": 8}
    settings["model"] = train_settings["model"] | {"freeze_stages": 2, "freeze_norm": True}
    settings["optim"] = train_settings["optim"] | {
        "backbone_lr_factors": factors,
        "milestones_steps": [4],
        "warmup_start": 0.5,
        "warmup_steps": 9,
    }
    assert call(train.main, arguments(settings)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # 0.01 at batch 4 is 0.02 at batch 8; warm-up is a tenth of the run: 0.5, 0.75, 1; a tenth from the fifth step on
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.01, 0.015, 0.02, 0.02, *[0.002] * 16])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warm-up 2 steps" in log
    assert "learning-rate factors: x0.1 " in log
    before = load_file(backbone_file)
    after = load_file(tmp_path / "run" / "detector.safetensors")
    moved = {
        name
        for name in before
        if name in before and not torch.equal(before[name], after.get(f"pyramid.body.{name}", before[name]))
    }
    assert moved, "nothing of the backbone was trained"
    assert all(
        (name.startswith(("layer2", "layer3", "layer4")) and "conv" in name) or "downsample.1" in name for name in moved
    ), moved


def test_the_same_command_again_is_finished_and_another_is_refused(
    train_settings: Settings,
    arguments: Arguments,
    call: Call,
    capsys: pytest.CaptureFixture[str],
    user_error: Callable[..., str],
) -> None:
    assert call(train.main, arguments(train_settings | {"steps": 1})) == 0
    capsys.readouterr()
    assert call(train.main, arguments(train_settings | {"steps": 1})) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    message = user_error(train.main, arguments(train_settings | {"steps": 1, "seed": 5}))
    assert "seed: 0 -> 5" in message


def test_a_batch_without_any_object_trains(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    data = train_settings["data"]
    content = json.loads(Path(data["train_annotations"]).read_text())
    one = [row for row in content["annotations"] if row["image_id"] == "train-0"]
    file = tmp_path / "one.json"
    file.write_text(json.dumps(content | {"annotations": one}))
    settings = train_settings | {"steps": 6, "batch_size": 2, "data": data | {"train_annotations": str(file)}}
    assert call(train.main, arguments(settings)) == 0  # a pass: one of the six batches has the image
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["loss_box"] == 0 for line in lines if "loss_box" in line) >= 5


def test_a_loss_that_is_not_finite_stops_with_the_ids_and_keeps_the_checkpoint(
    train_settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path
) -> None:
    optim = train_settings["optim"] | {"lr": 1000.0, "warmup_steps": 0, "milestones_steps": None}
    message = user_error(train.main, arguments(train_settings | {"save_every": 1, "steps": 30, "optim": optim}))
    assert "loss is not finite at step" in message
    assert "loss_rpn_cls" in message
    assert "train-" in message
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest
    load_checkpoint(newest)
    assert not (tmp_path / "run" / "result.json").exists()


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_bf16_trains_to_about_the_same_loss(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    for precision in ("fp32", "bf16"):
        assert call(train.main, arguments(train_settings | {"precision": precision, "steps": 2}, precision)) == 0
    full, half = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert full != half
    assert half == pytest.approx(full, rel=0.05)


def test_compiled_training_is_equal(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path, compiled: list[torch.nn.Module]
) -> None:
    for name in ("plain", "compiled"):
        assert call(train.main, arguments(train_settings | {"compile": name == "compiled", "steps": 2}, name)) == 0
    assert len(compiled) == 1
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
    plain, other = (read_tensors(tmp_path / name / "detector.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == other.keys()


def test_an_unreadable_training_image_is_skipped_and_listed(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(train_settings["data"]["train_images"], images)
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:200])
    settings = train_settings | {"data": train_settings["data"] | {"train_images": str(images)}}
    assert call(train.main, arguments(settings)) == 0
    assert (tmp_path / "run" / "quarantine.txt").read_text().strip().endswith("4.png")


def test_user_errors(
    train_settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path
) -> None:
    def message(**changes: Any) -> str:
        return user_error(train.main, arguments(train_settings | changes, "bad"))

    data = train_settings["data"]
    assert "strides" in message(backbone="random:vit_tiny_patch16_224")
    shutil.rmtree(tmp_path / "bad", ignore_errors=True)  # the backbone is built after the run directory
    assert "did you mean 'resnet50d'" in message(backbone="random:resnet50dd")
    assert "batch_size 40" in message(batch_size=40)
    shutil.rmtree(tmp_path / "bad", ignore_errors=True)
    assert "nowhere.json" in message(data=data | {"val_annotations": "nowhere.json"})
    other = tmp_path / "other.json"
    content = json.loads(Path(data["val_annotations"]).read_text())
    other.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "wide"}, {"id": 7, "name": "round"}]}))
    assert "round" in message(data=data | {"val_annotations": str(other)})
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    assert "is a pickle" in message(backbone=str(tmp_path / "weights.pth"))
    shutil.copy(tmp_path / "weights.pth", tmp_path / "weights.safetensors")
    assert "is a pickle" in message(backbone=str(tmp_path / "weights.safetensors"))
    assert "unknown key; did you mean 'freeze_norm'?" in message(model={"freeze_nrm": True})
    assert not (tmp_path / "bad").exists(), "a refused command left something behind"


def test_a_backbone_file_is_no_detector(
    backbone_file: Path, train_settings: Settings, user_error: Callable[..., str], tmp_path: Path
) -> None:
    data = train_settings["data"]
    flags = ["--model", str(backbone_file), "--annotations", data["val_annotations"], "--images", data["val_images"]]
    assert "is a backbone file, a detector file is needed" in user_error(
        evaluate.main, [*flags, "--output", str(tmp_path / "ap")]
    )


def test_a_detector_file_loads_anywhere(
    train_settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    assert call(train.main, arguments(train_settings | {"steps": 1})) == 0
    loaded = load_detector(tmp_path / "run" / "detector.safetensors")
    saved = load_file(tmp_path / "run" / "detector.safetensors")
    state = loaded.model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert not loaded.model.training


def test_real_images_go_through(
    train_settings: Settings,
    arguments: Arguments,
    call: Call,
    tmp_path: Path,
    shared_data: Callable[[str], Path],
) -> None:
    """A crowd, an RLE, images without objects and a grey-scale file, at a small size: one pass meets each of them."""
    folder = shared_data("coco-mini")
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    modes = {}
    for image in content["images"]:
        with Image.open(folder / "images" / image["file_name"]) as file:
            modes[image["id"]] = file.mode
    assert "L" in modes.values()
    assert any(isinstance(row["segmentation"], dict) for row in content["annotations"])
    assert any(row["iscrowd"] for row in content["annotations"])
    assert modes.keys() - {row["image_id"] for row in content["annotations"]}
    data = {
        "train_annotations": str(folder / "annotations" / "instances_train.json"),
        "train_images": str(folder / "images"),
        "keep_empty": True,
    }
    resize = {"train_short_sides": [48, 64], "train_long_side": 96, "short_side": 64, "long_side": 96}
    settings = train_settings | {
        "data": data,
        "resize": resize,
        "train_epochs": 1,
        "steps": None,
        "batch_size": 20,  # a divisor of 300: no image is left over
        "log_every": 5,
    }
    assert call(train.main, arguments(settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "300 images" in log
    assert "step 15/15" in log
    assert "marked iscrowd (first: annotation " in log
    assert not (tmp_path / "run" / "quarantine.txt").exists()
