"""From a configuration and a backbone to a detector: the only file that sees both settings and modules."""

from collections.abc import Callable

from torch import Tensor, nn

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import BoxLossConfig, DetectorConfig, RPNConfig
from ssld.stage2_detect.models.box_losses import BoxLoss
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.mask_head import MaskHead
from ssld.stage2_detect.models.postprocess import Suppression
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.retinanet import RetinaNet
from ssld.stage2_detect.models.roi_heads import BoxStage, RoIHeads
from ssld.stage2_detect.models.rpn import RPN

Detector = RCNN | DenseDetector
_ONE_STAGE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def build_detector(
    config: DetectorConfig,
    *,
    classes: int,
    body: nn.Module,
    arch: str,
    inputs: InputSettings,
    total: Callable[[Tensor], Tensor] = lambda count: count,
    world_size: int = 1,
) -> Detector:
    """The detector that `config` describes, on a features-only timm body.

    Args:
        classes: number of classes, without background.
        arch: the body's timm name, for error messages.
        inputs: the backbone's mean and std.
        total: sum of a tensor over ranks (`shared.ranks.total_over_ranks`).
        world_size: number of ranks.

    Raises UserError for a body without strides 4, 8, 16 and 32, and for one without convolutions to make deformable.
    """
    pyramid = TimmPyramid(
        body,
        name=arch,
        channels=config.fpn_channels,
        freeze_stages=config.freeze_stages,
        freeze_norm=config.freeze_norm,
        dcn_strides=config.dcn_strides,
        p3_p7=config.is_dense,
        p6_from_c5=config.dense.p6_from == "c5",
        relu_before_p7=config.dense.relu_before_p7,
    )
    if config.is_dense:
        return DenseDetector(
            pyramid=pyramid,
            dense=_dense(config, classes, pyramid, total, world_size),
            mean=inputs.mean,
            std=inputs.std,
            candidates=config.dense.candidates,
            score_threshold=config.dense.score_threshold,
            nms_iou=config.dense.nms_iou,
            detections_per_image=config.dense.detections,
            clip=config.dense.clip_boxes,
        )
    return RCNN(
        pyramid=pyramid,
        rpn=_rpn(config.rpn, pyramid),
        roi_heads=_roi_heads(config, classes, total, world_size),
        mask_head=_mask_head(config, classes, total, world_size) if config.has_masks else None,
        mean=inputs.mean,
        std=inputs.std,
    )


def _dense(
    config: DetectorConfig, classes: int, pyramid: TimmPyramid, total: Callable[[Tensor], Tensor], world_size: int
) -> GFL | RetinaNet:
    if config.kind == "gfl":
        return GFL(
            classes=classes,
            channels=pyramid.channels,
            strides=pyramid.strides,
            reg_max=config.gfl.reg_max,
            convolutions=config.dense.convolutions,
            tower_bias=config.gfl.tower_bias,
            unbiased_std=config.gfl.unbiased_std,
            ignore_padding=config.gfl.ignore_padding,
            weight_floor=config.gfl.weight_floor,
            box_weight=config.gfl.box_weight,
            dfl_weight=config.gfl.dfl_weight,
            total=total,
            world_size=world_size,
        )
    return RetinaNet(
        classes=classes,
        channels=pyramid.channels,
        strides=pyramid.strides,
        convolutions=config.dense.convolutions,
        tower_norm=config.retinanet.tower_norm,
        positive_iou=config.retinanet.positive_iou,
        negative_iou=config.retinanet.negative_iou,
        low_quality_iou=config.retinanet.low_quality_iou,
        alpha=config.retinanet.alpha,
        gamma=config.retinanet.gamma,
        smooth_l1_beta=config.retinanet.smooth_l1_beta,
        total=total,
        world_size=world_size,
    )


def _rpn(config: RPNConfig, pyramid: TimmPyramid) -> RPN:
    return RPN(
        channels=pyramid.channels,
        strides=pyramid.strides,
        anchor_sizes=config.anchor_sizes,
        anchor_ratios=config.anchor_ratios,
        positive_iou=config.positive_iou,
        negative_iou=config.negative_iou,
        samples_per_image=config.samples,
        positive_fraction=config.positive_fraction,
        random_sampling=config.random,
        nms_iou=config.nms_iou,
        train_pre_nms=config.train_pre_nms,
        train_post_nms=config.train_post_nms,
        test_pre_nms=config.val_pre_nms,
        test_post_nms=config.val_post_nms,
    )


def _roi_heads(config: DetectorConfig, classes: int, total: Callable[[Tensor], Tensor], world_size: int) -> RoIHeads:
    roi, cascade = config.roi, config.cascade
    return RoIHeads(
        classes=classes,
        channels=config.fpn_channels,
        stages=_stages(config),
        class_agnostic=config.is_cascade or roi.class_agnostic,
        add_objects_each_stage=cascade.add_gt_each_stage,
        score_rois=cascade.score_rois,
        hidden=roi.hidden,
        sampling_ratio=roi.sampling_ratio,
        aligned=roi.aligned,
        samples_per_image=roi.samples,
        positive_fraction=roi.foreground_fraction,
        sampling_kind=roi.sampling,
        libra_bins=roi.libra_bins,
        box_loss=_box_loss(roi.box_loss),
        score_threshold=roi.score_threshold,
        suppression=Suppression(kind=roi.nms.kind, iou=roi.nms.iou, sigma=roi.nms.sigma),
        detections_per_image=roi.detections,
        total=total,
        world_size=world_size,
    )


def _mask_head(config: DetectorConfig, classes: int, total: Callable[[Tensor], Tensor], world_size: int) -> MaskHead:
    return MaskHead(
        classes=classes,
        channels=config.fpn_channels,
        hidden=config.mask.channels,
        convolutions=config.mask.convolutions,
        pool_size=config.mask.pool_size,
        sampling_ratio=config.roi.sampling_ratio,
        aligned=config.roi.aligned,
        threshold=config.mask.threshold,
        total=total,
        world_size=world_size,
    )


def _stages(config: DetectorConfig) -> tuple[BoxStage, ...]:
    if not config.is_cascade:
        return (BoxStage(iou=config.roi.foreground_iou, weights=_ONE_STAGE_WEIGHTS),)
    stages = zip(config.cascade.ious, config.cascade.delta_weights, config.cascade.loss_weights, strict=True)
    return tuple(BoxStage(iou, weights, loss_weight) for iou, weights, loss_weight in stages)


def _box_loss(config: BoxLossConfig) -> BoxLoss:
    return BoxLoss(
        name=config.name,
        weight=config.weight,
        beta=config.beta,
        alpha=config.alpha,
        gamma=config.gamma,
        per_positive=config.normalization == "reference",
    )
