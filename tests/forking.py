"""A Python that starts in milliseconds: a server process has imported the project and its libraries, and forks a process for every command.

    python tests/forking.py serve SOCKET             imports, then waits for commands
    python -IS tests/forking.py start SOCKET WORDS   runs `python WORDS` in a fork of the server

The second line stands for `python` in a shell script that `Server` writes, so that it can be given to whatever starts processes. The
process that it starts has the folder, environment, input and outputs of the starter. Signals are passed on, the exit code is passed
back, and a starter that is killed takes its process with it. Words other than a script or `-m` and a module go to a Python of their own.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
# Libraries that commands import when they need them, and that none of the project's modules imports at its top.
LIBRARIES = (
    "accelerate",
    "datasets",
    "hotcoco",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "pycocotools.cocoeval",
    "timm",
    "timm.optim",
    "torchvision.transforms.v2",
    "torch.distributed.run",
)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OPTIONS = {"-W": 2, "-u": 1}  # of Python, and how many words each takes


class Server:
    """The server as a context manager; `python` is the file to start instead of an interpreter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ssld_fork_")
        place = Path(self._folder.name) / "socket"
        self.python = Path(self._folder.name) / "python"
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" start "{place}" "$@"\n')
        self.python.chmod(0o755)
        line = [sys.executable, __file__, "serve", str(place)]
        self._process = subprocess.Popen(line, cwd=ROOT.parent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not place.exists():
            if self._process.poll() is not None:
                raise RuntimeError("the server of tests/forking.py did not start")
            time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def serve(place: str) -> list[str]:
    """Wait for commands. Returns in the processes that are forked for them: the words of the command."""
    parent = os.getppid()
    import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.new")
    listener.listen(64)
    listener.settimeout(2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes below
    os.rename(f"{place}.new", place)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            connection = listener.accept()[0]
            if os.fork() == 0:
                listener.close()
                connection.setblocking(True)
                return _attend(connection)
            connection.close()
    os._exit(0)


def import_all() -> None:
    """Import the project and its libraries, for forks of this process."""
    import importlib
    import pkgutil

    warnings.simplefilter("ignore")
    sys.path[0] = str(ROOT)
    import ssld

    for name in LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("PIL.Image").init()
    for module in pkgutil.walk_packages(ssld.__path__, "ssld."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy this process's memory


def _attend(connection: socket.socket) -> list[str]:
    """Fork the process of a command, pass signals on to it and its exit code back; returns in that process alone."""
    message, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    size, content = int.from_bytes(message, "little"), b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    request = json.loads(content)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        connection.close()
        os.setpgid(0, 0)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        if "PYTHONUNBUFFERED" in os.environ:
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        sys.executable = request["python"]
        words: list[str] = request["words"]
        return words
    for descriptor in descriptors:
        os.close(descriptor)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        ready, _, _ = select.select([connection.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 64)
        if connection.fileno() in ready:
            signals = connection.recv(64)
            if not signals:  # the starter was killed
                os.killpg(child, signal.SIGKILL)
                os._exit(0)
            for number in signals:
                os.kill(child, number)


def start(place: str, words: list[str]) -> int:
    """Run a command in a fork of the server; returns its exit code, or ends by the signal that ended it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    python = str(Path(place).with_name("python"))
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "python": python}
    content = json.dumps(request).encode()

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(bytes([number]))

    socket.send_fds(connection, [len(content).to_bytes(4, "little")], [0, 1, 2])
    connection.sendall(content)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    answer = b""
    while not answer.endswith(b"\n"):
        part = connection.recv(16)
        if not part:
            return 99  # the server is gone
        answer += part
    code = int(answer)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def without_options(words: list[str]) -> list[str]:
    """Leave out Python's options before the script or `-m`; empty where another Python has to run the words."""
    while words and words[0] in _OPTIONS:
        words = words[_OPTIONS[words[0]] :]
    return words if words and (words[0].endswith(".py") or words[0] == "-m") else []


def run_and_exit(words: list[str]) -> None:
    """Run a script or a module as `python` does, and end this process without taking the interpreter apart, which would copy the server's memory."""
    code = 1
    try:
        code = run(words)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run(words: list[str]) -> int:
    """Run a script or a module; returns the exit code."""
    import numpy as np

    np.random.seed()  # a fork has its parent's state
    try:
        _run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _run(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:  # the server has imported plugins, whose assertions stay as they are
        os.environ["PYTEST_ADDOPTS"] = "-W ignore::pytest.PytestAssertRewriteWarning"
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "start":
        chosen = without_options(sys.argv[3:])
        if not chosen:
            os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
        sys.exit(start(sys.argv[2], chosen))
    run_and_exit(serve(sys.argv[2]))
