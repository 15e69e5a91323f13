"""BatchNorm folded into the convolutions before it, for a network that is never trained again: about a tenth of a teacher's forward pass.

Which BatchNorm directly follows which convolution is found by tracing; the network itself stays the module it was, so that its parts can still be
called one by one. Deliberately absent: BatchNorm before a convolution or a linear layer, and convolutions that standardise their weights.
"""

import copy
import warnings
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_DIFFERENCE = 1e-3  # largest that folding may make, as a part of the largest answer


class _Tracer(fx.Tracer):
    def __init__(self, opaque: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = (nn.Conv2d, nn.BatchNorm2d, *opaque)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(
    net: nn.Module, example: Tensor, *, opaque: tuple[type[nn.Module], ...] = ()
) -> tuple[nn.Module, int]:
    """(a copy of `net` with its BatchNorm folded, how many were); modules of the types `opaque` are not looked into.

    The network itself and 0 where tracing cannot follow it, where no BatchNorm follows a convolution, or where the answer to the input `example`
    changes by more than a thousandth of its largest value.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of what it skips
        try:
            return _folded(net, example, opaque)
        except (
            Exception
        ):  # control flow that depends on values, or on the modules that went: the network stays as it is
            return net, 0


def _folded(net: nn.Module, example: Tensor, opaque: tuple[type[nn.Module], ...]) -> tuple[nn.Module, int]:
    pairs = _pairs(net, opaque)
    if not pairs:
        return net, 0
    folded = copy.deepcopy(net)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest)
    folded.requires_grad_(False).eval()
    expected = net(example)
    difference = (folded(example) - expected).abs().max()
    # Written so that a difference that is not a number counts as too large.
    if not difference <= _DIFFERENCE * expected.abs().max():
        return net, 0
    return folded, len(pairs)


def _pairs(net: nn.Module, opaque: tuple[type[nn.Module], ...]) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) by name: each called once, and nothing else reads the convolution."""
    modules = dict(net.named_modules())
    calls = [node for node in _Tracer(opaque).trace(net).nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    pairs = []
    for node in calls:
        source = node.args[0]
        if (
            isinstance(modules[str(node.target)], nn.BatchNorm2d)
            and isinstance(source, fx.Node)
            and source.op == "call_module"
            and type(modules[str(source.target)]) in (nn.Conv2d, Conv2dSame)
            and len(source.users) == 1
            and modules[str(node.target)].track_running_stats
            and targets.count(str(node.target)) == targets.count(str(source.target)) == 1
        ):
            pairs.append((str(source.target), str(node.target)))
    return pairs
