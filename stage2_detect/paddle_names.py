"""PaddleDetection's parameter names for R-CNN detectors with a pyramid, and ours.

The names are those of PaddleDetection@666f597f (ppdet/modeling: backbones/resnet.py and name_adapter.py, necks/fpn.py,
proposal_generator/rpn_head.py, heads/{bbox,cascade,mask}_head.py), under which the files of its releases from 2.0 on are published. A detector of
the static-graph releases before has flat names (`res2a_branch2a_weights`) and another arithmetic: boxes are a pixel wider and RoIs pooled by other
samples, so its numbers would mean something else here.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.models.paddle_weights import LEAVES
from ssld.stage2_detect.model_config import DetectorConfig

# Blocks a stage; a deep stem makes it timm's `d`.
_DEPTHS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_BLOCK = re.compile(r"backbone\.res(\d)\.res\d([a-z])(\d*)\.(.+)")
_DEEP_STEM = "backbone.conv1.conv1_1.conv.weight"
# Their layer -> our module; {} takes the group, less the number beside it.
_LAYERS = (
    (r"neck\.fpn_inner_res(\d)_sum(?:_lateral)?", "pyramid.fpn.inner_blocks.{}.0", 2),
    (r"neck\.fpn_res(\d)_sum", "pyramid.fpn.layer_blocks.{}.0", 2),
    (r"rpn_head\.rpn_feat\.rpn_conv", "rpn.head.conv", 0),
    (r"rpn_head\.rpn_rois_score", "rpn.head.objectness", 0),
    (r"rpn_head\.rpn_rois_delta", "rpn.head.deltas", 0),
    (r"bbox_head\.head\.(?:(\d)\.)?fc6", "roi_heads.heads.{}.fc1", 0),
    (r"bbox_head\.head\.(?:(\d)\.)?fc7", "roi_heads.heads.{}.fc2", 0),
    (r"bbox_head\.bbox_score(?:_stage(\d))?", "roi_heads.heads.{}.logits", 0),
    (r"bbox_head\.bbox_delta(?:_stage(\d))?", "roi_heads.heads.{}.deltas", 0),
    (r"mask_head\.head\.upsample\.mask_inter_feat_(\d)", "mask_head.convs.{}", 1),
    (r"mask_head\.head\.upsample\.conv5_mask", "mask_head.upsample", 0),
    (r"mask_head\.mask_fcn_logits", "mask_head.logits", 0),
)


def our_name(name: str, *, deep_stem: bool = True) -> str | None:
    """Our name of one of PaddleDetection's parameters, None for one that we do not know.

    `deep_stem` says whether the backbone is a ResNet-vd, whose shortcuts pool before they convolve.
    """
    layer, _, leaf = name.rpartition(".")
    module = our_module(layer, deep_stem=deep_stem)
    return f"{module}.{LEAVES[leaf]}" if module and leaf in LEAVES else None


def our_module(layer: str, *, deep_stem: bool = True) -> str | None:
    """Our module for one of PaddleDetection's layers, None for one that we do not know."""
    if layer.startswith("backbone."):
        module = _backbone_module(layer, deep_stem)
        return module and f"pyramid.body.{module}"
    for pattern, ours, less in _LAYERS:
        if match := re.fullmatch(pattern, layer):
            number = next(iter(match.groups()), None)
            return ours.format(int(number or 0) - less)
    return None


def _backbone_module(layer: str, deep_stem: bool) -> str | None:
    """`backbone.res3.res3a.branch2b.conv` -> `layer2.0.conv2`, and so on."""
    if match := re.fullmatch(r"backbone\.conv1\.conv1(?:_([123]))?\.(conv|norm)", layer):
        number, part = match.groups()
        if number is None:
            return {"conv": "conv1", "norm": "bn1"}[part]
        if part == "conv":
            return f"conv1.{3 * int(number) - 3}"
        return "bn1" if number == "3" else f"conv1.{3 * int(number) - 2}"
    if not (match := _BLOCK.fullmatch(layer)):
        return None
    stage, letter, number, rest = match.groups()
    # Stages of more than ten blocks count a, b1, b2, ...; the others a, b, c, ...
    block = f"layer{int(stage) - 1}.{number or ord(letter) - ord('a')}"
    if inside := re.fullmatch(r"branch2([abc])\.(conv|norm|conv_offset)", rest):
        place = "abc".index(inside[1]) + 1
        return (
            f"{block}."
            + {"conv": f"conv{place}", "norm": f"bn{place}", "conv_offset": f"conv{place}.offset"}[inside[2]]
        )
    # `short.conv.conv` where pooling comes first, `short.conv` where it does not.
    if inside := re.fullmatch(r"short\.(?:conv\.)?(conv|norm)", rest):
        return f"{block}.downsample.{deep_stem + (inside[1] == 'norm')}"
    return None


