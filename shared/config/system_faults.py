"""Failures of the machine in one line with an advice: memory or a disk that is full, a disk that fails, a process that reads images and has died."""

import contextlib
import errno
import json
import os
import re
import signal
from pathlib import Path

from ssld.shared.config.training import PASSES_FILE
from ssld.shared.errors import is_out_of_memory
from ssld.shared.files import write_atomically

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
# Message of torch's loader about a dead worker, raised wherever the main process is at that moment.
_LOADER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)"
    r"|exited unexpectedly(?: with exit code (?P<code>\d+))?)"
)
_ANOTHER_ENDED = re.compile(
    r"gloo.*(closed by peer|reset by peer|Broken pipe)|ncclRemoteError|remote process exited", re.S
)
_MISPLACED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TOO_MANY_FILES = re.compile(r"Too many open files|items of ancillary data")  # as multiprocessing words it
_LOADER_ADVICE = {
    errno.ENOSPC: "/dev/shm is full, through which batches pass: enlarge it (docker run --shm-size 8g), use fewer --workers, or --workers 0",
    errno.EMFILE: "it may open no more files: raise the limit (ulimit -n 4096), use fewer --workers, or --workers 0",
    errno.ENOMEM: "out of memory: use fewer --workers, or --workers 0",
}


def system_fault(error: Exception, output: Path | None, auto_batch: bool | None) -> str | None:
    """Return the line on memory or a disk that is full, or on a loader process that is gone; None for any other error.

    `auto_batch` is the setting of a training command, None for another command.
    """
    _leave_workers_alone()
    message = explained(error, output) or _disturbed(error, output)
    if message or not is_out_of_memory(error):
        return message
    advice = _SMALLER if auto_batch is None else _MORE_PASSES if auto_batch else _PASSES
    # On every rank: the others wait for this one until the launcher ends them, and note nothing.
    if auto_batch and output:
        _note_too_few_passes(output)
    what = (str(error).splitlines() or ["no more to be had."])[0]
    return f"out of memory: {what} {advice}"


def another_ended(error: Exception) -> bool:
    """Whether an error of torch's communication means that another process has ended, and not a time limit or a network that cannot be set up."""
    return _ANOTHER_ENDED.search(str(error)) is not None


def _disturbed(error: Exception, output: Path | None) -> str | None:
    """Return the line on a run directory that was deleted, or in which something has the name of a file or folder of the run; None for others."""
    if output is None or not isinstance(error, OSError) or error.errno not in _MISPLACED:
        return None
    name = error.filename2 or error.filename
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else output
    if not path.is_relative_to(output):
        return None
    if not output.is_dir():
        return f"{output}: the run directory was deleted or moved while it was in use; run the same command again"
    while error.errno == errno.ENOTDIR and path != output and not path.exists():
        path = path.parent
    if path.is_dir():
        if error.errno == errno.EEXIST:  # a folder that was to be new: no mistake of a user
            return None
        return (
            f"{path}: is a folder, but the run writes a file of this name; move it away and run the same command again"
        )
    if error.errno != errno.ENOENT and path.exists():
        return (
            f"{path}: is a file, but the run needs a folder of this name; move it away and run the same command again"
        )
    return None


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
