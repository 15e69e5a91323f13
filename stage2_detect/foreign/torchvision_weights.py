"""Weights of torchvision's detectors as weights of this project's: names, order of rows, and what differs in the arithmetic.

The state dicts are those of torchvision 0.29.1 and those of its published files, which have older names. What changes beside names:

- the background's row comes first there and last here, and the box deltas and masks of the background are dropped;
- anchors of a cell are ordered ratio, scale there, scale, ratio here;
- the frozen norms of the published ResNets have an epsilon of 0: the weight of each norm absorbs the difference.

Shapes: K classes, L labels of torchvision (background or an unused one first, COCO's ids without a category among them).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256
from ssld.shared.models.downloads import hub_cached
from ssld.stage2_detect.foreign.files import read_foreign
from ssld.stage2_detect.foreign.fitting import (
    RATIOS,
    SCALES,
    ForeignDetector,
    Tensors,
    completed,
    rows_of,
    scales_first,
)
from ssld.stage2_detect.foreign.resnets import arch_of
from ssld.stage2_detect.published import PREFIX, PUBLISHED, Published, published

_OUR_EPS = 1e-5
_CELL = RATIOS * SCALES  # anchors of RetinaNet's
_CLASS_LOGITS = ("head.classification_head.cls_logits.weight", _CELL), ("roi_heads.box_predictor.cls_score.weight", 1)
# Detectors with the same tensors, of other settings, by the one that is assumed.
_SAME_TENSORS = {"fasterrcnn_mobilenet_v3_large_fpn": ("fasterrcnn_mobilenet_v3_large_320_fpn",)}
# Names of older files -> names of torchvision 0.29.1.
_OLDER = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}"),
    (r"(head\.\w+_head\.conv)\.([0246])\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)
# Stage of timm of each block of MobileNetV3-Large, features 1 to 15; convolutions and norms of a block, in order.
_MOBILE_BLOCKS = (0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 5)
_MOBILE_LAYERS = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_MOBILE_FIRST = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
# Layer of torchvision -> module of this project; {} is the group.
_LAYERS = (
    (r"backbone\.body\.(.+)", "pyramid.body.{}"),
    (r"backbone\.fpn\.((?:inner|layer)_blocks\.\d\.[01]|extra_blocks\.p[67])", "pyramid.fpn.{}"),
    (r"rpn\.head\.conv\.0\.0", "rpn.head.conv"),
    (r"rpn\.head\.cls_logits", "rpn.head.objectness"),
    (r"rpn\.head\.bbox_pred", "rpn.head.deltas"),
    (r"roi_heads\.box_head\.(?:fc6|5)", "roi_heads.heads.0.fc1"),
    (r"roi_heads\.box_head\.fc7", "roi_heads.heads.0.fc2"),
    (r"roi_heads\.box_head\.([0-3])\.0", "roi_heads.heads.0.convs.{}"),
    (r"roi_heads\.box_head\.([0-3])\.1", "roi_heads.heads.0.norms.{}"),
    (r"roi_heads\.box_predictor\.cls_score", "roi_heads.heads.0.logits"),
    (r"roi_heads\.box_predictor\.bbox_pred", "roi_heads.heads.0.deltas"),
    (r"roi_heads\.mask_head\.(\d)\.0", "mask_head.convs.{}"),
    (r"roi_heads\.mask_head\.(\d)\.1", "mask_head.norms.{}"),
    (r"roi_heads\.mask_predictor\.conv5_mask", "mask_head.upsample"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", "mask_head.logits"),
    (r"head\.classification_head\.cls_logits", "dense.head.logits"),
    (r"head\.regression_head\.bbox_reg", "dense.head.boxes"),
)


@dataclass(frozen=True)
class Recognized:
    """What a state dict of torchvision is.

    Attributes:
        name: the published detector of this architecture.
        about: its settings.
        labels: L, the number of labels.
        chosen_by: why this one, where several have the same tensors; for the log.
    """

    name: str
    about: Published
    labels: int
    chosen_by: str = ""


def find_weights(reference: str, key: str) -> Path:
    """Return the published file of `coco:NAME` or NAME: from torch hub's cache, else downloaded into it.

    Raises UserError, beginning with `key`, for an unknown name, a download that is not possible, and a file of another sha256.
    """
    about = published(reference, key)
    file = hub_cached(about.url).fetch(f"{key}: {reference}")
    check_sha256(file, about)
    return file


def check_sha256(file: Path, about: Published) -> str:
    """Return the sha256 of a published file. Raises UserError where it is another one."""
    digest = file_sha256(file)
    if not digest.startswith(about.sha256):
        raise UserError(
            f"{file}: its sha256 begins with {digest[:8]} in place of {about.sha256}: it is incomplete or another file; "
            "delete it, and it is downloaded again"
        )
    return digest


def read_weights(file: Path) -> Tensors:
    """Read a state dict of torchvision, under the names of torchvision 0.29.1. Raises UserError like `read_foreign`."""
    return with_current_names(read_foreign(file)[0])


def with_current_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors by the names of torchvision 0.29.1."""
    return {_current(name): tensor for name, tensor in tensors.items()}


