"""Stages of a backbone, and freezing its first stages and its norms.

Stages follow timm's `feature_info`, not names of any one architecture: stage 0 (the stem) is what comes before the
module that yields stride 4, stage k what comes after the module of stage k - 1 up to and including the one that
yields stride 2 * 2**k (4, 8, 16, 32).

A frozen BatchNorm stays a BatchNorm, in eval mode and without gradients: its keys in a state dict do not change, and
under bf16 autocast its output stays bf16 (the usual replacement multiplies by float32 buffers, and its output becomes
float32).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.stage2_detect.models.deform import is_offset

STRIDES = (4, 8, 16, 32)


class ConstantBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that is never trained: in float32 one multiplication and addition, which store nothing for the backward
    pass. That of `nn.BatchNorm2d` stores its input, a quarter of a ResNet's activations, and takes half as long again.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "ConstantBatchNorm2d":
        """Wrap a norm; parameters and buffers are shared."""
        constant = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        constant._parameters, constant._buffers = norm._parameters, norm._buffers
        return constant.eval()

    def train(self, mode: bool = True) -> "ConstantBatchNorm2d":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalize [B, C, H, W] by the running statistics."""
        mean, variance = self.running_mean, self.running_var
        if x_BCHW.dtype != torch.float32 or mean is None or variance is None or not self.affine:
            normalized: Tensor = super().forward(x_BCHW)  # float32 inside for every dtype of x
            return normalized
        scale_C = self.weight * torch.rsqrt(variance + self.eps)
        shift_C = self.bias - mean * scale_C
        return torch.addcmul(shift_C[:, None, None], x_BCHW, scale_C[:, None, None])


def feature_info(body: nn.Module) -> Any:
    """Return timm's description of a `features_only` body: channels, reductions and module names of its maps."""
    return body.feature_info


def level_indices(reductions: Sequence[int]) -> list[int | None]:
    """Return, for each of `STRIDES`, the index of the last feature with that reduction, or None."""
    return [max((i for i, r in enumerate(reductions) if r == stride), default=None) for stride in STRIDES]


def stage_of_module(body: nn.Module) -> dict[str, int]:
    """Return stage 0..4 of every module of a timm `features_only` body with all of `STRIDES`, by the module's name."""
    infos = feature_info(body).get_dicts()
    indices = level_indices([info["reduction"] for info in infos])
    assert None not in indices, "a pyramid body has every stride"
    # timm flattens `stages.0` to the child `stages_0` in some bodies, so names are compared without the difference.
    levels = [_flat(infos[i]["module"]) for i in indices if i is not None]
    stages: dict[str, int] = {}
    passed = 0  # number of levels whose module came before
    for name, _ in body.named_modules():  # registration order, which is the order of execution in timm's bodies
        inside = [k for k, level in enumerate(levels, start=1) if _flat(name).startswith(level)]
        if inside:
            passed = inside[0]
            stages[name] = passed
        else:
            is_container = any(level.startswith(_flat(name)) for level in levels)
            stages[name] = 0 if passed == 0 or is_container else min(passed + 1, len(STRIDES))
    return stages


def stage_of_parameter(body: nn.Module) -> dict[str, int]:
    """Return stage 0 (stem) .. 4 (stride 32) of every parameter of the body, by name."""
    stages = stage_of_module(body)
    return {name: stages[name.rpartition(".")[0]] for name, _ in body.named_parameters()}


def lr_factor_of_parameter(body: nn.Module, backbone_lr_factors: Sequence[float]) -> dict[str, float]:
    """Return the learning-rate factor of every parameter of the body, by name: that of its stage in `backbone_lr_factors`, stem first.

    The offsets of deformable convolutions are new and have factor 1, as in PaddleDetection@666f597f ppdet/modeling/layers.py.
    """
    stages = stage_of_parameter(body)
    return {name: 1.0 if is_offset(body, name) else backbone_lr_factors[stage] for name, stage in stages.items()}


def freeze(body: nn.Module, *, stages: int, norm: bool) -> list[nn.Module]:
    """Freeze the first `stages` stages (1: the stem, 2: also stride 4, ...) and, with `norm`, every BatchNorm.

    Returns:
        The modules whose own `training` flag has to stay False when the model is set to train.
    """
    stage = stage_of_module(body)
    for name, parameter in body.named_parameters():
        if stage[name.rpartition(".")[0]] < stages:
            parameter.requires_grad_(False)
    if norm:
        for name, module in list(body.named_modules()):
            if type(module) is nn.BatchNorm2d:
                body.set_submodule(name, ConstantBatchNorm2d.of(module))
        norms = [module for module in body.modules() if isinstance(module, _BatchNorm)]
        for module in norms:
            module.requires_grad_(False)
    modules = [(name, module) for name, module in body.named_modules() if name]
    return [m for name, m in modules if stage[name] < stages or (norm and isinstance(m, _BatchNorm))]


def untrained_norms(body: nn.Module, origin: str) -> str | None:
    """Return a warning about frozen norms of a body with random weights; None for a body without BatchNorm.

    Their running statistics are 0 and 1 and stay so. In a deep body nothing then keeps the maps' scale: HGNetV2-B0's is 0.84 at stride 4, 0.0005 at
    stride 32.

    Args:
        origin: the reference of the backbone, for the message.
    """
    if not any(isinstance(module, _BatchNorm) for module in body.modules()):
        return None
    return (
        f"warning: {origin} has random weights, and freeze_norm: true freezes its BatchNorm layers at mean 0 and variance 1, where they normalize "
        "nothing: the training may diverge or learn little; set freeze_norm: false"
    )


def _flat(name: str) -> str:
    return name.replace(".", "_") + "_"
