"""The stage-1 commands end to end on tiny drawn data: what they write, what they learn from, what they leave alone."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from ssld.shared.files import file_sha256
from ssld.shared.models.model_file import content_hash, read_metadata, read_tensors
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation import targets
from ssld.stage1_ssld.evaluate import main as evaluate
from ssld.stage1_ssld.teach import main as teach
from tests.float64 import in_float64

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]

RECORDS = {
    *{".lock", "batches.jpg", "config.yaml", "curves.png", "environment.json", "log.txt", "metrics.jsonl"},
    "result.json",
}


def checkpoint(step: int, *extra: str) -> set[str]:
    names = ("COMPLETE", "SHA256SUMS", "state.json", "model.safetensors", "optimizer.safetensors", *extra)
    return {f"checkpoints/step_{step:08d}/{name}" for name in names}


def without(settings: Settings, group: str, key: str) -> Settings:
    return settings | {group: {name: value for name, value in settings[group].items() if name != key}}


# ---- what the commands write


def test_a_resumed_run_keeps_its_sheet_of_images(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    assert call(distill, arguments(distill_settings)) == 0
    run = tmp_path / "run"
    for path in (run / "result.json", run / "student.safetensors"):
        path.unlink()
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / "batches.jpg").write_bytes(b"that of the first start")
    assert call(distill, arguments(distill_settings)) == 0
    assert "step 6/6" in (run / "log.txt").read_text()
    assert (run / "batches.jpg").read_bytes() == b"that of the first start"


def test_distill_writes_exactly_these_files(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, files_below: Any, metrics_of: Any
) -> None:
    assert call(distill, arguments(distill_settings)) == 0
    run = tmp_path / "run"
    assert files_below(run) == RECORDS | checkpoint(4) | checkpoint(6, "evaluation.json") | {"student.safetensors"}
    with Image.open(run / "batches.jpg") as sheet:  # 8 views of 32 px, enlarged, in two rows of four
        assert sheet.size == (4 * (160 + 6) - 6, 2 * (160 + 18 + 6) - 6)
    result = json.loads((run / "result.json").read_text())
    assert result["outputs"] == {"student.safetensors": file_sha256(run / "student.safetensors")}
    assert result["metrics"]["steps"] == 6
    assert result["metrics"]["images_seen"] == 48
    assert set(result["metrics"]) == {
        "images", "top1", "top5", "teacher_top1", "teacher_top5", "agreement", "kl", "steps", "images_seen"
    }  # fmt: skip
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [2, 4, 6, 6]
    assert set(lines[0]) == {"step", "lr", "loss", "agreement", "grad_norm", "teacher_entropy", "student_entropy"}
    assert lines[-1]["val_images"] == 15
    metadata = read_metadata(run / "student.safetensors", kind="backbone")
    assert metadata["class_names"] == ["disc", "ring", "stripes"]
    assert (metadata["num_classes"], metadata["step"], metadata["weights"]) == (3, 6, "last")
    assert metadata["input_size"] == [32, 32]
    assert metadata["teacher"]["licence"] == metadata["licence"] == "apache-2.0"
    assert metadata["metrics"]["top1"] == result["metrics"]["top1"]


def test_ema_and_evaluation_on_the_way_add_their_files(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, files_below: Any
) -> None:
    settings = distill_settings | {"ema": {"decay": 0.5, "warmup": False}, "evaluate_every": 0.3, "keep_checkpoints": 1}
    assert call(distill, arguments(settings)) == 0
    run = tmp_path / "run"
    models = {"student.safetensors", "student_best.safetensors"}
    assert files_below(run) == RECORDS | checkpoint(6, "ema.safetensors", "evaluation.json") | models
    last = load_file(run / "checkpoints/step_00000006/model.safetensors")
    average = load_file(run / "checkpoints/step_00000006/ema.safetensors")
    assert content_hash(read_tensors(run / "student.safetensors")) == content_hash(average) != content_hash(last)
    assert read_metadata(run / "student.safetensors")["weights"] == "ema"
    best = read_metadata(run / "student_best.safetensors")
    scores = {
        line["step"]: line["val_top1"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "val_top1" in line
    }
    assert list(scores) == [2, 4, 6]  # 0.3 of 6 steps, rounded
    assert best["metrics"]["top1"] == max(scores.values())
    assert best["step"] == min(step for step, score in scores.items() if score == max(scores.values()))
    result = json.loads((run / "result.json").read_text())
    assert set(result["outputs"]) == models
    assert result["metrics"]["best"] == {"file": "student_best.safetensors", "step": best["step"], **best["metrics"]}
    line = f"best: step {best['step']}, top1 {100 * best['metrics']['top1']:.2f}: {run / 'student_best.safetensors'}"
    assert (line in (run / "log.txt").read_text()) == (best["step"] != 6)


def test_ema_is_the_average_of_the_student_alone(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    """Recomputed from checkpoints of every step: average = d * average + (1 - d) * weights, from the initial weights."""
    settings = distill_settings | {"steps": 3, "save_every": 1, "keep_checkpoints": 9}
    assert call(distill, arguments(settings | {"ema": {"decay": 0.75, "warmup": False}})) == 0
    folder = tmp_path / "run" / "checkpoints"
    averages = [load_file(folder / f"step_{step:08d}" / "ema.safetensors") for step in (1, 2, 3)]
    for before, after, step in zip(averages, averages[1:], (2, 3), strict=False):
        weights = load_file(folder / f"step_{step:08d}" / "model.safetensors")
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * weights[name], rtol=1e-5, atol=1e-7)


def test_distil_without_any_label_and_without_validation(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, tiny: Any
) -> None:
    data = {"train": [str(tiny.unlabeled)], "image_size": 32}
    assert call(distill, arguments(distill_settings | {"data": data})) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["metrics"]) == {"steps", "images_seen"}


def test_unlabeled_validation_gives_agreement_and_kl_only(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, tiny: Any
) -> None:
    for name, val in (("plain", str(tiny.unlabeled)), ("switched_off", {"path": str(tiny.val), "labels": "none"})):
        data = distill_settings["data"] | {"val": val}
        assert call(distill, arguments(distill_settings | {"data": data}, name)) == 0
        metrics = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        assert set(metrics) == {"images", "agreement", "kl", "steps", "images_seen"}


def test_labels_of_the_training_images_are_never_used(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, tiny: Any
) -> None:
    for name, labels in (("with", "auto"), ("without", "none")):
        data = {"train": [{"path": str(tiny.parquet), "labels": labels}], "image_size": 32}
        assert call(distill, arguments(distill_settings | {"data": data}, name)) == 0
    with_labels, without_labels = (
        read_tensors(tmp_path / name / "student.safetensors") for name in ("with", "without")
    )
    assert content_hash(with_labels) == content_hash(without_labels)


def test_teach_then_evaluate(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, tiny: Any, files_below: Any
) -> None:
    settings = {k: v for k, v in distill_settings.items() if k not in ("student", "teacher")}
    settings |= {
        "model": {"model": "random:test_resnet"}, "steps": 60, "log_every": 20, "save_every": 60,
        "data": {"train": [str(tiny.train)], "val": str(tiny.val), "image_size": 32, "crop_area": [0.7, 1.0]},
        "optim": {"lr": 0.05, "reference_batch": 8, "warmup_steps": 2},
    }  # fmt: skip
    assert call(teach, arguments(settings, "teach")) == 0
    run = tmp_path / "teach"
    assert files_below(run) == RECORDS | checkpoint(60, "evaluation.json") | {"teacher.safetensors"}
    trained = json.loads((run / "result.json").read_text())["metrics"]
    assert (
        trained["top1"] > 0.75
    )  # chance is a third: the labels reach the loss in the right order; other seeds reach 0.87 to 1
    assert read_metadata(run / "teacher.safetensors")["teacher"] is None
    # the command for evaluation, by flags alone, gives the numbers of the training run
    file = str(run / "teacher.safetensors")
    argv = ["--model", file, "--data.path", str(tiny.val), "--output", str(tmp_path / "eval"), "--threads", "1"]
    assert call(evaluate, [*argv, "--workers", "0", "--batch_size", "4", "--teacher.model", file]) == 0
    assert files_below(tmp_path / "eval") == RECORDS - {"batches.jpg", "metrics.jsonl", "curves.png"}
    metrics = json.loads((tmp_path / "eval" / "result.json").read_text())["metrics"]
    assert metrics["top1"] == metrics["teacher_top1"] == trained["top1"]
    assert metrics["agreement"] == 1
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    # and that teacher teaches
    settings = distill_settings | {"teacher": {"model": file}, "steps": 60, "log_every": 10}
    assert call(distill, arguments(settings, "distill")) == 0
    distilled = json.loads((tmp_path / "distill" / "result.json").read_text())["metrics"]
    assert min(distilled["agreement"], distilled["top1"]) > 0.75


def test_supervised_baseline_is_the_same_settings(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    assert call(distill, arguments(distill_settings | {"objective": "labels"})) == 0
    run = tmp_path / "run"
    assert "1 unlabeled source left out" in (run / "log.txt").read_text()
    assert {"loss", "accuracy", "lr"} <= set(metrics_of(run)[0])
    metadata = read_metadata(run / "student.safetensors")
    assert metadata["objective"] == "labels"
    assert metadata["teacher"] is None
    assert metadata["class_names"] == ["disc", "ring", "stripes"]
    # the teacher is there for evaluation only
    assert "agreement" in json.loads((run / "result.json").read_text())["metrics"]


def test_file_loads_with_plain_timm(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    from ssld.shared.models.backbones import create_classifier
    from ssld.shared.models.references import parse_reference

    assert call(distill, arguments(distill_settings)) == 0
    file = str(tmp_path / "run" / "student.safetensors")
    actual, _ = create_classifier(parse_reference(file))
    other: Any = timm.create_model(
        "test_convnext", pretrained=True, pretrained_cfg_overlay={"file": file, "num_classes": 3}, num_classes=3
    )
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = other.pretrained_cfg["mean"], other.pretrained_cfg["std"]
    x = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(actual.eval()(pixels), other.eval()(x), rtol=1e-4, atol=1e-5)


# ---- the teacher is furniture


def test_teacher_is_untouched_and_in_no_checkpoint(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, teacher_file: Path, monkeypatch: Any
) -> None:
    loaded: list[Any] = []
    load = targets.make_teacher

    def remembered(*args: Any, **options: Any) -> Any:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(targets, "make_teacher", remembered)
    before = file_sha256(teacher_file)
    settings = distill_settings | {"ema": {"decay": 0.5}, "optim": distill_settings["optim"] | {"momentum": 0.9}}
    settings |= {"teacher": {"model": str(teacher_file), "batchnorm": "batch"}}
    assert call(distill, arguments(settings)) == 0
    assert file_sha256(teacher_file) == before
    teacher_tensors = read_tensors(teacher_file)
    with loaded[0].running_statistics():  # untouched too: every forward pass of the training went by the batch's
        assert content_hash(loaded[0]._classifier.net.state_dict()) == content_hash(teacher_tensors)
    assert all(parameter.grad is None for parameter in loaded[0]._classifier.parameters())
    teacher_hashes = {content_hash({"": tensor}) for tensor in teacher_tensors.values() if tensor.ndim > 1}
    student = set(timm.create_model("test_convnext", num_classes=3).state_dict())
    for file in (tmp_path / "run").rglob("*.safetensors"):
        tensors = load_file(file)
        assert not teacher_hashes & {content_hash({"": tensor}) for tensor in tensors.values()}
        if file.stem == "optimizer":
            assert len(tensors) == len(student)  # one momentum buffer for each parameter of the student; no more
        else:
            assert set(tensors) == student


def test_student_and_teacher_see_the_same_pixels(
    arguments: Arguments, distill_settings: Settings, call: Call, teacher_file: Path
) -> None:
    """Both get the very same uint8 tensor, in every step."""
    from ssld.shared.models.backbones import Classifier

    recorded: list[torch.Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: recorded.append(inputs[0]) if isinstance(module, Classifier) else None
    )
    try:
        data = without(distill_settings, "data", "val")["data"]
        teacher = {"model": str(teacher_file), "check_images": 0}
        assert call(distill, arguments(distill_settings | {"data": data, "teacher": teacher, "steps": 2})) == 0
    finally:
        handle.remove()
    drawn, *recorded = recorded  # the teacher's first pass shows that it sees something
    assert len(drawn) == 2
    assert len(recorded) == 5  # the student's last pass looks at the last update
    assert recorded[0].dtype == torch.uint8
    assert torch.equal(recorded[0], recorded[1])
    assert torch.equal(recorded[2], recorded[3])
    assert not torch.equal(recorded[0], recorded[2])


def test_a_student_that_starts_as_its_teacher_has_a_loss_of_zero(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    """Same view, same normalization, same function: of LayerNorm nets, which compute the same in training mode."""
    from ssld.shared.models.backbones import input_settings, save_backbone

    torch.manual_seed(5)
    net: Any = timm.create_model("test_convnext", num_classes=3)
    with torch.no_grad():
        net.get_classifier().weight.mul_(100)  # far from uniform predictions: another function would not agree
    file = tmp_path / "teacher.safetensors"
    # Statistics of its own: a student or teacher normalized by the arch's default would differ.
    inputs = input_settings(net, {"mean": [0.3, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "input_size": [32, 32]})
    save_backbone(file, net, arch="test_convnext", inputs=inputs, classes=3, licence="apache-2.0")
    data = without(distill_settings, "data", "val")["data"]
    settings = distill_settings | {"data": data, "steps": 1, "log_every": 1, "teacher": {"model": str(file)}}
    first = {}
    for name, model in (("itself", str(file)), ("another", "random:test_convnext")):
        assert call(distill, arguments(settings | {"student": {"model": model}}, name)) == 0
        first[name] = metrics_of(tmp_path / name)[0]
    assert abs(first["itself"]["loss"]) < 1e-6
    assert first["itself"]["agreement"] == 1
    assert first["another"]["loss"] > 0.1


# ---- equalities


def test_accumulation_equals_the_large_batch(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    settings = distill_settings | {"steps": 5, "log_every": 1}
    with in_float64():
        assert call(distill, arguments(settings, "whole")) == 0
        assert call(distill, arguments(settings | {"accumulate": 4}, "parts")) == 0
    whole, parts = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "parts"))
    start = load_file(tmp_path / "whole" / "checkpoints" / "step_00000004" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-9, atol=1e-12)
    moved = max((start[name] - tensor).abs().max().item() for name, tensor in whole.items())
    assert moved > 1e-4  # a single step moves the weights far more than the tolerance
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("warmup_steps", [2, 100])
def test_learning_rate_is_scaled_warmed_up_and_ends_near_zero(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any, warmup_steps: int
) -> None:
    optim = {"lr": 0.4, "reference_batch": 32, "warmup_steps": warmup_steps}
    assert call(distill, arguments(distill_settings | {"steps": 20, "log_every": 1, "optim": optim})) == 0
    curve = [line["lr"] for line in metrics_of(tmp_path / "run") if "lr" in line]
    # batch 8 of 32: peak 0.1; half of it, all of it, then half a cosine over 18 steps; no more than a tenth of the run is warm-up
    cosine = [0.05 + 0.05 * math.cos(math.pi * step / 18) for step in range(18)]
    assert curve == pytest.approx([0.05, 0.1, *cosine], rel=1e-5)
    assert "lr 0.1 = 0.4 scaled from batch 32 to 8 (linearly), warm-up" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"channels_last": True}, {"workers": 1}])
def test_speed_options_train_alike(
    change: Settings, arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    assert call(distill, arguments(distill_settings, "plain")) == 0
    assert call(distill, arguments(distill_settings | change, "other")) == 0
    exact = "workers" in change
    for a, b in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "other"), strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=0 if exact else 0.05, abs=0 if exact else 0.01)
            assert b["lr"] == a["lr"]


def test_real_processes_of_the_other_entries(
    scripts: Any, arguments: Any, distill_settings: Settings, tmp_path: Path, tiny: Any, teacher_file: Path
) -> None:
    """From any folder, without an installed package: exit codes, one line for a mistake, no traceback."""
    settings = {key: value for key, value in distill_settings.items() if key not in ("student", "teacher")}
    settings |= {"model": "random:test_resnet", "steps": 2}
    process = scripts.run("stage1_ssld/teach.py", *arguments(settings))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "teacher.safetensors").exists()
    line = ["--model", str(tiny.parquet), "--data.path", "x", "--output", "o"]
    process = scripts.run("stage1_ssld/evaluate.py", *line, new_python=True)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
