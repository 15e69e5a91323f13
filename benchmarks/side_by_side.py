"""Works measured in turn in one process: only their ratios mean anything."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], None]


def rounds(
    works: dict[str, Work], count: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, float]]:
    """Seconds of each work in every round, in alternating order; one round before them is not counted."""
    timings: list[dict[str, float]] = []
    for number in range(count + 1):
        seconds = {}
        for name in works if number % 2 else reversed(works):
            start = clock()
            works[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = clock() - start
        timings.append(seconds)
    return timings[1:]


def show(label: str, ratios: list[float]) -> None:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{label:<62} {middle:.3f}  ({low:.3f} to {high:.3f})")
