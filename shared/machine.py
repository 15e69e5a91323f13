"""CPU cores, threads, versions of installed packages, and Python's garbage collector. Imports the standard library only, so that `ssld doctor` works
where other packages are broken."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(setting: int | None) -> tuple[int, str]:
    """CPU threads of this process and where the number comes from: the setting `threads`, OMP_NUM_THREADS, or the cores shared by the processes on
    this machine.

    A launcher sets OMP_NUM_THREADS to 1 where the user has not set it (torch.distributed.run, accelerate launch), so under a launcher that value
    counts as not set.
    """
    local = _number("LOCAL_WORLD_SIZE") or 1
    if setting is not None:
        return setting, "threads"
    given = _number("OMP_NUM_THREADS")
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if given and not (given == 1 and launched):
        return given, "OMP_NUM_THREADS"
    return max(1, cores() // local), "cores / processes"


def ignored_threads(setting: int | None) -> str | None:
    """Return a warning for the log if OMP_NUM_THREADS would set the threads but is no whole number from 1 on; None otherwise."""
    text = os.environ.get("OMP_NUM_THREADS")
    if setting is not None or text is None or _number("OMP_NUM_THREADS"):
        return None
    return f"warning: OMP_NUM_THREADS={text[:40]!r} is ignored: expected a whole number from 1 on; cores / processes are used"


def _number(name: str) -> int | None:
    """A whole number in the environment, None where there is none: OMP_NUM_THREADS may be a list, as `4,2`, whose first number counts."""
    text = os.environ.get(name, "").partition(",")[0].strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable Python's garbage collector inside: it would scan millions of new objects that live on, of a large file or a traced graph, again and
    again; a fifth of the time of an export."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def installed_version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