def recognise(names: Collection[str], source: str) -> str:
    """timm's name of the ResNet under a detector with parameters of these names.

    Raises UserError for anything but a dygraph detector on a ResNet of 50, 101 or 152 layers, saying what it is instead where that can be told.
    """
    if any(name.startswith("backbone.") for name in names):
        blocks = {match.group(1, 2, 3) for name in names if (match := _BLOCK.match(name))}
        depths = tuple(sum(stage == str(number) for stage, _, _ in blocks) for number in (2, 3, 4, 5))
        bottlenecks = any(".branch2c." in name for name in names)
        if bottlenecks and (arch := _DEPTHS.get(depths)):
            return arch + "d" * (_DEEP_STEM in names)
        why = (
            "timm's ResNets with basic blocks have no convolution on the first shortcut, PaddleDetection's have"
            if blocks and not bottlenecks
            else "detectors on a ResNet50, 101 or 152 (plain or vd) are converted"
        )
        raise UserError(f"{source}: its backbone cannot become one of timm's: {why}")
    if any(name.endswith(("_weights", "_w", "_scale")) for name in names):
        raise UserError(
            f"{source}: is of PaddleDetection's static-graph releases, whose boxes are a pixel wider and whose RoIs are pooled by other samples; "
            "the same weights would give other boxes here. Files of its releases from 2.0 on are converted"
        )
    if any("_velocity" in name or "_moment" in name for name in names):
        raise UserError(
            f"{source}: is the state of an optimizer (.pdopt); the weights are in the .pdparams file beside it"
        )
    first = next(iter(names), "no parameters")
    raise UserError(
        f"{source}: not a detector of PaddleDetection (first of {len(names)} parameters: {first}); "
        "a backbone of PaddleClas is converted by stage1_ssld/convert_paddle.py"
    )


def check_recipe(arrays: Mapping[str, np.ndarray], model: DetectorConfig, source: str) -> None:
    """Raise UserError where a recipe describes another architecture than the parameters have."""
    cascade = any(name.startswith("bbox_head.bbox_score_stage") for name in arrays)
    masks = any(name.startswith("mask_head.") for name in arrays)
    pyramid = arrays.get("neck.fpn_res2_sum.weight")
    hidden = arrays.get(f"bbox_head.head.{'0.' if cascade else ''}fc7.weight")
    if pyramid is None or hidden is None:
        raise UserError(
            f"{source}: has no feature pyramid under two fully connected layers; detectors with FPN are converted"
        )
    deformable = {match[1] for name in arrays if "conv_offset" in name and (match := _BLOCK.match(name))}
    theirs = {
        "kind": ("cascade_" if cascade else "" if masks else "faster_") + ("mask_" if masks else "") + "rcnn",
        "fpn_channels": len(pyramid),
        "dcn_strides": [2 ** int(stage) for stage in sorted(deformable)],
        "roi.hidden": hidden.shape[-1],
    }
    ours = {
        "kind": model.kind,
        "fpn_channels": model.fpn_channels,
        "dcn_strides": sorted(model.dcn_strides),
        "roi.hidden": model.roi.hidden,
    }
    wrong = [f"model.{key} is {ours[key]}, the file has {theirs[key]}" for key in theirs if theirs[key] != ours[key]]
    if wrong:
        raise UserError(
            f"{source}: the recipe is another detector's: {'; '.join(wrong)}; docs/detectors.md lists the recipes"
        )


def class_count(arrays: Mapping[str, np.ndarray], source: str) -> int:
    """Classes without background. Raises UserError where the classifier is missing."""
    for name in ("bbox_head.bbox_score.weight", "bbox_head.bbox_score_stage0.weight"):
        if name in arrays:
            return int(arrays[name].shape[-1]) - 1
    raise UserError(f"{source}: has no classifier (bbox_head.bbox_score); the file is damaged")
