"""Weights of mmdetection's detectors with a ResNet and FPN as weights of this project's: Faster, Mask and Cascade R-CNN, RetinaNet, GFL.

Names and arithmetic of open-mmlab/mmdetection v3.3.0 (those of 2.x are the same), mmdet/models: backbones/resnet.py, necks/fpn.py,
dense_heads/{rpn,retina,gfl}_head.py, roi_heads/bbox_heads/convfc_bbox_head.py, roi_heads/mask_heads/fcn_mask_head.py; settings of its configs
_base_/models/*_r50_fpn.py and gfl/gfl_r50_fpn_1x_coco.py. Classes come before the background, as here; RetinaNet's anchors of a cell are ordered
ratio, scale there, scale, ratio here. A cascade averages logits over its stages, not probabilities.

Published files hold their configuration as text and the names of their classes. The configuration is compared with the settings that the
conversion assumes. Where it is missing, what the weights do not show (anchors, thresholds, image sizes) is taken from the configurations above.

In evaluation all is equal, but for sides that shrink to less than 1/62 of their anchor, which stop there in mmdetection. Not in training: RPNs
need an IoU of 0.3 for the best anchor of an object, anchors in the padding are left out, and a cascade samples anew for each stage.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.stage2_detect.foreign import resnets
from ssld.stage2_detect.foreign.fitting import (
    RATIOS,
    SCALES,
    SIDE_ABOVE_ZERO,
    ForeignDetector,
    Tensors,
    count_of,
    is_cascade,
    listed,
    nearly_equal,
    norm_behind,
    rcnn_kind,
    refuse,
    rows_of,
    scales_first,
)

_SMOOTH = 1 / 9
_DENSE: dict[str, Any] = {
    "candidates": 1000,
    "candidates_of": "scores",
    "score_threshold": 0.05,
    "relu_before_p7": False,
}
_CASCADE: dict[str, Any] = {
    "delta_weights": [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)],
    "loss_weights": [1.0, 0.5, 0.25],
    "add_gt_each_stage": True,
    "average_of": "logits",
}
_LOGITS = r"roi_head\.bbox_head(?:\.(\d))?\.fc_cls\.weight"
_REFUSED = (
    (
        r"roi_head\.mask_head\.\d\.",
        "it has a mask head for each stage of its cascade, whose masks are averaged; this project has one mask head",
    ),
    (
        r"bbox_head\.fc_cls|bbox_head\.0\.",
        "its names are those of mmdetection 1.x, whose boxes are a pixel wider and whose anchors lie elsewhere",
    ),
    (r"bbox_head\.reg_conf\.", "it is a GFLv2, which this project does not have"),
    (
        r"roi_head\.(?:semantic_head|grid_head|mask_iou_head|point_head|glbctx_head)\.",
        "it has a head that this project does not have",
    ),
    (
        r"roi_head\.bbox_head(?:\.\d)?\.(?:cls_convs|cls_fcs|reg_convs|reg_fcs)\.",
        "its box heads have branches of their own for classes and boxes",
    ),
    (
        r"(?:bbox_head\.(?:transformer|cls_branches)|decoder|query_embedding)",
        "it is a DETR, which this project does not have",
    ),
)
# A layer of mmdetection -> module of this project, given the match.
Place = Callable[["re.Match[str]"], str]
_LAYERS: tuple[tuple[str, Place], ...] = (
    (r"backbone\.(.+)", lambda m: f"{resnets.BODY}{m[1]}"),
    (r"neck\.lateral_convs\.(\d)\.conv", lambda m: f"pyramid.fpn.inner_blocks.{m[1]}.0"),
    (r"neck\.lateral_convs\.(\d)\.(?:bn|gn)", lambda m: f"pyramid.fpn.inner_blocks.{m[1]}.1"),
    (r"neck\.fpn_convs\.(\d)\.conv", lambda m: f"pyramid.fpn.layer_blocks.{m[1]}.0"),
    (r"neck\.fpn_convs\.(\d)\.(?:bn|gn)", lambda m: f"pyramid.fpn.layer_blocks.{m[1]}.1"),
    (r"rpn_head\.rpn_conv(?:\.0\.conv)?", lambda m: "rpn.head.conv"),
    (r"rpn_head\.rpn_conv\.([1-9])\.conv", lambda m: f"rpn.head.more_convs.{int(m[1]) - 1}"),
    (r"rpn_head\.rpn_cls", lambda m: "rpn.head.objectness"),
    (r"rpn_head\.rpn_reg", lambda m: "rpn.head.deltas"),
    (
        r"roi_head\.bbox_head(?:\.(\d))?\.shared_convs\.(\d)\.conv",
        lambda m: f"roi_heads.heads.{m[1] or 0}.convs.{m[2]}",
    ),
    (
        r"roi_head\.bbox_head(?:\.(\d))?\.shared_convs\.(\d)\.(?:bn|gn)",
        lambda m: f"roi_heads.heads.{m[1] or 0}.norms.{m[2]}",
    ),
    (r"roi_head\.bbox_head(?:\.(\d))?\.shared_fcs\.([01])", lambda m: f"roi_heads.heads.{m[1] or 0}.fc{int(m[2]) + 1}"),
    (r"roi_head\.bbox_head(?:\.(\d))?\.fc_cls", lambda m: f"roi_heads.heads.{m[1] or 0}.logits"),
    (r"roi_head\.bbox_head(?:\.(\d))?\.fc_reg", lambda m: f"roi_heads.heads.{m[1] or 0}.deltas"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv", lambda m: f"mask_head.convs.{m[1]}"),
    (r"roi_head\.mask_head\.convs\.(\d)\.(?:bn|gn)", lambda m: f"mask_head.norms.{m[1]}"),
    (r"roi_head\.mask_head\.upsample", lambda m: "mask_head.upsample"),
    (r"roi_head\.mask_head\.conv_logits", lambda m: "mask_head.logits"),
    (r"bbox_head\.(?:retina|gfl)_cls", lambda m: "dense.head.logits"),
    (r"bbox_head\.(?:retina|gfl)_reg", lambda m: "dense.head.boxes"),
)
_EXTRA = re.compile(r"neck\.fpn_convs\.([34])\.conv")
_TOWER = re.compile(r"bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn|bn)")
_SCALE = re.compile(r"bbox_head\.scales\.(\d)\.scale")
_IGNORED = re.compile(r"bbox_head\.integral\.project|steps")
_TOWERS = {"cls": "class_tower", "reg": "box_tower"}


def is_mmdetection(names: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a detector of mmdetection."""
    return any(name.startswith(("neck.", "rpn_head.", "roi_head.", "bbox_head.")) for name in names)


