"""The detector's architecture as settings; they are stored in its file. Does not import torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import Count, Positive, Weight
from ssld.shared.config.settings import Config

IoU = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[int, Field(ge=1, le=100)]
Four = tuple[Positive, Positive, Positive, Positive]
Norm = Literal["none", "batch", "group"]
AnchorGrid = Literal["exact", "torchvision"]
FPNMaps = Literal["strides", "last_stage"]
FPN_LEVELS: dict[FPNMaps, int] = {"strides": 5, "last_stage": 3}
"""levels of the pyramid by the maps of the backbone below it"""


class RPNConfig(Config):
    """Region proposals: anchors, assignment, sampling, counts."""

    anchor_sizes: list[Positive] = [32, 64, 128, 256, 512]
    """anchor sizes of the levels P2..P6, one per level: side of a square anchor in pixels; three with model.fpn_maps: last_stage"""
    anchor_ratios: list[Positive] = Field([0.5, 1.0, 2.0], min_length=1)
    """anchor aspect ratios, height / width"""
    anchor_scales: list[Positive] = Field([1.0], min_length=1)
    """factors on the anchor sizes of every level"""
    anchor_grid: AnchorGrid = "exact"
    """anchor sides and distances: exact; torchvision, sides rounded to whole pixels and distances of the cells from the padded image size"""
    convolutions: int = Field(1, ge=1, le=16)
    """number of convolutions of the RPN's head"""
    positive_iou: IoU = 0.7
    """IoU with an object from which an anchor is positive"""
    negative_iou: IoU = 0.3
    """IoU below which an anchor is negative; anchors between negative_iou and positive_iou are ignored"""
    samples_per_image: Count = 256
    """anchors sampled per image for the RPN losses"""
    positive_fraction: Fraction = 0.5
    """largest share of positives among the sampled anchors, 0 to 1"""
    sampling: Literal["random", "first"] = "random"
    """choice of the sampled anchors: random, or first in index order (for comparisons with other implementations)"""
    smooth_l1_beta: Weight = 0.0
    """absolute error at which the RPN's smooth L1 box loss changes from quadratic to linear; 0 is plain L1"""
    normalization: Literal["samples_per_image", "sampled"] = "samples_per_image"
    """divisor of the RPN losses: samples_per_image x images, or the number of anchors that were sampled in the process's batch"""
    min_size: Weight = 1.0
    """smallest side of a proposal, in pixels; smaller ones are dropped"""
    score_threshold: Fraction = 0.0
    """lowest objectness of a proposal, 0 to 1"""
    nms_iou: IoU = 0.7
    """IoU threshold of NMS among the proposals of one level"""
    pre_nms_top_n_train: Count = 2000
    """proposals per level before NMS, in training"""
    post_nms_top_n_train: Count = 1000
    """proposals per image after NMS, in training"""
    pre_nms_top_n_test: Count = 1000
    """proposals per level before NMS, in evaluation and prediction"""
    post_nms_top_n_test: Count = 1000
    """proposals per image after NMS, in evaluation and prediction: fewer are faster"""

    @field_validator("anchor_sizes")
    @classmethod
    def _one_per_level(cls, sizes: list[float]) -> list[float]:
        if len(sizes) not in FPN_LEVELS.values():
            raise ValueError(
                f"has {len(sizes)} entries; one per level are needed: {FPN_LEVELS['strides']}, with fpn_maps: last_stage {FPN_LEVELS['last_stage']}"
            )
        return sizes

    @model_validator(mode="after")
    def _ious_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou:g} is above positive_iou {self.positive_iou:g}")
        return self


class BoxLossConfig(Config):
    """Regression loss of the box heads."""

    name: Literal["l1", "smooth_l1", "balanced_l1", "giou", "ciou"] = "l1"
    """regression loss: between box deltas (l1, smooth_l1, balanced_l1) or 1 - IoU of the boxes (giou, ciou)"""
    weight: Positive = 1.0
    """weight of the regression loss in the total loss"""
    beta: Positive = 1.0
    """absolute error at which smooth_l1 and balanced_l1 change from quadratic to linear"""
    alpha: Positive = 0.5
    """slope of balanced_l1 near zero (arXiv 1904.02701 section 3.3)"""
    gamma: Positive = 1.5
    """largest slope of balanced_l1"""
    normalization: Literal["rois", "positives"] = "rois"
    """normalization of the regression loss: rois, sum over positives / sampled RoIs; positives, mean over positives x classes / sampled
    RoIs, as in PaddleDetection's CIoU and GIoU losses (grows with the number of classes)"""

    @model_validator(mode="after")
    def _positives_are_for_ious(self) -> Self:
        if self.normalization == "positives" and self.name not in ("giou", "ciou"):
            raise ValueError(f"normalization: positives is for giou and ciou, not for {self.name}")
        return self


