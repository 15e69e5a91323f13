"""Reorders the rows of a detector's heads from one list of classes to another: each row of a weight or bias belongs to a class.

Shapes: K classes. A box head has K + 1 rows of logits (background last) and 4 K of deltas, or 4 where they are class-agnostic; a mask head has K
rows. A one-stage head has K rows for each shape of anchor in a cell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of a tensor: as many blocks of (classes x `each`) as there are, and `behind` them rows that belong to no class."""

    blocks: int
    each: int
    behind: int


_PER_CLASS = {  # a tensor's name -> (rows a class, rows behind them)
    re.compile(r"roi_heads\.heads\.\d+\.logits\.(weight|bias)"): (1, 1),
    re.compile(r"roi_heads\.heads\.\d+\.deltas\.(weight|bias)"): (4, 0),
    re.compile(r"mask_head\.logits\.(weight|bias)"): (1, 0),
}
_PER_ANCHOR_AND_CLASS = re.compile(r"dense\.head\.logits\.(weight|bias)")


def rows_per_class(name: str, tensor: Tensor, classes: int) -> Rows | None:
    """Which rows of the tensor with this name belong to which class; None where none do."""
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
    """`tensors`, whose head rows are of the classes `old`, with rows for the classes `new`: those of a class by the same name, else those of `fresh`.

    What belongs to no class stays as it is, rows for background included. `class_agnostic`: the deltas belong to no class.
    """
    carried = dict(tensors)
    for name, tensor in tensors.items():
        rows = rows_per_class(name, tensor, len(old))
        if rows is None or (class_agnostic and ".deltas." in name) or name not in fresh:
            continue
        blocks, each, behind = rows
        result = fresh[name].detach().clone()
        for block in range(blocks):
            here, there = block * len(new) * each, block * len(old) * each
            for place, label in enumerate(new):
                if label in old:
                    target, source = here + place * each, there + list(old).index(label) * each
                    result[target : target + each] = tensor[source : source + each]
        if behind:
            result[-behind:] = tensor[-behind:]
        carried[name] = result
    return carried


def permute_classes(model: torch.nn.Module, *, old: Sequence[str], new: Sequence[str], class_agnostic: bool) -> None:
    """Give a model of the classes `old` the order `new`, in place."""
    if list(old) != list(new):
        state = model.state_dict()
        model.load_state_dict(carry_rows(state, state, old=old, new=new, class_agnostic=class_agnostic))
