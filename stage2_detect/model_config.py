"""The detector's architecture as settings; they are stored in its file. Does not import torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import Count, Positive, Weight
from ssld.shared.config.settings import Config

IoU = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[int, Field(ge=1, le=100)]
Four = tuple[Positive, Positive, Positive, Positive]


class RPNConfig(Config):
    """Region proposals: anchors, assignment, sampling, counts."""

    anchor_sizes: list[Positive] = Field([32, 64, 128, 256, 512], min_length=5, max_length=5)
    """side of the square anchor of each level P2..P6, in pixels"""
    anchor_ratios: list[Positive] = Field([0.5, 1.0, 2.0], min_length=1)
    """height / width"""
    positive_iou: IoU = 0.7
    """IoU with an object from which an anchor is positive"""
    negative_iou: IoU = 0.3
    """IoU below which it is negative; in between it is in no loss"""
    samples_per_image: Count = 256
    """anchors per image in the loss"""
    positive_fraction: Fraction = 0.5
    """largest share of positives among the samples, 0 to 1"""
    sampling: Literal["random", "first"] = "random"
    """first takes anchors in index order (for comparisons with other implementations)"""
    nms_iou: IoU = 0.7
    """IoU with a better proposal of its level above which one is dropped"""
    pre_nms_top_n_train: Count = 2000
    """proposals per level before NMS, in training"""
    post_nms_top_n_train: Count = 1000
    """proposals per image after NMS, in training"""
    pre_nms_top_n_test: Count = 1000
    """proposals per level before NMS, in evaluation and prediction"""
    post_nms_top_n_test: Count = 1000
    """proposals per image after NMS, in evaluation and prediction: fewer are faster"""

    @model_validator(mode="after")
    def _ious_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou:g} is above positive_iou {self.positive_iou:g}")
        return self


class BoxLossConfig(Config):
    """Regression loss of the box heads."""

    name: Literal["l1", "smooth_l1", "balanced_l1", "giou", "ciou"] = "l1"
    """distance between deltas, or 1 - IoU of boxes (giou, ciou)"""
    weight: Positive = 1.0
    """factor of the term in the loss"""
    beta: Positive = 1.0
    """distance at which the square part of smooth_l1 and balanced_l1 ends"""
    alpha: Positive = 0.5
    """slope of balanced_l1 near zero (arXiv 1904.02701 equation 5)"""
    gamma: Positive = 1.5
    """largest slope of balanced_l1"""
    normalization: Literal["rois", "positives"] = "rois"
    """rois: sum over positives / sampled RoIs; positives: mean over positives x classes / sampled RoIs, as
    PaddleDetection's CIoU and GIoU (it grows with the number of classes)"""

    @model_validator(mode="after")
    def _positives_are_for_ious(self) -> Self:
        if self.normalization == "positives" and self.name not in ("giou", "ciou"):
            raise ValueError(f"normalization: positives is for giou and ciou, not for {self.name}")
        return self


class NMSConfig(Config):
    """NMS: what becomes of a class's overlapping detections."""

    kind: Literal["hard", "soft_linear", "soft_gaussian"] = "hard"
    """hard drops the worse of two boxes, soft lowers its score"""
    iou: IoU = 0.5
    """IoU above which hard drops and soft_linear lowers scores"""
    sigma: Positive = 0.5
    """width of soft_gaussian (arXiv 1704.04503): scores fall by exp(-IoU^2 / sigma)"""


class RoIConfig(Config):
    """Box heads: assignment, sampling, pooling, loss, post-processing."""

    positive_iou: IoU = 0.5
    """IoU with an object from which a RoI is positive, else negative; a cascade has its own"""
    samples_per_image: Count = 512
    """RoIs per image in the loss"""
    positive_fraction: Fraction = 0.25
    """largest share of positives among the samples, 0 to 1"""
    sampling: Literal["random", "first", "libra"] = "random"
    """libra draws negatives evenly from bins of IoU (arXiv 1904.02701 section 3.1); first takes RoIs in index order
    (for comparisons with other implementations)"""
    libra_bins: Count = 3
    """bins of libra, between no overlap and the largest"""
    class_agnostic: bool = False
    """one box per RoI instead of one per class; a cascade always has it"""
    hidden: int = Field(1024, ge=1, le=65_536)
    """width of the two fully connected layers"""
    sampling_ratio: int = Field(0, ge=0, le=64)
    """samples along a side of a pooled bin; 0 takes as many as the bin has pixels"""
    aligned: bool = True
    """half-pixel-aligned pooling"""
    box_loss: BoxLossConfig = BoxLossConfig()
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """score above which a detection is one"""
    nms: NMSConfig = NMSConfig()
    detections_per_image: Count = 100
    """most detections per image"""


class CascadeConfig(Config):
    """Stages of a cascade (arXiv 1712.00726); used by the cascade kinds only."""

    positive_ious: list[IoU] = Field([0.5, 0.6, 0.7], min_length=2)
    """IoU with an object from which a RoI is positive, one per stage"""
    delta_weights: list[Four] = Field(
        [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)], min_length=2
    )
    """factors on a box's x, y, width, height in the regression, four per stage"""
    loss_weights: list[Positive] = Field([1 / 3, 1 / 3, 1 / 3], min_length=2)
    """factor on both losses, one per stage"""
    add_gt_each_stage: bool = False
    """append the objects to the RoIs of later stages too"""
    score_rois: Literal["own", "last"] = "own"
    """which RoIs each stage scores in evaluation: its own, or the last stage's"""

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        if not len(self.positive_ious) == len(self.delta_weights) == len(self.loss_weights):
            raise ValueError("positive_ious, delta_weights and loss_weights need one entry per stage each")
        return self