class NMSConfig(Config):
    """NMS among the detections of one class."""

    kind: Literal["hard", "soft_linear", "soft_gaussian"] = "hard"
    """kind of NMS: hard drops the lower-scoring of two overlapping boxes, soft (linear, gaussian) lowers its score"""
    iou: IoU = 0.5
    """IoU above which hard NMS drops a box and soft_linear lowers its score; unused by soft_gaussian"""
    sigma: Positive = 0.5
    """width of soft_gaussian (arXiv 1704.04503): scores fall by exp(-IoU^2 / sigma)"""


class RoIConfig(Config):
    """Box heads: assignment, sampling, pooling, loss, post-processing."""

    positive_iou: IoU = 0.5
    """IoU with an object from which a RoI is positive, else negative; cascade kinds use cascade.positive_ious"""
    samples_per_image: Count = 512
    """RoIs sampled per image for the losses of the box head"""
    positive_fraction: Fraction = 0.25
    """largest share of positives among the sampled RoIs, 0 to 1"""
    sampling: Literal["random", "first", "libra"] = "random"
    """choice of the sampled RoIs: random; libra, negatives drawn evenly from bins of IoU (arXiv 1904.02701 section 3.1); first, in index
    order (for comparisons with other implementations)"""
    libra_bins: Count = 3
    """number of IoU bins for libra sampling"""
    class_agnostic: bool = False
    """regress one box per RoI instead of one per class; cascade kinds always do"""
    hidden: int = Field(1024, ge=1, le=65_536)
    """width of the fully connected layers of the box head"""
    convolutions: int = Field(0, ge=0, le=100)
    """number of 3x3 convolutions of the box head, before the fully connected layers"""
    fully_connected: int = Field(2, ge=1, le=2)
    """number of fully connected layers of the box head"""
    norm: Norm = "none"
    """norm after the convolutions of the box head: none, batch (BatchNorm) or group (GroupNorm of 32 groups)"""
    sampling_ratio: int = Field(0, ge=0, le=64)
    """RoIAlign sampling points along each side of an output bin; 0: as many as the bin spans pixels of the feature map, rounded up"""
    aligned: bool = True
    """shift RoIs by half a pixel in RoIAlign, as torchvision's aligned=True"""
    box_loss: BoxLossConfig = BoxLossConfig()
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """score above which a box counts as a detection"""
    nms: NMSConfig = NMSConfig()
    detections_per_image: Count = 100
    """largest number of detections per image"""


class CascadeConfig(Config):
    """Stages of a cascade (arXiv 1712.00726); used by the cascade kinds only."""

    positive_ious: list[IoU] = Field([0.5, 0.6, 0.7], min_length=2)
    """IoU with an object from which a RoI is positive, one value per stage"""
    delta_weights: list[Four] = Field(
        [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)], min_length=2
    )
    """weights of the box deltas (x, y, width, height), four per stage"""
    loss_weights: list[Positive] = Field([1 / 3, 1 / 3, 1 / 3], min_length=2)
    """weight of a stage's classification and regression losses, one value per stage"""
    add_gt_each_stage: bool = False
    """append the ground-truth boxes to the RoIs of later stages too, not of the first alone"""
    score_rois: Literal["own", "last"] = "own"
    """RoIs that each stage scores in evaluation: its own, or those of the last stage"""
    average_of: Literal["probabilities", "logits"] = "probabilities"
    """quantity of the classes averaged over the stages in evaluation: probabilities, or logits, as in mmdetection"""

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        if not len(self.positive_ious) == len(self.delta_weights) == len(self.loss_weights):
            raise ValueError("positive_ious, delta_weights and loss_weights need one entry per stage each")
        return self


class MaskConfig(Config):
    """Mask head (arXiv 1703.06870); used by the mask kinds only."""

    hidden: int = Field(256, ge=1, le=8192)
    """channels of the mask head's convolutions"""
    convolutions: Layers = 4
    """number of convolutions before the mask head's upsampling"""
    norm: Norm = "none"
    """norm after these convolutions: none, batch (BatchNorm) or group (GroupNorm of 32 groups)"""
    pool_size: int = Field(14, ge=1, le=128)
    """side of the pooled features, in cells; the predicted masks are twice as large"""
    threshold: float = Field(0.5, gt=0, lt=1)
    """mask probability from which a pixel belongs to the object"""


