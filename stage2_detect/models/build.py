"""Construction of a detector from a configuration and a backbone: the only file that sees both settings and modules.

A setting has the name of the keyword argument that it becomes, so groups of settings are passed whole.
"""

from collections.abc import Sequence

from torch import nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.box_losses import BoxLoss
from ssld.stage2_detect.models.dense import DenseDetector, OneStageHead
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.mask_head import MaskHead
from ssld.stage2_detect.models.postprocess import NMS
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.retinanet import RetinaNet
from ssld.stage2_detect.models.roi_heads import BoxStage, RoIHeads
from ssld.stage2_detect.models.rpn import RPN

Detector = RCNN | DenseDetector
_HEADS: dict[str, type[OneStageHead]] = {"gfl": GFL, "retinanet": RetinaNet}
_DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of an R-CNN with one box stage; those of a cascade are settings


def build_detector(
    config: DetectorConfig,
    *,
    classes: int,
    body: nn.Module,
    arch: str,
    inputs: InputSettings,
    ranks: Ranks = ONE_RANK,
) -> Detector:
    """Build the detector that `config` describes on a features-only timm body.

    Args:
        classes: number of classes, without background.
        arch: the body's timm name, for error messages.
        inputs: the backbone's mean and std.
        ranks: processes whose counts the losses are divided by.

    Raises:
        UserError: the body lacks one of the strides 4, 8, 16 and 32, or has no convolution to make deformable.
    """
    pyramid = TimmPyramid(
        body,
        name=arch,
        channels=config.fpn_channels,
        maps=config.fpn_maps,
        norm=config.fpn_norm,
        freeze_stages=config.freeze_stages,
        freeze_norm=config.freeze_norm,
        dcn_strides=config.dcn_strides,
        stride_in_1x1=config.stride_in_1x1,
        p3_p7=config.is_dense,
        p6_from=config.dense.p6_from,
        relu_before_p7=config.dense.relu_before_p7,
    )
    if config.is_dense:
        return DenseDetector(
            pyramid=pyramid,
            dense=_dense(config, classes, pyramid),
            mean=inputs.mean,
            std=inputs.std,
            ranks=ranks,
            **config.dense.model_dump(exclude={"p6_from", "relu_before_p7", "convolutions"}),
        )
    # All levels but the pooled one; torchvision finds the levels of RoIs by their strides, and so pools from the first of two equal ones.
    roi_strides = pyramid.strides[:1] if config.fpn_maps == "last_stage" else pyramid.strides[:-1]
    return RCNN(
        pyramid=pyramid,
        rpn=RPN(channels=pyramid.channels, strides=pyramid.strides, **dict(config.rpn)),
        roi_heads=_roi_heads(config, classes, roi_strides),
        mask_head=_mask_head(config, classes, roi_strides) if config.has_masks else None,
        mean=inputs.mean,
        std=inputs.std,
        ranks=ranks,
    )


def _dense(config: DetectorConfig, classes: int, pyramid: TimmPyramid) -> OneStageHead:
    return _HEADS[config.kind](
        classes=classes,
        channels=pyramid.channels,
        strides=pyramid.strides,
        convolutions=config.dense.convolutions,
        **dict(getattr(config, config.kind)),
    )


def _roi_heads(config: DetectorConfig, classes: int, strides: Sequence[int]) -> RoIHeads:
    roi, cascade = config.roi, config.cascade
    settings = dict(roi) | {
        "class_agnostic": config.is_cascade or roi.class_agnostic,
        "box_loss": BoxLoss(**dict(roi.box_loss)),
        "nms": NMS(**dict(roi.nms)),
    }
    del settings["positive_iou"]  # belongs to the stage
    return RoIHeads(
        classes=classes,
        channels=config.fpn_channels,
        strides=strides,
        freeze_norm=config.freeze_norm,
        stages=_stages(config),
        add_gt_each_stage=cascade.add_gt_each_stage,
        score_rois=cascade.score_rois,
        average_of=cascade.average_of,
        **settings,
    )


def _stages(config: DetectorConfig) -> tuple[BoxStage, ...]:
    if not config.is_cascade:
        return (BoxStage(config.roi.positive_iou, _DELTA_WEIGHTS),)
    cascade = config.cascade
    stages = zip(cascade.positive_ious, cascade.delta_weights, cascade.loss_weights, strict=True)
    return tuple(BoxStage(*stage) for stage in stages)


def _mask_head(config: DetectorConfig, classes: int, strides: Sequence[int]) -> MaskHead:
    return MaskHead(
        classes=classes,
        channels=config.fpn_channels,
        strides=strides,
        freeze_norm=config.freeze_norm,
        sampling_ratio=config.roi.sampling_ratio,
        aligned=config.roi.aligned,
        **dict(config.mask),
    )
