"""Settings of the stage-2 commands. Does not import torch, so that the runner can check them at once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Weight, Workers
from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.settings import CommandConfig, Config, ModelText, Network
from ssld.shared.config.training import EmaConfig, OptimConfig, TrainingConfig
from ssld.shared.models.downloads import kind_of
from ssld.stage2_detect.distill_config import DistillConfig
from ssld.stage2_detect.model_config import DetectorConfig, Fraction
from ssld.stage2_detect.yolo_layout import find_yolo, input_places

Side = Annotated[int, Field(ge=32, le=16_384)]
Scale = Annotated[float, Field(gt=0, le=100)]


class DetectionDataConfig(Config):
    """COCO JSON files and the folders their file names are relative to."""

    train_annotations: Path
    """annotations to train on"""
    train_images: Path
    """folder of their images"""
    val_annotations: Path | None = None
    """annotations to evaluate on; null does not evaluate"""
    val_images: Path | None = None
    """folder of their images"""
    keep_empty: bool = True
    """whether images without any object are trained on"""
    allow_loss: bool = False
    """train on the rest where more than half of the boxes, or of those of one class, cannot be used; false stops with the cause"""
    repeat_threshold: Fraction | None = None
    """classes that fewer than this share of the images show are shown more often (repeat factors, arXiv 1908.03195)"""

    @model_validator(mode="after")
    def _val_together(self) -> Self:
        if (self.val_annotations is None) != (self.val_images is None):
            raise ValueError("give both val_annotations and val_images, or neither")
        return self


class ResizeConfig(Config):
    """Image sizes and flips."""

    train_short_sides: list[Side] = Field([640, 672, 704, 736, 768, 800], min_length=1)
    """in training the short side is drawn from these"""
    train_long_side: Side = 1333
    """largest long side in training"""
    short_side: Side = 800
    """the short side in evaluation and prediction"""
    long_side: Side = 1333
    """largest long side in evaluation and prediction"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """between pixels, without smoothing beforehand, as OpenCV does it"""
    kernel: Literal["reference", "fast"] = "reference"
    """reference: float arithmetic, equal to OpenCV's to one grey level; fast: on uint8, a few levels off"""


class AugmentConfig(Config):
    """Augmentation of training images beyond size and flip."""

    auto_augment: bool = False
    """AutoAugment for detection, policy v1 (arXiv 1906.11172), on the image as it is stored"""
    auto_augment_unlabeled: bool | None = None
    """the same for the images of unlabeled; null: as the labeled ones"""
    large_scale_jitter: tuple[Scale, Scale] | None = None
    """least and largest scale of the image inside a square of train_long_side, cropped or padded to it (arXiv
    2012.07177); replaces train_short_sides"""

    @model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.large_scale_jitter and self.large_scale_jitter[0] > self.large_scale_jitter[1]:
            raise ValueError("large_scale_jitter: the least scale comes first")
        return self


class ExpectedConfig(Config):
    """Scores that a recipe should reach; compared after its last evaluation."""

    images: Images | None = None
    """evaluation images of the set that the scores are for; another set is not compared"""
    AP: float | None = Field(None, ge=0, le=100)
    """of boxes, in percent"""
    AP_segm: float | None = Field(None, ge=0, le=100)
    """of masks, in percent"""
    tolerance: float = Field(0.3, ge=0, le=100)
    """allowed below, in percent points"""


class Stage2OptimConfig(OptimConfig):
    """Optimizer and its schedule: linear warm-up, then a factor at each milestone, by step."""

    backbone_lr_factors: list[Weight] = Field([1.0] * 5, min_length=5, max_length=5)
    """factors on the learning rate of the backbone's stem and stages of stride 4, 8, 16, 32"""
    warmup_steps: int = Field(1000, ge=0, le=1_000_000_000)
    """at most; no more than a tenth of the run is warm-up"""
    warmup_start: float = Field(0.1, ge=0, le=1)
    """factor on the learning rate at the first step"""
    milestones_epochs: list[Annotated[float, Field(ge=0, le=1_000_000)]] | None = None
    """passes over the training images after which the learning rate is multiplied by gamma"""
    milestones_steps: list[Annotated[int, Field(ge=0, le=1_000_000_000)]] | None = None
    """the same in steps; give one of the two, or none for a constant rate"""
    gamma: float = Field(0.1, gt=0, le=1)
    """factor on the learning rate at a milestone"""

    @model_validator(mode="after")
    def _one_kind_of_milestones(self) -> Self:
        if self.milestones_epochs is not None and self.milestones_steps is not None:
            raise ValueError("give one of milestones_epochs and milestones_steps")
        for name, given in (("epochs", self.milestones_epochs), ("steps", self.milestones_steps)):
            if given and list(given) != sorted(given):
                raise ValueError(f"milestones_{name}: one comes after the other, but {given} do not")
        return self

    def milestones(self, steps_per_epoch: int) -> list[int]:
        """Milestones in steps."""
        if self.milestones_steps is not None:
            return self.milestones_steps
        return [round(epochs * steps_per_epoch) for epochs in self.milestones_epochs or []]


