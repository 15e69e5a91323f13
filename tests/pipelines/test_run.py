"""The runner: order, skip, go on, refuse, redo, dry run, failures, signals, and the table."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines import launch
from pipelines.config import TableConfig
from pipelines.launch import Outcome, Signals, command_line, run_stage
from pipelines.plan import erase
from pipelines.run import main
from pipelines.stages import ROOT, Stage, build_stages, read_pipeline
from pipelines.table import table_text
from shared.errors import UserError

FAKE = Path(__file__).with_name("fake_stage.py")
CHAIN = ["data", "teacher", "student", "baseline", "ap"]


def one_stage(file: Path, number: int = 0) -> Stage:
    pipeline = read_pipeline(file)
    return build_stages(pipeline, file, output=pipeline.output)[number]


@pytest.fixture
def finished(started: list[str], write_pipeline: Any, chain: dict[str, Any], table: dict[str, Any]) -> Path:
    """A pipeline that has run once; `started` is empty again."""
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
    assert f"[2/5] teacher: python {FAKE} --source {file.parent}/runs/data/out.txt --text t" in out
    assert [line.split() for line in out.splitlines() if line.startswith(("SSLD", "backbone"))] == [
        ["backbone", "top-1", "agreement", "detector", "AP", "AP50"],
        ["SSLD", "70.0", "75.0", "25.7", "50.0"],
        ["SSLD", "-", "baseline", "+10.0", "+25.0", "-", "-"],
    ]
    assert "5 stages: 0.0 min of work" in out


def test_second_start_skips_everything(finished: Path, started: list[str], capfd: Any) -> None:
    assert main([str(finished)]) == 0
    assert started == []
    out = capfd.readouterr().out
    assert "[5/5] ap: done before" in out
    assert "25.7" in out


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
        "error: stage student: was made from a teacher that is gone or will change; --redo student makes it new\n"
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
        '(text: "s" -> "other"); --redo student computes it and what follows again\n'
    )
    assert main([str(finished), "--redo", "student"]) == 0
    assert started == ["student", "ap"]


def test_changed_input_stops(finished: Path, started: list[str], capfd: Any) -> None:
    (finished.parent / "runs/data/out.txt").write_text("changed")
    assert main([str(finished)]) == 2
    assert started == []
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
    assert lines[lines.index("[3/5] student: new") + 1].startswith(f"    python {FAKE} --source ")


def test_dry_run_of_a_new_pipeline_writes_nothing(write_pipeline: Any, chain: dict[str, Any], fake_kinds: None) -> None:
    file = write_pipeline(chain)
    assert main([str(file), "--dry-run"]) == 0
    assert not (file.parent / "runs").exists()


def test_shipped_quickstart_prints_its_commands(capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pipelines.disk._ask_timm", lambda names: {})
    assert main(["pipelines/quickstart.yaml", "--dry-run", "--output", str(tmp_path / "q")]) == 0
    out = capfd.readouterr().out
    assert "python stage1_ssld/distill.py --config stage1_ssld/configs/toy_student.yaml --teacher.model " in out
    assert len(re.findall(r"\d+ steps of \d+ images; disk unknown", out)) == 6
    assert "11 stages in " in out
    assert ", and 6 stages of unknown size" in out
    assert not (tmp_path / "q").exists()


def test_output_variables_and_smoke(started: list[str], write_pipeline: Any, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "in.txt").write_text("x")
    stages = {"a": {"command": "teach", "set": {"source": "${dir}/in.txt", "steps": 5}}}
    file = write_pipeline(stages, variables={"dir": None}, smoke={"teach": {"steps": 1}})
    assert main([str(file)]) == 2
    assert "variable dir has no value; give it as --variables.dir VALUE" in capfd.readouterr().err
    assert main(["--variables.dri", "x", str(file)]) == 2
    assert "--variables.dri: unknown flag; did you mean '--variables.dir'?" in capfd.readouterr().err
    assert main(["--variables.dir", str(tmp_path), str(file), "--smoke"]) == 0
    assert (tmp_path / "runs_smoke/a/out.txt").read_text() == "x"
    assert main([str(file), f"--variables.dir={tmp_path}", "--output", str(tmp_path / "elsewhere")]) == 0
    assert "steps: 5" in (tmp_path / "elsewhere/a/config.yaml").read_text()


def test_smoke_needs_its_section(write_pipeline: Any, fake_kinds: None, capfd: Any) -> None:
    assert main([str(write_pipeline({"a": {"command": "teach"}})), "--smoke"]) == 2
    assert "--smoke needs a section `smoke:`" in capfd.readouterr().err


@pytest.mark.parametrize("argv", [[], ["nowhere.yaml"], ["nowhere.yaml", "--dry-rum"]])
def test_bad_command_lines_end_in_one_line(argv: list[str], capfd: Any) -> None:
    assert main(argv) == 2
    assert capfd.readouterr().err.count("\n") == 1


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


def test_redo_of_a_stage_in_use_deletes_nothing(finished: Path, capfd: Any) -> None:
    runs = finished.parent / "runs"
    with (runs / "ap/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(finished), "--redo", "student"]) == 2
    assert "in use by another process" in capfd.readouterr().err
    assert (runs / "student/out.txt").exists()


# ---- processes


def test_command_lines_for_several_processes(
    fake_kinds: None, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = one_stage(write_pipeline({"a": {"command": "teach", "processes": 2}}))
    monkeypatch.setattr(launch, "_has_cuda", lambda: True)
    assert command_line(stage)[:6] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", str(FAKE)]
    monkeypatch.setattr(launch, "_has_cuda", lambda: False)
    expected = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(FAKE)]
    assert command_line(stage)[:7] == expected


def test_script_paths_from_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = one_stage(ROOT / "pipelines/quickstart.yaml", 1)
    monkeypatch.chdir(ROOT)
    assert command_line(stage)[:2] == ["python", "stage1_ssld/teach.py"]
    monkeypatch.chdir(tmp_path)
    assert command_line(stage)[:2] == ["python", str(ROOT / "stage1_ssld/teach.py")]


def run_one(file: Path) -> tuple[Outcome, str]:
    stage, console = one_stage(file), file.parent / "runs/logs/a.txt"
    with Signals() as signals:
        outcome = run_stage(stage, console, signals)
    return outcome, console.read_text()


def test_output_is_passed_through_and_kept(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    outcome, console = run_one(write_pipeline({"a": {"command": "teach", "set": {"text": "x y"}}}))
    assert outcome == Outcome(0)
    assert console.startswith(f"$ python {FAKE} --text 'x y' --output ")
    assert console.endswith("working in a\n")
    assert "working in a\n" in capfd.readouterr().out


def test_user_error_of_a_stage_is_one_line(fake_kinds: None, write_pipeline: Any) -> None:
    outcome, _ = run_one(write_pipeline({"a": {"command": "teach", "set": {"ends": "user error"}}}))
    assert outcome == Outcome(2, ("images: no such folder; give another",))


def test_crash_of_a_stage_shows_its_last_lines(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "crash"}}, "b": {"command": "teach"}})
    assert main([str(file)]) == 1
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == "error: stage a: exit code 1; its last lines:"
    assert lines[-1] == "error: stage a: RuntimeError: a bug"
    assert len(lines) == 16
    assert "[2/2]" not in captured.out


def test_stage_without_a_result_has_failed(fake_kinds: None, write_pipeline: Any) -> None:
    outcome, _ = run_one(write_pipeline({"a": {"command": "teach", "set": {"ends": "no result"}}}))
    assert outcome == Outcome(1, ("ended without a result; its last lines:", "working in a"))


@pytest.mark.parametrize(("error_json", "expected"), [(True, 2), (False, 1)])
def test_user_error_behind_a_launcher(fake_kinds: None, write_pipeline: Any, error_json: bool, expected: int) -> None:
    stage = one_stage(write_pipeline({"a": {"command": "teach", "processes": 2}}))
    stage.run.mkdir(parents=True)
    (stage.run / "error.json").write_text('{"error": "key: wrong", "exit_code": 2}')
    begun = time.time() + (0 if error_json else 60)  # an old file says nothing about this start
    outcome = launch._outcome(stage, 1, ["noise"], begun, stopped=False)
    assert outcome.code == expected
    assert outcome.lines[-1] == ("key: wrong" if error_json else "noise")


RUNNER = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
import fake_stage
from pipelines import run, stages
stages.KINDS["teach"] = stages.Kind(fake_stage.__file__, fake_stage.FakeConfig, ("out.txt",))
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_the_stage_in_its_own_group(
    fake_kinds: None, write_pipeline: Any, tmp_path: Path, number: signal.Signals
) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "waiting"}}, "b": {"command": "teach"}})
    code = RUNNER.format(root=str(ROOT), here=str(FAKE.parent))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ready = tmp_path / "runs/a/ready"
    deadline = time.monotonic() + 60
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "group True" in out
    assert f"stopped: signal {number.value}; the same command goes on from there" in out
    assert "stage a: stopped; the same command goes on from there" in err
    assert "[2/2]" not in out
    assert not (tmp_path / "runs/a/result.json").exists()


def test_signal_between_stages_stops(fake_kinds: None, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pipeline({"a": {"command": "teach"}, "b": {"command": "teach"}})

    def finish_in_spite_of(stage: Stage, console: Path, signals: Signals) -> Outcome:
        assert stage.name == "a"
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(0)

    monkeypatch.setattr("pipelines.run.run_stage", finish_in_spite_of)
    assert main([str(file)]) == 143


def test_runner_report_and_command_start_without_torch() -> None:
    code = "import sys; from pipelines import cli, report, run; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the table


def test_table_says_what_is_missing(tmp_path: Path, table: dict[str, Any]) -> None:
    assert table_text(TableConfig(**table), tmp_path).splitlines() == [
        "backbone           top-1    agreement    detector AP    AP50",
        "teacher                -            -              -       -",
        "SSLD                   -            -              -       -",
        "baseline               -            -              -       -",
        "------------------------------------------------------------",
        "SSLD - baseline        -            -              -       -",
    ]


def test_table_shows_percent_and_signed_differences(
    tmp_path: Path, table: dict[str, Any], fake_stage: ModuleType
) -> None:
    measured = {
        "student": {"top1": 0.5, "agreement": 1.0},
        "baseline": {"top1": 0.6237},
        "ap": {"AP": 0.0, "AP50": 0.9},
    }
    for name, metrics in measured.items():
        flags = [f"--metrics.{key}={value}" for key, value in metrics.items()]
        assert fake_stage.main([*flags, "--output", str(tmp_path / name)]) == 0
    cells = [line.split() for line in table_text(TableConfig(**table), tmp_path).splitlines()]
    assert cells[2] == ["SSLD", "50.0", "100.0", "0.0", "90.0"]
    assert cells[3] == ["baseline", "62.4", "-", "-", "-"]
    assert cells[5] == ["SSLD", "-", "baseline", "-12.4", "-", "-", "-"]


def test_damaged_result_is_a_user_error(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not readable"):
        table_text(TableConfig(**table), tmp_path)
