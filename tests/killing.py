"""Kills commands at their calls to the file system, one after the other, and reports where the same command does not end with the same files.

    python tests/killing.py CASES.json

Imports everything once and forks a process for every run. A place is a call of `os` or `open` together with the line of the project that led to it. A
child stops before each call that is looked at (after it, where a file was opened to be written); a copy of its folder is then what a kill at this
call would leave, since what was written lies with the kernel. At the last of them it is killed in earnest. From each of these folders the same
command runs to its end; then the folder is compared, byte for byte, with that of a run left in peace.

CASES.json: `cases`, each with `name`, `module`, `argv`, `output`, and `before`, the folder that the output is a copy of at the start; `imports`,
modules; `every`: all calls, not those of `chosen`. Prints a JSON line for each case.
"""

import builtins
import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CALLS = ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "open")
HELPERS = ("shared/files.py", "shared/checksums.py", "shared/terminal.py")  # whose callers are the places of interest
NOT_COMPARED = ("log.txt", ".lock", "metrics.jsonl", "logs")
Call = tuple[str, int]  # the n-th call at a place


class Calls:
    """Counts the calls of this process at every place; stops it at some of them, after their index was written to `tell`, a pipe."""

    def __init__(self, stops: Collection[Call] = (), tell: int = -1) -> None:
        self.calls: dict[str, int] = {}
        self._stops = {call: index for index, call in enumerate(stops)}
        self._tell, self._pid, self._lock = tell, os.getpid(), threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            self._wrap(os, name, (lambda *args, **_: bool(args[1] & os.O_CREAT)) if name == "open" else None)
        writes = lambda *args, **options: set(options.get("mode", args[1] if len(args) > 1 else "r")) & set("wax+")  # noqa: E731
        self._wrap(builtins, "open", writes, after=True)
        io.open = builtins.open

    def _wrap(self, owner: Any, name: str, when: Callable[..., Any] | None, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            place = None
            if os.getpid() == self._pid and (when is None or when(*args, **options)):
                place = place_of(sys._getframe(1), "write" if owner is builtins else name)
            index = self._meet(place) if place else None
            if index is not None and not after:
                self._stop(index)
            result = original(*args, **options)
            if index is not None and after:
                self._stop(index)
            return result

        setattr(owner, name, counted)

    def _meet(self, place: str) -> int | None:
        with self._lock:
            self.calls[place] = self.calls.get(place, 0) + 1
            return self._stops.get((place, self.calls[place]))

    def _stop(self, index: int) -> None:
        os.write(self._tell, index.to_bytes(4, "little"))
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no further, nor do the others


def place_of(frame: FrameType | None, call: str) -> str | None:
    """`write_store soft_label_writer.py:160 fsync files.py:87`; None where nothing of the project led to the call."""
    inner = ""
    while frame:
        file = frame.f_code.co_filename
        for package in ("shared", "stage1_ssld", "stage2_detect", "pipelines"):
            if f"/{package}/" in file and str(ROOT) in file:
                line = f"{file.rpartition('/')[2]}:{frame.f_lineno}"
                if not file.endswith(HELPERS):
                    return f"{frame.f_code.co_name} {line} {call}{inner}"
                inner = inner or f" {line}"
        frame = frame.f_back
    return None


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` in a forked process, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def fork(work: Callable[[], int]) -> int:
    """The id of a process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    return child


def run(case: dict[str, Any], calls: Calls | None = None) -> int:
    """The command, at a clock that stands still, so that records are equal; what it prints goes to a file beside."""
    sys.argv = [case["name"], *case["argv"]]
    now = time.localtime(1_700_000_000)
    time.time, written = (lambda: 1_700_000_000.0), time.strftime
    time.monotonic = lambda: 0.0
    time.strftime = lambda form, *_: written(form, now)
    to = os.open(f"{case['output']}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    main = importlib.import_module(case["module"]).main
    if case["module"] == "ssld.pipelines.run":
        run_stages_here()
    if calls:
        calls.install()
    code: int = main(case["argv"])
    return code


def run_stages_here() -> None:
    """A pipeline's stages in forked processes, which spares their imports; they are never killed."""
    from ssld.pipelines import run as runner
    from ssld.pipelines.runner.launch import Outcome

    def run_stage(stage: Any, console: Path, signals: Any, *, quiet: bool = False) -> Outcome:
        module = importlib.import_module(f"ssld.{stage.kind.script.removesuffix('.py').replace('/', '.')}")
        return Outcome(in_child(lambda: int(module.main(list(stage.arguments)))))

    runner.run_stage = run_stage


def contents(folder: Path) -> dict[str, Any]:
    """Content that has to be equal after a kill; metrics without those that depend on the clock.

    safetensors writes the metadata of a file in any order, so the metadata are compared as a dict.
    """
    from ssld.shared.run_dir import SPEED

    content_of: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            content_of[name] = [{key: value for key, value in line.items() if key not in SPEED} for line in lines]
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            body = 8 + int.from_bytes(content[:8], "little")
            content_of[name] = json.loads(content[8:body]), content[body:]
        elif path.name in ("result.json", "environment.json"):
            record = json.loads(path.read_text())
            record.pop("inputs")  # may go by time stamps
            outputs = {key: sha for key, sha in record.get("outputs", {}).items() if not key.endswith(".safetensors")}
            content_of[name] = record | {"outputs": outputs}
        elif not set(Path(name).parts) & set(NOT_COMPARED):
            content_of[name] = path.read_bytes() if path.is_file() else "a folder"
    return content_of


def differences(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    names = sorted(whole.keys() | resumed.keys())
    return [name for name in names if whole.get(name) != resumed.get(name)]


def examine(case: dict[str, Any], known: set[str], every: bool) -> Iterator[str]:
    """A line on each kill after which the command does not end as it should; `known` places are left out, and added to."""
    output, before = Path(case["output"]), case.get("before")

    def begin() -> None:
        shutil.rmtree(output, ignore_errors=True)
        if before:
            shutil.copytree(before, output, symlinks=True)

    def count() -> int:
        calls = Calls()
        try:
            return run(case, calls)
        finally:
            Path(f"{output}.calls").write_text(json.dumps(calls.calls))

    begin()
    if code := in_child(count):
        yield f"left in peace: exit code {code}"
        return
    whole = contents(output)
    shutil.copytree(output, output.with_name(f"{case['name']}_whole"), symlinks=True)
    times_of: dict[str, int] = json.loads(Path(f"{output}.calls").read_text())
    kills = [
        (place, number)
        for place, times in times_of.items()
        for number in (range(1, times + 1) if every else chosen(place, times, known))
    ]
    kills = kills or list(times_of.items())[-1:]  # at least one, in a command that has no place of its own
    case["kills"] = len(kills)
    begin()
    states = left_by_kills(case, kills)
    for call in set(kills) - states.keys():
        yield f"{call[0]} ({call[1]}): was not reached"
    for (place, number), state in states.items():
        shutil.rmtree(output, ignore_errors=True)
        if state.exists():
            state.rename(output)
        if code := in_child(lambda: run(case)):
            yield f"{place} ({number}): the same command ends with {code}"
        elif wrong := differences(whole, contents(output)):
            yield f"{place} ({number}): other content: {', '.join(wrong)}"


def left_by_kills(case: dict[str, Any], kills: list[Call]) -> dict[Call, Path]:
    """The command, stopped at these calls and killed at the last: call -> copy of the folder that the command has left, if any yet."""
    told, tell = os.pipe()
    child = fork(lambda: run(case, Calls(kills, tell)))
    os.close(tell)
    states: dict[Call, Path] = {}
    while os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
        index = int.from_bytes(os.read(told, 4), "little")
        state = states[kills[index]] = Path(f"{case['output']}_states") / str(index)
        if Path(case["output"]).exists():
            shutil.copytree(case["output"], state, symlinks=True)
        os.kill(child, signal.SIGKILL if len(states) == len(kills) else signal.SIGCONT)
    os.close(told)
    return states


def chosen(place: str, times: int, known: set[str]) -> list[int]:
    """Which calls at a place are looked at when not all are: those inside of helpers once for all, but of each of their callers the moment before its
    last file takes its name; any other place once."""
    words = place.split()
    key = " ".join(words[2:]) if len(words) > 3 and words[2] != "replace" else place
    if key in known:
        return []
    known.add(key)
    return [times if len(words) > 3 else 1]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, str(ROOT))
    from tests import sketches
    from tests.forking import import_all

    for module in spec["imports"]:
        importlib.import_module(module)
    import_all()
    sketches.install()
    known: set[str] = set()
    for case in spec["cases"]:
        case["kills"], begun = 0, time.monotonic()
        wrong = list(examine(case, known, spec["every"]))
        report = {
            "name": case["name"],
            "kills": case["kills"],
            "seconds": round(time.monotonic() - begun, 1),
            "wrong": wrong,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
