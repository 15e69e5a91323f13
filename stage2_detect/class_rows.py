"""Rows of a detector's heads belong to classes: carry them from one list of class names to another.

Shapes: K classes. A box head has K + 1 rows of logits (background last) and 4 K of deltas, or 4 where they are class-agnostic; a mask head has K
rows.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_PER_CLASS = {  # last parts of a tensor's name -> (rows a class, rows behind them)
    re.compile(r"roi_heads\.heads\.\d+\.logits\.(weight|bias)"): (1, 1),
    re.compile(r"roi_heads\.heads\.\d+\.deltas\.(weight|bias)"): (4, 0),
    re.compile(r"mask_head\.logits\.(weight|bias)"): (1, 0),
}


def rows_per_class(name: str, tensor: Tensor, classes: int) -> tuple[int, int] | None:
    """(rows a class, rows behind them) of the tensor with this name; None where it has no rows that belong to classes."""
    for pattern, (each, behind) in _PER_CLASS.items():
        if pattern.fullmatch(name) and len(tensor) == each * classes + behind:
            return each, behind
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
        each, behind = rows
        result = fresh[name].detach().clone()
        for place, label in enumerate(new):
            if label in old:
                source = list(old).index(label)
                result[place * each : (place + 1) * each] = tensor[source * each : (source + 1) * each]
        if behind:
            result[-behind:] = tensor[-behind:]
        carried[name] = result
    return carried


def permute_classes(model: torch.nn.Module, *, old: Sequence[str], new: Sequence[str], class_agnostic: bool) -> None:
    """Give a model of the classes `old` the order `new`, in place."""
    if list(old) != list(new):
        state = model.state_dict()
        model.load_state_dict(carry_rows(state, state, old=old, new=new, class_agnostic=class_agnostic))
