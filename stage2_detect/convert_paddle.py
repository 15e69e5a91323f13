"""Convert an official PaddleDetection file of an R-CNN detector (ResNet-vd with FPN: SSLD, PSS-DET, plain) to a detector file.

    python stage2_detect/convert_paddle.py --weights faster_rcnn_r50_vd_fpn_ssld_1x_coco.pdparams \\
        --config stage2_detect/configs/faster_rcnn_r50vd_ssld_1x.yaml --output runs/faster_official

Writes `detector.safetensors`. The recipe gives what the weights do not contain: anchors, thresholds, sizes; its training settings are ignored.
docs/detectors.md lists the files and their recipes. PaddleDetection's weights are under Apache-2.0.

Parameter names are those of PaddleDetection@666f597f (ppdet/modeling: backbones/resnet.py and name_adapter.py, necks/fpn.py,
proposal_generator/rpn_head.py, heads/{bbox,cascade,mask}_head.py), which its releases from 2.0 on use. Detectors of the static-graph releases before
have flat names (`res2a_branch2a_weights`) and a different arithmetic: boxes are a pixel wider and RoIs are pooled at other points, so the same
weights would give other detections.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import ConvertPaddleConfig
from ssld.stage2_detect.model_config import DetectorConfig

if TYPE_CHECKING:
    import numpy as np

    from ssld.stage2_detect.data.coco import CocoData

# Blocks per stage; with a deep stem it is timm's `d` variant.
_DEPTHS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_BLOCK = re.compile(r"backbone\.res(\d)\.res\d([a-z])(\d*)\.(.+)")
_DEEP_STEM = "backbone.conv1.conv1_1.conv.weight"
# Layer of PaddleDetection -> module of this project; {} is the group less the number beside it.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertPaddleConfig, convert_paddle, argv, program="convert_paddle.py")


def convert_paddle(config: ConvertPaddleConfig) -> None:
    """Write the detector file; every parameter of the PaddleDetection file is used, and every parameter of the detector is set.

    Raises UserError for another kind of file, and for a recipe or classes that do not fit it.
    """
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings
    from ssld.shared.models.paddle_weights import read_paddle_weights, to_torch
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.foreign.fitting import check_fits
    from ssld.stage2_detect.models.build import build_detector

    source = str(config.weights)
    arrays = read_paddle_weights(config.weights)
    arch = recognize(arrays, source)
    check_recipe(arrays, config.model, source)
    data = _classes(config, class_count(arrays, source))
    layers = {name.rpartition(".")[0] for name in arrays}
    modules = {layer: module_of(layer, deep_stem=arch.endswith("d")) for layer in layers}
    tensors = to_torch(arrays, {layer: module for layer, module in modules.items() if module}, source)
    # PaddlePaddle's readers normalize with ImageNet's mean and deviation, as timm does.
    inputs = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    body = timm.create_model(arch, features_only=True, pretrained=False)
    model = build_detector(config.model, classes=len(data.class_names), body=body, arch=arch, inputs=inputs)
    check_fits(tensors, model.state_dict(), source)
    model.load_state_dict(tensors)

    run = RunDir(config, "convert_paddle")
    if run.finished_earlier():
        return
    file = run.path / "detector.safetensors"
    save_detector(
        file,
        model,
        config=config.model,
        resize=config.resize,
        arch=arch,
        inputs=inputs,
        data=data,
        licence="apache-2.0",
        source={"file": config.weights.name, "sha256": file_sha256(config.weights), "project": "PaddleDetection"},
    )
    run.finish({"arrays": len(arrays), "tensors": len(tensors), "classes": len(data.class_names)}, [file])
    run.log(
        f"wrote {file}: {config.model.kind} on {arch}, {len(data.class_names)} classes, {len(arrays)} arrays, all in use"
    )


def _classes(config: ConvertPaddleConfig, count: int) -> "CocoData":
    """Return the names and category ids of the file's classes."""
    from ssld.stage2_detect.foreign.coco_classes import GIVE_ANNOTATIONS, classes_of

    data = classes_of(config.annotations)
    if len(data.class_names) != count:
        hint = "" if config.annotations else GIVE_ANNOTATIONS
        raise UserError(f"{config.weights}: has {count} classes, {data.file} has {len(data.class_names)}{hint}")
    return data


def module_of(layer: str, *, deep_stem: bool = True) -> str | None:
    """Return the module of this project for a layer of PaddleDetection, None for an unknown layer.

    `deep_stem`: the backbone is a ResNet-vd, whose shortcuts pool before they convolve.
    """
    if layer.startswith("backbone."):
        module = _backbone_module(layer, deep_stem)
        return module and f"pyramid.body.{module}"
    for pattern, template, less in _LAYERS:
        if match := re.fullmatch(pattern, layer):
            number = next(iter(match.groups()), None)
            return template.format(int(number or 0) - less)
    return None


