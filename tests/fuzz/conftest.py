"""Requirements on readers of damaged files: a result or a UserError, in time, within memory, and no effect outside their folder."""

import errno
import io
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

from ssld.shared.errors import UserError

MUTATIONS = 2000
"""of a sound file, the same at every run"""
_BATCH = 20  # under one seed of hypothesis, which takes longer than a reader
SECONDS, BYTES = 10, 1 << 30
"""what reading one of them may take at most: time, and memory beyond what the process has already"""
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_RUNS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "webbrowser")


class _Watch:
    """Effects on the machine while `folder` is watched, from the events of Python's audit hooks."""

    folder: str | None = None
    violations: list[str]

    def __init__(self) -> None:
        self.violations = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | bytes) and not self._inside(path):
                self.violations.append(f"opened {path!r} to write")
        elif event in _CHANGES:
            if not self._inside(arguments[0]):
                self.violations.append(f"{event} {arguments!r}")
        elif event.startswith(_RUNS):
            self.violations.append(f"{event} {str(arguments)[:200]}")

    def _inside(self, path: Any) -> bool:
        assert self.folder is not None
        return os.path.abspath(os.fsdecode(path)).startswith((self.folder, "/dev/null"))


_WATCH = _Watch()
sys.addaudithook(_WATCH)


@contextmanager
def _held() -> Iterator[None]:
    """Context manager: memory is bounded, and an alarm that goes off is a failure."""

    def late(*_: Any) -> None:
        raise AssertionError(f"reads for more than {SECONDS} seconds")

    own = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    if own.exists():
        limit = int(own.read_text().split()[0]) * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    """Writes `MUTATIONS` of a file, one after the other, and reads each; unless `refuses` is false, some have to be refused.

    The sound file has to be there: it is read first, and must be read again at the end.
    """
    monkeypatch.chdir(tmp_path)
    set_hypothesis_home_dir(tmp_path.parent / "hypothesis")

    def run(
        mutate: Callable[[random.Random], bytes], file: Path, read: Callable[[], Any], *, refuses: bool = True
    ) -> None:
        sound, counts = file.read_bytes(), {"read": 0, "refused": 0}
        read()

        @settings(
            max_examples=MUTATIONS // _BATCH,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # a smaller seed is no smaller mutation: there is nothing to shrink
        )
        @given(st.integers(0, 2**40))
        def attempt(seed: int) -> None:
            for number in range(_BATCH):
                attempt_one(f"{seed} {number}")

        def attempt_one(seed: str) -> None:
            file.write_bytes(mutate(random.Random(seed)))
            said = None
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            _WATCH.folder, _WATCH.violations = str(tmp_path.resolve()), []
            try:
                read()
            except UserError as error:
                said = str(error)
            except OSError as error:  # which every command tells in one line, as it does of a full disk
                if error.errno != errno.ENAMETOOLONG:
                    raise
                said = str(error)
            finally:
                _WATCH.folder = None
            counts["read" if said is None else "refused"] += 1
            assert said is None or 0 < len(said.strip()) < 20_000
            assert _WATCH.violations == []

        with _held():
            attempt()
        file.write_bytes(sound)
        read()
        assert sum(counts.values()) == MUTATIONS
        assert counts["refused"] > 0 or not refuses

    return run


def write_json(file: Path, content: Any) -> Path:
    """The file, with JSON in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def encoded_png(number: int = 0) -> bytes:
    """A PNG of noise."""
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
