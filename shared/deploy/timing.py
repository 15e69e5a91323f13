"""How long calls take, side by side."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int = 10) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that whatever else the machine does meets all of them; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_lines(latency: Mapping[str, float], throughput: Mapping[str, float], batch: int) -> list[str]:
    """A table: milliseconds of one image alone and images a second in batches of `batch`, from medians in seconds."""
    width = max(map(len, latency))
    return [f"{'':<{width}}  latency, batch 1  throughput, batch {batch}"] + [
        f"{name:<{width}}  {1000 * latency[name]:>13.1f} ms  {batch / throughput[name]:>13.1f} images/s"
        for name in latency
    ]
