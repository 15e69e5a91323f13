"""Ranges of activations for INT8, from what a network computes on calibration images.

The smallest and the largest value of a tensor are exact. Everything else comes from values drawn from it at random, about 65,000 over all images.

    minmax      all values
    percentile  without 0.01 % of the values at either end
    mse         the range, shrunk by one factor, whose codes have the least mean squared error

Shapes: B images, H height and W width; V drawn values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from ssld.shared.deploy.graph_files import session
from ssld.shared.training.progress import Clock
from ssld.shared.wording import duration
from ssld.stage2_detect.export_config import Calibration

_DRAWN = 65_536  # values per tensor over all images
_LEAST = 1024  # values per tensor and image
_TAIL = 1e-4
_FACTORS = np.linspace(0.3, 1.0, 36)
CODES = 255  # steps of an unsigned 8-bit code


@dataclass
class Observed:
    """Values of one tensor on calibration images: extremes, and drawn values [V]."""

    lowest: float = np.inf
    highest: float = -np.inf
    parts: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray, draw: np.random.Generator, most: int) -> None:
        """Take in the values of one batch; all of them where there are no more than `most`."""
        if not values.size:
            return
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))
        flat = values.ravel()
        self.parts.append(flat.copy() if flat.size <= most else flat[draw.integers(0, flat.size, most)])

    @property
    def values_V(self) -> np.ndarray:
        """The drawn values."""
        return np.concatenate(self.parts) if self.parts else np.zeros(1, np.float32)


def observe(
    source: Path,
    names: Sequence[str],
    images: Sequence[tuple[Tensor, Tensor]],
    threads: int,
    log: Callable[[str], None],
) -> dict[str, Observed]:
    """Run an ONNX file on images and record tensors inside it, by name.

    Args:
        names: float tensors of the file.
        images: pixels uint8 [B, 3, H, W] and sizes int64 [B, 2].
        log: receives a progress line now and then.
    """
    import onnx

    model = onnx.load(source)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    widened = source.with_name(f"{source.name}.observed")
    try:
        onnx.save(model, widened)
        run = session(widened, threads=threads)
    finally:
        widened.unlink(missing_ok=True)
    draw = np.random.default_rng(0)
    most = max(_LEAST, _DRAWN // max(len(images), 1))
    observed = {name: Observed() for name in names}
    clock = Clock(len(images))
    for pixels_BCHW, sizes_B2 in images:
        results = run.run(list(names), {"pixels": pixels_BCHW.numpy(), "sizes": sizes_B2.numpy()})
        for name, values in zip(names, results, strict=True):
            observed[name].add(values, draw, most)
        clock.add()
        if clock.due():
            log(f"{clock.done} of {clock.total} images done, {duration(clock.left)} to go")
    return observed


def ranges(observed: Mapping[str, Observed], method: Calibration) -> dict[str, tuple[float, float]]:
    """Choose the range of each tensor; it contains 0, whose code is exact."""
    return {name: range_of(one, method) for name, one in observed.items()}


def range_of(observed: Observed, method: Calibration) -> tuple[float, float]:
    """Choose the range of one tensor, see the module."""
    low, high = min(observed.lowest, 0.0), max(observed.highest, 0.0)
    if not high > low:
        return 0.0, 1.0
    if method == "percentile":
        ends = np.quantile(observed.values_V, (_TAIL, 1 - _TAIL))
        low, high = max(low, min(float(ends[0]), 0.0)), min(high, max(float(ends[1]), 0.0))
        return (low, high) if high > low else (0.0, 1.0)
    if method == "mse":
        values_V = observed.values_V
        errors = [np.square(rounded(values_V, f * low, f * high) - values_V).mean() for f in _FACTORS]
        best = float(_FACTORS[int(np.argmin(errors))])
        return best * low, best * high
    return low, high


def rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Round values to the unsigned 8-bit codes of a range, and clip them to it."""
    scale = np.float32((high - low) / CODES)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, CODES) - zero) * scale
