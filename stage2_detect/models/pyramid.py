"""A timm backbone under a feature pyramid: images -> P2..P6 of equal width (arXiv 1612.03144).

Levels are found by their stride in timm's `feature_info`, since many architectures list stride 2 first. A probe on
construction checks channels and sizes, so that an unfit backbone is refused before any data is read. The pyramid is
torchvision's, without norm, with nearest-neighbour upsampling; P6 is every second pixel of P5.

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Collection

import torch
from timm.layers import Format
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from shared.errors import UserError
from stage2_detect.models import freezing
from stage2_detect.models.deform import replace_convolutions

_PROBE_SIZE = (64, 96)


class TimmPyramid(nn.Module):
    """Images [B, 3, H, W] with sides that are multiples of 32 -> five maps of `channels` channels with strides 4, 8,
    16, 32, 64.

    Args:
        body: a timm `features_only` module.
        name: of the backbone, for messages.
        channels: width of every output map.
        freeze_stages: 0 nothing, 1 the stem, 2 stem and stride 4, ..., 5 all of the body.
        freeze_norm: holds running statistics, weight and bias of every BatchNorm of the body; nothing to do for
            LayerNorm.
        dcn_strides: stages, by stride, whose dense 3x3 convolutions become deformable ones. Weights have to be in the
            body already.

    Raises:
        UserError: the body lacks a stride, has nothing to make deformable there, or its maps do not have the size that
            their stride promises.
    """

    strides = (*freezing.STRIDES, 2 * freezing.STRIDES[-1])

    def __init__(
        self,
        body: nn.Module,
        *,
        name: str,
        channels: int = 256,
        freeze_stages: int = 0,
        freeze_norm: bool = False,
        dcn_strides: Collection[int] = (),
    ) -> None:
        super().__init__()
        if not 0 <= freeze_stages <= 5:
            raise UserError(f"freeze_stages is {freeze_stages}: it has to be 0 (nothing) to 5 (the whole backbone)")
        self.body = body
        self.channels = channels
        self.level_indices = _level_indices(body, name)
        self.is_nhwc = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC
        if dcn_strides:
            stages = {1 + freezing.STRIDES.index(stride) for stride in dcn_strides}
            replace_convolutions(body, freezing.stage_of_module(body), stages, name)
        widths = freezing.feature_info(body).channels()
        widths = [widths[i] for i in self.level_indices]
        self._probe(widths, name)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(
                    module.weight, a=1
                )  # = Xavier-uniform with the fan-in for both fans, as the reference
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        # A plain tuple: the modules are registered under `body`, and must not be a second time.
        self._still = tuple(freezing.freeze(body, stages=freeze_stages, norm=freeze_norm))
        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmPyramid":
        """Sets the mode of everything but the frozen modules, which stay in eval mode."""
        super().train(mode)
        for module in self._still:
            module.training = False
        return self

    def features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """C2..C5 of the body, channels second."""
        maps = self.body(pixels_BCHW)
        maps = [maps[i] for i in self.level_indices]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.is_nhwc else maps

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """P2..P6."""
        named = {str(i): m for i, m in enumerate(self.features(pixels_BCHW))}
        return list(self.fpn(named).values())

    @torch.no_grad()
    def _probe(self, widths: list[int], name: str) -> None:
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
        for stride, channels, level in zip(freezing.STRIDES, widths, maps, strict=True):
            expected = (1, channels, -(-height // stride), -(-width // stride))
            if tuple(level.shape) != expected:
                raise UserError(
                    f"backbone {name} cannot carry a detector: its map of stride {stride} is {tuple(level.shape)} instead of {expected} "
                    f"for an image of {_PROBE_SIZE}"
                )


def _level_indices(body: nn.Module, name: str) -> list[int]:
    reductions = freezing.feature_info(body).reduction()
    indices = freezing.level_indices(reductions)
    if None in indices:
        has = ", ".join(str(stride) for stride in sorted(set(reductions)))
        raise UserError(
            f"backbone {name} cannot carry a detector: it has maps of stride {has} only and strides 4, 8, 16, 32 are needed; "
            "take a hierarchical one (ResNet-D, MobileNetV3, HGNetV2, ConvNeXt, ...)"
        )
    return [i for i in indices if i is not None]