class TrainConfig(TrainingConfig):
    """Fine-tune a detector from a backbone file on COCO annotations."""

    backbone: ModelText | None = None
    """backbone file, timm:NAME or random:NAME; not read where there is `init`"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    data: DetectionDataConfig
    init: Path | None = None
    """detector file to go on from, on the same or other classes; rows of its heads are kept by class name"""
    unlabeled: Path | None = None
    """folder of images without annotations, for distillation or with pseudo"""
    pseudo: Path | None = None
    """boxes in them, from predict.py --pseudo_labels: trained on as if they were annotations; images without any are left out"""
    labeled_ratio: float = Field(0.5, gt=0, le=1)
    """share of labeled images in a batch where there are unlabeled ones; 1 leaves these out"""
    distill: DistillConfig | None = None
    cache_annotations: bool = True
    """keep the content of large annotation files, and which way up images are, in ~/.cache/ssld (or $XDG_CACHE_HOME/ssld), for the next start"""
    resize: ResizeConfig = ResizeConfig()
    augment: AugmentConfig = AugmentConfig()
    model: DetectorConfig = DetectorConfig()
    optim: Stage2OptimConfig
    val_batch_size: BatchSize = 4
    """images a forward pass in evaluation"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic depth of the backbone, where the arch has it"""
    ema: EmaConfig | None = None
    val_loss: bool = False
    """also report the losses on the evaluation images"""
    patience: Count | None = None
    """stop after this many evaluations in a row without a better AP; needs evaluate_every"""
    expected: ExpectedConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.backbone is None and self.init is None:
            raise ValueError(
                "backbone: missing; give a backbone file, timm:NAME or random:NAME, or a detector file as init"
            )
        if self.val_loss and self.data.val_annotations is None:
            raise ValueError(
                "val_loss is measured on evaluation images: give data.val_annotations and data.val_images too"
            )
        if self.patience is not None and (self.evaluate_every is None or self.data.val_annotations is None):
            raise ValueError("patience counts evaluations: give evaluate_every and data.val_annotations too")
        if self.pseudo is not None and self.unlabeled is None:
            raise ValueError("pseudo: has the boxes of images without annotations; give their folder as unlabeled")
        if self.unlabeled is not None and self.distill is None and self.pseudo is None:
            raise ValueError(
                "unlabeled: images without annotations teach by distillation or by pseudo-labels; give distill.teacher or pseudo"
            )
        if self.distill is not None and (fault := self.distill.fault(self.model)):
            raise ValueError(fault)
        if self.unlabeled is not None and self.pseudo is None and self.model.is_dense:
            raise ValueError(
                f"unlabeled: without boxes in them images teach R-CNN detectors only, and model.kind is {self.model.kind}; "
                "give pseudo, which predict.py --pseudo_labels writes"
            )
        if (self.augment.auto_augment or self.augment.auto_augment_unlabeled) and self.model.has_masks:
            raise ValueError("augment.auto_augment moves pixels inside boxes: it cannot go with masks")
        return self

    def inputs(self) -> dict[str, Path]:
        data = self.data
        files = {"data.train_annotations": data.train_annotations, "data.train_images": data.train_images}
        if data.val_annotations and data.val_images:
            files |= {"data.val_annotations": data.val_annotations, "data.val_images": data.val_images}
        if self.backbone and not self.init and kind_of(self.backbone) in ("file", "folder", "path"):
            files["backbone"] = Path(self.backbone)
        others = {
            "init": self.init,
            "unlabeled": self.unlabeled,
            "pseudo": self.pseudo,
            "distill.teacher": self.distill.teacher if self.distill else None,
        }
        return files | {key: path for key, path in others.items() if path is not None}

    def networks(self) -> dict[str, Network]:
        return {"backbone": Network(self.backbone, self.arch)} if self.backbone and not self.init else {}


