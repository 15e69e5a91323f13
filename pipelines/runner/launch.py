"""Runs one stage as a process: starts the command a user would type, passes its output through and logs it, forwards signals.

A stage has its own process group, because `accelerate launch` and `torch.distributed.run` do not forward signals reliably: signals are sent to the
group, and the runner waits for the whole group. Standard input of a stage is a pipe whose other end the runner holds: a runner that is killed, and so
forwards no signal, leaves no stage running (`stop_with_runner`), and neither does a launcher that is killed.
"""

import fcntl
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from ssld.pipelines.folder import shown
from ssld.pipelines.runner.stages import KINDS, Stage, own_file, typed_name
from ssld.shared.config.launcher import RUNNER
from ssld.shared.errors import MALFORMED, STOPPED, USER_ERROR, Stopped
from ssld.shared.run_dir import read_result
from ssld.shared.terminal import say

TAIL_LINES = 15
_GRACE_SECONDS = 600  # after a signal: time to end the step and write the checkpoint
_ERROR = "error: "  # beginning of a line about a user's mistake
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINGER_SECONDS = 10  # after a normal end: time for loader processes to exit


@dataclass(frozen=True)
class Outcome:
    """Exit code of a stage (0 finished, 2 a user's mistake, 143 stopped, 1 anything else) and the lines of its error."""

    code: int
    lines: tuple[str, ...] = ()


