"""Mistakes of users in stage 1: one line, exit code 2, nothing half-written."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.shared.distributed import processes
from ssld.shared.models.model_file import content_hash, read_tensors
from ssld.shared.training import training_state
from ssld.shared.training.checkpoint_folders import complete_checkpoints
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation import losses
from ssld.stage1_ssld.evaluate import main as evaluate

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        (None, {"stepz": 3}, "stepz: unknown key; did you mean 'steps'?"),
        ("optim", {"lrr": 1}, "optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim", {"lr": -1}, "optim.lr: has to be above 0 (given: -1)"),
        (None, {"train_epochs": 2}, "give at most one of steps, train_epochs, train_images"),
        (None, {"teacher": None}, "teacher.model is missing: distillation needs a teacher"),
        (None, {"batch_size": "many"}, "batch_size: has to be a whole number"),
        (None, {"precision": "fp16"}, "precision: fp16 needs a GPU"),
        (
            None,
            {"batch_size": 100},
            "batch_size: 100 is more than the 44 training images; set it to at most this number",
        ),
        (None, {"accumulate": 3}, "batch_size: 8 is not a multiple of 1 processes x accumulate 3"),
        ("student", {"model": "random:test_convnxt"}, "timm has no such model; did you mean 'test_convnext'?"),
        ("student", {"model": "gone.safetensors"}, "gone.safetensors: no such file"),
        ("teacher", {"model": "gone.safetensors"}, "teacher.model: gone.safetensors: no such file"),
        (
            "student",
            {"drop_path": 0.1, "model": "random:dla46_c"},
            "dla46_c: has no stochastic depth; leave drop_path at 0",
        ),
        ("data", {"train": ["no/such/folder"]}, "no/such/folder: no such file or folder"),
        ("data", {"train": []}, "data.train: needs at least 1"),
        ("data", {"val": "no/such/folder"}, "no/such/folder: no such file or folder"),
        ("optim", {"warmup_epochs": 1}, "give one of warmup_steps and warmup_epochs"),
    ],
)
def test_mistakes_cost_one_line(
    group: str | None, change: Settings, message: str, arguments: Arguments, distill_settings: Settings,
    user_error: Any, call: Call,
) -> None:  # fmt: skip
    settings = distill_settings | (change if group is None else {group: distill_settings[group] | change})
    assert message in user_error(distill, arguments(settings))
    # nothing half-written: mending the mistake and giving the same output works
    assert call(distill, arguments(distill_settings)) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_are_checked_before_any_process_group(
    streaming: bool, arguments: Arguments, distill_settings: Settings, user_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only opening a list shows that its files are missing; a rank that stops there must not leave others waiting."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a process group was opened")

    monkeypatch.setattr(processes, "start_processes", never)
    data = distill_settings["data"] | {"train": ["memory://nowhere/at/all"], "streaming": streaming}
    message = user_error(distill, arguments(distill_settings | {"data": data}))
    assert message.endswith("memory://nowhere/at/all: no such file or folder")


def test_unknown_flag(arguments: Arguments, distill_settings: Settings, user_error: Any, tmp_path: Path) -> None:
    argv = arguments(distill_settings, "run", "--optim.lrr", "1")
    assert user_error(distill, argv) == "--optim.lrr: unknown flag; did you mean '--optim.lr'?"
    assert not (tmp_path / "run").exists()


def test_folder_without_images(
    arguments: Arguments, distill_settings: Settings, user_error: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    data = {"train": [str(tmp_path / "empty")], "image_size": 32}
    assert f"no images in {tmp_path}/empty" in user_error(distill, arguments(distill_settings | {"data": data}))
    assert not (tmp_path / "run").exists()


def test_class_count_of_teacher_and_data_differ_and_the_same_output_works_once_mended(
    arguments: Arguments, distill_settings: Settings, user_error: Any, call: Call, tmp_path: Path, jpeg: Any
) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / "four" / name).mkdir(parents=True)
        (tmp_path / "four" / name / "1.jpg").write_bytes(jpeg())
    data = distill_settings["data"] | {"val": str(tmp_path / "four")}
    line = user_error(distill, arguments(distill_settings | {"data": data}))
    assert "four: class 'a' is not among the 3 classes of the teacher" in line
    unnamed = distill_settings | {"data": data, "teacher": {"model": "random:test_resnet"}}
    line = user_error(distill, arguments(unnamed, "other"))
    assert "four: has 4 classes, but the teacher has 1000" in line
    assert call(distill, arguments(distill_settings)) == 0


def test_run_directory_in_use(
    arguments: Arguments, distill_settings: Settings, user_error: Any, call: Call, tmp_path: Path
) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = user_error(distill, arguments(distill_settings))
        assert line.endswith("run: in use by another process; wait for it or give another --output")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    assert call(distill, arguments(distill_settings)) == 0


def test_foreign_folder_is_left_alone(
    arguments: Arguments, distill_settings: Settings, user_error: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "not empty and not a run directory" in user_error(distill, arguments(distill_settings))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"thesis.tex"}
    (tmp_path / "file").write_text("")
    assert "is a file; give another --output" in user_error(distill, arguments(distill_settings, "file"))


def test_full_disk(
    arguments: Arguments, distill_settings: Settings, user_error: Any, call: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    """The disk really fills up in the second checkpoint: one line, the first checkpoint usable, and the same command ends as if nothing had been.

    No file may grow beyond 20 kB from there on, which a write meets as it meets a full disk, in the library that writes the tensors too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = training_state.save_checkpoint

    def full(folder: Path, step: int, *rest: Any, **options: Any) -> Path:
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return save(folder, step, *rest, **options)

    assert call(distill, arguments(distill_settings, "whole")) == 0
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training_state, "save_checkpoint", full)
            line = user_error(distill, arguments(distill_settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in line
    assert "run the same command again" in line
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000004"]
    assert call(distill, arguments(distill_settings)) == 0
    whole, resumed = (read_tensors(tmp_path / name / "student.safetensors") for name in ("whole", "run"))
    assert content_hash(whole) == content_hash(resumed)
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing_*"))


def test_loss_that_is_not_finite(
    arguments: Arguments, distill_settings: Settings, user_error: Any, call: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    steps = iter(range(1, 100))

    def diverging(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return student.sum() * (
            float("nan") if next(steps) == 7 else 0.0
        )  # the second and third call check the first loss

    monkeypatch.setattr(losses, "symmetric_kl", diverging)
    settings = distill_settings | {"save_every": 2, "log_every": 10, "steps": 12}
    line = user_error(distill, arguments(settings))
    assert "loss is not finite at step 5: loss nan, agreement" in line
    assert "images 0:" in line or "images 1:" in line
    assert line.count("0:") + line.count("1:") >= 8
    from ssld.shared.training.checkpoint import load_checkpoint
    from ssld.shared.training.checkpoint_folders import newest_checkpoint

    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000002"  # the loss of step 5 is that of the weights of step 4
    parts, _ = load_checkpoint(newest)
    assert all(tensor.isfinite().all() for tensor in parts["model"].values())
    assert not (tmp_path / "run" / "student.safetensors").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    advice = "The same command with --optim.lr 0.002 (now 0.02), --optim.clip_grad_norm 1 continues from step_00000002"
    assert advice in line
    assert call(distill, arguments(settings, "run", "--optim.lr", "0.002", "--optim.clip_grad_norm", "1")) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "changed since the last start: optim.lr: 0.02 -> 0.002" in log
    assert "resumed from step_00000002" in log
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sorted(result["changes"]) == ["optim.clip_grad_norm: null -> 1.0", "optim.lr: 0.02 -> 0.002"]


def test_memory_that_runs_out_in_an_evaluation_costs_no_step(
    arguments: Arguments,
    distill_settings: Settings,
    user_error: Callable[..., str],
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although the next regular checkpoint is that of the last step."""
    from ssld.stage1_ssld.evaluation import validation

    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    settings = distill_settings | {"save_every": 100, "evaluate_every": 3}
    assert call(distill, arguments(settings, "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", too_large)
        assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. " in user_error(
            distill, arguments(settings)
        )
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    assert call(distill, arguments(settings)) == 0
    whole, resumed = (read_tensors(tmp_path / name / "student.safetensors") for name in ("whole", "run"))
    assert content_hash(whole) == content_hash(resumed)


@pytest.mark.parametrize(("steps", "where"), [(1, "restarts from step 0"), (3, "continues from step_00000002")])
def test_weights_that_the_last_update_spoilt(
    arguments: Arguments,
    distill_settings: Settings,
    user_error: Any,
    tmp_path: Path,
    monkeypatch: Any,
    steps: int,
    where: str,
) -> None:
    """The logged losses are finite: the loss of a step is that of the weights before its update."""
    at = tmp_path / "run" / "checkpoints"
    settings = distill_settings | {"steps": steps, "save_every": 1, "data": distill_settings["data"] | {"val": None}}
    real = torch.optim.SGD.step

    def spoils(optimizer: Any, *rest: Any) -> Any:
        real(optimizer, *rest)
        if steps == 1 or (at / "step_00000002").exists():
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1e30)

    monkeypatch.setattr(torch.optim.SGD, "step", spoils)
    line = user_error(distill, arguments(settings))
    assert f"loss is not finite after the last update, of step {steps}: loss nan" in line
    assert where in line
    assert not (tmp_path / "run" / "student.safetensors").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_that_are_not_finite_are_not_saved(
    arguments: Arguments, distill_settings: Settings, user_error: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    real, calls = torch.optim.SGD.step, iter(range(1, 100))

    def spoils(optimizer: Any, *rest: Any) -> Any:
        real(optimizer, *rest)
        if next(calls) == 4:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", spoils)
    line = user_error(distill, arguments(distill_settings | {"save_every": 2}))
    assert "loss is not finite after step 4: weights or the optimizer's state are not" in line
    assert "continues from step_00000002" in line
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_evaluate_mistakes(user_error: Any, tmp_path: Path, tiny: Any, teacher_file: Path) -> None:
    def line(**flags: str) -> str:
        given = {"model": str(teacher_file), "data.path": str(tiny.val), "output": str(tmp_path / "e"), "threads": "1"}
        argv = [part for key, value in (given | flags).items() for part in (f"--{key}", value)]
        message = user_error(evaluate, argv)
        assert isinstance(message, str)
        return message

    assert "no labels; give --teacher.model" in line(**{"data.path": str(tiny.unlabeled)})
    assert "no such file" in line(model="gone.safetensors")
    assert "gone: no such file or folder" in line(**{"data.path": "gone"})
    (tmp_path / "model.pth").write_bytes(b"\x80\x04N.")
    assert "does not name its architecture; set arch to its timm name" in line(model=str(tmp_path / "model.pth"))
    assert "cannot be read as a plain state dict" in line(model=str(tmp_path / "model.pth"), arch="test_resnet")
    argv = [
        "--model",
        str(teacher_file),
        "--data.path",
        str(tiny.val),
        "--output",
        str(tmp_path / "f"),
        "--threads",
        "1",
    ]
    assert "random:test_resnet: has 1000 classes" in user_error(
        evaluate, [*argv, "--teacher.model", "random:test_resnet"]
    )
