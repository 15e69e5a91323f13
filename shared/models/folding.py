"""BatchNorm folded into the convolutions before it, for a network that is not trained again: about a tenth of a teacher's forward pass.

Which BatchNorm directly follows which convolution is found by tracing; the network itself stays the module it was, so that its parts can still be
called one by one. Deliberately absent: BatchNorm before a convolution or a linear layer, and convolutions that standardize their weights.
"""

import copy
import warnings
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ssld.shared.distributed.precision import full_float32

_DIFFERENCE = 1e-3  # largest difference that folding may make, as a share of the largest output


class Folded(NamedTuple):
    """Result of `fold_batchnorm`."""

    net: nn.Module
    """a folded copy, or the network itself where `layers` is 0"""
    layers: int
    """number of BatchNorm layers folded"""
    reason: str
    """why none of the network's BatchNorm layers was folded; empty where one was, and for a network without any"""


class _Tracer(fx.Tracer):
    def __init__(self, opaque: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = (nn.Conv2d, nn.BatchNorm2d, *opaque)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(net: nn.Module, example: Tensor, *, opaque: tuple[type[nn.Module], ...] = ()) -> Folded:
    """Fold BatchNorm in a copy of a network in evaluation mode, and compare the outputs of both for the input `example`.

    The copy is rejected where an output changes by more than a thousandth of the largest. The comparison runs in full float32: the rounding of
    TF32, in which GPUs convolve by default, is larger than that.

    Args:
        example: on the network's device.
        opaque: types of modules that are not traced into.
    """
    with torch.no_grad(), warnings.catch_warnings(), full_float32():
        warnings.simplefilter("ignore")  # tracing warns of what it skips
        try:
            return _folded(net, example, opaque)
        # Of tracing: control flow that depends on values, or on the modules that were replaced.
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            return Folded(net, 0, f"the network cannot be traced or run folded ({type(error).__name__}: {why})")


def _folded(net: nn.Module, example: Tensor, opaque: tuple[type[nn.Module], ...]) -> Folded:
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return Folded(net, 0, "")
    pairs = _pairs(net, opaque)
    if not pairs:
        return Folded(net, 0, "no BatchNorm directly follows a convolution whose output nothing else reads")
    folded = copy.deepcopy(net)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest)
    folded.requires_grad_(False).eval()
    expected = net(example)
    difference = ((folded(example) - expected).abs().max() / expected.abs().max()).item()
    # Written so that a difference that is not a number counts as too large.
    if not difference <= _DIFFERENCE:
        return Folded(net, 0, f"outputs would differ by {difference:.1e} of the largest; {_DIFFERENCE:g} is allowed")
    return Folded(folded, len(pairs), "")


def _pairs(net: nn.Module, opaque: tuple[type[nn.Module], ...]) -> list[tuple[str, str]]:
    """List (convolution, BatchNorm) by name: each called once, and the convolution's output read by the BatchNorm alone."""
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
