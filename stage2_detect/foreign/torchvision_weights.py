"""Weights of torchvision's detectors as weights of this project's: names, order of rows, and what differs in the arithmetic.

The state dicts are those of torchvision 0.29.1 and those of its published files, which have older names. What changes beside names:

- the background's row comes first there and last here, and the box deltas and masks of the background are dropped;
- RetinaNet's anchors of a cell are ordered ratio, scale there, scale, ratio here;
- the frozen norms of the published ResNets have an epsilon of 0: the weight of each norm absorbs the difference.

Shapes: K classes, L labels of torchvision (background or an unused one first, COCO's ids without a category among them).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256
from ssld.shared.models.downloads import hub_cached
from ssld.shared.models.state_dicts import read_state_dict
from ssld.stage2_detect.published import PUBLISHED, Published, published

Tensors = dict[str, Tensor]
_OUR_EPS = 1e-5
_SCALES, _RATIOS = 3, 3  # of RetinaNet's anchors
_DEPTHS = {
    (2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
# Names of older files -> names of torchvision 0.29.1.
_OLDER = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}"),
    (r"(head\.\w+_head\.conv)\.([0246])\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)
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
    """

    name: str
    about: Published
    labels: int


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
    """Read a state dict of torchvision, under the names of torchvision 0.29.1. Raises UserError like `read_state_dict`."""
    tensors, _ = read_state_dict(file)
    return {_current(name.removeprefix("module.")): tensor for name, tensor in tensors.items()}


def _current(name: str) -> str:
    for pattern, new in _OLDER:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def recognize(tensors: Mapping[str, Tensor], source: object) -> Recognized:
    """Return which of torchvision's detectors these weights belong to. Raises UserError for anything else, with the reason."""
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in tensors:
        raise UserError(f"{source}: a Keypoint R-CNN; this project has no keypoint heads")
    mobile = any(name.startswith("backbone.body.0.0") for name in tensors)
    body = "mobilenet_v3_large" if mobile else _resnet(tensors, source)
    second = "backbone.fpn.inner_blocks.0.1.weight" in tensors or "head.classification_head.conv.0.1.weight" in tensors
    if "head.classification_head.cls_logits.weight" in tensors:
        kind, labels = "retinanet", len(tensors["head.classification_head.cls_logits.weight"]) // (_SCALES * _RATIOS)
    elif "roi_heads.box_predictor.cls_score.weight" in tensors:
        kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in tensors else "fasterrcnn"
        labels = len(tensors["roi_heads.box_predictor.cls_score.weight"])
    else:
        first = next(iter(tensors), "no tensors")
        raise UserError(
            f"{source}: not a Faster R-CNN, Mask R-CNN or RetinaNet of torchvision (first of {len(tensors)} tensors: {first})"
        )
    name = f"{kind}_{body}_fpn{'_v2' if second else ''}"
    if mobile:
        raise UserError(
            f"{source}: a {name}, which cannot be converted: its pyramid begins at stride 32, with a map from the middle of a stage of MobileNetV3, "
            "and its RoIs are pooled from that map alone"
        )
    if name not in PUBLISHED:
        raise UserError(f"{source}: a {name}, which cannot be converted; known: {', '.join(PUBLISHED)}")
    return Recognized(name, PUBLISHED[name], labels)


def _resnet(tensors: Mapping[str, Tensor], source: object) -> str:
    blocks = {match.groups() for name in tensors if (match := re.match(r"backbone\.body\.layer(\d)\.(\d+)\.", name))}
    depths = tuple(sum(stage == str(number) for stage, _ in blocks) for number in (1, 2, 3, 4))
    if not blocks:
        first = next(iter(tensors), "no tensors")
        raise UserError(
            f"{source}: no detector of torchvision on a ResNet or MobileNetV3 with FPN (first of {len(tensors)} tensors: {first})"
        )
    name = _DEPTHS.get(depths, f"resnet of {depths} blocks")
    return "resnet34" if name == "resnet50" and "backbone.body.layer1.0.conv3.weight" not in tensors else name


def convert(tensors: Mapping[str, Tensor], labels: Sequence[int], *, norm_eps: float, source: object) -> Tensors:
    """Return the weights of this project's detector.

    Args:
        tensors: of `read_weights`.
        labels: torchvision's label of each class, in order.
        norm_eps: epsilon of the backbone's norms in torchvision.

    Raises:
        UserError: a tensor that no part of the detectors has, or one with values that are not finite.
    """
    tower = 3 if "head.classification_head.conv.0.1.weight" in tensors else 2
    converted: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        module = _module_of(layer, tower)
        if module is None:
            raise UserError(f"{source}: {name} has no place in this project's detectors")
        value = tensor.float() if tensor.is_floating_point() else tensor
        converted[f"{module}.{leaf}"] = _rows(module, value, labels)
    for name in [name for name in converted if name.endswith(".running_var")]:
        stem = name.removesuffix("running_var")
        converted.setdefault(f"{stem}num_batches_tracked", torch.tensor(0))  # torchvision's frozen norms do not count
        if name.startswith("pyramid.body.") and norm_eps != _OUR_EPS:
            variance = converted[name].double()
            factor = ((variance + _OUR_EPS) / (variance + norm_eps)).sqrt()
            converted[f"{stem}weight"] = (converted[f"{stem}weight"] * factor).float()
    for name, tensor in converted.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite")
    return converted


def _module_of(layer: str, tower: int) -> str | None:
    if match := re.fullmatch(r"head\.(classification|regression)_head\.conv\.(\d)\.([01])", layer):
        branch = {"classification": "class_tower", "regression": "box_tower"}[match[1]]
        return f"dense.head.{branch}.{tower * int(match[2]) + int(match[3])}"
    if match := re.fullmatch(r"rpn\.head\.conv\.([1-9])\.0", layer):
        return f"rpn.head.more_convs.{int(match[1]) - 1}"
    for pattern, template in _LAYERS:
        if match := re.fullmatch(pattern, layer):
            return template.format(next(iter(match.groups()), ""))
    return None


def _rows(module: str, tensor: Tensor, labels: Sequence[int]) -> Tensor:
    """Reorder the rows of a head's last layer."""
    if module == "roi_heads.heads.0.logits":
        return tensor[[*labels, 0]]
    if module == "roi_heads.heads.0.deltas":
        return tensor.unflatten(0, (-1, 4))[list(labels)].flatten(0, 1)
    if module == "mask_head.logits":
        return tensor[list(labels)]
    if module in ("dense.head.logits", "dense.head.boxes"):
        by_anchor = tensor.unflatten(0, (_RATIOS, _SCALES, -1)).transpose(0, 1)
        return (by_anchor[:, :, list(labels)] if module.endswith("logits") else by_anchor).flatten(0, 2).contiguous()
    return tensor
