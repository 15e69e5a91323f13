"""SIGTERM, SIGHUP (a connection that broke) and Ctrl-C end a run after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType

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
