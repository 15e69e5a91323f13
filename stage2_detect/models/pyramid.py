"""A timm backbone under a feature pyramid: images -> P2..P6 of equal width (arXiv 1612.03144).

Levels are found by their stride in timm's `feature_info`, since many architectures list stride 2 first. A probe on
construction checks channels and sizes, so that an unsuitable backbone is refused before any data is read. The pyramid is
torchvision's, by default without norm, with nearest-neighbor upsampling. For R-CNN it begins at stride 4, and P6 is every second
pixel of P5; for one-stage detectors (arXiv 1708.02002) it begins at stride 8, and P6 and P7 are convolutions.

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from timm.layers import Format
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from ssld.shared.errors import UserError
from ssld.stage2_detect.models import freezing
from ssld.stage2_detect.models.deform import replace_convolutions
from ssld.stage2_detect.models.norms import Norm, norm_layer

_PROBE_SIZE = (64, 96)


class P6P7(ExtraFPNBlock):
    """Two coarser levels by 3x3 convolutions of stride 2.

    Args:
        width: channels of C5.
        channels: channels of P3..P7.
        p6_from: input of the convolution of P6, P5 or C5.
        relu_before_p7: apply ReLU to P6 before the convolution of P7, as in Detectron, PaddleDetection and torchvision, unlike mmdetection's GFL.
    """

    def __init__(self, width: int, channels: int, *, p6_from: Literal["p5", "c5"], relu_before_p7: bool) -> None:
        super().__init__()
        self.p6_from, self.relu_before_p7 = p6_from, relu_before_p7
        self.p6 = nn.Conv2d(width if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to P3..P5."""
        p6 = self.p6(self._padded(x[-1] if self.p6_from == "c5" else results[-1]))
        p7 = self.p7(self._padded(F.relu(p6) if self.relu_before_p7 else p6))
        return [*results, p6, p7], [*names, "p6", "p7"]

    def _padded(self, maps_BCHW: Tensor) -> Tensor:
        """Pad a map of one cell in training by a row and a column of zeros, which changes neither the result nor the gradient.

        On a CPU, torch (oneDNN) returns uninitialized memory in the gradient of a bf16 kernel of stride 2 whose input has one cell: the taps that
        no pixel reaches are not written.
        """
        if self.training and maps_BCHW.shape[-2:] == (1, 1):
            return F.pad(maps_BCHW, (0, 1, 0, 1))
        return maps_BCHW


