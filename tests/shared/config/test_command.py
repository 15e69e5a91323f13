"""Exit codes and lines of every entry script."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ssld.shared.config.command import call_command, run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.config.system_faults import system_fault
from ssld.shared.distributed.processes import describe_processes
from ssld.shared.errors import Stopped, UserError
from ssld.shared.machine import default_threads

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def start(error: BaseException | None = None, *flags: str) -> int:
        def work(config: CommandConfig) -> None:
            config.output.mkdir(exist_ok=True)
            if error:
                raise error

        return run_command(CommandConfig, work, ["--output", str(tmp_path / "o"), *flags], program="x.py")

    return start


def test_exit_codes_and_lines(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert capsys.readouterr().err == ""
    assert run(UserError("cats.json: not COCO")) == 2
    assert capsys.readouterr().err == "error: cats.json: not COCO\n"
    assert run(UserError("one", "two")) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    assert run(Stopped("checkpoint of step 3 written")) == 143
    assert capsys.readouterr().err == "stopped: checkpoint of step 3 written; the same command goes on from there\n"
    assert run(None, "--outptu", "x") == 2
    assert capsys.readouterr().err == "error: --outptu: unknown flag; did you mean '--output'?\n"


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EMFILE, errno.EIO],
)
def test_disk_errors_are_the_users(run: Run, capsys: pytest.CaptureFixture[str], number: int) -> None:
    assert run(OSError(number, "x", "/big/file")) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: /big/file: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "name", "what"),
    [
        (errno.EISDIR, "best.safetensors", "{}: is a folder, but the run writes a file of this name; move it away"),
        (errno.EEXIST, "pictures", "{}: is a file, but the run needs a folder of this name; move it away"),
        (errno.ENOTDIR, "checkpoints", "{}: is a file, but the run needs a folder of this name; move it away"),
    ],
)
def test_what_has_the_name_of_a_file_of_the_run_is_named(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, number: int, name: str, what: str
) -> None:
    path = tmp_path / "o" / name
    path.parent.mkdir()
    path.mkdir() if number == errno.EISDIR else path.write_text("x")
    new = tmp_path / "new"
    new.write_text("x")
    fail: dict[int, Callable[[], Any]] = {
        errno.EISDIR: lambda: new.replace(path),
        errno.EEXIST: path.mkdir,
        errno.ENOTDIR: (path / "deeper" / "step_1").mkdir,
    }
    with pytest.raises(OSError) as caught:
        fail[number]()
    assert caught.value.errno == number
    assert run(caught.value) == 2
    assert capsys.readouterr().err == f"error: {what.format(path)} and run the same command again\n"
    with pytest.raises(OSError):
        run(OSError(number, "x", "/another/folder"))  # a file that is none of the run's may be a bug


def test_a_run_directory_that_was_deleted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: CommandConfig) -> None:
        (config.output / "log.txt").open("a")

    folder = tmp_path / "o"
    assert run_command(CommandConfig, work, ["--output", str(folder)], program="x.py") == 2
    assert capsys.readouterr().err == (
        f"error: {folder}: the run directory was deleted or moved while it was in use; run the same command again\n"
    )
    other = FileNotFoundError(
        errno.ENOENT, "gone", str(tmp_path / "photo.jpg")
    )  # not one of the run, though that has no folder
    assert system_fault(other, folder, auto_batch=None) is None
    folder.mkdir()
    with pytest.raises(FileNotFoundError):  # a bug: another file is missing
        run_command(CommandConfig, work_on_missing, ["--output", str(folder)], program="x.py")


def work_on_missing(config: CommandConfig) -> None:
    (config.output / "none").read_text()


_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1."
_KILLED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer."
)
_NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1, ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"


@pytest.mark.parametrize("message", [_CLOSED, _KILLED, _NCCL])
def test_a_process_that_was_left_alone_does_not_hide_why(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str, tmp_path: Path
) -> None:
    """Its own error is that another has ended; one process alone, and a time limit, keep their tracebacks."""
    with pytest.raises(RuntimeError):
        run(RuntimeError(message))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(RuntimeError(message)) == 1
    line = capsys.readouterr().err
    assert line.startswith("[rank 1] another process of this run has ended: ")
    assert line.count("\n") == 1
    assert not (tmp_path / "o" / "error.json").exists()  # that of the other process is in its place, if it wrote one
    with pytest.raises(RuntimeError):
        run(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 300000ms for recv operation"))


@pytest.mark.slow
def test_a_mistake_that_only_the_main_process_sees_ends_both(
    scripts: Any, tiny: Any, teacher_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    flags = ["--model", str(teacher_file), "--data.path", str(tiny.val), "--output", str(tmp_path)]
    done = scripts.run("stage1_ssld/evaluate.py", *flags, "--device", "cpu", "--workers", "0", ranks=2)
    assert done.returncode == 1
    wanted = f"{tmp_path}: not empty and not a run directory; give another --output"
    assert f"error: {wanted}" in done.stderr.splitlines()
    assert json.loads((tmp_path / "error.json").read_text())["error"] == wanted
    assert "[rank 1] another process of this run has ended: " in done.stderr
    assert "gloo" not in done.stderr


def test_bugs_keep_their_traceback(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    with pytest.raises(OSError, match="odd"):
        run(OSError(errno.EBADF, "odd"))


def test_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert run(None, "--threads", "1") == 0
        assert torch.get_num_threads() == 1
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert run() == 0
        assert torch.get_num_threads() == 4
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert run() == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        (2, {"OMP_NUM_THREADS": "4"}, (2, "threads")),
        (None, {"OMP_NUM_THREADS": "4"}, (4, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "4,2"}, (4, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "1"}, (1, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "many"}, (6, "cores / processes")),
        (None, {}, (6, "cores / processes")),
        (None, {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (3, "cores / processes")),
        # Launchers set 1 where the user has set nothing.
        (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (3, "cores / processes")),
        (None, {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, (6, "cores / processes")),
        (None, {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (2, "OMP_NUM_THREADS")),
    ],
)
def test_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, setting: int | None, environment: dict[str, str], expected: tuple[int, str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_threads(setting) == expected


@pytest.mark.parametrize("text", ["0", "-1", "abc", "", "4.5"])
def test_a_wrong_number_of_threads_is_one_warning(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    accelerator, config = SimpleNamespace(device="cpu"), SimpleNamespace(precision="fp32", threads=None)
    assert default_threads(None) == (6, "cores / processes")
    first, warning = describe_processes(cast(Any, accelerator), cast(Any, config), 0)
    assert first.endswith("(cores / processes), 0 workers")
    assert warning.startswith(f"warning: OMP_NUM_THREADS={text!r} is ignored: expected a whole number from 1 on")
    for setting, valid in ((2, text), (None, "4,2"), (None, "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", valid)
        config.threads = setting
        assert len(describe_processes(cast(Any, accelerator), cast(Any, config), 0)) == 1


def test_under_a_launcher_the_line_is_left_in_the_folder_and_the_main_ranks_wins(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(UserError("bad")) == 2
    assert capsys.readouterr().err == "[rank 1] error: bad\n"
    assert json.loads((tmp_path / "o" / "error.json").read_text()) == {"error": "bad", "exit_code": 2}
    assert run(UserError("the same, later")) == 2
    assert capsys.readouterr().err == "", "only the first line of another rank is reported"
    monkeypatch.setenv("RANK", "0")
    assert run(UserError("worse")) == 2
    assert capsys.readouterr().err == "error: worse\n"
    assert json.loads((tmp_path / "o" / "error.json").read_text()) == {"error": "worse", "exit_code": 2}


def test_a_command_without_passes_is_told_to_take_fewer_images(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(torch.OutOfMemoryError("CUDA out of memory.")) == 2
    assert capsys.readouterr().err == "error: out of memory: CUDA out of memory. Use a smaller --batch_size\n"


def test_ctrl_c_outside_training_is_no_traceback(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt()) == 143
    assert capsys.readouterr().err == "stopped; the same command begins again, and goes on from what it has written\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "x"),
        ("RANK", "1"),
        ("RANK", "-1"),
        ("WORLD_SIZE", ""),
        ("LOCAL_RANK", ""),
        ("LOCAL_WORLD_SIZE", "two"),
        ("MASTER_PORT", "x"),
    ],
)
def test_a_broken_launcher_is_named(
    name: str, value: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "MASTER_PORT":  # which one process has no use for
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert run() == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {name}={value}")
    assert "the launcher's environment is broken; unset RANK, WORLD_SIZE" in line
    assert line.count("\n") == 1


def test_a_call_computes_gradients_in_float32_and_one_runs_at_a_time(tmp_path: Path) -> None:
    seen = []

    def work(config: CommandConfig) -> None:
        weight = torch.ones(2, requires_grad=True)
        (2 * weight).sum().backward()
        assert weight.grad is not None
        seen.append((weight.dtype, weight.grad.tolist()))
        with pytest.raises(UserError, match="another run is in progress in this process"):
            call_command(CommandConfig, work, None, {"output": tmp_path / "inner"})

    torch.set_default_dtype(torch.float64)
    try:
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                call_command(CommandConfig, work, None, {"output": tmp_path / "outer"})
                assert not torch.is_grad_enabled()
                assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [(torch.float32, [2.0, 2.0])] * 2
