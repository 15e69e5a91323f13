"""Weights of detectron2's detectors with a ResNet and FPN as weights of this project's: Faster, Mask and Cascade R-CNN, RetinaNet.

Names and arithmetic of facebookresearch/detectron2@60d7a1fd, detectron2/modeling: backbone/{resnet,fpn}.py, proposal_generator/rpn.py,
roi_heads/{box_head,fast_rcnn,cascade_rcnn,mask_head}.py, meta_arch/retinanet.py; settings of its configs/Base-RCNN-FPN.yaml, Base-RetinaNet.yaml and
Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml. Rows and anchors have this project's order: classes before the background, scales before ratios. What the
weights do not show (thresholds, image sizes) is taken from these configurations.

In evaluation all is equal. Not in training: RetinaNet's divisor is a moving average there, and a cascade divides the gradient of its RoI features
by the number of stages, not that of its heads.
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
)
from ssld.stage2_detect.models.anchors import grid_anchors

_ANCHOR_SIDES = (32.0, 64.0, 128.0, 256.0, 512.0)
_THIRDS = tuple(2 ** (third / 3) for third in range(SCALES))
_LOGITS = r"roi_heads\.box_predictor(?:\.(\d))?\.cls_score\.weight"
_DENSE: dict[str, Any] = {
    "p6_from": "c5",
    "relu_before_p7": True,
    "candidates": 1000,
    "candidates_of": "scores",
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "clip_after_nms": True,
}
# A tensor's name -> why its detector cannot be converted.
_REFUSED = (
    (r"sem_seg_head\.", "it segments surfaces too (panoptic FPN); this project has no such head"),
    (r"roi_heads\.keypoint_head\.", "it finds keypoints; this project has no such head"),
    (r"roi_heads\.mask_head\.(?:coarse_head|point_head)\.", "its masks are PointRend's; this project has no such head"),
    (r"roi_heads\.res5\.", "it has no feature pyramid (C4); detectors with FPN are converted"),
    (r"backbone\.(?:net\.|bottom_up\.(?:cls_token|patch_embed|stages|stem\.conv\.|s1))", "its backbone is no ResNet"),
    (r"head\.(?:centerness|ctrness)", "it is an FCOS; this project has no such detector"),
)
_IGNORED = re.compile(r"pixel_(?:mean|std)|(?:proposal_generator\.)?anchor_generator\.cell_anchors\.\d")
Place = Callable[["re.Match[str]", int], str]
# Layer of detectron2 -> module of this project, given the match and the first level of the pyramid.
_LAYERS: tuple[tuple[str, Place], ...] = (
    (r"backbone\.bottom_up\.stem\.conv1", lambda m, _: f"{resnets.BODY}conv1"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm", lambda m, _: f"{resnets.BODY}bn1"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])", lambda m, _: f"{_block(m)}.conv{m[3]}"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])\.norm", lambda m, _: f"{_block(m)}.bn{m[3]}"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv2_offset", lambda m, _: f"{_block(m)}.conv2.offset"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut", lambda m, _: f"{_block(m)}.downsample.0"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm", lambda m, _: f"{_block(m)}.downsample.1"),
    (r"backbone\.fpn_lateral([2-5])", lambda m, first: f"pyramid.fpn.inner_blocks.{int(m[1]) - first}.0"),
    (r"backbone\.fpn_lateral([2-5])\.norm", lambda m, first: f"pyramid.fpn.inner_blocks.{int(m[1]) - first}.1"),
    (r"backbone\.fpn_output([2-5])", lambda m, first: f"pyramid.fpn.layer_blocks.{int(m[1]) - first}.0"),
    (r"backbone\.fpn_output([2-5])\.norm", lambda m, first: f"pyramid.fpn.layer_blocks.{int(m[1]) - first}.1"),
    (r"backbone\.top_block\.(p[67])", lambda m, _: f"pyramid.fpn.extra_blocks.{m[1]}"),
    (r"proposal_generator\.rpn_head\.conv(?:\.conv0)?", lambda m, _: "rpn.head.conv"),
    (r"proposal_generator\.rpn_head\.conv\.conv([1-9])", lambda m, _: f"rpn.head.more_convs.{int(m[1]) - 1}"),
    (r"proposal_generator\.rpn_head\.objectness_logits", lambda m, _: "rpn.head.objectness"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", lambda m, _: "rpn.head.deltas"),
    (r"roi_heads\.box_head(?:\.(\d))?\.fc([12])", lambda m, _: f"roi_heads.heads.{m[1] or 0}.fc{m[2]}"),
    (r"roi_heads\.box_head(?:\.(\d))?\.conv(\d)", lambda m, _: f"roi_heads.heads.{m[1] or 0}.convs.{int(m[2]) - 1}"),
    (
        r"roi_heads\.box_head(?:\.(\d))?\.conv(\d)\.norm",
        lambda m, _: f"roi_heads.heads.{m[1] or 0}.norms.{int(m[2]) - 1}",
    ),
    (r"roi_heads\.box_predictor(?:\.(\d))?\.cls_score", lambda m, _: f"roi_heads.heads.{m[1] or 0}.logits"),
    (r"roi_heads\.box_predictor(?:\.(\d))?\.bbox_pred", lambda m, _: f"roi_heads.heads.{m[1] or 0}.deltas"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", lambda m, _: f"mask_head.convs.{int(m[1]) - 1}"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.norm", lambda m, _: f"mask_head.norms.{int(m[1]) - 1}"),
    (r"roi_heads\.mask_head\.deconv", lambda m, _: "mask_head.upsample"),
    (r"roi_heads\.mask_head\.predictor", lambda m, _: "mask_head.logits"),
    (r"head\.cls_subnet\.(\d+)", lambda m, _: f"dense.head.class_tower.{m[1]}"),
    (r"head\.bbox_subnet\.(\d+)", lambda m, _: f"dense.head.box_tower.{m[1]}"),
    (r"head\.cls_score", lambda m, _: "dense.head.logits"),
    (r"head\.bbox_pred", lambda m, _: "dense.head.boxes"),
)


def _block(match: "re.Match[str]") -> str:
    return f"{resnets.BODY}layer{int(match[1]) - 1}.{match[2]}"


def is_detectron2(names: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a detector of detectron2."""
    return any(
        name.startswith(("backbone.bottom_up.", "backbone.res", "backbone.net.", "proposal_generator."))
        for name in names
    )


