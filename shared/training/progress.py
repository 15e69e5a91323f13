"""How far a run is: a bar on a terminal, and what a log line says of speed, time left, waiting and memory.

Nothing here waits for the device: times are the process's, memory is what the allocator has counted.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from tqdm import tqdm

from ssld.shared.run_dir import RunDir
from ssld.shared.wording import duration

_TRIED = 8  # steps after which the run's time is estimated, or earlier:
_SILENCE = 20.0  # seconds that nothing is heard for


class Progress:
    """The bar of a training run, and the clock behind its log lines.

    The bar is there on the main process and only where standard error is a terminal; lines that the run logs meanwhile stand above it.
    """

    def __init__(self, run: RunDir, device: torch.device) -> None:
        self._waited = self._paused = 0.0
        self._run, self._device = run, device
        self._print = run.write
        self._start = self._read_step = self._step = self._steps = 0
        self._began = self._read_time = time.perf_counter()
        self._first = self._began
        self._told = False  # how long the run will take
        self._bar: tqdm | None = None

    def begin(self, start: int, steps: int) -> "Progress":
        """The loop of `steps` steps begins after step `start`; the bar goes with the context."""
        self._start = self._read_step = self._step = start
        self._steps = steps
        self._began = self._read_time = time.perf_counter()
        if self._run.main and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)
            self._run.write = tqdm.write
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
        if self._bar:
            self._bar.update()
        done = self._step - self._start
        now = time.perf_counter()
        if done == 1:  # left out of the estimate: workers start and kernels are chosen in it
            self._first = now
        elif not self._told and self._read_step == self._start:
            enough = done == min(_TRIED, self._steps - self._start - 1) or now - self._began > _SILENCE
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
        steps = self._step - self._start
        left = (time.perf_counter() - self._began) / max(1, steps) * (self._steps - self._step)
        wait, memory = f"{100 * numbers['data_wait']:.0f} % waiting for data", f"{numbers['memory_gb']:.1f} GB"
        if self._bar:
            shown = {"loss": loss, "lr": lr, "data wait": numbers["data_wait"], "memory": memory}
            self._bar.set_postfix({key: value for key, value in shown.items() if value is not None}, refresh=False)
        rate = f"{numbers['images_per_second']:.3g} images/s"
        return f"{rate}, {wait}, {memory}" + (f", {duration(left)} to go" if self._step < self._steps else "")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None
            self._run.write = self._print


def greatest_memory(device: torch.device) -> int:
    """Bytes: what tensors took at most on a GPU, else what the process took."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