class DenseConfig(Config):
    """One-stage detectors: pyramid, head, post-processing; unused by R-CNN."""

    p6_from: Literal["p5", "c5"] = "p5"
    """feature map that the level P6 is convolved from: p5 (pyramid) or c5 (backbone)"""
    relu_before_p7: bool = False
    """apply ReLU to P6 before the convolution that makes P7"""
    convolutions: Layers = 4
    """number of convolutions per tower (classification, boxes)"""
    candidates: Count | None = 1000
    """anchors, or scores, per level that go into NMS, those with the highest class score; null: all"""
    candidates_of: Literal["anchors", "scores"] = "anchors"
    """unit of candidates: anchors, with the scores of all classes; scores of one anchor and class, as in torchvision"""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """score above which a box counts as a detection"""
    nms_iou: IoU = 0.6
    """IoU threshold of NMS among the detections of one class"""
    detections_per_image: Count = 100
    """largest number of detections per image"""
    clip_boxes: bool = True
    """clip detected boxes to the image"""
    clip_after_nms: bool = False
    """clip, and drop boxes outside of the image, after NMS and detections_per_image, as detectron2; needs clip_boxes. false: before NMS"""


class GFLConfig(Config):
    """GFL's head and losses (arXiv 2006.04388)."""

    reg_max: int = Field(16, ge=1, le=256)
    """largest distance from a cell's center to a side of its box, in strides of the level"""
    tower_bias: bool = False
    """use a bias in the towers' convolutions, as PaddleDetection does"""
    unbiased_std: bool = True
    """use the unbiased standard deviation of the candidates' IoUs in ATSS; PaddleDetection uses the biased one"""
    ignore_padding: bool = True
    """ignore cells in the padding outside an image; in PaddleDetection they are candidates and negatives"""
    weight_floor: Positive = 1e-6
    """lower bound of the sum of scores that divides the box losses; PaddleDetection's is 1"""
    box_weight: Positive = 2.0
    """weight of the GIoU loss"""
    dfl_weight: Weight = 0.25
    """weight of the distribution focal loss; 0 switches it off"""


class RetinaNetConfig(Config):
    """RetinaNet's head, assignment and losses (arXiv 1708.02002)."""

    tower_norm: bool = False
    """use GroupNorm in the towers, as torchvision's RetinaNet v2"""
    positive_iou: IoU = 0.5
    """IoU with an object from which an anchor is positive"""
    negative_iou: IoU = 0.4
    """IoU below which an anchor is negative; anchors between negative_iou and positive_iou are ignored"""
    low_quality_iou: Fraction = 0.0
    """IoU from which the best anchor of an object is positive even below positive_iou; 0.4 in Detectron"""
    alpha: Fraction = 0.25
    """alpha of the focal loss, 0 to 1: weight of the positives; negatives have 1 - alpha"""
    gamma: float = Field(2.0, ge=0, le=100)
    """gamma of the focal loss: the exponent that down-weights well-classified anchors"""
    smooth_l1_beta: Weight = 0.0
    """absolute error at which the smooth L1 box loss changes from quadratic to linear; 0 is plain L1"""
    box_loss: Literal["l1", "giou"] = "l1"
    """box loss: l1 between deltas (smooth with smooth_l1_beta), or giou, 1 - GIoU of the boxes, as torchvision's RetinaNet v2"""
    normalization: Literal["batch", "image"] = "batch"
    """divisor of the losses: batch, positives of all images together; image, positives of each image, then the number of images"""
    anchor_grid: AnchorGrid = "exact"
    """anchor sides and distances: exact; torchvision, sides rounded to whole pixels and distances of the cells from the padded image size"""


# A setting that determines shapes of tensors is also in `_SHAPING` of training/init_weights.py.
_GEOMETRY = {
    "": ("kind", "fpn_channels", "fpn_maps", "fpn_norm", "dcn_strides", "stride_in_1x1"),
    "rpn": ("anchor_sizes", "anchor_ratios", "anchor_scales", "anchor_grid", "convolutions"),
    "roi": ("class_agnostic", "hidden", "convolutions", "fully_connected", "norm", "sampling_ratio", "aligned"),
    "cascade": ("delta_weights",),
    "mask": ("hidden", "convolutions", "norm", "pool_size"),
    "dense": ("p6_from", "relu_before_p7", "convolutions"),
    "gfl": ("reg_max", "tower_bias"),
    "retinanet": ("tower_norm", "anchor_grid"),
}


