"""Reordering of the rows of a detector's heads from one list of classes to another: each row of a weight or bias belongs to a class.

Shapes: K classes. A box head has K + 1 rows of logits (background last) and 4 K of deltas, or 4 where they are class-agnostic; a mask head has K
rows. A one-stage head has K rows per anchor of a cell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Layout of a tensor's rows: `blocks` blocks of (classes x `each`) rows, followed by `behind` rows that belong to no class."""

    blocks: int
    each: int
    behind: int


_PER_CLASS = {  # name of a tensor -> (rows per class, rows behind them)
    re.compile(r"roi_heads\.heads\.\d+\.logits\.(weight|bias)"): (1, 1),
    re.compile(r"roi_heads\.heads\.\d+\.deltas\.(weight|bias)"): (4, 0),
    re.compile(r"mask_head\.logits\.(weight|bias)"): (1, 0),
}
_PER_ANCHOR_AND_CLASS = re.compile(r"dense\.head\.logits\.(weight|bias)")


def rows_per_class(name: str, tensor: Tensor, classes: int) -> Rows | None:
    """Return the layout of the rows of the tensor with this name; None where no row belongs to a class."""
    if _PER_ANCHOR_AND_CLASS.fullmatch(name) and len(tensor) % classes == 0:
        return Rows(len(tensor) // classes, 1, 0)
    for pattern, (each, behind) in _PER_CLASS.items():
        if pattern.fullmatch(name) and len(tensor) == each * classes + behind:
            return Rows(1, each, behind)
    return None


def carry_rows(
    tensors: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    *,
    old: Sequence[str],
    new: Sequence[str],
    class_agnostic: bool,
) -> dict[str, Tensor]:
    """Rearrange head rows of the classes `old` for the classes `new`, by class name.

    Rows that belong to no class, such as those of the background, stay as they are.

    Args:
        tensors: weights and biases by name, of a detector of the classes `old`.
        fresh: weights and biases of a detector of the classes `new`; used for classes that are not in `old`.
        class_agnostic: whether the deltas belong to no class.
    """
    carried = dict(tensors)
    for name, tensor in tensors.items():
        rows = rows_per_class(name, tensor, len(old))
        if rows is None or (class_agnostic and ".deltas." in name) or name not in fresh:
            continue
        blocks, each, behind = rows
        result = fresh[name].detach().clone()
        for block in range(blocks):
            new_start, old_start = block * len(new) * each, block * len(old) * each
            for place, label in enumerate(new):
                if label in old:
                    target, source = new_start + place * each, old_start + list(old).index(label) * each
                    result[target : target + each] = tensor[source : source + each]
        if behind:
            result[-behind:] = tensor[-behind:]
        carried[name] = result
    return carried


def permute_classes(model: torch.nn.Module, *, old: Sequence[str], new: Sequence[str], class_agnostic: bool) -> None:
    """Reorder the head rows of a model of the classes `old` to the order `new`, in place."""
    if list(old) != list(new):
        state = model.state_dict()
        model.load_state_dict(carry_rows(state, state, old=old, new=new, class_agnostic=class_agnostic))
