"""Faster forms of plain operations, equal to them up to rounding, and the one switch between both ways.

    roi_align.py    RoIAlign on the CPU; plain: torchvision's. And each RoI on its own level alone; plain: on all levels, on
                    those that are not its own outside of the map
    sparse_rpn.py   gradients of the RPN's head at the sampled anchors alone; plain: everywhere

The fast way is on. `with plain():` turns all of it off, for tests and for measurements.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_enabled = True


def enabled() -> bool:
    """Whether the fast way is taken where there is one."""
    return _enabled


def on_host(tensor: Tensor) -> bool:
    """Whether to compute with a tensor in the way that is fast on a CPU: by its values, which a GPU would be waited for and a
    traced graph does not have.
    """
    return _enabled and tensor.device.type == "cpu" and not torch.compiler.is_exporting()


@contextmanager
def plain() -> Iterator[None]:
    """Inside, everything is computed in the plain way."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
