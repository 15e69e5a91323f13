"""From settings to detectors: every setting arrives, and every kind trains and detects."""

import inspect
from typing import Any, get_args

import pytest
import timm
import torch

from ssld.shared.config.settings import Config
from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect import model_config
from ssld.stage2_detect.model_config import DetectorConfig, OneStageKind
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.box_losses import BoxLoss
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.mask_head import MaskHead
from ssld.stage2_detect.models.mask_targets import ImageMasks
from ssld.stage2_detect.models.postprocess import NMS
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.retinanet import RetinaNet
from ssld.stage2_detect.models.roi_heads import BoxStage, RoIHeads
from ssld.stage2_detect.models.rpn import RPN

INPUTS = InputSettings.of_detector((0.5,) * 3, (0.25,) * 3)
RANKS = Ranks(world_size=3)
SMALL: dict[str, Any] = {
    "fpn_channels": 16,
    "rpn": {"post_nms_top_n_train": 60, "post_nms_top_n_test": 40, "anchor_sizes": [8, 16, 32, 64, 128]},
}


def build(**settings: Any) -> RCNN:
    torch.manual_seed(0)
    body = timm.create_model("test_resnet", features_only=True, pretrained=False)
    config = DetectorConfig.model_validate(SMALL | settings)
    model = build_detector(config, classes=4, body=body, arch="test_resnet", inputs=INPUTS, ranks=RANKS)
    assert isinstance(model, RCNN)
    return model


@pytest.mark.parametrize(
    ("group", "takers"),
    [
        (model_config.RPNConfig, [RPN]),
        (model_config.RoIConfig, [RoIHeads, BoxStage]),
        (model_config.BoxLossConfig, [BoxLoss]),
        (model_config.NMSConfig, [NMS]),
        (model_config.MaskConfig, [MaskHead]),
        (model_config.DenseConfig, [DenseDetector, TimmPyramid, GFL]),
        (model_config.GFLConfig, [GFL]),
        (model_config.RetinaNetConfig, [RetinaNet]),
    ],
)
def test_a_setting_has_the_name_and_the_default_of_the_keyword_that_it_becomes(
    group: type[Config], takers: list[type]
) -> None:
    keywords = [one for taker in takers for one in inspect.signature(taker).parameters.values()]
    assert set(group.model_fields) <= {one.name for one in keywords}
    for name, default in dict(group()).items():
        for keyword in keywords:
            if keyword.name == name and keyword.default is not inspect.Parameter.empty:
                plain = dict(default) if isinstance(default, Config) else default
                other = vars(keyword.default) if isinstance(default, Config) else keyword.default
                assert plain == (list(other) if isinstance(plain, list) else other), name


def test_settings_of_the_rpn_arrive() -> None:
    rpn = {
        "anchor_sizes": [9, 17, 33, 65, 129],
        "anchor_ratios": [0.4, 1.0],
        "positive_iou": 0.65,
        "negative_iou": 0.25,
        "samples_per_image": 77,
        "positive_fraction": 0.4,
        "sampling": "first",
        "nms_iou": 0.66,
        "pre_nms_top_n_train": 101,
        "post_nms_top_n_train": 102,
        "pre_nms_top_n_test": 103,
        "post_nms_top_n_test": 104,
    }
    model = build(rpn=rpn)
    actual = model.rpn
    assert (actual.anchor_sizes, actual.anchor_ratios) == ((9, 17, 33, 65, 129), (0.4, 1.0))
    assert (actual.positive_iou, actual.negative_iou, actual.nms_iou) == (0.65, 0.25, 0.66)
    assert (actual.samples_per_image, actual.positive_fraction, actual.sampling) == (77, 0.4, "first")
    assert (actual.pre_nms_top_n_train, actual.post_nms_top_n_train) == (101, 102)
    assert (actual.pre_nms_top_n_test, actual.post_nms_top_n_test) == (103, 104)
    assert actual.head.objectness.out_channels == 2


