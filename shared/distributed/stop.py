"""What ends a run after the current step, with a checkpoint: SIGTERM, SIGHUP (a broken connection), Ctrl-C, and the death of a loader's worker."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ssld.shared.distributed.ranks import any_rank

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Context manager: SIGTERM, SIGHUP and the first SIGINT only set a flag; a second SIGINT interrupts at once.

    What `nohup` ignores stays ignored.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    @property
    def requested(self) -> bool:
        """Whether this process received a signal; the others may not have."""
        return self._requested

    def agreed(self) -> bool:
        """Whether the run should stop: the same value on every rank."""
        return any_rank(self._requested)


class WorkerDeaths:
    """Context manager of a training loop: a worker's death raises its error inside `told` alone, so that no step is cut in two.

    torch raises that error from a signal handler, wherever the main process is.
    """

    def __init__(self) -> None:
        self._handler: Callable[..., Any] | None = None  # torch's, while this object has its place
        self._died = self._inside = False

    def __enter__(self) -> "WorkerDeaths":
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._give_back()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, the death of a worker is an error, also of one that has died before; torch keeps its handler outside of the training loop."""
        handler = self._give_back()
        try:
            if handler and self._died:
                self._died = False
                handler(signal.SIGCHLD, None)
            yield
        finally:
            now = signal.getsignal(signal.SIGCHLD)
            if self._inside and callable(now) and threading.current_thread() is threading.main_thread():
                self._handler = now
                signal.signal(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._died = True

    def _give_back(self) -> Callable[..., Any] | None:
        handler, self._handler = self._handler, None
        if handler:
            signal.signal(signal.SIGCHLD, handler)
        return handler
