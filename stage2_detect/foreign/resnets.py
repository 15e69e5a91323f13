"""ResNets of other projects, under timm's names: which of timm's they are, and Caffe's.

Caffe's ResNets (Detectron, detectron2's MSRA files, mmdetection's `caffe` style) have the strides of a stage in the first 1x1 convolution of its
first block, take blue, green, red, and divide by no standard deviation. Their norms were merged: a mean of 0 and a variance of 1.
Sources: facebookresearch/detectron2@8d2f3eb3 detectron2/modeling/backbone/resnet.py, `stride_in_1x1`; open-mmlab/mmdetection v3.3.0
mmdet/models/backbones/resnet.py, `style`.
"""

import re
from collections.abc import Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.stage2_detect.foreign.fitting import ForeignDetector, Tensors, completed, norm_behind

BODY = "pyramid.body."
_DEPTHS = {
    (2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
_NO_DEVIATION = (1 / 255,) * 3  # of an input in units of 0..1 that is divided by nothing in units of 0..255


def arch_of(tensors: Mapping[str, Tensor], prefix: str = BODY) -> str | None:
    """Return timm's name of the ResNet whose names begin with `prefix`, "resnet of BLOCKS blocks" for another depth; None for no ResNet."""
    blocks = {
        match.groups() for name in tensors if (match := re.match(rf"{re.escape(prefix)}layer(\d)\.(\d+)\.", name))
    }
    if not blocks:
        return None
    depths = tuple(sum(stage == str(number) for stage, _ in blocks) for number in (1, 2, 3, 4))
    name = _DEPTHS.get(depths, f"resnet of {depths} blocks")
    return "resnet34" if name == "resnet50" and f"{prefix}layer1.0.conv3.weight" not in tensors else name


def check_resnet(tensors: Mapping[str, Tensor], source: object) -> str:
    """Return timm's name of a plain ResNet. Raises UserError for any other backbone, with the reason."""
    arch = arch_of(tensors)
    if arch is None:
        other = next((name for name in tensors if name.startswith((BODY, "backbone."))), "none")
        raise UserError(f"{source}: its backbone is no ResNet (tensor {other}); detectors on ResNets are converted")
    if " " in arch:
        raise UserError(f"{source}: its backbone is a {arch}, which timm does not have")
    if any("offset" in name for name in tensors if name.startswith(BODY)):
        raise UserError(f"{source}: its backbone has deformable convolutions, which are not converted")
    stem = tensors.get(f"{BODY}conv1.weight")
    if stem is None or tuple(stem.shape) != (64, 3, 7, 7):
        raise UserError(
            f"{source}: its ResNet's stem is not one convolution of 7 x 7 (as in ResNet-C, -D, -S), which is not converted"
        )
    middle = tensors.get(f"{BODY}layer1.0.conv2.weight")
    if middle is not None and tuple(middle.shape[:2]) != (64, 64):
        raise UserError(
            f"{source}: its backbone is a ResNeXt or a wide ResNet ({BODY}layer1.0.conv2.weight is {tuple(middle.shape)}), which is not converted"
        )
    if not {f"{BODY}bn1.running_mean", f"{BODY}bn1.running_var"} <= tensors.keys():
        raise UserError(f"{source}: the norms of its backbone are not BatchNorm; timm has no such ResNet")
    return arch


def pixel_statistics(*, caffe: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the input in units of 0..255, as configurations state them: Caffe's for blue, green, red, else for red, green, blue."""
    if caffe:
        return (103.53, 116.28, 123.675), (1.0,) * 3
    return (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def has_merged_norms(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the statistics of the stem's norm are 0 and 1, which those of trained weights are only if they were merged."""
    mean, variance = (tensors[f"{BODY}bn1.{name}"].float() for name in ("running_mean", "running_var"))
    return not bool(mean.any()) and bool(((variance - 1).abs() < 1e-3).all())


def detector_on_resnet(
    ours: Tensors,
    model: dict[str, Any],
    *,
    project: str,
    arch: str,
    classes: int,
    caffe: bool,
    resize: dict[str, Any],
    class_names: tuple[str, ...] = (),
    source: object,
) -> ForeignDetector:
    """Return a detector on a ResNet with FPN.

    Args:
        ours: its weights under the names of this project; the first convolution of a Caffe ResNet is turned, in place.
        model: settings of its pyramid and heads; those of the backbone are added.

    Other arguments as of `ForeignDetector`. Raises UserError like `completed` and `norm_behind`.
    """
    mean, std = input_of(ours, caffe=caffe)
    batch_norm = norm_behind("pyramid.fpn.layer_blocks.0.1", ours, source) == "batch"
    return ForeignDetector(
        project=project,
        name=f"{model['kind']} on {arch} with FPN",
        arch=arch,
        model=model | {"freeze_stages": 2, "freeze_norm": not batch_norm, "stride_in_1x1": caffe},
        resize=resize,
        mean=mean,
        std=std,
        classes=classes,
        class_names=class_names,
        tensors=completed(ours, source),
        note="a Caffe ResNet, strides in the 1x1 convolutions and blue, green, red" if caffe else "",
    )


def input_of(tensors: Tensors, *, caffe: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the input; turn the first convolution of a Caffe ResNet, in place, from blue, green, red to red, green, blue."""
    if not caffe:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    tensors[f"{BODY}conv1.weight"] = tensors[f"{BODY}conv1.weight"].flip(1)
    return IMAGENET_DEFAULT_MEAN, _NO_DEVIATION  # the mean is ImageNet's: 103.53, 116.28, 123.675 for blue, green, red