ROI = {
    "positive_iou": 0.55,
    "samples_per_image": 99,
    "positive_fraction": 0.3,
    "sampling": "libra",
    "libra_bins": 5,
    "hidden": 24,
    "sampling_ratio": 2,
    "aligned": False,
    "box_loss": {"name": "balanced_l1", "weight": 2, "beta": 0.9, "alpha": 0.4, "gamma": 1.4},
    "score_threshold": 0.01,
    "nms": {"kind": "soft_gaussian", "iou": 0.45, "sigma": 0.4},
    "detections_per_image": 33,
}
CASCADE = {
    "positive_ious": [0.45, 0.65],
    "delta_weights": [[10, 10, 5, 5], [21, 22, 11, 12]],
    "loss_weights": [1, 0.4],
    "add_gt_each_stage": True,
    "score_rois": "last",
}


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn"])
def test_settings_of_the_heads_arrive(kind: str) -> None:
    model = build(kind=kind, roi=ROI, cascade=CASCADE)
    heads: Any = model.roi_heads
    assert (heads.classes, model.ranks) == (4, RANKS)
    assert (heads.samples_per_image, heads.positive_fraction) == (99, 0.3)
    assert (heads.sampling, heads.libra_bins) == ("libra", 5)
    assert (heads.sampling_ratio, heads.aligned) == (2, False)
    assert heads.box_loss == BoxLoss("balanced_l1", weight=2, beta=0.9, alpha=0.4, gamma=1.4)
    assert (heads.score_threshold, heads.detections_per_image) == (0.01, 33)
    assert heads.nms == NMS("soft_gaussian", iou=0.45, sigma=0.4)
    assert {head.fc1.out_features for head in heads.heads} == {24}
    if kind == "faster_rcnn":
        assert heads.stages == (BoxStage(0.55, (10, 10, 5, 5)),)
        assert [head.deltas.out_features for head in heads.heads] == [16]
    else:
        assert heads.stages == (BoxStage(0.45, (10, 10, 5, 5), 1), BoxStage(0.65, (21, 22, 11, 12), 0.4))
        assert (heads.add_gt_each_stage, heads.score_rois) == (True, "last")
        assert [head.deltas.out_features for head in heads.heads] == [4, 4]


def test_one_stage_may_be_class_agnostic_and_may_divide_by_positives() -> None:
    heads: Any = build(
        roi={"class_agnostic": True, "box_loss": {"name": "ciou", "normalization": "positives"}}
    ).roi_heads
    assert heads.heads[0].deltas.out_features == 4
    assert heads.box_loss == BoxLoss("ciou", normalization="positives")


OPTIONS: dict[str, dict[str, Any]] = {
    "faster": {"kind": "faster_rcnn"},
    "cascade": {"kind": "cascade_rcnn"},
    "PSS-DET": {
        "dcn_strides": [8, 16, 32],
        "roi": {"sampling": "libra", "box_loss": {"name": "ciou", "weight": 10}},
    },
    "PSS-DET cascade": {
        "kind": "cascade_rcnn",
        "roi": {"sampling": "libra", "box_loss": {"name": "balanced_l1"}, "nms": {"kind": "soft_linear"}},
        "cascade": {"add_gt_each_stage": True, "score_rois": "last", "loss_weights": [1, 0.5, 0.25]},
    },
}


@pytest.mark.parametrize("empty", [False, True], ids=["objects", "no objects"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_trains_and_detects(name: str, empty: bool) -> None:
    settings = {"roi": {}} | OPTIONS[name]
    model = build(**settings | {"roi": settings["roi"] | {"hidden": 16, "samples_per_image": 32, "score_threshold": 0}})
    pixels = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageBatch(pixels, torch.tensor([[96, 128], [80, 100]]), torch.tensor([1.0, 0.8]))
    objects = torch.tensor([[[10.0, 12.0, 60.0, 48.0]], [[40.0, 5.0, 90.0, 79.0]]])
    labels = torch.tensor([[1], [3]])
    if empty:
        objects, labels = objects[:, :0], labels[:, :0]
    losses = model(images, Targets(objects, labels, torch.tensor([5, 6])))
    stages = ["_0", "_1", "_2"] if "cascade" in name else [""]
    expected = {"loss_rpn_cls", "loss_rpn_box"} | {f"loss_{part}{stage}" for part in ("cls", "box") for stage in stages}
    assert set(losses) == expected
    sum(losses.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            if empty and ".deltas." in parameter_name:
                assert not parameter.grad.any(), parameter_name
    for detections in model.eval()(images):
        assert 0 < len(detections.scores_N) <= 100
        assert (detections.scores_N.diff() <= 0).all()


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_mask_rcnn", *get_args(OneStageKind)])
def test_forward_divides_by_the_counts_of_its_ranks(kind: str) -> None:
    """Three ranks with counts of one: losses that divide by counts are three times those of one rank."""
    small = SMALL | {"kind": kind, "roi": {"hidden": 16, "samples_per_image": 16}, "mask": {"hidden": 8}}
    config = DetectorConfig.model_validate(small | {"dense": {"convolutions": 1}})
    body = timm.create_model("test_resnet", features_only=True, pretrained=False)
    model: Any = build_detector(config, classes=4, body=body, arch="test_resnet", inputs=INPUTS, ranks=RANKS).train()
    images = ImageBatch(torch.full((1, 3, 64, 96), 9, dtype=torch.uint8), torch.tensor([[64, 96]]), torch.ones(1))
    shape = (ImageMasks(([[10.0, 12.0, 60.0, 12.0, 60.0, 48.0]],)),)
    targets = Targets(torch.tensor([[[10.0, 12, 60, 48]]]), torch.tensor([[1]]), torch.tensor([5]), masks=shape)
    alone, _ = model.losses(model.features(images), images.sizes_B2, targets, ONE_RANK)
    losses = model(images, targets)
    assert set(losses) == set(alone)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(alone[name].item() * (1 if "rpn" in name else 3), rel=1e-5), name
        assert loss.item() > 0, name
