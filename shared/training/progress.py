"""Progress of trainings, evaluations and predictions: clock, bar, and the numbers for log lines.

Nothing in this module waits for the device, but a bar once for the first loss: times are those of the process, memory is the allocator's count.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from ssld.shared.run_dir import RunDir
from ssld.shared.wording import duration

SILENCE = 20.0
"""seconds between two progress lines"""
_KEPT = 0.95  # weight of the earlier losses in the average that the bar shows: about that of the last 20 steps
_TRIED = 8  # steps after which the run's time is estimated, or earlier after a silence


class Clock:
    """Rate at which items are processed, and time left.

    Attributes:
        total: number of items, as far as it is known, else 0.
        done: number of items processed.
    """

    def __init__(self, total: int = 0) -> None:
        self.total, self.done = total, 0
        self._began = self._reported = time.perf_counter()

    def add(self, count: int = 1) -> None:
        """Count further items as done."""
        self.done += count

    @property
    def rate(self) -> float:
        """Items per second since the clock began."""
        return self.done / max(time.perf_counter() - self._began, 1e-9)

    @property
    def left(self) -> float:
        """Seconds left at this rate; 0 where nothing is left, nothing is done, or the total is unknown."""
        rest = self.total - self.done
        return rest / self.rate if rest > 0 and self.done else 0.0

    def due(self) -> bool:
        """Whether a progress line is due: the last one is `SILENCE` seconds old, and items are left."""
        now = time.perf_counter()
        if now - self._reported < SILENCE or self.done == self.total:
            return False
        self._reported = now
        return True

    def describe(self) -> str:
        """Describe rate and time left: `3.2 per second, 4 min to go`."""
        left = self.left
        return f"{self.rate:.3g} per second" + (f", {duration(left)} to go" if left else "")


class Bar:
    """A bar of `total` items, below the lines that the run logs; only on the main process, and where standard error is a terminal."""

    def __init__(self, run: RunDir, total: int, unit: str, done: int = 0) -> None:
        self._run = run
        self._bar: tqdm | None = None
        if run.main and sys.stderr.isatty():
            self._print, run.write = run.write, tqdm.write
            self._bar = tqdm(total=total or None, initial=done, unit=unit, dynamic_ncols=True, file=sys.stderr)

    @property
    def visible(self) -> bool:
        """Whether there is a bar to see."""
        return self._bar is not None

    def add(self) -> None:
        """Count one more item as done."""
        if self._bar:
            self._bar.update()

    def show(self, **values: Any) -> None:
        """Show values beside the bar, except those that are None."""
        if self._bar:
            self._bar.set_postfix({key: value for key, value in values.items() if value is not None}, refresh=False)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.close()
            self._bar, self._run.write = None, self._print


class Progress:
    """The bar of a training run, and the clock behind its log lines.

    Args:
        loss: reads the loss of the last step, or None where it is unknown. The bar shows its moving average on a CPU. On a GPU, where reading
            it waits for the step, it is read after the first step only, and the bar has the averages of the log lines after that.
    """

    def __init__(self, run: RunDir, device: torch.device, loss: Callable[[], float | None] | None = None) -> None:
        self._loss, self._average, self._weight = loss, 0.0, 0.0
        self._shown: dict[str, Any] = {}  # beside the bar
        self._waited = self._paused = 0.0
        self._run, self._device = run, device
        self._start = self._read_step = self._step = self._steps = 0
        self._clock = Clock()
        self._read_time = self._first = time.perf_counter()
        self._estimated = False  # whether the time of the run was logged
        self._bar: Bar | None = None

    def begin(self, start: int, steps: int) -> "Progress":
        """Start the clock of a loop of `steps` steps after step `start`; the bar is removed when the context ends."""
        self._start = self._read_step = self._step = start
        self._steps = steps
        self._clock = Clock(steps - start)
        self._read_time = time.perf_counter()
        self._bar = Bar(self._run, steps, "step", start)
        return self

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure a wait for the next batch."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Measure a pause of the training: an evaluation, a checkpoint. Rates and shares exclude it, `seconds` and the time left include it."""
        since = time.perf_counter()
        yield
        self._paused += time.perf_counter() - since

    def step(self) -> None:
        """Count a step as done. After the first few, a line estimates the time of the run, if nothing was logged yet."""
        self._step += 1
        self._clock.add()
        done = self._clock.done
        if self._bar:
            if self._bar.visible and (self._device.type == "cpu" or done == 1):
                self._smooth()
            self._bar.add()
        now = time.perf_counter()
        if done == 1:  # left out of the estimate: workers start and kernels are chosen in it
            self._first = now
        elif not self._estimated and self._read_step == self._start:
            enough = done == min(_TRIED, self._steps - self._start - 1) or self._clock.due()
            if enough and self._step < self._steps:
                self._estimated = True
                seconds = (now - self._first) / (done - 1)
                left = seconds * (self._steps - self._step)
                self._run.log(
                    f"step {self._step}: about {duration(seconds)} per step, {duration(left)} to go without evaluations"
                )

    def _smooth(self) -> None:
        """Add the last step's loss to the average, an exponential one without bias to its start, and show it."""
        value = self._loss() if self._loss else None
        if value is not None:
            self._average = _KEPT * self._average + (1 - _KEPT) * value
            self._weight = _KEPT * self._weight + 1 - _KEPT
            self._show(loss=self._average / self._weight)

    def _show(self, **values: Any) -> None:
        if self._bar:
            self._shown |= {key: value for key, value in values.items() if value is not None}
            self._bar.show(**self._shown)

    def read(self, images_seen: Callable[[int], int]) -> dict[str, float]:
        """Return `seconds` since the last call, the share of them spent waiting for data, images per second and peak memory.

        Args:
            images_seen: returns the number of images in the first steps of the run, over all processes.

        `memory_gb` is the peak of all tensors on a GPU, else the peak of the process.
        """
        now = time.perf_counter()
        seconds, self._read_time = now - self._read_time, now
        training, self._paused = max(seconds - self._paused, 1e-9), 0.0
        images, self._read_step = images_seen(self._step) - images_seen(self._read_step), self._step
        share, self._waited = min(1.0, self._waited / training), 0.0
        return {
            "seconds": round(seconds, 3),
            "data_wait": round(share, 3),
            "images_per_second": round(images / training, 2),
            "memory_gb": round(greatest_memory(self._device) / 2**30, 2),
        }

    def describe(self, numbers: dict[str, float], loss: float | None = None, lr: float | None = None) -> str:
        """Describe the numbers of `read` for the end of a log line; the bar shows them too."""
        wait, memory = f"{100 * numbers['data_wait']:.0f} % waiting for data", f"{numbers['memory_gb']:.1f} GB"
        smooth = self._device.type == "cpu" and self._weight > 0
        self._show(**{"loss": None if smooth else loss, "lr": lr, "data wait": numbers["data_wait"], "memory": memory})
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
    """Return the peak memory in bytes: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
