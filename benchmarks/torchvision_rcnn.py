"""One network as our detector and as torchvision's Faster or Mask R-CNN: same weights, anchors, counts and thresholds; only the code differs.

The weights are those of tests/golden/reference_weights.py, under which both find something. torchvision's side keeps its own transform (without the
resize), FrozenBatchNorm2d, RPN, samplers, RoI pooling (two samples per side of a bin, not aligned) and heads; its body is timm's resnet50d, because
those weights are of one, and its anchors are ours, because torchvision rounds its own.
"""

import copy
import functools
import importlib.util
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops.misc import FrozenBatchNorm2d

from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.paddle_weights import to_torch
from ssld.stage2_detect.convert_paddle import module_of
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import anchors
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.rcnn import RCNN

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
ARCH, CLASSES = "resnet50d", 80
_INPUTS = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def our_detector(kind: str, *, torchvisions_pooling: bool) -> RCNN:
    """Our "faster" or "mask" R-CNN under the golden weights, pooling RoIs as torchvision does or as the reference does."""
    pooling = {"sampling_ratio": 2, "aligned": False} if torchvisions_pooling else {}
    settings = {"kind": f"{kind}_rcnn", "freeze_stages": 2, "freeze_norm": True, "roi": pooling}
    config = DetectorConfig.model_validate(settings)
    body = timm.create_model(ARCH, features_only=True, pretrained=False)
    model = build_detector(config, classes=CLASSES, body=body, arch=ARCH, inputs=_INPUTS)
    assert isinstance(model, RCNN)
    model.load_state_dict(_weights(kind))
    return model


def torchvisions_detector(ours: RCNN) -> FasterRCNN:
    """The same network and settings in torchvision's classes; labels are ours + 1, since background comes first."""
    rpn, roi = ours.rpn, ours.roi_heads
    network = MaskRCNN if ours.mask_head else FasterRCNN
    reference = network(
        FrozenBackbone(ours.pyramid),
        num_classes=CLASSES + 1,
        rpn_anchor_generator=_OurAnchors(ours),
        rpn_pre_nms_top_n_train=rpn.pre_nms_top_n_train,
        rpn_post_nms_top_n_train=rpn.post_nms_top_n_train,
        rpn_pre_nms_top_n_test=rpn.pre_nms_top_n_test,
        rpn_post_nms_top_n_test=rpn.post_nms_top_n_test,
    )
    # Images come at their size; it can skip this in training only.
    reference.transform.resize = lambda image, target: (image, target)
    reference.rpn.min_size = rpn.min_size
    head, box = reference.rpn.head, reference.roi_heads
    _copy(ours.rpn.head.conv, head.conv[0][0])
    _copy(ours.rpn.head.objectness, head.cls_logits)
    _copy(ours.rpn.head.deltas, head.bbox_pred)
    our_head: Any = roi.heads[0]
    _copy(our_head.fc1, box.box_head.fc6)
    _copy(our_head.fc2, box.box_head.fc7)
    with torch.no_grad():
        for name in ("weight", "bias"):
            logits, deltas = getattr(our_head.logits, name), getattr(our_head.deltas, name)
            getattr(box.box_predictor.cls_score, name).copy_(torch.cat((logits[-1:], logits[:-1])))
            getattr(box.box_predictor.bbox_pred, name).copy_(torch.cat((torch.zeros_like(deltas[:4]), deltas)))
    if ours.mask_head:
        for number, conv in enumerate(ours.mask_head.convs):
            _copy(conv, box.mask_head[number][0])
        _copy(ours.mask_head.upsample, box.mask_predictor.conv5_mask)
        predictor = box.mask_predictor.mask_fcn_logits
        with torch.no_grad():  # the background's mask comes first, and is never looked at
            for parameter, our_parameter in zip(
                predictor.parameters(), ours.mask_head.logits.parameters(), strict=True
            ):
                parameter.copy_(torch.cat((torch.zeros_like(our_parameter[:1]), our_parameter)))
    return reference.train(ours.training)


class FrozenBackbone(nn.Module):
    """torchvision's BackboneWithFPN around a timm body, with torchvision's frozen norm and the stem and first stage fixed."""

    def __init__(self, ours: TimmPyramid) -> None:
        super().__init__()
        self.body = copy.deepcopy(ours.body)
        self.fpn = copy.deepcopy(ours.fpn)
        self.indices = ours.level_indices[ours.first_level :]
        self.out_channels = ours.channels
        norms = {name: module for name, module in self.body.named_modules() if isinstance(module, nn.BatchNorm2d)}
        for name, norm in norms.items():
            frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            frozen.load_state_dict({key: value for key, value in norm.state_dict().items() if "num_" not in key})
            self.body.set_submodule(name, frozen)

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.body(pixels_BCHW)
        return dict(self.fpn(OrderedDict((str(place), maps[i]) for place, i in enumerate(self.indices))))


class _OurAnchors(AnchorGenerator):
    def __init__(self, ours: RCNN) -> None:
        super().__init__(tuple((int(size),) for size in ours.rpn.anchor_sizes), (ours.rpn.anchor_ratios,) * 5)
        self.ours = (ours.rpn.strides, ours.rpn.anchor_sizes, ours.rpn.anchor_ratios)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        strides, sizes, ratios = self.ours
        grids = [(feature.shape[-2], feature.shape[-1]) for feature in feature_maps]
        device = feature_maps[0].device
        grid = anchors.grid_anchors(grids, device, strides=strides, sizes=sizes, ratios=ratios)
        return [grid] * len(image_list.image_sizes)


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


@functools.cache
def _weights(kind: str) -> dict[str, Tensor]:
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    about = json.loads((GOLDEN / f"{kind}.json").read_text())
    parameters = about["parameters"]
    arrays = {name: rule.reference_weight(name, shape, about["salt"]) for name, shape in parameters.items()}
    modules = {layer: module_of(layer) or layer for layer in (name.rpartition(".")[0] for name in arrays)}
    return to_torch(arrays, modules, kind)
