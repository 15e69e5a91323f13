"""A stage as a process: command line, output, failures and signals."""

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssld.pipelines import cli
from ssld.pipelines.run import main
from ssld.pipelines.runner import launch
from ssld.pipelines.runner.launch import Outcome, Signals, command_line, run_stage, stoppable
from ssld.pipelines.runner.stages import ROOT, Stage, build_stages, find_pipeline, read_pipeline
from ssld.shared.config.settings import parse_config
from ssld.shared.errors import Stopped

FAKE = Path(__file__).parents[1] / "fake_stage.py"


def one_stage(file: Path, number: int = 0) -> Stage:
    pipeline = read_pipeline(file)
    return build_stages(pipeline, file, output=pipeline.output)[number]


def test_command_lines_for_several_processes(
    fake_kinds: None, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = one_stage(write_pipeline({"a": {"command": "teach", "processes": 2}}))
    monkeypatch.setattr(launch, "_has_cuda", lambda: True)
    assert command_line(stage)[:6] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", str(FAKE)]
    monkeypatch.setattr(launch, "_has_cuda", lambda: False)
    expected = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(FAKE)]
    assert command_line(stage)[:7] == expected


def test_command_lines_from_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process is the sub-command of `ssld`, in any folder; the script of several processes is found from there."""
    monkeypatch.chdir(tmp_path)
    stage = one_stage(ROOT / "pipelines/quickstart.yaml", 1)
    line = command_line(stage)
    assert line[:4] == ["ssld", "teach", "--config", "toy_teacher"]  # a shipped recipe by its name
    Path("toy_teacher").touch()  # which `--config toy_teacher` would read
    assert command_line(stage)[3] == str(ROOT / "stage1_ssld/configs/toy_teacher.yaml")
    monkeypatch.setattr(launch, "_has_cuda", lambda: False)
    several = command_line(dataclasses.replace(stage, processes=2))
    assert several[6] == str(ROOT / "stage1_ssld/teach.py")


def test_every_line_is_a_sub_command_with_the_settings_of_its_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line of each stage of every shipped pipeline, given to `ssld`, calls the entry of that stage with its settings."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, list[str]]] = []

    def stand_in(module: str, argv: list[str]) -> int:
        calls.append((module, argv))
        return 0

    monkeypatch.setattr("ssld.pipelines.cli._main_of", stand_in)
    monkeypatch.setattr("ssld.pipelines.cli._script", lambda name, argv: f"by the kind of the file: {name}")
    for name in ("quickstart", "sad_toy"):
        file = find_pipeline(name)
        for stage in build_stages(read_pipeline(file), file, output=tmp_path / "runs"):
            line = command_line(stage)
            assert line[0] == "ssld"
            assert cli.main(line[1:]) == 0
            module, argv = calls.pop()
            script = (
                "stage2_detect/evaluate.py" if module.endswith(": evaluate") else f"{module[5:].replace('.', '/')}.py"
            )
            assert script == stage.kind.script
            assert parse_config(stage.kind.config_type, argv, program=script) == stage.config


def run_one(file: Path) -> tuple[Outcome, str]:
    stage, console = one_stage(file), file.parent / "runs/logs/a.txt"
    with Signals() as signals:
        outcome = run_stage(stage, console, signals)
    return outcome, console.read_text()


@pytest.mark.process
def test_output_is_passed_through_and_kept(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    outcome, console = run_one(write_pipeline({"a": {"command": "teach", "set": {"text": "x y"}}}))
    assert outcome == Outcome(0)
    assert console.startswith("$ ssld teach --text 'x y' --output ")
    assert console.endswith("working in a\n")
    assert "working in a\n" in capfd.readouterr().out


@pytest.mark.process
def test_user_error_of_a_stage_is_one_line(fake_kinds: None, write_pipeline: Any) -> None:
    outcome, _ = run_one(write_pipeline({"a": {"command": "teach", "set": {"ends": "user error"}}}))
    assert outcome == Outcome(2, ("images: no such folder; give another",))


@pytest.mark.process
def test_user_error_of_a_stage_is_printed_once(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "user error"}}})
    assert main([str(file)]) == 2
    captured = capfd.readouterr()
    assert captured.err == "error: stage a: images: no such folder; give another\n"
    assert "images: no such folder" not in captured.out
    assert captured.out.endswith("working in a\n")
    assert "\nerror: images: no such folder; give another\n" in (file.parent / "runs/logs/a.txt").read_text()


@pytest.mark.process
def test_place_of_a_wrong_key_is_named(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "wrong key"}}})
    assert main([str(file)]) == 2
    assert capfd.readouterr().err == f"error: stage a: text: not allowed (stages.a.set in {file})\n"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("source: a.txt: no such file", True),
        ("metrics.top1: must be a number", True),
        ("metrics.top1 x.safetensors: no such file", True),
        ("a.txt: no such file", False),
        ("source and target are the same", False),
    ],
)
def test_keys_of_a_stage_are_recognized(fake_kinds: None, write_pipeline: Any, message: str, named: bool) -> None:
    assert one_stage(write_pipeline({"a": {"command": "teach"}})).names_setting(message) == named


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_of_errors_are_withheld_from_the_screen(size: int, capfd: Any, tmp_path: Path) -> None:
    """Whatever the boundaries between two reads."""
    text = b"one\rtwo\nerror: a\nerr\nerrors: b\n\n error: c\nerror: d"
    source, target = os.pipe()
    with (
        os.fdopen(source, "rb") as reading,
        (tmp_path / "log").open("wb") as log,
        pytest.MonkeyPatch.context() as patch,
    ):
        read = os.read
        patch.setattr(launch.os, "read", lambda file, most: read(file, size))
        os.write(target, text)
        os.close(target)
        tail, errors = deque[str](), list[str]()
        launch._pass_through(reading, log, tail, errors, quiet=False)
    assert capfd.readouterr().out == "one\rtwo\nerr\nerrors: b\n\n error: c\n"
    assert errors == ["error: a", "error: d"]
    assert (tmp_path / "log").read_bytes() == text
    assert list(tail) == ["two", "error: a", "err", "errors: b", " error: c", "error: d"]


@pytest.mark.process
def test_crash_of_a_stage_shows_its_last_lines(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "crash"}}, "b": {"command": "teach"}})
    assert main([str(file)]) == 1
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == "error: stage a: exit code 1; its last lines:"
    assert lines[-1] == "error: stage a: RuntimeError: a bug"
    assert len(lines) == 16
    assert "[2/2]" not in captured.out


@pytest.mark.process
def test_stage_without_a_result_has_failed(fake_kinds: None, write_pipeline: Any) -> None:
    outcome, _ = run_one(write_pipeline({"a": {"command": "teach", "set": {"ends": "no result"}}}))
    assert outcome == Outcome(1, ("ended without a result; its last lines:", "working in a"))


@pytest.mark.parametrize(
    ("record", "lines"), [('{"error": "key: wrong"}', ("key: wrong",)), ("[]", None), (None, None)]
)
def test_user_error_behind_a_launcher(
    fake_kinds: None, write_pipeline: Any, record: str | None, lines: tuple[str, ...] | None
) -> None:
    stage = one_stage(write_pipeline({"a": {"command": "teach", "processes": 2}}))
    stage.run.mkdir(parents=True)
    if record:
        (stage.run / "error.json").write_text(record)
    expected = Outcome(2, lines) if lines else Outcome(1, ("exit code 1; its last lines:", "noise"))
    assert launch._outcome(stage, 1, ["noise"], stopped=False) == expected


@pytest.mark.process
def test_the_mistake_of_an_earlier_start_is_not_this_ones(fake_kinds: None, write_pipeline: Any) -> None:
    """Whatever the clock says of its file."""
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "crash"}}})
    (file.parent / "runs/a").mkdir(parents=True)
    (file.parent / "runs/a/error.json").write_text('{"error": "key: wrong"}')
    outcome, _ = run_one(file)
    assert outcome.lines[0] == "exit code 1; its last lines:"


@pytest.mark.process
def test_a_log_that_cannot_be_written_stops_nothing(fake_kinds: None, write_pipeline: Any, capfd: Any) -> None:
    file = write_pipeline({"a": {"command": "teach"}})
    (file.parent / "runs/logs").mkdir(parents=True)
    (file.parent / "runs/logs/a.txt").symlink_to("/dev/full")
    with Signals() as signals:
        assert run_stage(one_stage(file), file.parent / "runs/logs/a.txt", signals) == Outcome(0)
    assert "working in a\n" in capfd.readouterr().out


RUNNER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
sys.path.insert(0, {here!r})
import fake_stage
from ssld.pipelines import run
from ssld.pipelines.runner import stages
stages.KINDS["teach"] = stages.Kind(fake_stage.__file__, fake_stage.FakeConfig, ("out.txt",))
sys.exit(run.main(sys.argv[1:]))
"""