def detectron2_detector(tensors: Mapping[str, Tensor], *, caffe: bool | None, source: object) -> ForeignDetector:
    """Return the detector that these weights are of.

    Args:
        tensors: by detectron2's names.
        caffe: whether the ResNet is Caffe's (`resnets.py`); None: if the file shows it.

    Raises:
        UserError: a detector that this project does not have, with the reason.
    """
    refuse(tensors, _REFUSED, "detectron2", source)
    if "backbone.fpn_output5.weight" not in tensors:
        raise UserError(
            f"{source}: a detector of detectron2 without a feature pyramid (C4 or DC5), which cannot be converted"
        )
    ours = _renamed(tensors, source)
    arch = resnets.check_resnet(ours, source)
    caffe = _is_caffe(tensors, ours, caffe, source)
    if "head.cls_score.weight" in tensors:
        model, classes = _retinanet(tensors, source)
    else:
        model, classes = _rcnn(tensors, source)
    _check_anchors(tensors, model["kind"], source)
    return resnets.detector_on_resnet(
        ours,
        model,
        project="detectron2",
        arch=arch,
        classes=classes,
        caffe=caffe,
        resize={"interpolation": "bilinear"},
        source=source,
    )


def _renamed(tensors: Mapping[str, Tensor], source: object) -> Tensors:
    first = 2 if "backbone.fpn_output2.weight" in tensors else 3
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if _IGNORED.fullmatch(name):
            continue
        layer, _, leaf = name.rpartition(".")
        module = next(
            (place(match, first) for pattern, place in _LAYERS if (match := re.fullmatch(pattern, layer))), None
        )
        if module is None:
            raise UserError(f"{source}: {name} has no place in this project's detectors")
        ours[f"{module}.{leaf}"] = tensor
    return ours


def _is_caffe(tensors: Mapping[str, Tensor], ours: Tensors, given: bool | None, source: object) -> bool:
    if given is None and not resnets.has_merged_norms(ours):
        raise UserError(
            f"{source}: does not show how its ResNet reads images; give --caffe true for detectron2's default (RESNETS.STRIDE_IN_1X1, blue first, "
            "PIXEL_STD 1), or --caffe false for torchvision's ResNet (STRIDE_IN_1X1 false, red first, PIXEL_STD 58.395 57.12 57.375)"
        )
    caffe = True if given is None else given
    mean, std = resnets.pixel_statistics(caffe=caffe)
    for name, expected in (("pixel_mean", mean), ("pixel_std", std)):
        found = tuple(tensors[name].flatten().tolist()) if name in tensors else expected
        if not nearly_equal(found, expected):
            kind = "Caffe's ResNet" if caffe else "torchvision's ResNet"
            raise UserError(f"{source}: {name} is {listed(found)}, that of {kind} is {listed(expected)}; check --caffe")
    return caffe


