"""detectron2's and mmdetection's own models, where the packages are installed: the same detections on the same random weights.

mmcv without its compiled operators (mmcv-lite), and detectron2 without its own, suffice: torchvision's operators take their places.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ssld.stage2_detect.foreign.detectron2_weights import detectron2_detector
from ssld.stage2_detect.foreign.fitting import ForeignDetector
from ssld.stage2_detect.foreign.mmdetection_weights import mmdetection_detector
from ssld.stage2_detect.models.batch import ImageBatch
from tests.stage2_detect.foreign.test_foreign_weights import BLUE_FIRST, STD, built

SIZES = [(64, 96), (60, 70)]
SCORE = 0.01
DETECTRON2 = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade_mask_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
MMDETECTION = {
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
}


class _Compiled(types.ModuleType):
    """Compiled operators: torchvision's for those that are called, an empty module for every other."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _OPERATORS:
            return _OPERATORS[name]
        return type(name, (nn.Module,), {})


class _RoIAlign(nn.Module):
    def __init__(
        self, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = 0, aligned: bool = True
    ) -> None:
        super().__init__()
        self.output_size = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
        self.spatial_scale, self.sampling_ratio, self.aligned = spatial_scale, sampling_ratio, aligned

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        pooled: Tensor = torchvision.ops.roi_align(
            features, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )
        return pooled


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Any, class_agnostic: bool = False) -> Any:
    apart = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None] if len(boxes) else boxes
    keep = torchvision.ops.nms(apart, scores, nms_cfg["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


_OPERATORS = {"RoIAlign": _RoIAlign, "batched_nms": _batched_nms}


class _Operators:
    """Finds the modules of compiled operators that are not there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "detectron2._C" or name == "mmcv.ops" or name.startswith("mmcv.ops."):
            return ModuleSpec(name, self, is_package=name == "mmcv.ops")  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Compiled(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@pytest.fixture
def _operators() -> None:
    if not any(isinstance(finder, _Operators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Operators())


def enliven(model: nn.Module) -> None:
    """Weights and statistics at random, maps of a usual scale, and last layers whose scores pass the threshold."""
    draw = torch.Generator().manual_seed(3)
    scores, deltas = (
        {"cls_score": 0.4, "fc_cls": 0.4, "retina_cls": 0.4, "gfl_cls": 1.0, "rpn_cls": 0.2, "objectness_logits": 0.2},
        {"anchor_deltas", "rpn_reg"},
    )
    deltas |= {"bbox_pred", "fc_reg", "retina_reg"}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            layer = name.rpartition(".")[0].rpartition(".")[2]
            if name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draw))
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
            elif name.endswith(("bn3.weight", "conv3.norm.weight")):
                tensor.fill_(0.3)  # of a residual branch
            elif name.endswith("weight") and tensor.ndim > 1:
                scale = 0.1 if layer in deltas else scores.get(layer, 0.3 if "lateral" in name else 2**0.5)
                scale /= 57 if "stem" in name else 1  # pixels that are divided by nothing
                tensor.copy_(scale / tensor[0].numel() ** 0.5 * torch.randn(tensor.shape, generator=draw))
            elif layer in ("retina_cls", "gfl_cls") or name == "head.cls_score.bias":
                tensor.fill_(-3.0)


def pixels(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], ImageBatch]:
    draw = torch.Generator().manual_seed(5)
    images = [torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8) for size in sizes]
    batch = torch.zeros(2, 3, *SIZES[0], dtype=torch.uint8)
    for place, image in enumerate(images):
        batch[place, :, : image.shape[1], : image.shape[2]] = image
    return images, ImageBatch(batch, torch.tensor(sizes), torch.ones(2))


def compare(detector: ForeignDetector, images: ImageBatch, theirs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Boxes, scores and labels of each image, sorted by class and score."""
    model: Any = built(detector)
    (model.roi_heads if hasattr(model, "roi_heads") else model).score_threshold = SCORE
    with torch.no_grad():
        detections = model(images)
    for one, (boxes, scores, labels) in zip(detections, theirs, strict=True):
        assert len(scores) > 20, "a comparison of nothing"
        mine, other = (one.labels_N - one.scores_N.double()).argsort(), (labels - scores.double()).argsort()
        assert one.labels_N[mine].tolist() == labels[other].tolist()
        torch.testing.assert_close(one.scores_N[mine], scores[other], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.boxes_N4[mine], boxes[other], rtol=1e-4, atol=2e-2)


@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="mmdetection is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("kind", MMDETECTION)
def test_detections_of_mmdetection(kind: str) -> None:
    mmengine = pytest.importorskip("mmengine")
    pytest.importorskip("mmdet.models")
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample

    mmengine.registry.init_default_scope("mmdet")
    config = mmengine.Config.fromfile(f"{mmdet.__path__[0]}/.mim/configs/{MMDETECTION[kind]}").model
    config.backbone.init_cfg = None
    test = config.test_cfg.rcnn if "rcnn" in config.test_cfg else config.test_cfg
    test.score_thr = SCORE
    model = MODELS.build(config).eval()
    enliven(model)
    raw, images = pixels(SIZES)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (BLUE_FIRST[::-1], STD))
    batch = torch.zeros(2, 3, *SIZES[0])
    samples = []
    for place, image in enumerate(raw):
        batch[place, :, : image.shape[1], : image.shape[2]] = (image.float() - mean) / std
        shapes = {
            "img_shape": SIZES[place],
            "ori_shape": SIZES[place],
            "pad_shape": SIZES[0],
            "batch_input_shape": SIZES[0],
        }
        samples.append(DetDataSample(metainfo=shapes | {"scale_factor": (1.0, 1.0)}))
    with torch.no_grad():
        found = [sample.pred_instances for sample in model.predict(batch, samples, rescale=False)]
    detector = mmdetection_detector(model.state_dict(), {}, caffe=None, source="model")
    assert detector.model["kind"] == kind
    compare(detector, images, [(one.bboxes, one.scores, one.labels) for one in found])


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="detectron2 is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("kind", DETECTRON2)
def test_detections_of_detectron2(kind: str) -> None:
    pytest.importorskip("detectron2.modeling")
    import detectron2
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.merge_from_file(f"{detectron2.__path__[0]}/model_zoo/configs/{DETECTRON2[kind]}")
    config.MODEL.DEVICE = "cpu"
    config.MODEL.ROI_HEADS.SCORE_THRESH_TEST = config.MODEL.RETINANET.SCORE_THRESH_TEST = SCORE
    model = build_model(config).eval()
    enliven(model)
    raw, images = pixels(SIZES)
    with torch.no_grad():
        found = [one["instances"] for one in model([{"image": image.flip(0)} for image in raw])]
    detector = detectron2_detector(model.state_dict(), caffe=True, source="model")
    assert detector.model["kind"] == kind
    compare(detector, images, [(one.pred_boxes.tensor, one.scores, one.pred_classes) for one in found])
