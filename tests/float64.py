"""Runs a command in float64, so that what should be equal but for the order of a sum is equal to many digits.

In float32 an R-CNN cannot be compared after several steps: two proposals whose scores differ by less than rounding change
places, other regions are sampled, and the losses differ in the fourth digit. As a script, for real processes:

    python tests/float64.py stage2_detect/train.py --config ...
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """`x.float()` is float64, and a function of float32 and float64 tensors takes all of them as float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        in_place = func.__name__.endswith("_")  # writes to its first argument, whose type stays
        if not in_place and {torch.float32, torch.float64} <= {tensor.dtype for tensor in tensors}:
            args = tuple(
                arg.double() if isinstance(arg, Tensor) and arg.dtype == torch.float32 else arg for arg in args
            )
        return func(*args, **kwargs or {})


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks made inside have float64 weights, and so all they compute; files, pixels and anchors stay what they are."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    script = Path(__file__).parents[1] / sys.argv[1]
    sys.argv = [str(script), *sys.argv[2:]]
    with in_float64():
        runpy.run_path(str(script), run_name="__main__")
