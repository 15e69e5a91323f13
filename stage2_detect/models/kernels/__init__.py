"""Faster forms of plain operations, equal to them up to rounding, and the one switch between both ways.

    nms.py          NMS of many rows: on the CPU by threads, on a GPU in rounds over all rows; plain: row after row
    roi_align.py    RoIAlign on the CPU; plain: torchvision's. And each RoI on its own level alone; plain: on all levels, on
                    those that are not its own outside of the map
    sparse_rpn.py   gradients of the RPN's head at the sampled anchors only; plain: at all anchors

The fast way is on. `with plain():` turns all of it off, for tests and for measurements.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_enabled = True


def enabled() -> bool:
    """Return whether the fast forms are on."""
    return _enabled


def on_host(tensor: Tensor) -> bool:
    """Return whether to use the form that is fast on a CPU, whose shapes depend on values: a GPU would have to be waited for, and
    a traced graph has no values.
    """
    return _enabled and tensor.device.type == "cpu" and not torch.compiler.is_exporting()


@contextmanager
def plain() -> Iterator[None]:
    """Turn the fast forms off inside the block."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
