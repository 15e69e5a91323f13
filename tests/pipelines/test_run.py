"""The runner: order, skipping, resuming, refusal, --redo, --dry-run, flags, and files that are never deleted."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from ssld.pipelines.run import main
from ssld.pipelines.runner.plan import erase
from ssld.pipelines.runner.stages import ROOT, build_stages, read_pipeline
from ssld.stage1_ssld.config import DistillConfig

CHAIN = ["data", "teacher", "student", "baseline", "ap"]


@pytest.fixture
def finished(started: list[str], write_pipeline: Any, chain: dict[str, Any], table: dict[str, Any]) -> Path:
    """A pipeline that has run once, with `started` emptied."""
    file: Path = write_pipeline(chain, table=table)
    assert main([str(file)]) == 0
    assert started == CHAIN
    started.clear()
    return file


# ---- order, skip, redo


def test_runs_in_order_and_prints_the_table(
    started: list[str], write_pipeline: Any, chain: dict[str, Any], table: dict[str, Any], capfd: Any
) -> None:
    file = write_pipeline(chain, table=table)
    assert main([str(file)]) == 0
    assert started == CHAIN
    assert (file.parent / "runs/student/out.txt").read_text() == "dts"
    out = capfd.readouterr().out
    assert f"[2/5] teacher: ssld teach --source {file.parent}/runs/data/out.txt --text t" in out
    assert [line.split() for line in out.splitlines() if line.startswith(("SSLD", "model"))] == [
        ["model", "top-1", "agreement", "detector", "AP", "AP50"],
        ["SSLD", "70.0", "75.0", "25.7", "50.0"],
        ["SSLD", "-", "baseline", "+10.0", "+25.0", "-", "-"],
    ]
    assert re.search(r"\ntime of this start: \d+\.\d min for 5 stages; largest process \d+\.\d GB\n$", out)


def test_second_start_skips_everything(finished: Path, started: list[str], capfd: Any) -> None:
    assert main([str(finished)]) == 0
    assert started == []
    out = capfd.readouterr().out
    assert "[5/5] ap: finished earlier" in out
    assert "25.7" in out
    assert "largest process" not in out  # none was started


def test_times_of_this_start_and_of_earlier_ones_add_up(finished: Path, started: list[str], capfd: Any) -> None:
    for name in CHAIN:
        file = finished.parent / "runs" / name / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 93.0}))
    (finished.parent / "runs/ap/out.txt").unlink()  # made again before the others are compared
    assert main([str(finished)]) == 0
    assert started == ["ap"]
    lines = capfd.readouterr().out.splitlines()
    times = {
        line.partition(":")[0]: float(line.split(": ")[1].split()[0]) for line in lines if line.startswith("time ")
    }
    assert times["time of earlier starts"] == pytest.approx(4 * 93 / 60)
    assert times["time in all"] == pytest.approx(times["time of this start"] + times["time of earlier starts"])
    assert f"[1/1] ap: finished in {times['time of this start']} min" in lines
    assert main([str(finished)]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("time ")] == [
        "time of earlier starts: 6.2 min, as the stages have recorded it"
    ]


def test_model_files_go_by_their_content(started: list[str], write_pipeline: Any, tmp_path: Path, capfd: Any) -> None:
    model = tmp_path / "model.safetensors"
    model.write_text("weights")
    file = write_pipeline({"a": {"command": "teach", "set": {"source": str(model)}}})
    assert main([str(file)]) == 0
    os.utime(model, (1, 1))
    assert main([str(file)]) == 0
    assert started == ["a"]
    model.write_text("others!")
    assert main([str(file)]) == 2
    assert "source has other content" in capfd.readouterr().err


def test_redo_computes_a_stage_and_what_follows(finished: Path, started: list[str], capfd: Any) -> None:
    assert main([str(finished), "--redo", "teacher"]) == 0
    assert started == ["teacher", "student", "ap"]
    assert f"deleted {finished.parent}/runs/teacher" in capfd.readouterr().out


@pytest.mark.parametrize("way", [["--redo", "teacher"], ["--redo", "teacher", "--dry-run"]])
def test_redo_keeps_a_run_whose_weights_are_damaged(
    way: list[str], finished: Path, started: list[str], tmp_path: Path, capfd: Any
) -> None:
    half = tmp_path / "half.safetensors"
    save_file({"a": np.zeros(100)}, half)
    half.write_bytes(half.read_bytes()[:-1])
    finished.write_text(finished.read_text().replace("${data}/out.txt", str(half)))
    assert main([str(finished), *way]) == 2
    assert f"error: stage teacher: source: {half}: the file is damaged or not complete" in capfd.readouterr().err
    assert started == []
    assert (finished.parent / "runs/teacher/out.txt").exists()


def test_redo_of_an_unknown_stage(finished: Path, capfd: Any) -> None:
    assert main([str(finished), "--redo", "techer"]) == 2
    assert capfd.readouterr().err == "error: --redo techer: no such stage; did you mean 'teacher'?\n"


def test_missing_stage_is_computed_and_later_ones_are_not_silently_kept(
    finished: Path, started: list[str], capfd: Any
) -> None:
    (stage,) = (
        s
        for s in build_stages(read_pipeline(finished), finished, output=finished.parent / "runs")
        if s.name == "teacher"
    )
    erase([stage], {"teacher"}, finished.parent / "runs")
    assert main([str(finished)]) == 2
    assert started == []
    assert capfd.readouterr().err == (
        "error: stage student: was made from teacher, which is missing or will change; --redo student computes it again\n"
    )
    assert main([str(finished), "--redo", "student"]) == 0
    assert started == ["teacher", "student", "ap"]


def test_another_configuration_stops_before_anything_runs(
    finished: Path, started: list[str], write_pipeline: Any, chain: dict[str, Any], capfd: Any
) -> None:
    chain["student"]["set"]["text"] = "other"
    write_pipeline(chain)
    assert main([str(finished)]) == 2
    assert started == []
    assert capfd.readouterr().err == (
        f"error: stage student: {finished.parent}/runs/student holds a run with another configuration "
        '(text: "s" -> "other"); --redo student computes it and the stages that depend on it again\n'
    )
    assert main([str(finished), "--redo", "student"]) == 0
    assert started == ["student", "ap"]


def test_a_start_that_ended_by_a_mistake_takes_other_settings(
    started: list[str], write_pipeline: Any, capfd: Any
) -> None:
    """As the stage alone does: it has no work to lose."""
    assert main([str(write_pipeline({"a": {"command": "teach", "set": {"ends": "user error"}}}))]) == 2
    file = write_pipeline({"a": {"command": "teach", "set": {"text": "other"}}})
    assert main([str(file), "--dry-run"]) == 0
    assert "[1/1] a: new\n" in capfd.readouterr().out
    assert main([str(file)]) == 0
    assert started == ["a", "a"]


def test_the_dry_run_refuses_what_the_run_refuses(
    finished: Path, started: list[str], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished.parent / "runs/ap/result.json").unlink()
    flags = [str(finished), "--stages.ap.resume", "never"]
    for words in (flags, [*flags, "--dry-run"]):
        assert main(words) == 2
        folder = finished.parent / "runs/ap"
        assert capfd.readouterr().err == (
            f"error: stage ap: {folder}: holds this run already and --resume is never; give another --output or delete it\n"
        )
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != finished.parent / "runs")
    for more in ([], ["--dry-run"]):
        assert main([str(finished), *more]) == 2
        assert capfd.readouterr().err == f"error: {finished.parent}/runs: cannot be written; give another --output\n"
    assert started == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("by hand")])
def test_what_is_gone_or_changed_is_made_again(
    finished: Path, started: list[str], capfd: Any, damage: Callable[[Path], Any]
) -> None:
    file = finished.parent / "runs/ap/out.txt"
    damage(file)
    changed = file.exists()
    assert main([str(finished), "--dry-run"]) == 0
    assert "ap: finished, but files are missing\n" in capfd.readouterr().out
    assert main([str(finished)]) == 0
    out = capfd.readouterr().out
    assert started == ["ap"]
    assert f"[1/1] ap: {file} is missing or has changed; recomputing it" in out
    assert "[5/5] ap: finished earlier" in out
    assert file.read_text() == "dts"
    assert (finished.parent / "runs/ap/out.txt.changed").exists() == changed


def test_what_is_made_again_and_differs_stops(
    finished: Path, started: list[str], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished.parent / "runs/data/out.txt").unlink()
    monkeypatch.setenv("FAKE_STAGE_CHANCE", "another result")
    assert main([str(finished)]) == 2
    assert started == ["data"]
    err = capfd.readouterr().err
    assert "stage teacher: " in err
    assert "source has other content" in err


def test_more_steps_go_on_and_say_so(
    finished: Path, started: list[str], write_pipeline: Any, chain: dict[str, Any], capfd: Any
) -> None:
    chain["ap"]["set"]["steps"] = 2
    write_pipeline(chain)
    assert main([str(finished)]) == 0
    assert started == ["ap"]
    assert "[5/5] ap: changed since the last start: steps: 1 -> 2" in capfd.readouterr().out


def test_more_steps_of_a_stage_that_others_read_name_the_change(
    finished: Path, started: list[str], write_pipeline: Any, chain: dict[str, Any], capfd: Any
) -> None:
    chain["student"]["set"]["steps"] = 2
    write_pipeline(chain)
    assert main([str(finished)]) == 2
    assert started == []
    assert capfd.readouterr().err == (
        "error: stage ap: was made from student, which is missing or will change (student: changed since the last start: steps: 1 -> 2); "
        "--redo ap computes it again, and --redo student begins student afresh instead of continuing it\n"
    )
    assert main([str(finished), "--redo", "ap"]) == 0
    assert started == ["student", "ap"]


def test_report_is_made_again_when_something_changed(
    started: list[str], write_pipeline: Any, chain: dict[str, Any], table: dict[str, Any]
) -> None:
    stages = {**chain, "report": {"command": "report", "set": {"pipeline": "${pipeline}", "runs": "${output}"}}}
    file = write_pipeline(stages, table=table)
    assert main([str(file)]) == 0
    assert started == [*CHAIN, "report"]
    page = file.parent / "runs/report/report.html"
    assert "25.7" in page.read_text()
    started.clear()
    assert main([str(file)]) == 0
    assert started == []
    stages["ap"]["set"]["steps"] = 2
    write_pipeline(stages, table=table)
    assert main([str(file)]) == 0
    assert started == ["ap", "report"]
    started.clear()
    assert main([str(file), "--redo", "ap"]) == 0
    assert started == ["ap", "report"]


# ---- flags


def test_dry_run_does_nothing(finished: Path, started: list[str], capfd: Any) -> None:
    before = sorted(finished.parent.rglob("*"))
    assert main([str(finished), "--dry-run", "--redo", "student"]) == 0
    assert started == []
    assert sorted(finished.parent.rglob("*")) == before
    lines = capfd.readouterr().out.splitlines()
    assert f"would delete {finished.parent}/runs/student" in lines
    assert "[1/5] data: done, skipped" in lines
    assert "[3/5] student: new" in lines
    assert lines[lines.index("[3/5] student: new") + 1].startswith("    ssld distill --source ")


def test_dry_run_of_a_new_pipeline_writes_nothing(write_pipeline: Any, chain: dict[str, Any], fake_kinds: None) -> None:
    file = write_pipeline(chain)
    assert main([str(file), "--dry-run"]) == 0
    assert not (file.parent / "runs").exists()


def test_shipped_quickstart_prints_its_commands(capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["pipelines/quickstart.yaml", "--dry-run", "--output", str(tmp_path / "q")]) == 0
    out = capfd.readouterr().out
    assert "ssld distill --config toy_student --teacher.model " in out
    assert len(re.findall(r"\d+ steps of \d+ images; disk unknown", out)) == 6
    line = r"11 stages in .*: unknown time; --estimate measures it; 6 stages of unknown size; data sets not counted"
    assert re.search(line, out)
    assert main(["pipelines/quickstart.yaml", "--estimate", "--output", str(tmp_path / "q")]) == 2
    assert "--estimate: give --dry-run too" in capfd.readouterr().err
    assert not (tmp_path / "q").exists()


def test_output_variables_and_smoke(started: list[str], write_pipeline: Any, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "in.txt").write_text("x")
    stages = {"a": {"command": "teach", "set": {"source": "${dir}/in.txt", "steps": 5}}}
    file = write_pipeline(stages, variables={"dir": None}, smoke={"teach": {"steps": 1}})
    assert main([str(file)]) == 2
    assert "variable dir has no value; give it as --variables.dir VALUE" in capfd.readouterr().err
    assert main(["--variables.dri", "x", str(file)]) == 2
    assert "--variables.dri: unknown variable; did you mean 'dir'?" in capfd.readouterr().err
    assert main(["--variables.steps", "3", str(file)]) == 2  # shares only the prefix with the known one
    assert "--variables.steps: unknown variable; known: dir\n" in capfd.readouterr().err
    assert main(["--variables.dir", "--dry-run", str(file)]) == 2
    assert "--variables.dir: give a value" in capfd.readouterr().err
    assert main(["--variables.dir", str(tmp_path), str(file), "--smoke"]) == 0
    assert (tmp_path / "runs_smoke/a/out.txt").read_text() == "x"
    assert main([str(file), f"--variables.dir={tmp_path}", "--output", str(tmp_path / "elsewhere")]) == 0
    assert "steps: 5" in (tmp_path / "elsewhere/a/config.yaml").read_text()


def test_settings_of_a_stage_on_the_command_line(
    started: list[str], write_pipeline: Any, tmp_path: Path, capfd: Any
) -> None:
    stages = {
        "a": {"command": "teach", "set": {"steps": 5, "metrics": {"top1": 0.5, "AP": 3}}},
        "b": {"like": "a", "set": {"text": "b"}},
        "c": {"command": "teach", "seeds": 2},
    }
    file = write_pipeline(stages, smoke={"teach": {"steps": 1}})
    flags = ["--stages.a.steps", "7", "--stages.a.metrics.top1=0.25", "--stages.c.seed", "4"]
    assert main([*flags, str(file)]) == 0
    values = {name: yaml.safe_load((tmp_path / f"runs/{name}/config.yaml").read_text()) for name in started}
    assert [values[name]["steps"] for name in ("a", "b", "c")] == [7, 7, 1]  # b is like a
    assert values["b"]["metrics"] == {"top1": 0.25, "AP": 3, "AP50": None, "agreement": None}
    assert [values[name]["seed"] for name in ("c", "c_1")] == [4, 5]
    assert main([str(file), "--smoke", "--stages.a.text", "x"]) == 0
    for words, line in (
        (["--stages.aa.steps", "7"], "--stages.aa: no such stage; did you mean 'a'?"),
        (["--stages.a.step", "7"], "stage a: --step: unknown flag; did you mean '--steps'?"),
        (["--stages.a.steps", "0"], "stage a: command line: steps: has to be at least 1"),
        (["--stages.a", "7"], "--stages.a: expected --stages.NAME.KEY VALUE"),
        (["--stages.a.steps"], "--stages.a.steps: give a value"),
        (["--smoke", "--stages.a.steps", "7"], "--stages.a.steps: the section smoke of the file sets it too"),
    ):
        capfd.readouterr()
        assert main([str(file), *words]) == 2
        assert line in capfd.readouterr().err


def test_another_kind_of_length_replaces_the_one_of_the_file(write_pipeline: Any) -> None:
    common = {"student.model": "random:x", "objective": "labels", "data.train": ["x"], "batch_size": 4}
    common |= {"optim": {"lr": 0.1, "reference_batch": 4, "warmup_epochs": 1}, "steps": 9}
    file = write_pipeline({"a": {"command": "distill", "set": common}, "b": {"like": "a"}})
    given = {"a": {"train_epochs": "2", "optim.warmup_steps": "0.1"}}
    for stage in build_stages(read_pipeline(file, given), file, output=file.parent):
        assert isinstance(stage.config, DistillConfig)
        assert (stage.config.steps, stage.config.train_epochs, stage.config.train_images) == (None, 2, None)
        assert (stage.config.optim.warmup_steps, stage.config.optim.warmup_epochs) == (0.1, None)


def test_smoke_needs_its_section(write_pipeline: Any, fake_kinds: None, capfd: Any) -> None:
    assert main([str(write_pipeline({"a": {"command": "teach"}})), "--smoke"]) == 2
    assert "--smoke needs a section `smoke:`" in capfd.readouterr().err


def test_weights_without_an_architecture_are_refused_before_anything_runs(tmp_path: Path, capfd: Any) -> None:
    """All of them at once, with the key that is missing; weights with `arch`, or written by this project, are not."""
    foreign, own = tmp_path / "foreign.safetensors", tmp_path / "own.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, foreign)
    save_file({"x": np.zeros(1, np.float32)}, own, {"ssld": "{}"})
    (tmp_path / "photos").mkdir()
    common = {
        "data.train": [str(tmp_path / "photos")],
        "steps": 1,
        "batch_size": 1,
        "optim": {"lr": 1, "reference_batch": 1},
    }
    networks = {"student.model": str(foreign), "teacher.model": str(foreign)}
    stages = {
        "a": {"command": "distill", "set": {**common, **networks}},
        "b": {
            "command": "distill",
            "set": {**common, **networks, "student.arch": "resnet18d", "teacher.model": str(own)},
        },
    }
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps({"output": str(tmp_path / "runs"), "stages": stages}), encoding="utf-8")
    assert main([str(file), "--dry-run"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        f"error: stage a: {key}.model: {foreign}: does not name its architecture; set {key}.arch to its timm name"
        for key in ("student", "teacher")
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argv", [[], ["nowhere.yaml"], ["nowhere.yaml", "--dry-rum"]])
def test_bad_command_lines_end_in_one_line(argv: list[str], capfd: Any) -> None:
    """After the usage, if no argument was given."""
    assert main(argv) == 2
    *usage, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert bool(usage) == (not argv)
    assert "".join(usage[:1]).startswith("usage: " if usage else "")


# ---- safety


def test_pipeline_in_use_is_refused(finished: Path, capfd: Any) -> None:
    with (finished.parent / "runs/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(finished)]) == 2
    assert "in use by another pipeline" in capfd.readouterr().err


def test_redo_deletes_nothing_but_run_directories(finished: Path, capfd: Any, tmp_path: Path) -> None:
    runs = finished.parent / "runs"
    (runs / "ap/config.yaml").unlink()
    assert main([str(finished), "--redo", "ap"]) == 2
    assert "not a run directory; delete it yourself" in capfd.readouterr().err
    assert (runs / "ap/out.txt").exists()
    (runs / "baseline").rename(tmp_path / "kept")
    (runs / "baseline").symlink_to(tmp_path / "kept")
    assert main([str(finished), "--redo", "baseline"]) == 2
    assert (tmp_path / "kept/out.txt").exists()


def test_redo_of_a_start_that_came_to_nothing(finished: Path, started: list[str]) -> None:
    run = finished.parent / "runs/ap"
    assert main([str(finished), "--redo", "ap"]) == 0
    for file in run.iterdir():
        if not file.name.startswith("."):
            file.unlink()
    (run / "error.json").write_text("{}")
    started.clear()
    assert main([str(finished), "--redo", "ap"]) == 0
    assert started == ["ap"]


@pytest.mark.parametrize("moment", ["between two stages", "in the deletion"])
def test_a_kill_during_redo_leaves_stages_whole_or_gone(
    finished: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Entries of a folder are deleted in directory order: result.json may remain last, without the files that it lists."""
    runs = finished.parent / "runs"
    moves: list[str] = []
    rename = Path.rename

    def killed_before_the_second(path: Path, target: Path) -> Path:
        if moves:
            raise KeyboardInterrupt
        moves.append(path.name)
        return rename(path, target)

    def killed_in_the_middle(folder: Path) -> None:
        (Path(folder) / "out.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "between two stages":
            patch.setattr(Path, "rename", killed_before_the_second)
        else:
            patch.setattr(shutil, "rmtree", killed_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            main([str(finished), "--redo", "student"])
    for name in CHAIN:
        assert (runs / name / "out.txt").exists() == (runs / name / "result.json").exists(), name
    assert not (runs / "ap").exists()  # dependent stages are deleted first: no stage is left whose input is gone
    assert main([str(finished), "--redo", "student"]) == 0
    assert started == ["student", "ap"]
    assert not list(runs.glob(".deleted*"))


def test_redo_of_a_stage_in_use_deletes_nothing(finished: Path, capfd: Any) -> None:
    runs = finished.parent / "runs"
    with (runs / "ap/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(finished), "--redo", "student"]) == 2
    assert "in use by another process" in capfd.readouterr().err
    assert (runs / "student/out.txt").exists()
