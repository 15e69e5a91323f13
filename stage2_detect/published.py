"""Detectors that torchvision publishes with weights trained on COCO: their files, and the settings that make this project's detector equal to them.

Does not import torch, so that settings of a training can follow those of its initial weights.

Source: torchvision 0.29.1, models/detection (BSD-3-Clause): faster_rcnn.py, mask_rcnn.py, retinanet.py. A file's name ends with the first eight
hexadecimal digits of its sha256.
"""

from dataclasses import dataclass, field
from typing import Any

from ssld.shared.errors import UserError

PREFIX = "coco:"
"""beginning of a reference to published weights, before the name"""
_URL = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Published:
    """Weights of torchvision.

    Attributes:
        file: name of the file, below https://download.pytorch.org/models/ and in torch hub's cache.
        arch, model_args: timm's name of the backbone, and arguments to build it.
        model, resize: settings of the groups `model` and `resize`.
        norm_eps: epsilon of the backbone's BatchNorm.
        box_ap: published AP of boxes on val2017, in percent.
    """

    file: str
    model: dict[str, Any]
    box_ap: float
    arch: str = "resnet50"
    model_args: dict[str, Any] = field(default_factory=dict)
    resize: dict[str, Any] = field(default_factory=lambda: dict(_RESIZE))
    norm_eps: float = 1e-5

    @property
    def url(self) -> str:
        """Address of the file."""
        return _URL + self.file

    @property
    def sha256(self) -> str:
        """First eight hexadecimal digits of the file's sha256."""
        return self.file.removesuffix(".pth").rpartition("-")[2]


_RESIZE: dict[str, Any] = {"interpolation": "bilinear"}
_SMOOTH = 1 / 9  # beta of smooth L1
_RPN: dict[str, Any] = {
    "anchor_grid": "torchvision",
    "smooth_l1_beta": _SMOOTH,
    "normalization": "sampled",
    "min_size": 1e-3,
    "post_nms_top_n_train": 2000,
}
_ROI: dict[str, Any] = {
    "sampling_ratio": 2,
    "aligned": False,
    "box_loss": {"name": "smooth_l1", "beta": _SMOOTH},
}
_RCNN: dict[str, Any] = {"kind": "faster_rcnn", "freeze_stages": 2, "rpn": _RPN, "roi": _ROI}
_RCNN_V2: dict[str, Any] = _RCNN | {
    "freeze_norm": False,
    "fpn_norm": "batch",
    "rpn": _RPN | {"convolutions": 2},
    "roi": _ROI | {"convolutions": 4, "fully_connected": 1, "norm": "batch"},
}
_MOBILE_RPN: dict[str, Any] = _RPN | {
    "anchor_sizes": [32, 32, 32],
    "anchor_scales": [1, 2, 4, 8, 16],
    "score_threshold": 0.05,
}
_MOBILE: dict[str, Any] = _RCNN | {"fpn_maps": "last_stage", "freeze_stages": 3, "rpn": _MOBILE_RPN}
_DENSE: dict[str, Any] = {
    "relu_before_p7": True,
    "candidates": 1000,
    "candidates_of": "scores",
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "detections_per_image": 300,
}
_RETINANET: dict[str, Any] = {
    "kind": "retinanet",
    "freeze_stages": 2,
    "dense": _DENSE,
    "retinanet": {"anchor_grid": "torchvision", "normalization": "image"},
}

PUBLISHED: dict[str, Published] = {
    "fasterrcnn_resnet50_fpn": Published("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", _RCNN, 37.0, norm_eps=0.0),
    "fasterrcnn_resnet50_fpn_v2": Published("fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", _RCNN_V2, 46.7),
    "maskrcnn_resnet50_fpn": Published(
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", _RCNN | {"kind": "mask_rcnn"}, 37.9, norm_eps=0.0
    ),
    "maskrcnn_resnet50_fpn_v2": Published(
        "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
        _RCNN_V2 | {"kind": "mask_rcnn", "mask": {"norm": "batch"}},
        47.4,
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": Published(
        "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", _MOBILE, 32.8, arch="mobilenetv3_large_100"
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Published(
        "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
        _MOBILE | {"rpn": _MOBILE_RPN | {"pre_nms_top_n_test": 150, "post_nms_top_n_test": 150}},
        22.8,
        arch="mobilenetv3_large_100",
        resize=_RESIZE | {"train_short_sides": [320], "train_long_side": 640, "short_side": 320, "long_side": 640},
    ),
    "retinanet_resnet50_fpn": Published("retinanet_resnet50_fpn_coco-eeacb38b.pth", _RETINANET, 36.4, norm_eps=0.0),
    "retinanet_resnet50_fpn_v2": Published(
        "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
        _RETINANET
        | {
            "freeze_norm": False,
            "dense": _DENSE | {"p6_from": "c5"},
            "retinanet": _RETINANET["retinanet"] | {"tower_norm": True, "box_loss": "giou"},
        },
        41.5,
    ),
}


def published(name: str, key: str) -> Published:
    """Return the published detector `name`, with or without `coco:`. Raises UserError, which begins with `key`, for an unknown one."""
    short = name.removeprefix(PREFIX)
    if short not in PUBLISHED:
        raise UserError(f"{key}: {name}: no published detector of torchvision; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[short]