def _rcnn(tensors: Mapping[str, Tensor], source: object) -> tuple[dict[str, Any], int]:
    cascade = is_cascade(tensors, _LOGITS, "detectron2", source)
    head, predictor = (
        f"roi_heads.{name}.0" if cascade else f"roi_heads.{name}" for name in ("box_head", "box_predictor")
    )
    if f"{head}.fc1.weight" not in tensors:
        raise UserError(f"{source}: its box head ({head}) has no fully connected layer, which this project's need")
    if rows_of(tensors, "proposal_generator.rpn_head.objectness_logits.weight", source) != RATIOS:
        raise UserError(f"{source}: its RPN has other anchors than the three of Base-RCNN-FPN.yaml")
    classes = rows_of(tensors, f"{predictor}.cls_score.weight", source) - 1
    masks = "roi_heads.mask_head.predictor.weight" in tensors
    roi: dict[str, Any] = {
        "hidden": rows_of(tensors, f"{head}.fc1.weight", source),
        "fully_connected": 2 if f"{head}.fc2.weight" in tensors else 1,
        "convolutions": count_of(rf"{re.escape(head)}\.conv\d\.weight", tensors),
        "norm": norm_behind(f"{head}.conv1.norm", tensors, source),
    }
    if not cascade:
        roi["class_agnostic"] = rows_of(tensors, f"{predictor}.bbox_pred.weight", source) == 4 and classes > 1
    rpn = {
        "min_size": SIDE_ABOVE_ZERO,
        "convolutions": 1 + count_of(r"proposal_generator\.rpn_head\.conv\.conv[1-9]\.weight", tensors),
    }
    model: dict[str, Any] = {
        "kind": rcnn_kind(cascade=cascade, masks=masks),
        "fpn_norm": norm_behind("backbone.fpn_output5.norm", tensors, source),
        "fpn_channels": rows_of(tensors, "backbone.fpn_output5.weight", source),
        "rpn": rpn | ({"post_nms_top_n_train": 2000} if cascade else {}),
        "roi": roi,
    }
    if masks:
        model["mask"] = {
            "hidden": rows_of(tensors, "roi_heads.mask_head.mask_fcn1.weight", source),
            "convolutions": count_of(r"roi_heads\.mask_head\.mask_fcn\d\.weight", tensors),
            "norm": norm_behind("roi_heads.mask_head.mask_fcn1.norm", tensors, source),
        }
    return model, classes


def _retinanet(tensors: Mapping[str, Tensor], source: object) -> tuple[dict[str, Any], int]:
    anchors = rows_of(tensors, "head.bbox_pred.weight", source) // 4
    if anchors != RATIOS * SCALES:
        raise UserError(
            f"{source}: a RetinaNet of {anchors} anchors per cell; those of Base-RetinaNet.yaml, {RATIOS * SCALES}, are converted"
        )
    if "head.cls_subnet.1.weight" in tensors:
        raise UserError(
            f"{source}: a RetinaNet with norms behind convolutions with a bias (MODEL.RETINANET.NORM), which this project does not have"
        )
    model = {
        "kind": "retinanet",
        "fpn_channels": rows_of(tensors, "backbone.fpn_output5.weight", source),
        "fpn_norm": norm_behind("backbone.fpn_output5.norm", tensors, source),
        "dense": _DENSE | {"convolutions": count_of(r"head\.cls_subnet\.\d+\.weight", tensors)},
    }
    return model, rows_of(tensors, "head.cls_score.weight", source) // anchors


def _check_anchors(tensors: Mapping[str, Tensor], kind: str, source: object) -> None:
    """Compare the anchors that older files hold with those of the base configurations."""
    scales = _THIRDS if kind == "retinanet" else (1.0,)
    for level, side in enumerate(_ANCHOR_SIDES):
        expected_A4 = grid_anchors(
            [(1, 1)], torch.device("cpu"), strides=[1], sizes=[side], ratios=(0.5, 1.0, 2.0), scales=scales
        )
        for owner in ("", "proposal_generator."):
            found = tensors.get(f"{owner}anchor_generator.cell_anchors.{level}", expected_A4)
            if found.shape != expected_A4.shape or not torch.allclose(found.float(), expected_A4, atol=0.01):
                raise UserError(
                    f"{source}: has other anchors than detectron2's base configuration ({owner}anchor_generator.cell_anchors.{level}); "
                    "detectors with those of the base configuration are converted"
                )
