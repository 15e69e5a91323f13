"""Time and disk of stages from given rates, and a trial of real stages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.pipelines.checks.settings import settings_lines
from ssld.pipelines.run import main
from ssld.pipelines.runner import trial
from ssld.pipelines.runner.estimate import FILE, Rate, disk_of, rate_key, read_rates, seconds, time_text, write_rates
from ssld.pipelines.runner.launch import Outcome
from ssld.pipelines.runner.plan import Planned
from ssld.pipelines.runner.stages import KINDS, Stage, build_stages, read_pipeline
from ssld.pipelines.runner.trial import rate_of, shortened
from ssld.shared.checksums import write_folder_sums
from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError
from ssld.shared.run_dir import RunDir
from ssld.shared.training.checkpoint import load_checkpoint, save_checkpoint
from ssld.shared.training.checkpoint_folders import MARK
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import TrainConfig
from tests.conftest import save_images

DISTILL = ["--student.model", "random:x", "--teacher.model", "random:y", "--data.train", "x"]
TRAIN = ["--backbone", "random:x", "--data.train_annotations", "a.json", "--data.train_images", "a"]
RATE = Rate(start=20.0, step=0.5, images=40, val_images=16, files=1000, model=300, checkpoint=700)


def stage(command: str, *words: str, output: str = "runs/a") -> Stage:
    kind = KINDS[command]  # type: ignore[index]
    common = ["--batch_size", "4", "--optim.lr", "0.1", "--optim.reference_batch", "4"]
    arguments = [*words, *common, "--output", output]
    config = parse_config(kind.config_type, arguments, program="p")
    return Stage(Path(output).name, kind, config, tuple(arguments), 1, frozenset())


def test_seconds_are_start_steps_and_evaluations() -> None:
    # An evaluation of 16 images: 16 x 0.5 s / 4 images per step x 0.5 = 1 s.
    assert seconds(stage("distill", *DISTILL, "--steps", "100"), RATE) == 20 + 50 + 1
    assert (
        seconds(stage("distill", *DISTILL, "--steps", "100", "--evaluate_every", "0.3"), RATE) == 20 + 50 + 4
    )  # 30, 60, 90
    assert (
        seconds(stage("distill", *DISTILL, "--steps", "100", "--evaluate_every", "25"), RATE) == 20 + 50 + 4
    )  # the last at the end
    assert seconds(stage("train", *TRAIN, "--train_epochs", "3"), RATE) == 20 + 0.5 * 30 + 1
    assert seconds(stage("train", *TRAIN, "--train_epochs", "3"), Rate(start=1, step=1)) is None
    no_data = Rate(start=20.0, step=0.5)
    assert seconds(stage("distill", *DISTILL, "--steps", "100"), no_data) == 70
    kind = KINDS["toy_data"]
    config = parse_config(kind.config_type, ["--output", "o"], program="p")
    assert seconds(Stage("d", kind, config, (), 1, frozenset()), Rate(start=7.5)) == 7.5


def test_a_training_that_resumes_needs_the_time_of_what_is_left(
    write_pipeline: Any, tmp_path: Path, capfd: Any
) -> None:
    """A run killed after step 60 of 100, and later checkpoint folders that a kill left incomplete; and a request for fewer steps than are done."""
    (tmp_path / "photos").mkdir()
    settings = {
        "student.model": "random:test_resnet",
        "teacher.model": "random:test_resnet",
        "steps": 100,
        "batch_size": 4,
    }
    settings |= {
        "data.train": [str(tmp_path / "photos")],
        "evaluate_every": 25,
        "optim": {"lr": 0.1, "reference_batch": 4},
    }
    stages = {"student": {"command": "distill", "set": settings}}
    file = write_pipeline(stages)
    pipeline = read_pipeline(file)
    built = build_stages(pipeline, file, output=pipeline.output)
    RunDir(built[0].config, "distill").close()
    (built[0].run / "metrics.jsonl").touch()
    write_rates(pipeline.output, {rate_key(built[0], pipeline.output): RATE}, built)
    assert main([str(file), "--dry-run"]) == 0
    # 20 s start, 50 s for 100 steps, four evaluations of 1 s.
    line = "[1/1] student: begins again: no checkpoint yet; 100 steps of 4 images; about 74 s; "
    assert line in capfd.readouterr().out
    checkpoints = built[0].run / "checkpoints"
    for step in (30, 60, 90):
        (checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (checkpoints / f"step_{step:08d}" / "state.json").write_text("{}")
        write_folder_sums(checkpoints / f"step_{step:08d}")
        if step < 90:
            (checkpoints / f"step_{step:08d}" / MARK).touch()
    assert main([str(file), "--dry-run"]) == 0
    out = capfd.readouterr().out
    # 20 s start, 20 s for 40 steps, the evaluations of steps 75 and 100.
    assert "[1/1] student: resumes after step 60; 100 steps of 4 images in all; about 42 s for what is left; " in out
    assert "runs: about 42 s; trainings that resume count what is left; " in out
    assert main([str(file), "--dry-run", "--stages.student.steps", "60"]) == 0
    assert "about 21 s for what is left" in capfd.readouterr().out
    assert main([str(file), "--dry-run", "--stages.student.steps", "59"]) == 2
    shared = f"{built[0].run}: is at step 60 already, beyond the 59 requested"
    assert capfd.readouterr().err == f"error: stage student: {shared}; give as many at least, or --redo student\n"
    assert main([str(file), "--dry-run", "--stages.student.steps", "59", "--redo", "student"]) == 0
    capfd.readouterr()
    save_images(tmp_path / "photos", "disc", 4, seed=0)  # one step per pass
    assert main([str(file), "--dry-run", "--stages.student.steps", "null", "--stages.student.train_epochs", "59"]) == 2
    assert "is at step 60 already, beyond the " in capfd.readouterr().err


def test_a_damaged_checkpoint_is_found_before_the_run(write_pipeline: Any, capfd: Any, tmp_path: Path) -> None:
    """With the words of the training that would read it; not where the stage is computed again."""
    (tmp_path / "photos").mkdir()
    settings = {
        "student.model": "random:test_resnet",
        "objective": "labels",
        "data.train": [str(tmp_path / "photos")],
        "steps": 9,
    }
    settings |= {"batch_size": 4, "optim": {"lr": 0.1, "reference_batch": 4}}
    file = write_pipeline({"student": {"command": "distill", "set": settings}})
    built = build_stages(read_pipeline(file), file, output=tmp_path / "runs")
    run = RunDir(built[0].config, "distill")
    newest = save_checkpoint(run.checkpoints, 6, {"model": {"w": torch.ones(3)}}, {})
    run.close()
    assert main([str(file), "--dry-run"]) == 0
    (newest / "model.safetensors").write_bytes(b"half")
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        load_checkpoint(newest)
    for words in (["--dry-run"], []):
        assert main([str(file), *words]) == 2
        assert capfd.readouterr().err == f"error: stage student: {caught.value}\n"
    for checked in (file, run.path / "config.yaml"):  # a pipeline, and the settings of one command
        lines, _ = settings_lines(checked, {}, {}, quick=True)
        faults = [line.text.removeprefix("stage student: ") for line in lines if line.level == "fault"]
        assert faults == [str(caught.value)]
    assert main([str(file), "--dry-run", "--redo", "student"]) == 0


def test_disk_is_files_and_checkpoints() -> None:
    assert disk_of(stage("distill", *DISTILL, "--steps", "100"), RATE) == 1000 + 700  # at the end only
    assert disk_of(stage("distill", *DISTILL, "--steps", "100", "--save_every", "0.5"), RATE) == 1000 + 2 * 700
    # Two are kept, and a third is there while it is written; the best model is a second file.
    more = ["--steps", "100", "--save_every", "0.1", "--evaluate_every", "0.5"]
    assert disk_of(stage("distill", *DISTILL, *more), RATE) == 1000 + 300 + 3 * 700
    assert disk_of(stage("train", *TRAIN, "--train_epochs", "3"), Rate(start=1, step=1)) is None


def test_times_for_people() -> None:
    assert time_text({"a": 60.0, "b": 240.0}) == "about 5 min"
    assert time_text({"a": 60.0, "b": None}) == "about 60 s, and b of unknown time"
    assert time_text({"a": None, "b": None}) == "unknown time"
    assert time_text({}) == "nothing to run"


def test_a_rate_belongs_to_settings_without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*words: str, output: str = "runs") -> str:
        return rate_key(stage("train", *TRAIN, *words, output=f"{output}/a"), Path(output))

    first = key("--steps", "100")
    assert (
        key("--train_epochs", "3", "--seed", "2", "--evaluate_every", "0.5", "--optim.milestones_steps", "0.7") == first
    )
    assert key("--steps", "100", output="elsewhere") == first
    within = ["--init", "runs/b/detector.safetensors"], ["--init", "elsewhere/b/detector.safetensors"]
    assert key("--steps", "1", *within[0]) == key("--steps", "1", *within[1], output="elsewhere") != first
    others = (["--resize.short_side", "320"], ["--accumulate", "2"], ["--optim.name", "adamw"], ["--workers", "0"])
    assert len({first, *(key("--steps", "100", *words) for words in others)}) == 5
    monkeypatch.setattr("platform.node", lambda: "another machine")
    assert key("--steps", "100") != first


def test_rates_are_kept_beside_the_runs(tmp_path: Path) -> None:
    assert read_rates(tmp_path) == {}
    write_rates(tmp_path, {"k": RATE}, [])
    assert read_rates(tmp_path) == {"k": RATE}
    for damaged in ("[]", "{", '{"k": {"pace": 3}}', '{"k": 3}'):
        (tmp_path / FILE).write_text(damaged)
        assert read_rates(tmp_path) == {}


def test_a_trial_has_three_steps_and_no_evaluation() -> None:
    more = ["--train_epochs", "9", "--data.val.path", "v", "--evaluate_every", "0.2", "--patience=3"]
    short = shortened(stage("distill", *DISTILL, *more, "--keep_weights", "better")).config
    assert isinstance(short, DistillConfig)
    assert (short.steps, short.train_epochs, short.data.val, short.evaluate_every, short.patience) == (
        3,
        None,
        None,
        None,
        None,
    )
    assert (short.log_every, short.save_every, short.batch_size, short.keep_weights) == (1, 3, 4, "last")
    assert short.teacher
    assert short.teacher.check_images == 0  # a teacher of three steps is no better than guessing
    more = ["--steps", "90", "--data.val_annotations", "v.json", "--data.val_images", "v", "--val_loss", "true"]
    short = shortened(stage("train", *TRAIN, *more)).config
    assert isinstance(short, TrainConfig)
    assert (short.steps, short.data.val_annotations, short.data.val_images, short.val_loss) == (3, None, None, False)


@pytest.mark.parametrize("burn_in", ["500", "0.9"])
def test_the_steps_of_a_trial_include_the_moving_teacher(burn_in: str) -> None:
    moving = ["--moving_teacher.unlabeled", "more", "--moving_teacher.burn_in", burn_in, "--moving_teacher.weight", "2"]
    moving += ["--steps", "900"]
    short = shortened(stage("train", *TRAIN, *moving)).config
    assert isinstance(short, TrainConfig)
    assert short.moving_teacher
    assert (short.steps, short.moving_teacher.burn_in, short.moving_teacher.weight) == (3, 1, 2.0)


def test_the_first_step_counts_as_start(tmp_path: Path) -> None:
    lines = [{"step": number, "seconds": value} for number, value in enumerate((9.0, 1.0, 3.0), 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "student.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "checkpoints/step_3").mkdir(parents=True)
    (tmp_path / "checkpoints/step_3/model.safetensors").write_bytes(b"x" * 70)
    rate = rate_of(tmp_path, 30.0, images=5, val_images=2)
    metrics = (tmp_path / "metrics.jsonl").stat().st_size
    assert rate == Rate(24.0, 2.0, images=5, val_images=2, files=50 + metrics, model=50, checkpoint=70)  # 30 - 3 x 2


def test_a_trial_converts_files_and_estimates_audits(
    tmp_path: Path, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, annotations = tmp_path / "photos", tmp_path / "a.json"
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.jpg").touch()
    annotations.write_text(json.dumps({"images": [{"id": n} for n in range(8)], "annotations": []}))
    own = {"model": "${trained}/detector.safetensors", "images": str(photos)}
    data = {"data.train_annotations": str(annotations), "data.train_images": str(photos)}
    settings = data | {"steps": 30, "batch_size": 4, "optim": {"lr": 0.1, "reference_batch": 4}}
    file = write_pipeline(
        {
            "paddle": {"command": "convert_paddle_detector", "set": {"weights": "w.pdparams"}},
            "converted": {"command": "convert_detector", "set": {"weights": "w.pth"}},
            "trained": {"command": "train", "set": settings | {"init": "${converted}/detector.safetensors"}},
            "next": {"command": "audit", "set": own},
            "labels": {"command": "audit", "set": own | {"annotations": str(annotations)}},
            "unseen": {"command": "audit", "set": own | {"images": "later"}},
        }
    )
    ran: list[str] = []

    def run(stage: Stage, console: Path, signals: Any, *, quiet: bool) -> Outcome:
        ran.append(stage.name)
        stage.run.mkdir()
        lines = [json.dumps({"step": step, "seconds": 2.0}) for step in (1, 2, 3)] if stage.name == "trained" else []
        (stage.run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return Outcome(0, ())

    monkeypatch.setattr(trial, "run_stage", run)
    pipeline = read_pipeline(file)
    stages = build_stages(pipeline, file, output=pipeline.output)
    rates: dict[str, Rate] = {}
    plan = [Planned(one, "new") for one in stages]
    trial.measure(plan, lambda folder: build_stages(pipeline, file, output=folder), pipeline.output, rates)
    assert ran == ["paddle", "converted", "trained"]
    starts = {one.name: rate.start for one in stages if (rate := rates.get(rate_key(one, pipeline.output)))}
    assert starts.keys() == {"paddle", "converted", "trained", "next", "labels"}
    # 2 s per step of 4 images, half of it per evaluated image: 6 photos in two views, 8 annotated ones.
    assert starts["next"] - starts["trained"] == pytest.approx(0.5 * 12 * 2 / 4)
    assert starts["labels"] - starts["trained"] == pytest.approx(0.5 * 8 * 2 / 4)


@pytest.mark.process
def test_a_trial_of_real_stages(
    tiny: Any, write_pipeline: Any, tmp_path: Path, capfd: Any, forking_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings, the second of which reads the first one's file, and an evaluation; the second start measures nothing."""
    monkeypatch.setattr(sys, "executable", str(forking_python))
    common: dict[str, Any] = {"steps": 500, "batch_size": 8, "workers": 0, "threads": 1, "device": "cpu"}
    common |= {
        "optim": {"lr": 0.02, "reference_batch": 8},
        "data": {"train": [str(tiny.train)], "val": str(tiny.val), "image_size": 32},
    }
    stages = {
        "teacher": {"command": "teach", "set": common | {"model": {"model": "random:test_resnet"}}},
        "student": {
            "command": "distill",
            "set": common | {"student.model": "random:test_resnet", "teacher.model": "${teacher}/teacher.safetensors"},
        },
        "top1": {
            "command": "evaluate_backbone",
            "set": {"model": "${student}/student.safetensors", "data.path": str(tiny.val)},
        },
        "curated": {
            "command": "curate",
            "set": {"pool": [str(tiny.unlabeled)], "teacher.model": "${teacher}/teacher.safetensors", "keep": 2},
        },
    }
    file = write_pipeline(stages)
    assert main([str(file), "--dry-run", "--estimate"]) == 0
    out = capfd.readouterr().out
    assert "trial of teacher: 3 steps\ntrial of student: 3 steps\n[1/4] teacher: 500 steps of 8 images; about " in out
    assert "about" in next(line for line in out.splitlines() if line.startswith("[3/4] top1: "))
    assert ", and curated of unknown time; " in out  # the curation cannot be tried
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {".lock", FILE}
    pipeline = read_pipeline(file)
    built = build_stages(pipeline, file, output=pipeline.output)
    rates = read_rates(pipeline.output)
    assert set(rates) == {rate_key(one, pipeline.output) for one in built[:3]}
    rate = rates[rate_key(built[1], pipeline.output)]
    assert rate.start > 0 < rate.step
    assert (rate.images, rate.val_images) == (30, 15)
    assert rate.files > rate.model > 0 < rate.checkpoint
    assert main([str(file), "--dry-run", "--estimate", "--stages.student.steps", "1000"]) == 0
    assert "trial of" not in capfd.readouterr().out