def _value(config: Config, key: str) -> Any:
    """Return the value of a setting by its key with dots."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


OneStageKind = Literal["retinanet", "gfl"]
"""kinds with a head of their own on all levels, each with a group of settings of its name"""
Kind = Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", OneStageKind]
KIND_NAMES: Mapping[str, str] = {
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "cascade_rcnn": "Cascade R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "retinanet": "RetinaNet",
    "gfl": "GFL",
}
"""names in sentences"""


class DetectorConfig(Config):
    """The detector's architecture; stored in its file."""

    kind: Kind = "faster_rcnn"
    """kind of detector; two-stage: faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn; one-stage: retinanet, gfl"""
    fpn_channels: int = Field(256, ge=8, le=8192)
    """channels of the feature pyramid's levels"""
    fpn_maps: FPNMaps = "strides"
    """maps of the backbone below the pyramid: strides, those of 4, 8, 16 and 32 (one-stage kinds: 8, 16 and 32); last_stage, for R-CNN on
    MobileNetV3, the first block's and the last of stride 32, as in torchvision, with RoIs pooled from the first"""
    fpn_norm: Norm = "none"
    """norm after the convolutions of the pyramid, P6 and P7 excepted: none, batch (BatchNorm) or group (GroupNorm of 32 groups)"""
    freeze_stages: int = Field(0, ge=0, le=5)
    """number of frozen backbone stages: 0, none; 1, the stem; 2, the stem and the stride-4 stage; ... 5, all"""
    freeze_norm: bool = True
    """freeze all BatchNorm layers, of backbone, pyramid and heads: running statistics and affine parameters"""
    dcn_strides: list[Literal[4, 8, 16, 32]] = []
    """strides of the backbone stages (4, 8, 16, 32) whose dense 3x3 convolutions become modulated deformable ones (DCNv2)"""
    stride_in_1x1: bool = False
    """use the stride of a bottleneck of the backbone in its first 1x1 convolution, as Caffe's ResNets, in place of its 3x3 convolution"""
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    cascade: CascadeConfig = CascadeConfig()
    mask: MaskConfig = MaskConfig()
    dense: DenseConfig = DenseConfig()
    gfl: GFLConfig = GFLConfig()
    retinanet: RetinaNetConfig = RetinaNetConfig()

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if self.fpn_maps == "last_stage" and self.is_dense:
            raise ValueError(f"fpn_maps: last_stage is for R-CNN, not for {self.kind}")
        levels = FPN_LEVELS[self.fpn_maps]
        if len(self.rpn.anchor_sizes) != levels:
            raise ValueError(
                f"rpn.anchor_sizes has {len(self.rpn.anchor_sizes)} entries; fpn_maps: {self.fpn_maps} has {levels} levels"
            )
        return self

    def geometry(self) -> dict[str, Any]:
        """Return the settings by key that weights are trained for: shapes of tensors, anchors, pooling. With others they mean nothing."""
        keys = [f"{group}.{key}" if group else key for group, keys in _GEOMETRY.items() for key in keys]
        unread = self.unread_groups
        return {key: _value(self, key) for key in keys if key.partition(".")[0] not in unread}

    @property
    def new_batch_norms(self) -> list[str]:
        """Settings by which BatchNorm is part of the pyramid or the heads of this kind."""
        heads = {} if self.is_dense else {"roi.norm": self.roi.norm if self.roi.convolutions else "none"}
        heads |= {"mask.norm": self.mask.norm} if self.has_masks else {}
        return [key for key, norm in ({"fpn_norm": self.fpn_norm} | heads).items() if norm == "batch"]

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks and trains on them."""
        return self.kind in ("mask_rcnn", "cascade_mask_rcnn")

    @property
    def unread_groups(self) -> dict[str, Config]:
        """Groups of settings that this kind of detector does not use."""
        read = {"dense", self.kind} if self.is_dense else {"rpn", "roi"}
        read |= {name for name, has in (("cascade", self.is_cascade), ("mask", self.has_masks)) if has}
        return {name: value for name, value in self if isinstance(value, Config) and name not in read}

    @property
    def unread(self) -> list[str]:
        """Unused groups whose values differ from the defaults."""
        return [name for name, value in self.unread_groups.items() if value != type(value)()]

    @property
    def is_dense(self) -> bool:
        """Whether the detector has one stage and no RoIs."""
        return self.kind in get_args(OneStageKind)

    @property
    def is_cascade(self) -> bool:
        """Whether the detector has several box stages."""
        return self.kind in ("cascade_rcnn", "cascade_mask_rcnn")
