"""Common frame of the entry scripts: parse settings, set threads, and turn a user's mistake into one line and exit code 2."""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssld.shared.config.settings import ConfigT, launched_number, launched_ranks, parse_config, validate
from ssld.shared.config.training import PASSES_FILE
from ssld.shared.config.yaml_files import merge, read_recipe, recipe_file, spelled_out, without_others
from ssld.shared.errors import STOPPED, USER_ERROR, Stopped, UserError, is_out_of_memory
from ssld.shared.files import write_atomically
from ssld.shared.machine import default_threads
from ssld.shared.noise import libraries_told_apart
from ssld.shared.terminal import say, silence

_NOBODY_READS = 128 + signal.SIGPIPE
_MAKE_ROOM = "nothing is lost: make room and run the same command again"
_HINTS = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
    errno.EROFS: "give another --output",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EACCES: "check its permissions, or give another --output",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096), or use fewer --workers",
    errno.ENFILE: "the machine has no more; use fewer --workers",
    errno.EIO: "the disk or network drive failed; check it, and run the same command again",
}
_PASSES = (
    "The run goes on with --auto_batch true, which takes the same batch in as many passes as fit, or with --accumulate 2, 4, ... "
    "(in evaluation with a smaller --val_batch_size); smaller images or --precision bf16 are another run"
)
_MORE_PASSES = "auto_batch found too few passes: the same command tries more of them"
_SMALLER = "Use a smaller --batch_size"
_running = (
    threading.Lock()
)  # held by `call_command`: threads, loggers and accelerate's state belong to the whole process
# Message of torch's loader about a dead worker, raised wherever the main process is at that moment.
_LOADER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)"
    r"|exited unexpectedly(?: with exit code (?P<code>\d+))?)"
)
_TOO_MANY_FILES = re.compile(r"Too many open files|items of ancillary data")  # as multiprocessing words it
_LOADER_ADVICE = {
    errno.ENOSPC: "/dev/shm is full, through which batches pass: enlarge it (docker run --shm-size 8g), use fewer --workers, or --workers 0",
    errno.EMFILE: "it may open no more files: raise the limit (ulimit -n 4096), use fewer --workers, or --workers 0",
    errno.ENOMEM: "out of memory: use fewer --workers, or --workers 0",
}


def run_command(
    config_type: type[ConfigT],
    work: Callable[[ConfigT], None],
    argv: Sequence[str] | None,
    *,
    program: str,
    torch_threads: bool = True,
) -> int:
    """Run `work(config)` and return the exit code: 0 done, 2 a user's mistake, 143 stopped by a signal with a checkpoint written.

    A command that does not use torch passes `torch_threads=False` and starts faster.
    """
    rank, processes = 0, 1
    called = Path(sys.argv[0])
    if called.name == "ssld" or called.parts[-2:] == ("ssld", "__main__.py"):  # which calls this by another name
        program = f"ssld {sys.argv[1]}"
    output: Path | None = None
    auto_batch: bool | None = None  # of a training command
    try:
        rank, processes = launched_ranks()
        config = parse_config(config_type, _worded(sys.argv[1:] if argv is None else argv), program=program)
        output, auto_batch = config.output, getattr(config, "auto_batch", None)
        with libraries_told_apart(verbose=config.verbose):
            if torch_threads:
                _set_threads(config.threads)
            work(config)
    except UserError as error:
        return _report(str(error), rank, processes, output)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        message = _system_fault(error, output, auto_batch)
        if message is None:
            raise
        return _report(str(UserError(message)), rank, processes, output)
    except KeyboardInterrupt:
        if rank == 0:
            say("stopped; the same command begins again, and goes on from what it has written", sys.stderr)
        return STOPPED
    except Stopped as error:
        if rank == 0:
            say(f"stopped: {error}; the same command goes on from there", sys.stderr)
        return STOPPED
    return 0


def call_command(
    config_type: type[ConfigT],
    work: Callable[[ConfigT], None],
    config: ConfigT | str | Path | None,
    settings: dict[str, Any],
) -> ConfigT:
    """Run `work(config)` in the caller's process, as `run_command` does for a command line, and return the configuration it ran with.

    The work runs with gradients and float32 as the default type, whatever the caller has set. Afterwards torch's number of threads and default type
    and accelerate's state are what they were before.

    Args:
        config: a configuration, a YAML file, the name of a shipped recipe, or None for `settings` alone.
        settings: settings that override it, as nested dicts or by dotted key.

    Raises:
        UserError: a mistake the user can fix, or another run in progress in this process; also where the command would end with exit code 2 for
            memory or disk that ran out.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    import torch

    resolved = _resolved(config_type, config, settings)
    if not _running.acquire(blocking=False):
        raise UserError("another run is in progress in this process; wait for it, or start this one in another process")
    threads, dtype, on_child = torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGCHLD)
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _own_accelerate_state(),
            libraries_told_apart(verbose=resolved.verbose),
        ):
            _set_threads(resolved.threads)
            work(resolved)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        message = _system_fault(error, resolved.output, getattr(resolved, "auto_batch", None))
        if message is None:
            raise
        raise UserError(message) from error
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        _running.release()
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGCHLD, on_child)
    return resolved


def _resolved(config_type: type[ConfigT], config: ConfigT | str | Path | None, settings: dict[str, Any]) -> ConfigT:
    over: dict[str, Any] = {}
    for key, value in settings.items():
        inner = _plain(value)
        for part in reversed(key.split(".")):
            inner = {part: inner}
        over = merge(over, inner)
    over = spelled_out(over, config_type.short_forms)
    below: dict[str, Any] = {}
    if isinstance(config, config_type):
        below = config.model_dump()
    elif isinstance(config, str | Path):
        config = recipe_file(config, config_type.recipes)
        below = read_recipe(config, config_type.alternatives, config_type.short_forms)
    elif config is not None:
        raise TypeError(f"expected a {config_type.__name__}, a YAML file or None, got {type(config).__name__}")
    values = merge(without_others(below, config_type.alternatives, over), over)
    file = config if isinstance(config, Path) else None
    parts = [*([str(file)] if file else []), *(["the given settings"] if over or not file else [])]
    resolved = validate(config_type, values, source=" with ".join(parts), call=True)
    resolved._recipe = file
    return resolved


def _plain(value: Any) -> Any:
    """Return a value as YAML would give it: paths as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Inside, accelerate starts anew: it keeps one device and precision per process, and refuses others."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = () if launched_ranks()[1] > 1 else (AcceleratorState, GradientState, PartialState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _system_fault(error: Exception, output: Path | None, auto_batch: bool | None) -> str | None:
    """Return the line on memory or a disk that is full, or on a loader process that is gone; None for any other error.

    `auto_batch` is the setting of a training command, None for another command.
    """
    _leave_workers_alone()
    message = explained(error, output)
    if message or not is_out_of_memory(error):
        return message
    advice = _SMALLER if auto_batch is None else _MORE_PASSES if auto_batch else _PASSES
    # On every rank: the others wait for this one until the launcher ends them, and note nothing.
    if auto_batch and output:
        _note_too_few_passes(output)
    what = (str(error).splitlines() or ["no more to be had"])[0]
    return f"out of memory: {what} {advice}"