class MaskConfig(Config):
    """Mask head (arXiv 1703.06870); used by the mask kinds only."""

    hidden: int = Field(256, ge=1, le=8192)
    """channels of its convolutions"""
    convolutions: Layers = 4
    """convolutions before the map is doubled in size"""
    pool_size: int = Field(14, ge=1, le=128)
    """side of the pooled features; masks have twice that"""
    threshold: float = Field(0.5, gt=0, lt=1)
    """probability from which a pixel belongs to the object"""


class DenseConfig(Config):
    """One-stage detectors: pyramid, head, post-processing; used by the kinds retinanet and gfl only."""

    p6_from: Literal["p5", "c5"] = "p5"
    """what the sixth level is convolved from"""
    relu_before_p7: bool = False
    """ReLU between the convolutions of the two coarsest levels"""
    convolutions: Layers = 4
    """convolutions per tower"""
    candidates: Count | None = 1000
    """anchors per level that are looked at, by their best class; null looks at all"""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """score above which a detection is one"""
    nms_iou: IoU = 0.6
    """IoU with a better detection of its class above which one is dropped"""
    detections_per_image: Count = 100
    """most detections per image"""
    clip_boxes: bool = True
    """clip boxes to the image"""


class GFLConfig(Config):
    """GFL's head and losses (arXiv 2006.04388)."""

    reg_max: int = Field(16, ge=1, le=256)
    """largest distance from a cell to a side, in strides"""
    tower_bias: bool = False
    """convolutions of the towers have a bias, as PaddleDetection's"""
    unbiased_std: bool = True
    """unbiased standard deviation of the candidates' IoUs in ATSS; PaddleDetection's is biased"""
    ignore_padding: bool = True
    """cells beyond the image are none of its anchors; in PaddleDetection they are candidates and negatives"""
    weight_floor: Positive = 1e-6
    """smallest sum of scores that the box losses are divided by; PaddleDetection's is 1"""
    box_weight: Positive = 2.0
    """factor of the GIoU loss"""
    dfl_weight: Weight = 0.25
    """factor of the distribution focal loss; 0 leaves it out"""


class RetinaNetConfig(Config):
    """RetinaNet's head, assignment and losses (arXiv 1708.02002)."""

    tower_norm: bool = False
    """GroupNorm in the towers, as in torchvision's second version"""
    positive_iou: IoU = 0.5
    """IoU with an object from which an anchor is positive"""
    negative_iou: IoU = 0.4
    """IoU below which it is negative; in between it is in no loss"""
    low_quality_iou: Fraction = 0.0
    """IoU from which an object's best anchor is positive, below positive_iou too; Detectron's 0.4"""
    alpha: Fraction = 0.25
    """weight of the positives in the focal loss, 0 to 1; negatives have the rest"""
    gamma: float = Field(2.0, ge=0, le=100)
    """exponent of the focal loss: how much less what is right already counts"""
    smooth_l1_beta: Weight = 0.0
    """distance at which the square part of the box loss ends; 0 is plain L1"""


Kind = Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet", "gfl"]


class DetectorConfig(Config):
    """The detector's architecture; stored in its file."""

    kind: Kind = "faster_rcnn"
    """two stages, those of a cascade in several, mask kinds with shapes too; or one stage (retinanet, gfl)"""
    fpn_channels: int = Field(256, ge=8, le=8192)
    """channels of every level of the pyramid"""
    freeze_stages: int = Field(0, ge=0, le=5)
    """stages of the backbone that do not train: 1 is the stem, 2 the stem and the stride-4 stage, ..."""
    freeze_norm: bool = True
    """BatchNorm as a constant: running statistics and affine parameters fixed"""
    dcn_strides: list[Literal[4, 8, 16, 32]] = []
    """stages of the backbone, by stride, whose dense 3x3 convolutions become modulated deformable ones (DCNv2)"""
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    cascade: CascadeConfig = CascadeConfig()
    mask: MaskConfig = MaskConfig()
    dense: DenseConfig = DenseConfig()
    gfl: GFLConfig = GFLConfig()
    retinanet: RetinaNetConfig = RetinaNetConfig()

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks and trains on them."""
        return self.kind in ("mask_rcnn", "cascade_mask_rcnn")

    @property
    def unread_groups(self) -> dict[str, Config]:
        """Groups of settings that a detector of this kind does not read."""
        read = {"dense", self.kind} if self.is_dense else {"rpn", "roi"}
        read |= {name for name, has in (("cascade", self.is_cascade), ("mask", self.has_masks)) if has}
        return {name: value for name, value in self if isinstance(value, Config) and name not in read}

    @property
    def unread(self) -> list[str]:
        """Those of them that were changed all the same."""
        return [name for name, value in self.unread_groups.items() if value != type(value)()]

    @property
    def is_dense(self) -> bool:
        """Whether the detector has one stage and no RoIs."""
        return self.kind in ("retinanet", "gfl")

    @property
    def is_cascade(self) -> bool:
        """Whether the detector has several box stages."""
        return self.kind in ("cascade_rcnn", "cascade_mask_rcnn")
