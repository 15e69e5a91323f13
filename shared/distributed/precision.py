"""Full float32 on devices that shorten it. A module of its own, without accelerate, because networks are folded where no run is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 tensors run in float32, not in TF32 or bf16."""
    backends: Any = torch.backends
    groups = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [group.fp32_precision for group in groups]
    try:
        for group in groups:
            group.fp32_precision = "ieee"
        yield
    finally:
        for group, precision in zip(groups, before, strict=True):
            group.fp32_precision = precision