def _worded(argv: Sequence[str]) -> list[str]:
    """Give `--verbose` its value, which is usually left out."""
    return [
        "--verbose=true" if word == "--verbose" and after.startswith("--") else word
        for word, after in pairwise([*argv, "--"])
    ]


def exit_code(work: Callable[[], int]) -> int:
    """Return the exit code of `work`, for a command without a run directory: its own, 2 after a user's mistake, printed in one line or more, or 143
    after a signal that raised Stopped."""
    try:
        return work()
    except UserError as error:
        return _report(str(error), 0, 1, None)
    except Stopped as error:
        say(str(error), sys.stderr)
        return STOPPED
    except BrokenPipeError:  # as in `ssld inspect FILE | head`: the reader needs no more
        silence(sys.stdout)
        return _NOBODY_READS
    except OSError as error:
        message = explained(error, None)
        if message is None:
            raise
        return _report(str(UserError(message)), 0, 1, None)


def explained(error: Exception, output: Path | None) -> str | None:
    """Return the line about a full or failing disk, or a dead loader process; None for any other error.

    torch raises the latter from a signal handler, anywhere in the main process.
    """
    if isinstance(error, OSError) and error.errno in _HINTS:
        where = error.filename or output
        return f"{f'{where}: ' if where else ''}{os.strerror(error.errno)}; {_HINTS[error.errno]}"
    said = f"{error} {error.__cause__}"
    found = _LOADER.search(f"{error.__cause__}") or _LOADER.search(str(error))
    cut_off = isinstance(error, ConnectionError | EOFError) and _came_from_a_loader(error)
    if found is None and not cut_off:
        return f"{os.strerror(errno.EMFILE)}; {_HINTS[errno.EMFILE]}" if _TOO_MANY_FILES.search(said) else None
    name, code = ((found["signal"] or "").strip(), int(found["code"] or 0)) if found else ("", 0)
    if name == "Bus error":
        code = errno.ENOSPC
    how = f" ({name})" if name else ""
    often = "often because the machine had no memory left, or /dev/shm is full: use fewer --workers, or --workers 0"
    return f"a process that reads images has died{how}: {_LOADER_ADVICE.get(code, often)}; the same command goes on from what it has written"


def _came_from_a_loader(error: BaseException) -> bool:
    """Whether an error rose while a batch was fetched from a dead worker that torch has not noticed yet."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_name != "_try_get_data":
        trace = trace.tb_next
    return trace is not None


def _leave_workers_alone() -> None:
    """Remove torch's handler for dead loader processes: it would raise again for the next one, in the middle of the report on the first."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _note_too_few_passes(run: Path) -> None:
    """Write a note that a run with `auto_batch` ran out of memory with its number of passes; the next start tries more."""
    file = run / PASSES_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        record = {"too_few": int(found["accumulate"]), "processes": int(found["processes"])}
    except (OSError, ValueError, KeyError, TypeError):
        return
    write_atomically(file, json.dumps(record) + "\n")


def _report(message: str, rank: int, processes: int, output: Path | None) -> int:
    printed = rank == 0
    # A launcher buries its children's output and changes their exit code: leave the line where the runner finds it. The main rank's line wins;
    # another rank's is printed only if it came first, since most mistakes occur on all ranks alike.
    if processes > 1 and output is not None and output.is_dir():
        record = json.dumps({"error": message, "exit_code": USER_ERROR}) + "\n"
        try:
            with (output / "error.json").open("w" if rank == 0 else "x", encoding="utf-8") as file:
                file.write(record)
            printed = True
        except OSError:
            pass
    for line in message.split("\n") if printed else []:
        say(f"{'' if rank == 0 else f'[rank {rank}] '}error: {line}", sys.stderr)
    return USER_ERROR


def _set_threads(threads: int | None) -> None:
    import torch

    launched_number("LOCAL_WORLD_SIZE", 1)  # a user's mistake where it is no number
    torch.set_num_threads(default_threads(threads)[0])
