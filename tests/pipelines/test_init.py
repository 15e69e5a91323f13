"""`ssld init`: the command, its files, and a pipeline that the runner accepts unchanged; its split and settings: scaffold/test_suggest.py."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssld.pipelines import init, run
from ssld.pipelines.checks import data as checked_data
from ssld.pipelines.checks.settings import settings_lines
from ssld.pipelines.runner.estimate import Rate, rate_key
from ssld.pipelines.runner.stages import build_stages, read_pipeline
from ssld.pipelines.scaffold import pool, trials, weights
from ssld.pipelines.scaffold.split import split_content
from ssld.pipelines.scaffold.suggest import (
    Settings,
    Trained,
)
from ssld.stage1_ssld.config import LR_OF_RANDOM, DistillConfig
from ssld.stage2_detect import check_data
from ssld.stage2_detect.config import TrainConfig
from tests.pipelines.scaffold.test_suggest import GPU, content, ids


def quick_machine(settings: Settings, trained: Trained, limit: float) -> Rate:
    """A machine that fits everything into any time."""
    return Rate(start=0.1, step=0.001, images=32, val_images=8, files=10**6, model=10**6, checkpoint=10**6)


def stages_of(file: str, variables: dict[str, str] | None = None) -> dict[str, Any]:
    """Settings of the stages of a pipeline, by name."""
    built = build_stages(read_pipeline(Path(file)), Path(file), output=Path("runs"), variables=variables)
    return {stage.name: stage.config for stage in built}


CPU: dict[str, Any] = {"devices": []}
WITH_STAGE_1 = [
    *("--images", "photos", "--annotations", "all.json", "--distill", "yes", "--unlabeled", "more photos"),
    *("--output", "mine.yaml"),
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The content as files; torch is not imported, since that takes seconds per process."""
    monkeypatch.setattr(init, "ask_torch", lambda: CPU)
    for module, name in ((weights, "find_downloads_apart"), (weights, "faults_apart"), (run, "downloads")):
        monkeypatch.setattr(
            module, name, lambda references, **_: []
        )  # timm's names and networks, which nothing here reads
    monkeypatch.setattr(pool, "call_apart", lambda function, *given: function(*given))
    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(quick_machine))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (checked_data, init):
        monkeypatch.setattr(module, "run_script", check_data.main)
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for folder, count in (("photos", 40), ("more photos", 3)):
        Path(folder).mkdir()
        for number in range(count):
            Image.fromarray(draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(f"{folder}/{number}.png")
    Path("all.json").write_text(json.dumps(content()))
    return tmp_path


@pytest.mark.parametrize("unlabeled", [False, True])
def test_the_runner_takes_what_is_written(photos: Path, unlabeled: bool, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--distill", "yes", "--unlabeled", "more photos"] if unlabeled else []
    assert init.main(["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml", *more]) == 0
    written = {"mine.yaml", "mine_train.json", "mine_val.json"} | (
        {"mine_train.txt", "mine_unlabeled.txt", "mine_shown.txt"} if unlabeled else set()
    )
    assert {path.name for path in photos.iterdir() if path.is_file()} == {"all.json"} | written
    assert len(json.loads(Path("mine_val.json").read_text())["images"]) == 8
    if unlabeled:
        assert len(Path("mine_train.txt").read_text().split()) == 32
    pipeline = yaml.safe_load(Path("mine.yaml").read_text())
    assert len(pipeline["stages"]) == (7 if unlabeled else 3)
    capfd.readouterr()
    for flags in ([], ["--smoke"]):
        assert run.main(["mine.yaml", "--dry-run", *flags]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "2 steps of 2 images" in out
    assert "random:test_resnet" in out


def test_one_line_changes_the_length(photos: Path) -> None:
    """Of all detectors; warm-up, milestones and intervals of a pipeline that is four times as long are four times as long."""
    assert init.main(WITH_STAGE_1) == 0
    for steps in (100, 400):
        given = {"steps": str(steps), "distill_steps": str(2 * steps)}
        configs = stages_of("mine.yaml", given)
        distill, train, other = configs["ssld"], configs["detector_imagenet"], configs["detector_ssld"]
        assert isinstance(distill, DistillConfig)
        assert isinstance(train, TrainConfig)
        assert isinstance(other, TrainConfig)
        assert other.steps == train.steps == steps
        assert distill.steps == 2 * steps
        run = train.in_steps(steps)
        assert (run.evaluate_every, run.save_every, run.log_every) == (steps // 5, steps // 5, steps // 20)
        assert run.optim.milestones(7, steps) == [steps * 7 // 10, steps * 9 // 10]
        assert run.optim.total_warmup_steps(steps) == steps // 10
        assert distill.in_steps(2 * steps).save_every == 2 * steps // 5
        assert distill.optim.total_warmup_steps(None, 32, 2 * steps) == steps // 10


def test_variables_as_flags(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One for all detectors; an unknown one names no other that is unlike it."""
    assert init.main(WITH_STAGE_1) == 0
    capfd.readouterr()
    assert run.main(["mine.yaml", "--dry-run", "--variables.steps", "500", "--variables.distill_steps", "70"]) == 0
    out = capfd.readouterr().out
    assert out.count(": 500 steps of 2 images") == 2
    assert ": 70 steps of 32 images" in out
    for flag, hint in (
        ("--steps", "did you mean '--variables.steps'?"),
        ("--size", "did you mean '--variables.size'?"),
        ("--variables.stps", "did you mean 'steps'?"),
        ("--variables.distill", "did you mean 'distill_steps'?"),
        *((f"--variables.{name}", "known: backbone, distill_steps") for name in ("epochs", "minutes", "lr", "length")),
    ):
        assert run.main(["mine.yaml", "--dry-run", flag, "500"]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {flag}: unknown ")
        assert hint in error


def test_both_parts_keep_what_all_photos_together_show(photos: Path) -> None:
    """The boxes refer to the stored pixels, which only one rotated photo shows; it is in one of the parts."""
    for name, value in (("3", 6), ("8", 3), ("20", 3)):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.open(f"photos/{name}.png").save(f"photos/{name}.png", exif=exif)
    assert init.main(["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml"]) == 0
    for part in ("train", "val"):
        assert json.loads(Path(f"mine_{part}.json").read_text())["info"] == {"image_orientation": "stored"}


def test_a_split_keeps_one_photo_on_one_side(photos: Path) -> None:
    """Duplicates by id, by names of augmented copies and by content stay together; the parts equal what training reads."""
    whole = content()
    for number in range(10):
        whole["images"][number + 10]["file_name"] = f"./{number}.png"
    for number in range(20, 30):
        name = f"p{number % 5}_png.rf.{number:032x}.png"
        Path("photos", f"{number}.png").rename(Path("photos", name))
        whole["images"][number]["file_name"] = name
    Path("photos", "31.png").write_bytes(Path("photos", "30.png").read_bytes())
    for row in whole["annotations"]:
        row["category_id"] = float(row["category_id"])
    whole["categories"][0]["name"] = "common\n"
    Path("all.json").write_text(json.dumps(whole))
    line = ["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml", "--val_share", "0.5"]
    assert init.main([*line, "--seed", "3"]) == 0
    parts = [json.loads(Path(f"mine_{part}.json").read_text()) for part in ("train", "val")]
    sides = [ids(part) for part in parts]
    groups = (
        [{f"i{n}", f"i{n + 10}"} for n in range(10)]
        + [{f"i{n}", f"i{n + 5}"} for n in range(20, 25)]
        + [{"i30", "i31"}]
    )
    assert all(group <= sides[0] or group <= sides[1] for group in groups)
    assert sides[0] | sides[1] == ids(whole)
    for part in parts:
        assert {type(row["category_id"]) for row in part["annotations"]} == {int}
        assert part["categories"][0]["name"] == "common"
    assert sum(len(part["annotations"]) for part in parts) == len(whole["annotations"])
    assert yaml.safe_load(Path("mine.yaml").read_text())["output"] == "runs/mine"


def test_several_files_are_read_as_one(photos: Path) -> None:
    """Two files of one class each, in two folders; the split is one of all photos."""
    whole = content(43)
    for number in range(3):
        whole["images"][40 + number]["file_name"] = f"{number}.png"
    for name, rows in (("one", whole["images"][:40]), ("two", whole["images"][40:])):
        known = {row["id"] for row in rows}
        part = whole | {
            "images": rows,
            "annotations": [row for row in whole["annotations"] if row["image_id"] in known],
        }
        Path(f"{name}.json").write_text(json.dumps(part))
    places = ["--annotations", "one.json", "two.json", "--images", "photos", "more photos"]
    assert init.main([*places, "--output", "mine.yaml"]) == 0
    parts = [json.loads(Path(f"mine_{part}.json").read_text())["images"] for part in ("train", "val")]
    names = {row["file_name"] for part in parts for row in part}
    assert names == {f"photos/{number}.png" for number in range(40)} | {
        f"more photos/{number}.png" for number in range(3)
    }
    data = yaml.safe_load(Path("mine.yaml").read_text())["stages"]["detector"]["set"]["data"]
    assert all((Path(data["train_images"]) / name).is_file() for name in names)
    assert run.main(["mine.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize("val", [False, True])
def test_a_data_set_by_its_path(val: bool, photos: Path) -> None:
    """YOLO's layout, with and without images for evaluation."""
    for part, numbers in (("train", range(30)), *([("val", range(30, 40))] if val else [])):
        for kind in ("images", "labels"):
            Path("yolo", kind, part).mkdir(parents=True)
        for number in numbers:
            Path("photos", f"{number}.png").rename(Path("yolo", "images", part, f"{number}.png"))
            Path("yolo", "labels", part, f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    more = "val: images/val\n" if val else ""
    Path("yolo/data.yaml").write_text(f"path: .\ntrain: images/train\n{more}names: [cell]\n")
    assert init.main(["--data", "yolo/data.yaml", "--output", "mine.yaml"]) == 0
    data = yaml.safe_load(Path("mine.yaml").read_text())["stages"]["detector"]["set"]["data"]
    counts = [len(json.loads(Path(data[f"{part}_annotations"]).read_text())["images"]) for part in ("train", "val")]
    assert counts == ([30, 10] if val else [24, 6])
    assert run.main(["mine.yaml", "--dry-run"]) == 0


def test_a_backbone_and_nothing_else(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert init.main(["--unlabeled", "more photos", "--output", "mine.yaml"]) == 0
    written = yaml.safe_load(Path("mine.yaml").read_text())
    assert list(written["stages"]) == ["ssld", "report"]
    assert {path.name for path in photos.iterdir() if path.is_file()} == {"all.json", "mine.yaml", "mine_unlabeled.txt"}
    assert "stage 1 alone: without annotations there is no detector" in capfd.readouterr().out
    for flags in ([], ["--smoke"]):
        assert run.main(["mine.yaml", "--dry-run", *flags]) == 0, capfd.readouterr().err
    assert "2 steps of 3 images" in capfd.readouterr().out


def test_a_trial_of_stage_1_alone(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no detector, the trial starts stage 1 of a pipeline without any."""
    tried: list[str] = []

    def measured(planned: Any, build: Any, output: Path, rates: dict[str, Rate], limit: float) -> None:
        tried.append(planned[0].stage.name)
        rates[rate_key(planned[0].stage, output)] = Rate(0.1, 0.001, 32, 8, 10**6, 10**6, 10**6)

    monkeypatch.setattr(trials, "measure", measured)
    monkeypatch.setattr(init, "trials", trials.trials)
    assert init.main(["--unlabeled", "more photos", "--backbone", "random:test_vit", "--output", "mine.yaml"]) == 0
    assert set(tried) == {"ssld"}


def test_stage_1_is_left_out_where_nothing_says_that_it_helps(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--images", "photos", "--annotations", "all.json", "--unlabeled", "more photos"]
    assert init.main([*line, "--output", "mine.yaml"]) == 0
    assert list(yaml.safe_load(Path("mine.yaml").read_text())["stages"]) == ["detector", "ap", "predictions", "report"]
    out = capfd.readouterr().out
    assert "stage 1 is left out: the student has pretrained weights, and 3 photos are few. " in out
    assert "--distill yes adds it" in out
    assert init.main([*line, "--output", "new.yaml", "--backbone", "random:resnet18"]) == 0
    out = capfd.readouterr().out
    assert "stage 1 on 3 unlabeled photos and the annotated ones: the student has no pretrained weights. " in out
    assert "Compare the AP of the two detectors\n" in out
    stages = yaml.safe_load(Path("new.yaml").read_text())["stages"]
    assert list(stages)[:3] == ["ssld", "detector_random", "detector_ssld"]
    assert stages["ssld"]["set"]["optim"]["lr"] == LR_OF_RANDOM
    assert stages["ssld"]["set"]["losses"] == ["pooled", {"name": "spatial", "weight": 0.5}]


def test_what_few_evaluation_photos_cannot_tell_is_said(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--images", "photos", "--annotations", "all.json"]
    assert init.main([*line, "--output", "few.yaml"]) == 0
    few = "on 8 photos, a random part of the 40 annotated ones; with fewer than 30 photos AP is a rough number, and no difference"
    assert f"\nevaluation: {few}" in capfd.readouterr().out
    assert init.main([*line, "--val_share", "0.75", "--output", "many.yaml"]) == 0
    assert "\nevaluation: on 30 photos, a random part of the 40 annotated ones\n" in capfd.readouterr().out


def test_an_earlier_rate_of_the_machine_is_a_lower_bound(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where not one step of the trial ended, the sum is not unknown: it is more than the stages take that ran here before."""

    def slow(settings: Settings, trained: Trained, limit: float) -> Rate:
        return Rate(start=10.0, step=1.0, images=32, val_images=8, files=10**6, model=10**6, checkpoint=10**6)

    line = ["--images", "photos", "--annotations", "all.json", "--minutes", "4"]
    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(slow))
    assert init.main([*line, "--output", "first.yaml"]) == 0
    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(lambda *given: None))
    assert init.main([*line, "--output", "second.yaml"]) == 0
    found = re.search(r"sum +more than (\d+) (s|min); whether it fits the 4 min is not known", capfd.readouterr().out)
    assert found
    assert 60 <= int(found[1]) * (60 if found[2] == "min" else 1) <= 240


def test_the_time_is_told_and_kept(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`init`, a dry run and the doctor tell the same time; another pipeline of this machine knows the rates, those of other sizes are unknown."""
    line = ["--images", "photos", "--annotations", "all.json"]
    assert init.main([*line, "--minutes", "20", "--output", "mine.yaml"]) == 0
    out = capfd.readouterr().out
    assert "of the 20 min; " in out
    assert re.search(r"\nmore time: --minutes 60: .*\nthis took [\d.]+ s, [\d.]+ s of it for the trial\n", out)
    assert run.main(["mine.yaml", "--dry-run"]) == 0
    planned = capfd.readouterr().out
    assert "3 stages in runs/mine: about " in planned
    assert "last known rate" not in planned
    findings, _ = settings_lines(Path("mine.yaml"), CPU, {}, quick=True)
    (time,) = [one.text for one in findings if one.topic == "time"]
    total = planned.rpartition("runs/mine: ")[2].split(";")[0]
    assert time.startswith(f"{total} (detector ")
    text = (
        Path("mine.yaml")
        .read_text()
        .replace("mine_train.json", "all.json")
        .replace("output: runs/mine", "output: runs/other")
    )
    Path("other.yaml").write_text(text)
    assert run.main(["other.yaml", "--dry-run"]) == 0
    assert "2 stages by the last known rate of this machine; --estimate measures it" in capfd.readouterr().out
    assert run.main(["other.yaml", "--dry-run", "--stages.detector.resize.train_long_side", "160"]) == 0
    assert "unknown time; --estimate measures it" in capfd.readouterr().out


def test_given_evaluation_file_and_gpu(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "ask_torch", lambda: GPU)
    train, val = split_content(content(), share=0.2, seed=1)
    Path("train.json").write_text(json.dumps(train))
    Path("val.json").write_text(json.dumps(val))
    line = [
        "--images",
        "photos",
        "--annotations",
        "train.json",
        "--val-annotations",
        "val.json",
        "--output",
        "a b.yaml",
    ]
    assert init.main(line) == 0
    text = Path("a b.yaml").read_text()
    assert "ssld run 'a b.yaml' --dry-run" in text
    assert "NVIDIA H200, 141 GB" in text
    assert yaml.safe_load(text)["stages"]["detector"]["set"]["precision"] == "bf16"
    assert not list(photos.glob("a b_*"))


def test_mistakes_leave_nothing(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = ["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml"]
    broken = content()
    broken["annotations"][0]["image_id"] = "nobody"
    Path("broken.json").write_text(json.dumps(broken))
    cases = [
        ([*good, "--output", "mine.txt"], "--output mine.txt: give the name of a YAML file"),
        ([*good, "--images", "nowhere"], "--images nowhere: no such file or folder"),
        (
            [*good, "--annotations", "broken.json"],
            "the data have faults, see above; ssld doctor --annotations broken.json",
        ),
        ([*good, "--unlabeled", "nowhere"], "--unlabeled nowhere: no such folder"),
        ([*good, "--val_images", "photos"], "--val_images: give --val_annotations too"),
        ([*good, "--val_share", "1.5"], "--val_share 1.5: give a share between 0 and 1"),
        ([*good, "--minutes", "0"], "--minutes 0: give a number above 0, 1,000,000 at most"),
        ([*good, "--minutes", "inf"], "--minutes inf: give a number above 0, 1,000,000 at most"),
        ([*good, "--minutes", "nan"], "--minutes nan: give a number above 0, 1,000,000 at most"),
        ([*good, "--hours", "-2"], "--hours -2: give a number above 0, 1,000,000 at most"),
        ([*good, "--data", "x"], "--data: has its own images and annotations; leave out"),
        ([*good, "--distill", "yes"], "--distill yes: give --unlabeled too"),
        ([*good, "--backbone", "no/file.safetensors"], "--backbone no/file.safetensors: no such file"),
        ([*good, "--arch", "resnet18"], "--arch: give --backbone too, a weights file"),
        ([*good, "--starts", "coco,imagnet"], "--starts coco,imagnet: imagnet; did you mean 'imagenet'?"),
        ([*good, "--starts", "ssld"], "--starts ssld: stage 1 needs --unlabeled too, a folder of photos"),
        ([*good, "--starts", "coco", "--distill", "no"], "--distill no: leave it out, --starts says whether there is"),
        ([*good, "--starts", "imagenet", "--init", "coco:x"], "--init: --starts imagenet does not use it; add coco"),
        ([*good, "--init", "coco:x"], "--init: coco:x: no published detector of torchvision; known: fasterrcnn_"),
        ([*good, "--init", "all.json"], "--init all.json: not a detector file of this project; give the detector."),
        ([*good, "--augment", "much"], "argument --augment: invalid choice: 'much'"),
        (["--unlabeled", "photos", "--augment", "cells", *good[4:]], "--augment: is about detectors; give --data, or"),
        (good[2:], "give --annotations and --images together"),
        (["--output", "mine.yaml"], "give --data, or --images and --annotations, for a detector, or --unlabeled"),
        ([*good, "--sed", "1"], "--sed: unknown flag; did you mean '--seed'?"),
    ]
    Path("elsewhere").mkdir()
    cases.append(([*good, "--images", "elsewhere"], "the data have faults, see above; fix them first"))
    for argv, message in cases:
        assert init.main(argv) == 2
        assert f"error: {message}" in capfd.readouterr().err
        assert not list(photos.glob("mine*"))
    Path("mine.yaml").write_text("# mine\n")
    assert init.main(good) == 2
    assert "error: mine.yaml: exists already" in capfd.readouterr().err
    assert Path("mine.yaml").read_text() == "# mine\n"


def test_no_file_of_yours_is_overwritten(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = [
        "--images",
        "photos",
        "--annotations",
        "all.json",
        "--output",
        "mine.yaml",
        "--distill",
        "yes",
        "--unlabeled",
        "more photos",
    ]
    names = ["mine.yaml", "mine_train.json", "mine_val.json", "mine_train.txt"]
    for name in names:
        Path(name).write_text("yours")
        assert init.main(line) == 2
        assert f"error: {name}: exists already" in capfd.readouterr().err
        assert [path.name for path in photos.glob("mine*")] == [name]
        assert Path(name).read_text() == "yours"
        Path(name).unlink()
    Path("mine_train.txt").write_text("yours")  # nothing is written there without --unlabeled
    assert init.main(line[:-4]) == 0
    assert Path("mine_train.txt").read_text() == "yours"


def test_a_name_need_not_be_given(photos: Path) -> None:
    assert init.main(["--images", "photos", "--annotations", "all.json"]) == 0
    names = {path.name for path in photos.iterdir() if path.is_file()}
    assert names == {"all.json", "pipeline.yaml", "pipeline_train.json", "pipeline_val.json"}
    assert yaml.safe_load(Path("pipeline.yaml").read_text())["output"] == "runs/pipeline"


@pytest.mark.parametrize(("gpus", "batch", "distilling"), [(1, 8, 35), (2, 8, 34), (3, 6, 33), (4, 8, 32)])
def test_every_gpu_gets_a_process(
    gpus: int, batch: int, distilling: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "ask_torch", lambda: {"devices": GPU["devices"] * gpus})
    assert init.main(WITH_STAGE_1) == 0
    content = yaml.safe_load(Path("mine.yaml").read_text())
    # 32 training photos and 3 others: too few for 256 at once
    for stage, images in (("detector_imagenet", batch), ("ssld", distilling)):
        assert content["stages"][stage]["set"]["batch_size"] == images
        assert content["stages"][stage].get("processes", 1) == gpus
        smoke = content["smoke"]["distill" if stage == "ssld" else "train"]["batch_size"]
        assert smoke % gpus == 0
        assert smoke <= images
    assert run.main(["mine.yaml", "--dry-run", "--smoke"]) == 0


def test_a_path_that_reads_as_a_variable_is_refused(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert init.main(["--images", "photos", "--annotations", "all.json", "--output", "${x}.yaml"]) == 2
    assert "error: --output ${x}.yaml: ${ marks a variable in a pipeline" in capfd.readouterr().err
