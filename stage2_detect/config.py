"""Settings of the stage-2 commands. Does not import torch, so that the runner can check them at once."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config import CommandConfig, Config
from shared.training_config import OptimConfig, TrainingConfig

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
IoU = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class DetectionDataConfig(Config):
    """COCO JSON files and the folders their file names are relative to."""

    train_annotations: Path
    train_images: Path
    val_annotations: Path | None = None
    """annotations to evaluate on; null does not evaluate"""
    val_images: Path | None = None
    keep_empty: bool = False
    """whether images without any object are trained on"""

    @model_validator(mode="after")
    def _val_together(self) -> Self:
        if (self.val_annotations is None) != (self.val_images is None):
            raise ValueError("give both val_annotations and val_images, or neither")
        return self


class ResizeConfig(Config):
    """Image sizes and flips."""

    train_short_sides: list[Annotated[int, Field(ge=32)]] = Field([640, 672, 704, 736, 768, 800], min_length=1)
    """the short side is drawn from these"""
    train_long_side: int = Field(1333, ge=32)
    """largest long side in training"""
    val_short_side: int = Field(800, ge=32)
    val_long_side: int = Field(1333, ge=32)
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class RPNConfig(Config):
    """Region proposals: anchors, assignment, sampling, counts."""

    anchor_sizes: list[Positive] = Field([32, 64, 128, 256, 512], min_length=5, max_length=5)
    """one a level P2..P6, in pixels"""
    anchor_ratios: list[Positive] = Field([0.5, 1.0, 2.0], min_length=1)
    """height / width"""
    positive_iou: IoU = 0.7
    negative_iou: IoU = 0.3
    samples: int = Field(256, ge=1)
    """anchors an image in the loss"""
    positive_fraction: Fraction = 0.5
    nms_iou: IoU = 0.7
    train_pre_nms: Count = 2000
    """proposals a level before NMS"""
    train_post_nms: Count = 1000
    """proposals an image after NMS"""
    val_pre_nms: Count = 1000
    val_post_nms: Count = 1000

    @model_validator(mode="after")
    def _ious_in_order(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou {self.negative_iou:g} is above positive_iou {self.positive_iou:g}")
        return self


class RoIConfig(Config):
    """Box head: assignment, sampling, post-processing."""

    foreground_iou: IoU = 0.5
    samples: int = Field(512, ge=1)
    """RoIs an image in the loss"""
    foreground_fraction: Fraction = 0.25
    hidden: Count = 1024
    """width of the two fully connected layers"""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    nms_iou: IoU = 0.5
    detections: Count = 100
    """kept an image"""


class DetectorConfig(Config):
    """The detector's architecture; stored in its file."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"
    fpn_channels: int = Field(256, ge=8)
    freeze_stages: int = Field(0, ge=0, le=5)
    """stages of the backbone that do not train: 1 is the stem, 2 the stem and the stride-4 stage, ..."""
    freeze_norm: bool = True
    """BatchNorm as a constant: running statistics and affine parameters fixed"""
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()


class Stage2OptimConfig(OptimConfig):
    """Optimizer and its schedule: linear warm-up, then a factor at each milestone, by step."""

    backbone_lr_factors: list[Annotated[float, Field(ge=0)]] = Field([1.0] * 5, min_length=5, max_length=5)
    """factors on the learning rate of the backbone's stem and stages of stride 4, 8, 16, 32"""
    warmup_steps: int = Field(1000, ge=0)
    warmup_start: float = Field(0.1, ge=0, le=1)
    """factor on the learning rate at the first step"""
    milestones_epochs: list[float] | None = None
    """passes over the training images after which the learning rate is multiplied by gamma"""
    milestones_steps: list[int] | None = None
    """the same in steps; give one of the two, or none for a constant rate"""
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _one_kind_of_milestones(self) -> Self:
        if self.milestones_epochs is not None and self.milestones_steps is not None:
            raise ValueError("give one of milestones_epochs and milestones_steps")
        return self

    def milestones(self, steps_per_epoch: int) -> list[int]:
        """Milestones in steps."""
        if self.milestones_steps is not None:
            return self.milestones_steps
        return [round(epochs * steps_per_epoch) for epochs in self.milestones_epochs or []]


class TrainConfig(TrainingConfig):
    """Fine-tune a detector from a backbone file on COCO annotations."""

    backbone: str
    """backbone file, timm:NAME or random:NAME"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    data: DetectionDataConfig
    resize: ResizeConfig = ResizeConfig()
    model: DetectorConfig = DetectorConfig()
    optim: Stage2OptimConfig
    val_batch_size: int = Field(4, ge=1)
    """images a forward pass in evaluation"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic depth of the backbone, where the arch has it"""

    def inputs(self) -> dict[str, Path]:
        data = self.data
        files = {"data.train_annotations": data.train_annotations, "data.train_images": data.train_images}
        if data.val_annotations and data.val_images:
            files |= {"data.val_annotations": data.val_annotations, "data.val_images": data.val_images}
        if self.backbone.endswith(".safetensors") or Path(self.backbone).is_dir():
            files["backbone"] = Path(self.backbone)
        return files


class EvaluateConfig(CommandConfig):
    """Evaluate a detector file by COCO AP."""

    model: Path
    """detector file"""
    annotations: Path
    """COCO JSON"""
    images: Path
    """folder that the JSON's file names are relative to"""
    backend: Literal["auto", "hotcoco", "pycocotools"] = "auto"
    """auto takes hotcoco where it is installed; both give the same numbers"""
    short_side: int | None = Field(None, ge=32)
    """null: as the detector's recipe says"""
    long_side: int | None = Field(None, ge=32)
    batch_size: int = Field(4, ge=1)
    """images a forward pass"""
    workers: int = Field(2, ge=0)
    """processes that decode images"""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a CUDA GPU where there is one"""

    def inputs(self) -> dict[str, Path]:
        return {"model": self.model, "annotations": self.annotations, "images": self.images}