def _backbone_module(layer: str, deep_stem: bool) -> str | None:
    """Return timm's module for a layer of the backbone, for example `layer2.0.conv2` for `backbone.res3.res3a.branch2b.conv`."""
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
        index = "abc".index(inside[1]) + 1
        return (
            f"{block}."
            + {"conv": f"conv{index}", "norm": f"bn{index}", "conv_offset": f"conv{index}.offset"}[inside[2]]
        )
    # `short.conv.conv` after pooling, `short.conv` without it.
    if inside := re.fullmatch(r"short\.(?:conv\.)?(conv|norm)", rest):
        return f"{block}.downsample.{deep_stem + (inside[1] == 'norm')}"
    return None


def recognize(names: Collection[str], source: str) -> str:
    """Return timm's name of a detector's ResNet, from the names of its parameters.

    Raises UserError for anything but a dygraph detector on a ResNet of 50, 101 or 152 layers; names the kind of file if it is known.
    """
    if any(name.startswith("backbone.") for name in names):
        blocks = {match.group(1, 2, 3) for name in names if (match := _BLOCK.match(name))}
        depths = tuple(sum(stage == str(number) for stage, _, _ in blocks) for number in (2, 3, 4, 5))
        bottlenecks = any(".branch2c." in name for name in names)
        if bottlenecks and (arch := _DEPTHS.get(depths)):
            return arch + "d" * (_DEEP_STEM in names)
        reason = (
            "timm's ResNets with basic blocks have no convolution on the first shortcut, PaddleDetection's have"
            if blocks and not bottlenecks
            else "detectors on a ResNet50, 101 or 152 (plain or vd) are converted"
        )
        raise UserError(f"{source}: no equivalent timm backbone: {reason}")
    if any(name.endswith(("_weights", "_w", "_scale")) for name in names):
        raise UserError(
            f"{source}: comes from PaddleDetection's static-graph releases, whose boxes are a pixel wider and whose RoIs are pooled at other points; "
            "the same weights would give other boxes in this project. Files of releases from 2.0 on can be converted"
        )
    if any("_velocity" in name or "_moment" in name for name in names):
        raise UserError(
            f"{source}: contains the state of an optimizer (.pdopt); the weights are in the .pdparams file beside it"
        )
    first = next(iter(names), "no parameters")
    raise UserError(
        f"{source}: not a detector of PaddleDetection (first of {len(names)} parameters: {first}); "
        "a backbone of PaddleClas is converted by ssld convert-paddle"
    )


def check_recipe(arrays: Mapping[str, "np.ndarray"], model: DetectorConfig, source: str) -> None:
    """Raise UserError if a recipe describes another architecture than that of the parameters."""
    from ssld.stage2_detect.foreign.fitting import rcnn_kind

    cascade = any(name.startswith("bbox_head.bbox_score_stage") for name in arrays)
    masks = any(name.startswith("mask_head.") for name in arrays)
    pyramid = arrays.get("neck.fpn_res2_sum.weight")
    hidden = arrays.get(f"bbox_head.head.{'0.' if cascade else ''}fc7.weight")
    if pyramid is None or hidden is None:
        raise UserError(
            f"{source}: has no feature pyramid with a head of two fully connected layers; only detectors with FPN can be converted"
        )
    deformable = {match[1] for name in arrays if "conv_offset" in name and (match := _BLOCK.match(name))}
    in_file = {
        "kind": rcnn_kind(cascade=cascade, masks=masks),
        "fpn_channels": len(pyramid),
        "dcn_strides": [2 ** int(stage) for stage in sorted(deformable)],
        "roi.hidden": hidden.shape[-1],
    }
    in_recipe = {
        "kind": model.kind,
        "fpn_channels": model.fpn_channels,
        "dcn_strides": sorted(model.dcn_strides),
        "roi.hidden": model.roi.hidden,
    }
    wrong = [
        f"model.{key} is {in_recipe[key]}, the file has {value}"
        for key, value in in_file.items()
        if value != in_recipe[key]
    ]
    if wrong:
        raise UserError(
            f"{source}: the recipe is for another detector: {'; '.join(wrong)}; docs/detectors.md lists the recipes"
        )


def class_count(arrays: Mapping[str, "np.ndarray"], source: str) -> int:
    """Return the number of classes without background. Raises UserError if the classifier is missing."""
    for name in ("bbox_head.bbox_score.weight", "bbox_head.bbox_score_stage0.weight"):
        if name in arrays:
            return int(arrays[name].shape[-1]) - 1
    raise UserError(f"{source}: has no classifier (bbox_head.bbox_score); the file is damaged")


if __name__ == "__main__":
    sys.exit(main())
