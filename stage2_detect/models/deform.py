"""Modulated deformable convolution (DCNv2, arXiv 1811.11168) in place of a backbone's dense 3x3 convolutions.

Replaced is the convolution that a residual block calls `conv2`, where it is 3x3 and not grouped. In a bottleneck it is the only 3x3 convolution; in a
basic block it is the second of two. PaddleDetection replaces the same ones (its `branch2b`). Stems, shortcuts and grouped convolutions (ResNeXt,
RegNet) stay as they are.

Shapes: B images, I and O channels in and out, H height, W width, K = 9 positions of the kernel, row by row.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from ssld.shared.errors import UserError


class ModulatedDeformConv2d(nn.Module):
    """A 3x3 convolution that samples each of its 9 positions at a learned offset and weighs it by a learned mask in 0..1.

    The 27 channels of `offset`, a convolution of the same stride, are (dy, dx) of each position in input pixels, then the 9
    logits of the mask. They start at 0: no offset, and every position at half its weight, as in the paper (section 2.1).

    Args:
        replaced: the convolution whose weight, bias, stride, padding and dilation are taken over. Its parameters are used, not copied.
    """

    def __init__(self, replaced: nn.Conv2d) -> None:
        super().__init__()
        assert is_dense_3x3(replaced)
        assert not isinstance(replaced.padding, str)
        self.stride, self.padding = _pair(replaced.stride), _pair(replaced.padding)
        self.dilation = _pair(replaced.dilation)
        self.weight, self.bias = replaced.weight, replaced.bias
        self.offset = nn.Conv2d(
            replaced.in_channels, 27, 3, stride=self.stride, padding=self.padding, dilation=self.dilation
        ).to(replaced.weight)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """Convolve to [B, O, H / stride, W / stride], in the memory format of the input.

        Float32 inside under any autocast: the kernel has no bf16, and offsets of several pixels would be off by
        hundredths. The output has the dtype that an ordinary convolution would have.
        """
        device = x_BIHW.device.type
        out_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BIHW.dtype
        with torch.autocast(device, enabled=False):
            inside = torch.promote_types(x_BIHW.dtype, torch.float32)
            x_BIHW = x_BIHW.to(inside)
            weight_OI33, offset_weight = self.weight.to(inside), self.offset.weight.to(inside)
            bias_O = None if self.bias is None else self.bias.to(inside)
            places = F.conv2d(
                x_BIHW,
                offset_weight,
                self.offset.bias.to(inside),  # type: ignore[union-attr]
                self.stride,
                self.padding,
                self.dilation,
            )
            offset_B18HW, mask_B9HW = places[:, :18], places[:, 18:].sigmoid()
            out_BOHW: Tensor = deform_conv2d(
                x_BIHW,
                offset_B18HW,
                weight_OI33,
                bias_O,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=mask_B9HW,
            )
        # The kernel computes channels first; the next layers expect the memory format of the input.
        if x_BIHW.is_contiguous(memory_format=torch.channels_last) and not x_BIHW.is_contiguous():
            out_BOHW = out_BOHW.contiguous(memory_format=torch.channels_last)
        return out_BOHW.to(out_type)

    def extra_repr(self) -> str:
        out, inside = self.weight.shape[:2]
        return f"{inside}, {out}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


def replace_convolutions(
    body: nn.Module, stage_of_module: Mapping[str, int], stages: Collection[int], name: str
) -> None:
    """Replace the dense 3x3 convolutions of some stages by deformable ones, which keep the weights; load these before.

    Args:
        stage_of_module: `freezing.stage_of_module(body)`.
        stages: 1 (stride 4) .. 4 (stride 32).
        name: name of the backbone, for messages.

    Raises:
        UserError: one of the stages has no such convolution.
    """
    names = [
        module_name
        for module_name, module in body.named_modules()
        if stage_of_module[module_name] in stages and _is_second(module_name) and is_dense_3x3(module)
    ]
    without = sorted(set(stages) - {stage_of_module[module_name] for module_name in names})
    if without:
        strides = ", ".join(str(2 * 2**stage) for stage in without)
        raise UserError(
            f"model.dcn_strides: backbone {name} has no dense 3x3 convolution in the blocks of stride {strides} to make deformable; "
            "ResNets with basic blocks or ungrouped bottlenecks have them (resnet34d, resnet50d, resnet101d, seresnet50, darknet53, ...)"
        )
    for module_name in names:
        convolution = body.get_submodule(module_name)
        assert isinstance(convolution, nn.Conv2d)
        body.set_submodule(module_name, ModulatedDeformConv2d(convolution))


def is_dense_3x3(module: nn.Module) -> bool:
    """Return whether a module is a plain 3x3 convolution without groups; subclasses compute something else (standardized weights, other padding)."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def is_offset(body: nn.Module, parameter_name: str) -> bool:
    """Return whether a parameter of the body belongs to the offsets of a deformable convolution."""
    parent, _, leaf = parameter_name.rpartition(".")[0].rpartition(".")
    return leaf == "offset" and isinstance(body.get_submodule(parent), ModulatedDeformConv2d)


def _is_second(module_name: str) -> bool:
    # `conv2.conv` where timm keeps a convolution and its norm together, as in DarkNet.
    return module_name.endswith((".conv2", ".conv2.conv"))


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]