def mmdetection_detector(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, caffe: bool | None, source: object
) -> ForeignDetector:
    """Return the detector that these weights are of.

    Args:
        tensors: by mmdetection's names.
        meta: what the file holds under `meta`, empty where it holds nothing.
        caffe: whether the ResNet is Caffe's (`resnets.py`); None: what the configuration in `meta` says, or the norms of the ResNet show.

    Raises:
        UserError: a detector that this project does not have, or a configuration that differs from the base one, with the reason.
    """
    refuse(tensors, _REFUSED, "mmdetection", source)
    version = str(meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise UserError(
            f"{source}: written by mmdetection {version}, whose boxes are a pixel wider and whose anchors lie elsewhere; "
            "files of 2.x and 3.x are converted"
        )
    if "neck.fpn_convs.0.conv.weight" not in tensors:
        raise UserError(
            f"{source}: a detector of mmdetection without a feature pyramid (C4 or DC5), which cannot be converted"
        )
    ours = _renamed(tensors, source)
    arch = resnets.check_resnet(ours, source)
    if "rpn_head.rpn_cls.weight" in tensors:
        model, classes = _rcnn(tensors, source)
    elif "bbox_head.retina_cls.weight" in tensors or "bbox_head.gfl_cls.weight" in tensors:
        model, classes = _one_stage(tensors, source)
    else:
        found = next((name for name in tensors if not name.startswith(("backbone.", "neck."))), "none")
        raise UserError(
            f"{source}: a detector of mmdetection that this project does not have (tensor {found}); Faster, Mask and Cascade R-CNN, RetinaNet and "
            "GFL are converted"
        )
    text = str(meta.get("cfg") or meta.get("config") or "")
    if caffe is None:
        caffe = bool(re.search(r"style='caffe'|to_rgb=False", text)) or (not text and resnets.has_merged_norms(ours))
    _check_config(text, model["kind"], caffe, source)
    return resnets.detector_on_resnet(
        ours,
        model,
        project="mmdetection",
        arch=arch,
        classes=classes,
        caffe=caffe,
        resize={"interpolation": "bilinear", "train_short_sides": [800]},
        class_names=_class_names(meta),
        source=source,
    )


def _renamed(tensors: Mapping[str, Tensor], source: object) -> Tensors:
    dense = "neck.lateral_convs.3.conv.weight" not in tensors
    tower = 3 if any(match[3] != "conv" for name in tensors if (match := _TOWER.match(name))) else 2
    ours: Tensors = {}
    scales: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if _IGNORED.fullmatch(name):
            continue
        if match := _SCALE.fullmatch(name):
            if tensor.numel() != 1:
                raise UserError(
                    f"{source}: {name} is {tuple(tensor.shape)}, one number is expected; the file is damaged"
                )
            scales[int(match[1])] = tensor.reshape(())
            continue
        if dense and (match := _EXTRA.fullmatch(layer)):
            module: str | None = f"pyramid.fpn.extra_blocks.p{int(match[1]) + 3}"
        elif match := _TOWER.fullmatch(layer):
            module = f"dense.head.{_TOWERS[match[1]]}.{tower * int(match[2]) + (match[3] != 'conv')}"
        else:
            module = next((place(match) for pattern, place in _LAYERS if (match := re.fullmatch(pattern, layer))), None)
        if module is None:
            raise UserError(f"{source}: {name} has no place in this project's detectors")
        ours[f"{module}.{leaf}"] = scales_first(tensor, SCALES) if _by_ratio(name, tensor) else tensor
    if scales:
        ours["dense.head.scales"] = torch.stack([scales[level] for level in sorted(scales)])
    return ours


def _by_ratio(name: str, tensor: Tensor) -> bool:
    """Whether the rows of a tensor are RetinaNet's, of as many anchors as this project has."""
    is_last = re.fullmatch(r"bbox_head\.retina_(?:cls|reg)\.(?:weight|bias)", name)
    return bool(is_last) and tensor.ndim > 0 and len(tensor) % (RATIOS * SCALES) == 0


def _rcnn(tensors: Mapping[str, Tensor], source: object) -> tuple[dict[str, Any], int]:
    cascade = is_cascade(tensors, _LOGITS, "mmdetection", source)
    head = "roi_head.bbox_head.0" if cascade else "roi_head.bbox_head"
    if f"{head}.shared_fcs.0.weight" not in tensors:
        raise UserError(f"{source}: its box head ({head}) has no fully connected layer, which this project's need")
    if rows_of(tensors, "rpn_head.rpn_cls.weight", source) != RATIOS:
        raise UserError(f"{source}: its RPN has other anchors than the three of mmdetection's base configuration")
    classes = rows_of(tensors, f"{head}.fc_cls.weight", source) - 1
    masks = "roi_head.mask_head.conv_logits.weight" in tensors
    roi: dict[str, Any] = {
        "hidden": rows_of(tensors, f"{head}.shared_fcs.0.weight", source),
        "fully_connected": 2 if f"{head}.shared_fcs.1.weight" in tensors else 1,
        "convolutions": count_of(rf"{re.escape(head)}\.shared_convs\.\d\.conv\.weight", tensors),
        "norm": _norm(f"{head}.shared_convs.0", tensors, source),
    }
    rpn: dict[str, Any] = {
        "normalization": "sampled",
        "min_size": SIDE_ABOVE_ZERO,
        "convolutions": 1 + count_of(r"rpn_head\.rpn_conv\.[1-9]\.conv\.weight", tensors),
    }
    model: dict[str, Any] = {
        "kind": rcnn_kind(cascade=cascade, masks=masks),
        "fpn_channels": rows_of(tensors, "neck.fpn_convs.0.conv.weight", source),
        "fpn_norm": _norm("neck.fpn_convs.0", tensors, source),
        "rpn": rpn,
        "roi": roi,
    }
    if cascade:
        rpn |= {"smooth_l1_beta": _SMOOTH, "post_nms_top_n_train": 2000}
        roi |= {"box_loss": {"name": "smooth_l1", "beta": 1.0}}
        model["cascade"] = _CASCADE
    else:
        roi["class_agnostic"] = rows_of(tensors, f"{head}.fc_reg.weight", source) == 4 and classes > 1
    if masks:
        model["mask"] = {
            "hidden": rows_of(tensors, "roi_head.mask_head.convs.0.conv.weight", source),
            "convolutions": count_of(r"roi_head\.mask_head\.convs\.\d\.conv\.weight", tensors),
            "norm": _norm("roi_head.mask_head.convs.0", tensors, source),
        }
    return model, classes


def _one_stage(tensors: Mapping[str, Tensor], source: object) -> tuple[dict[str, Any], int]:
    convolutions = count_of(r"bbox_head\.cls_convs\.\d\.conv\.weight", tensors)
    model: dict[str, Any] = {
        "fpn_channels": rows_of(tensors, "neck.fpn_convs.0.conv.weight", source),
        "fpn_norm": _norm("neck.fpn_convs.0", tensors, source),
    }
    if "bbox_head.gfl_cls.weight" in tensors:
        model |= {
            "kind": "gfl",
            "dense": _DENSE | {"p6_from": "p5", "nms_iou": 0.6, "convolutions": convolutions},
            "gfl": {"reg_max": rows_of(tensors, "bbox_head.gfl_reg.weight", source) // 4 - 1},
        }
        return model, rows_of(tensors, "bbox_head.gfl_cls.weight", source)
    anchors = rows_of(tensors, "bbox_head.retina_reg.weight", source) // 4
    if anchors != RATIOS * SCALES:
        raise UserError(
            f"{source}: a RetinaNet of {anchors} anchors per cell; those of the base configuration, {RATIOS * SCALES}, are converted"
        )
    model |= {
        "kind": "retinanet",
        "dense": _DENSE | {"p6_from": "c5", "nms_iou": 0.5, "convolutions": convolutions},
        "retinanet": {"tower_norm": _norm("bbox_head.cls_convs.0", tensors, source) == "group"},
    }
    return model, rows_of(tensors, "bbox_head.retina_cls.weight", source) // anchors


def _norm(layer: str, tensors: Mapping[str, Tensor], source: object) -> str:
    kinds = [norm_behind(f"{layer}.{name}", tensors, source) for name in ("bn", "gn")]
    return next((kind for kind in kinds if kind != "none"), "none")


def _check_config(text: str, kind: str, caffe: bool, source: object) -> None:
    """Compare the numbers of the configuration in a file with those of the base configurations."""
    pixels = dict(zip(("mean", "std"), resnets.pixel_statistics(caffe=caffe), strict=True))
    anchors: dict[str, tuple[float, ...]] = {"scales": (8.0,), "ratios": (0.5, 1.0, 2.0)}
    if kind == "retinanet":
        anchors = {"octave_base_scale": (4.0,), "ratios": (0.5, 1.0, 2.0)}
    if kind == "gfl":
        anchors = {"octave_base_scale": (8.0,), "ratios": (1.0,)}
    for key, expected in (pixels | anchors).items():
        pattern = rf"\b{key}=(\d+)" if key == "octave_base_scale" else rf"\b{key}=\[([\d.,\s]+)\]"
        for found in re.findall(pattern, text):
            values = tuple(float(number) for number in re.findall(r"\d*\.?\d+", found))
            if not nearly_equal(values, expected):
                raise UserError(
                    f"{source}: its configuration has {key} {listed(values)}, the base configuration {listed(expected)}; "
                    "detectors with the numbers of the base configuration are converted"
                )


def _class_names(meta: Mapping[str, Any]) -> tuple[str, ...]:
    data = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (data.get("classes") or data.get("CLASSES") if isinstance(data, Mapping) else None)
    return tuple(str(name).replace("_", " ") for name in names) if isinstance(names, list | tuple) else ()