class TTAConfig(Config):
    """Test-time augmentation: detections of several views of an image, merged by NMS."""

    short_sides: list[Side] = []
    """of the views; empty: the one of the recipe"""
    flip: bool = True
    """each view mirrored too"""
    nms_iou: Fraction = 0.5
    """overlap with a better box of the class at which a box of any view goes"""


class RunDetectorConfig(ComputeConfig):
    """What every command has that runs a detector file over images."""

    model: Path
    """detector file"""
    short_side: Side | None = None
    """null: as the detector's recipe says"""
    long_side: Side | None = None
    """largest long side; null: as the detector's recipe says"""
    tta: TTAConfig | None = None
    """null looks at one view an image"""
    batch_size: BatchSize = 4
    """images a forward pass"""
    workers: Workers = 2
    """processes that decode images"""


class EvaluateConfig(RunDetectorConfig):
    """Evaluate a detector file by COCO AP."""

    annotations: Path
    """COCO JSON"""
    images: Path
    """folder that the JSON's file names are relative to"""
    backend: Literal["auto", "hotcoco", "pycocotools"] = "auto"
    """auto takes hotcoco where it is installed; both give the same numbers"""
    score_threshold: float = Field(0.5, ge=0, lt=1)
    """of the counts: precision, recall and F1 of each class, and the confusion matrix"""
    cache_annotations: bool = True
    """keep the content of large annotation files, and which way up images are, in ~/.cache/ssld (or $XDG_CACHE_HOME/ssld), for the next start"""
    expected: ExpectedConfig | None = None
    """scores to compare with, as a recipe has them"""
    compare: Path | None = None
    """detections.json of another evaluation on the same annotations; the difference in AP is reported with a 95 % interval"""

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model, "annotations": self.annotations, "images": self.images}
        return files | ({"compare": self.compare} if self.compare else {})


class ConvertDataConfig(CommandConfig):
    """Turn detection data in YOLO, Pascal VOC or Hugging Face layout into COCO JSON."""

    source: str
    """data.yaml or folder (YOLO), folder with Annotations/ (Pascal VOC), Parquet file or folder of them, or
    hub:ORG/NAME"""
    splits: list[str] = []
    """those to convert; empty: all there are"""
    classes: Path | None = None
    """text file with a class name a line, in order; null: as the data say"""
    box_format: Literal["xywh", "xyxy", "xyxy_relative", "cxcywh_relative"] = "xywh"
    """of Parquet files, whose data sets differ in it; the first two are in pixels"""
    voc_inclusive: bool = True
    """corners are the first and the last pixel, counted from 1, as in VOC; false: edges counted from 0"""
    voc_difficult: Literal["ignore", "keep"] = "ignore"
    """ignore makes objects marked difficult iscrowd: not trained on, neither found nor missed in evaluation"""

    allow_loss: bool = False
    """go on where more than half of the images or boxes of a split or a class, or all of a class, would be left out"""

    def inputs(self) -> dict[str, Path]:
        places = {} if self.source.startswith("hub:") else {"source": Path(self.source)}
        layout = find_yolo(Path(self.source))
        if layout and not layout.file.is_dir():  # a description names folders elsewhere
            places |= {f"source: {name}": place for name, place in input_places(layout).items()}
        return places | ({"classes": self.classes} if self.classes else {})


class ConvertPaddleConfig(CommandConfig):
    """Turn an official PaddleDetection file of an R-CNN detector with FPN into a detector file; --config takes the recipe."""

    weights: Path
    """.pdparams file"""
    annotations: Path | None = None
    """COCO JSON with the classes of the file, in its order; null: the 80 of COCO"""
    resize: ResizeConfig = ResizeConfig()
    model: DetectorConfig = DetectorConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_how_to_train(cls, values: dict[str, Any]) -> dict[str, Any]:
        training = TrainConfig.model_fields.keys() - cls.model_fields.keys()
        return {key: value for key, value in values.items() if key not in training}

    def inputs(self) -> dict[str, Path]:
        return {"weights": self.weights} | ({"annotations": self.annotations} if self.annotations else {})
