"""A detector as it is run, not trained: its constant BatchNorm folded into the convolutions, channels last in memory.

Folding drops about a tenth of a ResNet's forward pass; channels last is what CPU convolutions, cuDNN and our RoI
pooling want. Values change by rounding only, about 1e-6.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ssld.shared.models.folding import fold_batchnorm
from ssld.stage2_detect.models.deform import ModulatedDeformConv2d
from ssld.stage2_detect.models.pyramid import TimmPyramid

_EXAMPLE = (1, 3, 64, 96)
Detector = TypeVar("Detector", bound=nn.Module)


class _Joined(nn.Module):
    """A body's maps in one vector, which is what folding compares."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return torch.cat([feature.flatten() for feature in self.body(pixels_BCHW)])


def for_inference(model: Detector) -> Detector:
    """A copy of a detector in evaluation mode, without gradients, that gives the same detections faster.

    `model` has a `pyramid`. BatchNorm behind a deformable convolution stays, and a body in which none follows an
    ordinary one is only laid out anew. The copy does not follow the training of `model`; its state dict is not that of
    a detector file.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    pyramid = fast.pyramid
    assert isinstance(pyramid, TimmPyramid)
    parameter = next(pyramid.parameters())
    noise = torch.randn(_EXAMPLE, generator=torch.Generator().manual_seed(0))
    noise = noise.to(parameter.device, parameter.dtype)
    joined, _ = fold_batchnorm(_Joined(pyramid.body), noise, opaque=(ModulatedDeformConv2d,))
    pyramid.body = joined.get_submodule("body")
    return fast.to(memory_format=torch.channels_last)