def _current(name: str) -> str:
    for pattern, new in _OLDER:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def recognize(tensors: Mapping[str, Tensor], source: object) -> Recognized:
    """Return which of torchvision's detectors these weights belong to; of several with the same tensors the one for larger images, see `choose`.

    Raises UserError for anything else, with the reason.
    """
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in tensors:
        raise UserError(f"{source}: a Keypoint R-CNN; this project has no keypoint heads")
    body = arch_of(tensors, "backbone.body.")
    if any(name.startswith("backbone.body.16.0.") for name in tensors):
        body = "mobilenet_v3_large"
    if body is None:
        first = next(iter(tensors), "no tensors")
        raise UserError(
            f"{source}: no detector of torchvision on a ResNet or MobileNetV3 with FPN (first of {len(tensors)} tensors: {first})"
        )
    second = "backbone.fpn.inner_blocks.0.1.weight" in tensors or "head.classification_head.conv.0.1.weight" in tensors
    labels = _label_count(tensors, source)
    if labels is None:
        first = next(iter(tensors), "no tensors")
        raise UserError(
            f"{source}: not a Faster R-CNN, Mask R-CNN or RetinaNet of torchvision (first of {len(tensors)} tensors: {first})"
        )
    kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in tensors else "fasterrcnn"
    if "head.classification_head.cls_logits.weight" in tensors:
        kind = "retinanet"
    name = f"{kind}_{body}_fpn{'_v2' if second else ''}"
    if name not in PUBLISHED:
        raise UserError(f"{source}: a {name}, which cannot be converted; known: {', '.join(PUBLISHED)}")
    return Recognized(name, PUBLISHED[name], labels)


def _label_count(tensors: Mapping[str, Tensor], source: object) -> int | None:
    """Return L, the number of labels, by the last layer for classes; None where there is no such layer."""
    for name, rows_per_label in _CLASS_LOGITS:
        if name in tensors:
            rows = rows_of(tensors, name, source)
            if rows % rows_per_label:
                raise UserError(
                    f"{source}: {name} has {rows} rows, no multiple of {rows_per_label}; the file is damaged"
                )
            return rows // rows_per_label
    return None


