"""Architectures that have the same tensors and compute otherwise with them: weights of one load whole into the other, and are worse there.

timm has such families: other padding and epsilon (`tf_efficientnet_lite0` and `efficientnet_lite0`), another activation (`quickgelu`), another mean
and std of the input. Nothing in a plain state dict tells them apart, so what was assumed is told. They are versions of one network, that people call
by one name. A network with more layers, if without weights, as `resnetaa50` beside `resnet50`, is not: whoever has trained it knows.
"""

import functools
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

_TRIED = 12  # most similar names


@functools.cache
def twins(arch: str, classes: int) -> tuple[str, ...]:
    """Return timm's architectures, of those with similar names, that have the tensors of `arch` and as many layers, and compute
    otherwise; in a second or two.

    Args:
        arch: timm's name, with or without the tag of weights.
        classes: rows of the classification layer; 0 for none.
    """
    base = arch.partition(".")[0]
    own = _facts(arch, classes)
    known, words = timm.list_models(), set(base.split("_"))
    similar = get_close_matches(base, known, n=_TRIED + 1, cutoff=0.7)
    similar += [
        name for name in known if len(words ^ set(name.split("_"))) == 1
    ]  # as quickgelu in the middle of a name
    found = []
    for name in dict.fromkeys(similar):
        other = _facts(name, classes) if name != base else None
        if own and other and other[0] == own[0] and other[1:] != own[1:]:
            found.append(name)
    return tuple(found)


def _facts(arch: str, classes: int) -> tuple[Any, ...] | None:
    """Return ((shapes of the tensors by name, number of layers), the layers in words, mean, std); None for what timm cannot build like that."""
    try:
        with torch.device("meta"):
            net: Any = timm.create_model(arch, num_classes=classes)
    except Exception:  # every family of networks raises other errors
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    layers = sum(not isinstance(module, nn.Identity) for module in net.modules())
    cfg = net.pretrained_cfg
    return (shapes, layers), repr(net), tuple(cfg["mean"]), tuple(cfg["std"])
