"""How far something is: the one clock and the one bar of trainings, evaluations and predictions, and what a log line says of them.

Nothing here waits for the device: times are the process's, memory is what the allocator has counted.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from ssld.shared.run_dir import RunDir
from ssld.shared.wording import duration

SILENCE = 20.0
"""seconds that nothing is heard for"""
_TRIED = 8  # steps after which the run's time is estimated, or earlier after a silence


class Clock:
    """How fast things are done, and how long the rest of them takes.

    Attributes:
        total: how many there are, as far as that is known.
        done: how many of them are done.
    """

    def __init__(self, total: int = 0) -> None:
        self.total, self.done = total, 0
        self._began = self._told = time.perf_counter()

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count

    @property
    def rate(self) -> float:
        """Things a second since the clock began."""
        return self.done / max(time.perf_counter() - self._began, 1e-9)

    @property
    def left(self) -> float:
        """Seconds that the rest takes at this rate; 0 where nothing is left, none is done, or nobody knows how many there are."""
        rest = self.total - self.done
        return rest / self.rate if rest > 0 and self.done else 0.0

    def due(self) -> bool:
        """Whether it is time for a word: nothing has been heard for a while, and not all is done."""
        now = time.perf_counter()
        if now - self._told < SILENCE or self.done == self.total:
            return False
        self._told = now
        return True

    def describe(self) -> str:
        """`3.2 a second, 4 min to go`."""
        left = self.left
        return f"{self.rate:.3g} a second" + (f", {duration(left)} to go" if left else "")


class Bar:
    """A bar of `total` things, with lines that the run logs meanwhile above it; only on the main process, and where standard error is a terminal."""

    def __init__(self, run: RunDir, total: int, unit: str, done: int = 0) -> None:
        self._run = run
        self._bar: tqdm | None = None
        if run.main and sys.stderr.isatty():
            self._print, run.write = run.write, tqdm.write
            self._bar = tqdm(total=total or None, initial=done, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def add(self) -> None:
        """One more is done."""
        if self._bar:
            self._bar.update()

    def show(self, **values: Any) -> None:
        """Show these values beside it, but for those that are None."""
        if self._bar:
            self._bar.set_postfix({key: value for key, value in values.items() if value is not None}, refresh=False)

    def close(self) -> None:
        """Remove it."""
        if self._bar:
            self._bar.close()
            self._bar, self._run.write = None, self._print


class Progress:
    """The bar of a training run, and the clock behind its log lines."""

    def __init__(self, run: RunDir, device: torch.device) -> None:
        self._waited = self._paused = 0.0
        self._run, self._device = run, device
        self._start = self._read_step = self._step = self._steps = 0
        self._clock = Clock()
        self._read_time = self._first = time.perf_counter()
        self._told = False  # how long the run will take
        self._bar: Bar | None = None

    def begin(self, start: int, steps: int) -> "Progress":
        """The loop of `steps` steps begins after step `start`; the bar goes with the context."""
        self._start = self._read_step = self._step = start
        self._steps = steps
        self._clock = Clock(steps - start)
        self._read_time = time.perf_counter()
        self._bar = Bar(self._run, steps, "step", start)
        return self

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what is waited for: the next batch."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is no training: an evaluation, a checkpoint. Rates and shares are without it, `seconds` and the time left are not."""
        since = time.perf_counter()
        yield
        self._paused += time.perf_counter() - since

    def step(self) -> None:
        """A step is done. After the first few a line says how long the run will take, where the log says nothing yet."""
        self._step += 1
        self._clock.add()
        if self._bar:
            self._bar.add()
        done = self._clock.done
        now = time.perf_counter()
        if done == 1:  # left out of the estimate: workers start and kernels are chosen in it
            self._first = now
        elif not self._told and self._read_step == self._start:
            enough = done == min(_TRIED, self._steps - self._start - 1) or self._clock.due()
            if enough and self._step < self._steps:
                self._told = True
                seconds = (now - self._first) / (done - 1)
                left = seconds * (self._steps - self._step)
                self._run.log(
                    f"step {self._step}: about {duration(seconds)} a step, {duration(left)} to go without evaluations"
                )

    def read(self, images: int) -> dict[str, float]:
        """Since the last call: `seconds`, the share of them spent waiting for data, images a second and greatest memory.

        Args:
            images: that a step takes, over all processes.

        `memory_gb` is the device's (what tensors took) on a GPU, else the process's.
        """
        now = time.perf_counter()
        seconds, self._read_time = now - self._read_time, now
        training, self._paused = max(seconds - self._paused, 1e-9), 0.0
        steps, self._read_step = self._step - self._read_step, self._step
        share, self._waited = min(1.0, self._waited / training), 0.0
        return {
            "seconds": round(seconds, 3),
            "data_wait": round(share, 3),
            "images_per_second": round(steps * images / training, 2),
            "memory_gb": round(greatest_memory(self._device) / 2**30, 2),
        }

    def describe(self, numbers: dict[str, float], loss: float | None = None, lr: float | None = None) -> str:
        """The end of a log line from what `read` gave; the bar shows it too."""
        wait, memory = f"{100 * numbers['data_wait']:.0f} % waiting for data", f"{numbers['memory_gb']:.1f} GB"
        if self._bar:
            self._bar.show(**{"loss": loss, "lr": lr, "data wait": numbers["data_wait"], "memory": memory})
        rate = f"{numbers['images_per_second']:.3g} images/s"
        left = self._clock.left
        return f"{rate}, {wait}, {memory}" + (f", {duration(left)} to go" if left else "")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()


def greatest_memory(device: torch.device) -> int:
    """Bytes: what tensors took at most on a GPU, else what the process took."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