def choose(recognized: Recognized, architecture: str | None, *, file: Path, digest: str) -> Recognized:
    """Return which of the detectors with these tensors a file is of.

    The first of these that tells: `architecture`, the sha256 of a published file, the name of one of the detectors in the file's name, in letters
    of any case and with any signs between them. Else `recognized`.

    Args:
        architecture: name of the detector, with or without `coco:`, given by the user.
        digest: sha256 of `file`, in hexadecimal digits.

    Raises:
        UserError: `architecture` is empty or has other tensors, or the file is the published one of another detector.
    """
    candidates = (recognized.name, *_SAME_TENSORS.get(recognized.name, ()))
    listed = " or ".join(candidates)
    if architecture is not None:
        architecture = architecture.removeprefix(PREFIX)
        if not architecture:
            raise UserError(
                f"architecture: is empty; {file} has the tensors of {listed}: give that name, or leave it out"
            )
    if architecture is not None and architecture not in candidates:
        raise UserError(f"architecture: {architecture}: {file} has the tensors of {listed}")
    known = next((name for name in candidates if digest.startswith(PUBLISHED[name].sha256)), None)
    if architecture and known and architecture != known:
        raise UserError(f"architecture: {architecture}: {file} is torchvision's published file of {known}")
    named = [name for name in candidates if _letters(name) in _letters(file.name)]
    in_name = named[0] if len(named) == 1 else None
    name = architecture or known or in_name or recognized.name
    reason = ""
    if len(candidates) > 1 and not architecture and not known:
        told = "as in the file's name" if in_name else "assumed, since the file's name has both" if named else "assumed"
        reason = f"settings of {name}, {told} (--architecture {listed}: the tensors fit both)"
    return replace(recognized, name=name, about=PUBLISHED[name], chosen_by=reason)


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def torchvision_detector(
    tensors: Mapping[str, Tensor], recognized: Recognized, labels: Sequence[int], *, norm_eps: float, source: object
) -> ForeignDetector:
    """Return the detector that these weights are of; arguments as of `convert`."""
    about = recognized.about
    dropped = [str(label) for label in range(recognized.labels) if label not in labels]
    chosen_by = f"{recognized.chosen_by}; " if recognized.chosen_by else ""
    return ForeignDetector(
        project="torchvision",
        name=recognized.name,
        arch=about.arch,
        model=about.model,
        resize=about.resize,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classes=len(labels),
        tensors=convert(tensors, labels, norm_eps=norm_eps, source=source),
        note=f"{chosen_by}epsilon of the backbone's BatchNorm {norm_eps:g}; rows of {len(dropped)} labels without a class dropped "
        f"({', '.join(dropped)}; the background of a two-stage detector is kept apart)",
    )


def convert(tensors: Mapping[str, Tensor], labels: Sequence[int], *, norm_eps: float, source: object) -> Tensors:
    """Return the weights of this project's detector.

    Args:
        tensors: of `read_weights`.
        labels: torchvision's label of each class, in order.
        norm_eps: epsilon of the backbone's norms in torchvision.

    Raises:
        UserError: a tensor that no part of the detectors has, one of a head's last layer with another number of rows than its labels need, or one
            with values that are not finite.
    """
    count = _label_count(tensors, source)
    tower = 3 if "head.classification_head.conv.0.1.weight" in tensors else 2
    converted: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        module = _module_of(layer, tower)
        if module is None:
            raise UserError(f"{source}: {name} has no place in this project's detectors")
        _check_rows(name, module, tensor, count, source)
        converted[f"{module}.{leaf}"] = _rows(module, tensor, labels)
    for name in [name for name in converted if name.endswith(".running_var")]:
        stem = name.removesuffix("running_var")
        if name.startswith("pyramid.body.") and norm_eps != _OUR_EPS:
            weight, variance = converted.get(f"{stem}weight"), converted[name].double()
            if weight is None or weight.shape != variance.shape:
                continue  # the comparison with the detector names it
            converted[f"{stem}weight"] = (weight * ((variance + _OUR_EPS) / (variance + norm_eps)).sqrt()).float()
    return completed(converted, source)