def start_waiting(write_pipeline: Any, tmp_path: Path) -> "subprocess.Popen[str]":
    """A runner whose first stage waits for a signal; returns when it does."""
    file = write_pipeline({"a": {"command": "teach", "set": {"ends": "waiting"}}, "b": {"command": "teach"}})
    code = RUNNER.format(here=str(FAKE.parent))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ready = tmp_path / "runs/a/ready"
    deadline = time.monotonic() + 60
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_the_stage_in_its_own_group(
    fake_kinds: None, write_pipeline: Any, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_waiting(write_pipeline, tmp_path)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143
    assert "group True" in out
    assert f"stopped: signal {number.value}; the same command goes on from there" in out
    assert "stage a: stopped; the same command resumes it" in err
    assert "[2/2]" not in out
    assert not (tmp_path / "runs/a/result.json").exists()


@pytest.mark.process
def test_a_killed_runner_stops_its_stage(fake_kinds: None, write_pipeline: Any, tmp_path: Path) -> None:
    process = start_waiting(write_pipeline, tmp_path)
    (stage,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    try:
        stage.wait(timeout=30)  # half as long as it would wait for a signal
    finally:
        if stage.is_running():
            stage.kill()
    with (tmp_path / "runs/a/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / "runs/a/stopped").read_text() == str(signal.SIGTERM.value)


@pytest.mark.process
def test_a_start_waits_for_the_stage_of_a_killed_runner(
    fake_kinds: None, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    file = write_pipeline({"a": {"command": "teach"}})
    run = file.parent / "runs/a"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock, Signals() as signals:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits: list[float] = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(launch.time, "sleep", wait)
        assert run_stage(one_stage(file), file.parent / "runs/logs/a.txt", signals) == Outcome(0)
    assert len(waits) == 2
    assert capfd.readouterr().out.count("runs/a: in use by another process; waiting") == 1


LONG_STEP = """
import signal, subprocess, sys, time
from pathlib import Path
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)  # as a training, which ends its step first
rank = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"], start_new_session=True)
run = Path(sys.argv[sys.argv.index("--output") + 1])
run.mkdir(parents=True)
(run / "checkpoint").write_bytes(b"x")
Path({pids!r}).write_text(f"{{rank.pid}} {{run}}")
while True:
    time.sleep(60)
"""
TRIAL = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssld.pipelines import run
from ssld.pipelines.runner import stages
from ssld.stage1_ssld.config import TeachConfig
stages.KINDS["teach"] = stages.Kind({script!r}, TeachConfig)
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_trial_stops_at_once_and_leaves_nothing(write_pipeline: Any, tmp_path: Path, number: signal.Signals) -> None:
    """Not after its step: the stage, and a process of it in a session of its own, as torch's launcher starts ranks, are killed."""
    pids, script, temporary = tmp_path / "pids", tmp_path / "long.py", tmp_path / "temporary"
    script.write_text(LONG_STEP.format(pids=str(pids)))
    temporary.mkdir()
    (tmp_path / "photos").mkdir()
    settings = {"model.model": "random:test_resnet", "data.train": ["photos"], "steps": 9, "batch_size": 2}
    settings |= {"optim": {"lr": 0.1, "reference_batch": 2}}
    file = write_pipeline({"a": {"command": "teach", "set": settings}})
    process = subprocess.Popen(
        [sys.executable, "-c", TRIAL.format(script=str(script)), str(file), "--dry-run", "--estimate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    rank, run = pids.read_text().split()
    assert Path(run).is_relative_to(temporary)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)  # the step takes longer
    assert process.returncode == 143, err
    assert err == "trial of a: stopped; the rates measured before are kept\n"
    assert list(temporary.iterdir()) == []
    assert not _runs(int(rank))


def _runs(pid: int) -> bool:
    """Whether a process still runs; one that has ended may wait for its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_surrounds_a_trial_is_cleared_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def be_stopped() -> None:
        with stoppable("nothing is written"), tempfile.TemporaryDirectory():
            assert list(tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(Stopped, match="nothing is written"):
        be_stopped()
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable("x"):
            os.kill(os.getpid(), signal.SIGHUP)  # ignored, as by nohup
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_signal_between_stages_stops(fake_kinds: None, write_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pipeline({"a": {"command": "teach"}, "b": {"command": "teach"}})

    def finish_in_spite_of(stage: Stage, console: Path, signals: Signals) -> Outcome:
        assert stage.name == "a"
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(0)

    monkeypatch.setattr("ssld.pipelines.run.run_stage", finish_in_spite_of)
    assert main([str(file)]) == 143


@pytest.mark.process
def test_runner_report_and_command_start_without_torch() -> None:
    code = "import sys; from ssld.pipelines import cli, report, run; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
