"""From a configuration and a backbone to a detector: the only file that sees both settings and modules."""

from collections.abc import Callable

from torch import Tensor, nn

from shared.backbones import InputSettings
from stage2_detect.model_config import DetectorConfig
from stage2_detect.models.pyramid import TimmPyramid
from stage2_detect.models.rcnn import RCNN
from stage2_detect.models.roi_heads import BoxStage, RoIHeads
from stage2_detect.models.rpn import RPN


def build_detector(
    config: DetectorConfig,
    *,
    classes: int,
    body: nn.Module,
    arch: str,
    inputs: InputSettings,
    total: Callable[[Tensor], Tensor] = lambda count: count,
    world_size: int = 1,
) -> RCNN:
    """The detector that `config` describes, on a features-only timm body.

    Args:
        classes: number of classes, without background.
        arch: the body's timm name, for error messages.
        inputs: the backbone's mean and std.
        total: sum of a tensor over ranks (`shared.ranks.total_over_ranks`).
        world_size: number of ranks.

    Raises UserError for a body without strides 4, 8, 16 and 32.
    """
    pyramid = TimmPyramid(
        body,
        name=arch,
        channels=config.fpn_channels,
        freeze_stages=config.freeze_stages,
        freeze_norm=config.freeze_norm,
        dcn_strides=config.dcn_strides,
    )
    match config.kind:
        case "mask_rcnn" | "cascade_rcnn" | "cascade_mask_rcnn":
            raise NotImplementedError(config.kind)
        case "faster_rcnn":
            rpn = RPN(
                channels=config.fpn_channels,
                strides=pyramid.strides,
                anchor_sizes=config.rpn.anchor_sizes,
                anchor_ratios=config.rpn.anchor_ratios,
                positive_iou=config.rpn.positive_iou,
                negative_iou=config.rpn.negative_iou,
                samples_per_image=config.rpn.samples,
                positive_fraction=config.rpn.positive_fraction,
                random_sampling=config.rpn.random,
                nms_iou=config.rpn.nms_iou,
                train_pre_nms=config.rpn.train_pre_nms,
                train_post_nms=config.rpn.train_post_nms,
                test_pre_nms=config.rpn.val_pre_nms,
                test_post_nms=config.rpn.val_post_nms,
            )
            roi_heads = RoIHeads(
                classes=classes,
                channels=config.fpn_channels,
                hidden=config.roi.hidden,
                samples_per_image=config.roi.samples,
                positive_fraction=config.roi.foreground_fraction,
                stages=(BoxStage(iou=config.roi.foreground_iou, weights=(10.0, 10.0, 5.0, 5.0)),),
                score_threshold=config.roi.score_threshold,
                nms_iou=config.roi.nms.iou,
                detections_per_image=config.roi.detections,
                total=total,
                world_size=world_size,
            )
            return RCNN(pyramid=pyramid, rpn=rpn, roi_heads=roi_heads, mean=inputs.mean, std=inputs.std)
