"""What this machine has: CPU cores, and versions of installed packages. Imports nothing but Python's own, so that `ssld doctor` can ask it where the
rest is broken."""

import importlib.metadata
import os


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