class Signals:
    """Context manager that forwards SIGINT, SIGTERM and SIGHUP to the running stage; signals ignored by `nohup` stay ignored.

    Args:
        kill: whether the stage is killed instead, because nothing of its work will be kept.

    Attributes:
        received: the first signal received, or None.
        group: process group of the running stage, or None.
    """

    def __init__(self, *, kill: bool = False) -> None:
        self.received: int | None = None
        self.group: int | None = None
        self._kill = kill

    def __enter__(self) -> "Signals":
        self._before = _handled_by(self.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Pass a signal on to the running stage."""
        self.received = self.received or number
        if self.group is not None and self._kill:
            _kill_all(self.group)
        elif self.group is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.group, number)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Raise Stopped with this message at SIGINT, SIGTERM and SIGHUP, so that what surrounds the work is cleared up; ignored signals stay ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(message)

    before = _handled_by(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled_by(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of the signals that stop a command, unless they are ignored; return the handlers before."""
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def _kill_all(group: int) -> None:
    """Kill a process group and all processes below its leader: torch's launcher starts each rank in a group of its own."""
    import psutil

    below: list[psutil.Process] = []
    with suppress(psutil.Error):
        below = psutil.Process(group).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for process in below:
        with suppress(psutil.Error):
            process.kill()


def command_line(stage: Stage) -> list[str]:
    """Return the command a user would type for this stage. Several processes are started by accelerate on GPUs, and by torch's launcher on CPU,
    where accelerate starts only one."""
    script = own_file(stage.kind.script)
    count = str(stage.processes)
    arguments = _with_recipe_name(stage)
    if stage.processes == 1:
        return ["ssld", *(typed_name(name) for name, kind in KINDS.items() if kind is stage.kind), *arguments]
    if getattr(stage.config, "device", "auto") != "cpu" and _has_cuda():
        launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", count]
    else:
        launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    return [*launcher, script, *arguments]


def _with_recipe_name(stage: Stage) -> list[str]:
    """Return the arguments of a stage with the name of a shipped recipe that its command takes in place of the path."""
    recipes, arguments = stage.kind.config_type.recipes, list(stage.arguments)
    if recipes is not None and arguments[:1] == ["--config"]:
        file = Path(arguments[1])
        if file.resolve().parent == recipes and not Path(file.stem).is_file():  # a file of that name would be read
            arguments[1] = file.stem
    return arguments


def run_stage(stage: Stage, console: Path, signals: Signals, *, quiet: bool = False) -> Outcome:
    """Run a stage to its end; its output is appended to the file `console`, and passed through unless `quiet`."""
    line = command_line(stage)
    if line[0] == "ssld":  # by its script, which needs no `ssld` on the path
        words = [sys.executable, own_file(stage.kind.script), *stage.arguments]
    elif line[0] == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.launch", *line[2:]]
    else:
        words = [sys.executable, *line[1:]]
    tail: deque[str] = deque(maxlen=200)
    errors: list[str] = []
    console.parent.mkdir(parents=True, exist_ok=True)
    if stage.processes > 1:  # so that error.json can be written even before the stage creates its run directory
        stage.run.mkdir(parents=True, exist_ok=True)
    _wait_for_orphan(stage.run, signals)
    with suppress(OSError):
        (stage.run / "error.json").unlink()  # that of an earlier start
    with console.open("ab", buffering=0) as log:
        _keep(log, f"$ {shlex.join(line)}\n".encode())
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", RUNNER: "1"},
        )
        signals.group = process.pid
        if signals.received:  # between two stages
            signals.forward(signals.received)
        assert process.stdin is not None
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_through, args=(process.stdout, log, tail, errors, quiet), daemon=True)
        reader.start()
        code = process.wait()
        process.stdin.close()
        # A launcher may exit before the processes it started: the stage has ended when all of them have closed their output.
        orphans = code < 0 and stage.processes > 1
        reader.join(_GRACE_SECONDS if signals.received or orphans else _LINGER_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(_LINGER_SECONDS)
        process.stdout.close()
        signals.group = None
    outcome = _outcome(stage, code, list(tail), stopped=signals.received is not None)
    if outcome.code != USER_ERROR and not quiet:  # the caller prints the lines of a user's mistake
        for text in errors:
            say(text, sys.stderr)
    return outcome


def _wait_for_orphan(run: Path, signals: Signals) -> None:
    """Wait while another process holds a run directory: after the death of its runner a stage ends its step, and the next start may come at once."""
    deadline, told = time.monotonic() + _GRACE_SECONDS, False
    while _is_held(run) and not signals.received and time.monotonic() < deadline:
        if not told:
            say(f"{shown(run)}: in use by another process; waiting, in case it is the stage of a run that was killed")
            told = True
        time.sleep(1)


def _is_held(run: Path) -> bool:
    try:
        with (run / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such run yet
        pass
    return False


def _outcome(stage: Stage, code: int, tail: list[str], *, stopped: bool) -> Outcome:
    if code == 0 and read_result(stage.run) is not None:
        return Outcome(0)
    if stopped or code == STOPPED:
        return Outcome(STOPPED)
    with suppress(OSError, *MALFORMED):  # written by the main rank, whose exit code a launcher hides
        error = json.loads((stage.run / "error.json").read_text(encoding="utf-8"))["error"]
        return Outcome(USER_ERROR, tuple(error.splitlines()))
    if code == USER_ERROR:
        errors = [text.removeprefix(_ERROR) for text in tail if text.startswith(_ERROR)]
        return Outcome(USER_ERROR, tuple(errors or tail[-1:]))
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    reason = "ended without a result" if code == 0 else reason
    return Outcome(1, (f"{reason}; its last lines:", *tail[-TAIL_LINES:]))


def _pass_through(source: IO[bytes], log: IO[bytes], tail: deque[str], errors: list[str], quiet: bool) -> None:
    """Copy a stage's output to `log`, its last lines to `tail`, error lines to `errors`, and all other lines to the screen unless `quiet`."""
    screen, mark = getattr(sys.stdout, "buffer", None), _ERROR.encode()
    rest, printed = b"", 0  # the line that is not complete yet, and how many of its bytes are on the screen
    while chunk := os.read(source.fileno(), 65536):
        _keep(log, chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        shown = b""
        for line in lines:
            if line.startswith(mark):
                errors.append(_last_state(line))
            else:
                shown += line[printed:] + b"\n"
            printed = 0
        if not rest.startswith(mark[: max(1, len(rest))]):
            shown, printed = shown + rest[printed:], len(rest)
        with suppress(OSError, ValueError):  # a closed terminal must not end the stage
            if quiet:
                pass
            elif screen is not None:
                sys.stdout.flush()
                screen.write(shown)
                screen.flush()
            else:
                sys.stdout.write(shown.decode(errors="replace"))
        tail.extend(text for text in map(_last_state, lines) if text)
    if text := _last_state(rest):
        tail.append(text)
        if not printed:
            errors.append(text)


def _keep(log: IO[bytes], output: bytes) -> None:
    """Write to a log where that is possible: a full disk must not end the reading of a stage's output, for which the stage would wait for ever."""
    with suppress(OSError):
        log.write(output)


def _last_state(line: bytes) -> str:
    """Return the final text of a printed line: progress bars overwrite it with carriage returns."""
    return line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]


@functools.cache
def _has_cuda() -> bool:
    """Return whether torch sees a GPU; tested in another process, so that this one does not import torch."""
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