def _module_of(layer: str, tower: int) -> str | None:
    if match := re.fullmatch(r"head\.(classification|regression)_head\.conv\.(\d)\.([01])", layer):
        branch = {"classification": "class_tower", "regression": "box_tower"}[match[1]]
        return f"dense.head.{branch}.{tower * int(match[2]) + int(match[3])}"
    if match := re.fullmatch(r"backbone\.body\.(\d+)\.(.+)", layer):
        inside = _mobile_module(int(match[1]), match[2])
        return inside and f"pyramid.body.{inside}"
    if match := re.fullmatch(r"rpn\.head\.conv\.([1-9])\.0", layer):
        return f"rpn.head.more_convs.{int(match[1]) - 1}"
    for pattern, template in _LAYERS:
        if match := re.fullmatch(pattern, layer):
            return template.format(next(iter(match.groups()), ""))
    return None


def _mobile_module(number: int, inside: str) -> str | None:
    """Return timm's module of a layer of MobileNetV3-Large, for example `blocks.1.0.conv_pw` for feature 2, `block.0.0`."""
    if number == 0:
        return {"0": "conv_stem", "1": "bn1"}.get(inside)
    if number == len(_MOBILE_BLOCKS) + 1:
        return {"0": f"blocks.{len(set(_MOBILE_BLOCKS))}.0.conv", "1": f"blocks.{len(set(_MOBILE_BLOCKS))}.0.bn1"}.get(
            inside
        )
    if number > len(_MOBILE_BLOCKS):
        return None
    stage = _MOBILE_BLOCKS[number - 1]
    block = f"blocks.{stage}.{number - 1 - _MOBILE_BLOCKS.index(stage)}"
    match = re.fullmatch(r"block\.(\d)\.(0|1|fc1|fc2)", inside)
    if match is None:
        return None
    place, part = int(match[1]), match[2]
    if part.startswith("fc"):
        return f"{block}.se.conv_{'reduce' if part == 'fc1' else 'expand'}"
    if stage == 0:  # without the first convolution
        return f"{block}.{_MOBILE_FIRST[place][int(part)]}" if place < len(_MOBILE_FIRST) else None
    return f"{block}.{_MOBILE_LAYERS[min(place, 2)][int(part)]}"  # squeeze-and-excitation is between the last two


def _check_rows(name: str, module: str, tensor: Tensor, count: int | None, source: object) -> None:
    """Raise UserError where a tensor of a head's last layer has not the rows that `_rows` reorders; `count` is the number of labels."""
    labels = count or 0
    expected = {
        "roi_heads.heads.0.logits": labels,
        "roi_heads.heads.0.deltas": 4 * labels,
        "mask_head.logits": labels,
        "dense.head.logits": _CELL * labels,
        "dense.head.boxes": _CELL * 4,
    }.get(module)
    if expected is None and not module.startswith("rpn.head."):
        return
    rows = rows_of({name: tensor}, name, source)
    if expected is not None and rows != expected:
        why = "" if module == "dense.head.boxes" else f" of {labels} labels"
        raise UserError(f"{source}: {name} has {rows} rows instead of {expected}{why}; the file is damaged")


def _rows(module: str, tensor: Tensor, labels: Sequence[int]) -> Tensor:
    """Reorder the rows of a head's last layer."""
    if module == "roi_heads.heads.0.logits":
        return tensor[[*labels, 0]]
    if module == "roi_heads.heads.0.deltas":
        return tensor.unflatten(0, (-1, 4))[list(labels)].flatten(0, 1)
    if module == "mask_head.logits":
        return tensor[list(labels)]
    if module in ("rpn.head.objectness", "rpn.head.deltas"):
        values = 4 if module.endswith("deltas") else 1
        return (
            scales_first(tensor, len(tensor) // (RATIOS * values)) if len(tensor) % (RATIOS * values) == 0 else tensor
        )
    if module in ("dense.head.logits", "dense.head.boxes"):
        by_scale = scales_first(tensor, SCALES)
        if module.endswith("boxes"):
            return by_scale
        return by_scale.unflatten(0, (SCALES * RATIOS, -1))[:, list(labels)].flatten(0, 1)
    return tensor
