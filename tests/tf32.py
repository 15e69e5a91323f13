"""TF32 on a CPU: operands rounded as a GPU of Ampere or later does, for what has to be computed in full float32."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to the 10 bits of a mantissa that TF32 has."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class MatrixProductsInTF32(TorchDispatchMode):
    """Context manager: float32 matrix products are those of TF32, unless `fp32_precision` is ieee; `rounded` counts them."""

    rounded = 0

    def __enter__(self) -> "MatrixProductsInTF32":
        self._matmul: Any = torch.backends.cuda.matmul
        self._before = self._matmul.fp32_precision  # whatever an earlier test has left
        self._matmul.fp32_precision = "tf32"
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._matmul.fp32_precision = self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backends: Any = torch.backends
        if func is torch.ops.aten.mm.default and backends.cuda.matmul.fp32_precision != "ieee":
            self.rounded += 1
            args = tuple(to_tf32(operand) for operand in args)
        return func(*args, **(kwargs or {}))