class LastStage(nn.Module):
    """A body of timm's MobileNetV3 (its modules, under their names) -> two maps of stride 32: of the first block of this stride, and the last.

    Source: torchvision 0.29.1, models/detection/backbone_utils.py, `_mobilenet_extractor`.

    Raises:
        UserError: a body without such stages.
    """

    conv_stem: nn.Module
    bn1: nn.Module
    act1: nn.Module
    blocks: Any

    def __init__(self, body: nn.Module, name: str) -> None:
        super().__init__()
        stages = getattr(body, "blocks", None)
        halving = [
            number
            for number, stage in enumerate(
                stages if isinstance(stages, nn.Sequential) and hasattr(body, "conv_stem") else ()
            )
            if isinstance(stage, nn.Sequential)
            and type(stage[0]) is InvertedResidual
            and stage[0].conv_dw.stride == (2, 2)
        ]
        if not halving or freezing.feature_info(body).reduction()[-1] != freezing.STRIDES[-1]:
            raise UserError(
                f"fpn_maps: last_stage: backbone {name} has no stages of inverted residuals; it is for MobileNetV3"
            )
        for part in ("conv_stem", "bn1", "act1", "blocks"):
            setattr(self, part, getattr(body, part))
        self.feature_info = freezing.feature_info(body)
        self.first = halving[-1]
        self.widths = [int(self.blocks[self.first][0].conv_pwl.out_channels), int(self.feature_info.channels()[-1])]

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Compute the two maps."""
        x = self.act1(self.bn1(self.conv_stem(pixels_BCHW)))
        maps = []
        for number, stage in enumerate(self.blocks):
            for place, block in enumerate(stage):
                x = block(x)
                if (number, place) == (self.first, 0):
                    maps.append(x)
        return [*maps, x]


class TimmPyramid(nn.Module):
    """Images [B, 3, H, W] with sides that are multiples of 32 -> five maps of `channels` channels, P2..P6 with strides
    4, 8, 16, 32, 64, or P3..P7 with the double; over `LastStage` three, of strides 32, 32, 64.

    Args:
        body: a timm `features_only` module.
        name: name of the backbone, for messages.
        channels: width of every output map.
        maps: `last_stage` for the maps of `LastStage`.
        norm: norm after the pyramid's convolutions, which then have no bias; P6 and P7 have none.
        freeze_stages: number of frozen stages: 0 none, 1 the stem, 2 stem and stride 4, ..., 5 all of the body.
        freeze_norm: freeze running statistics, weight and bias of every BatchNorm; LayerNorm and GroupNorm are not affected.
        stride_in_1x1: move the strides of the body's bottlenecks from their 3x3 convolution to the 1x1 before it.
        dcn_strides: strides of the stages whose dense 3x3 convolutions become deformable. Load weights into the body before.
        p3_p7: leave out the finest level, and add two convolved ones on top.
        p6_from, relu_before_p7: see `P6P7`; for P3..P7 only.

    Raises:
        UserError: the body lacks a stride, has nothing to make deformable there, has no bottlenecks to move strides in, or its maps do not have
            the size that their stride promises.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        name: str,
        channels: int = 256,
        maps: Literal["strides", "last_stage"] = "strides",
        norm: Norm = "none",
        freeze_stages: int = 0,
        freeze_norm: bool = False,
        dcn_strides: Collection[int] = (),
        stride_in_1x1: bool = False,
        p3_p7: bool = False,
        p6_from: Literal["p5", "c5"] = "p5",
        relu_before_p7: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= freeze_stages <= 5:
            raise UserError(f"freeze_stages is {freeze_stages}: it has to be 0 (nothing) to 5 (the whole backbone)")
        self.channels = channels
        self.first_level = 1 if p3_p7 else 0
        self.strides = tuple(4 * 2 ** (self.first_level + level) for level in range(5))
        self.level_indices = _level_indices(body, name)
        self.is_nhwc = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC
        widths = [freezing.feature_info(body).channels()[i] for i in self.level_indices]
        map_strides: Sequence[int] = freezing.STRIDES
        if maps == "last_stage":
            body = last_stage = LastStage(body, name)
            widths, map_strides, self.level_indices, self.strides = last_stage.widths, (32, 32), [0, 1], (32, 32, 64)
        self.body = body
        if stride_in_1x1:
            _move_strides(body, name)
        if dcn_strides:
            stages = {1 + freezing.STRIDES.index(stride) for stride in dcn_strides}
            replace_convolutions(body, freezing.stage_of_module(body), stages, name)
        self._probe(widths, map_strides, name)
        extra: ExtraFPNBlock = LastLevelMaxPool()
        if p3_p7:
            extra = P6P7(widths[-1], channels, p6_from=p6_from, relu_before_p7=relu_before_p7)
        self.fpn = FeaturePyramidNetwork(
            widths[self.first_level :],
            channels,
            extra_blocks=extra,
            norm_layer=norm_layer(norm, frozen=freeze_norm),
        )
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                # = Xavier-uniform with the fan-in for both fans, as in the reference
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A plain tuple: the modules are registered under `body`, and must not be a second time.
        self._frozen = tuple(freezing.freeze(body, stages=freeze_stages, norm=freeze_norm))
        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmPyramid":
        """Set the mode of all modules except the frozen ones, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Compute C2..C5 of the body, or the two of its last stage, channels second."""
        maps = self.body(pixels_BCHW)
        maps = [maps[i] for i in self.level_indices]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.is_nhwc else maps

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Compute P2..P6 or P3..P7."""
        named = {str(i): m for i, m in enumerate(self.features(pixels_BCHW)[self.first_level :])}
        return list(self.fpn(named).values())

    @torch.no_grad()
    def feature_scales(self, pixels_BCHW: Tensor) -> list[float]:
        """Measure the root mean square of each of the body's maps that the pyramid uses, finest first.

        Norms that train use the statistics of this batch, as in training; frozen norms use their own. The module is not changed.
        """
        modes = [(module, module.training) for module in self.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.body.buffers()]
        self.eval()  # no drop-path
        for module in self.body.modules():
            if isinstance(module, _BatchNorm) and not any(module is one for one in self._frozen):
                module.train()
        maps = self.features(pixels_BCHW)[self.first_level :]
        scales = [one.float().square().mean().sqrt().item() for one in maps]
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        return scales

    @torch.no_grad()
    def divide_inputs(self, scales: Sequence[float]) -> None:
        """Divide the weights of the convolutions on the body's maps by one number per map: the pyramid then computes what it would from maps
        divided by these numbers.
        """
        for name, scale in self.input_scales(scales).items():
            self.get_parameter(name).div_(scale)

    def input_scales(self, scales: Sequence[float]) -> dict[str, float]:
        """Map the name of each weight on the body's maps to the scale of its map."""
        named = {f"fpn.inner_blocks.{level}.0.weight": scale for level, scale in enumerate(scales)}
        extra = self.fpn.extra_blocks
        if isinstance(extra, P6P7) and extra.p6_from == "c5":
            named["fpn.extra_blocks.p6.weight"] = scales[-1]
        return named

    @torch.no_grad()
    def _probe(self, widths: Sequence[int], strides: Sequence[int], name: str) -> None:
        parameter = next(self.body.parameters())
        was_training = self.body.training
        self.body.eval()
        try:
            maps = self.features(torch.zeros(1, 3, *_PROBE_SIZE, device=parameter.device, dtype=parameter.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"backbone {name} cannot carry a detector, which needs images of any size: {_PROBE_SIZE} fails with '{reason}'"
            ) from error
        finally:
            self.body.train(was_training)
        height, width = _PROBE_SIZE
        for stride, channels, level in zip(strides, widths, maps, strict=True):
            expected = (1, channels, -(-height // stride), -(-width // stride))
            if tuple(level.shape) != expected:
                raise UserError(
                    f"backbone {name} cannot carry a detector: its map of stride {stride} is {tuple(level.shape)} instead of {expected} "
                    f"for an image of {_PROBE_SIZE}"
                )


def _move_strides(body: nn.Module, name: str) -> None:
    blocks = [one for one in body.modules() if type(one) is Bottleneck and one.conv2.stride != (1, 1)]
    if not blocks:
        raise UserError(
            f"stride_in_1x1: backbone {name} has no bottlenecks with a stride; it is for ResNets of 50 layers and more"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def _level_indices(body: nn.Module, name: str) -> list[int]:
    reductions = freezing.feature_info(body).reduction()
    indices = freezing.level_indices(reductions)
    if None in indices:
        has = ", ".join(str(stride) for stride in sorted(set(reductions)))
        raise UserError(
            f"backbone {name} cannot carry a detector: it has maps of stride {has} only and strides 4, 8, 16, 32 are needed; "
            "use a hierarchical one (ResNet-D, MobileNetV3, HGNetV2, ConvNeXt, ...)"
        )
    return [i for i in indices if i is not None]
