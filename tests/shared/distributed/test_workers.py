"""Loader processes that die or cannot hand over a batch: one line and exit code 2, and no waiting for ever."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling

from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.distributed import processes
from ssld.shared.distributed.processes import start_worker
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.images import UnreadableImage, decode_image

pytestmark = pytest.mark.process


class Settings(CommandConfig):
    """Settings of a test."""


class Dying(IterableDataset[Any]):
    """Ends its own process, or what hands its batches over fails."""

    def __init__(self, how: int | Exception) -> None:
        self.how = how

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1)
        if isinstance(self.how, int):
            os.kill(os.getpid(), self.how)
        yield Unsendable(self.how)  # type: ignore[misc]


class Unsendable:
    """Fails where a batch is made ready for the main process, in a thread of its worker."""

    def __init__(self, error: Any) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def as_it_is(item: Any) -> Any:
    return item


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (
            signal.SIGKILL,
            r"\(Killed\): often because the machine had no memory left, or /dev/shm is full: use fewer --workers",
        ),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), r": /dev/shm is full, "),
        (OSError(errno.EMFILE, "Too many open files"), r": it may open no more files: raise the limit \(ulimit -n"),
        (RuntimeError("received 0 items of ancillary data"), r": often because the machine had no memory left"),
    ],
    ids=["killed", "shared memory", "files", "other"],
)
def test_a_worker_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: int | Exception, line: str
) -> None:
    def work(config: Settings) -> None:
        loader = DataLoader(
            Dying(how), batch_size=None, num_workers=1, worker_init_fn=start_worker, collate_fn=as_it_is
        )
        for _ in loader:
            pass

    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch sets its handler once per process
    try:
        assert run_command(Settings, work, ["--output", str(tmp_path), "--threads", "1"], program="x.py") == 2
    finally:
        signal.signal(signal.SIGCHLD, before)
    err = capfd.readouterr().err
    assert re.fullmatch(
        rf"error: a process that reads images has died ?{line}.*; the same command goes on .*\n", err
    ), err


def test_a_machine_without_files_left_does_not_make_images_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage):
        decode_image(tmp_path / "a.png")

    def full(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("ssld.shared.images.Image.open", full)
    with pytest.raises(OSError, match="Too many open files"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_ask_for_a_checkpoint(number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # a background job ignores some
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
    finally:
        signal.signal(number, before)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_number_of_an_error_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(processes, "_LAST_WORDS", 0)
    for error in (
        OSError(errno.EMFILE, "x"),
        RuntimeError("shm: No space left on device (28)"),
        ValueError("odd"),
        RuntimeError("(300)"),
    ):
        processes._give_up(error, None)
    assert codes == [errno.EMFILE, errno.ENOSPC, 1, 1]
