"""Settings of the stage-2 commands. Does not import torch, so that the runner can check them quickly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Position, Weight, Workers
from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.settings import CommandConfig, Config, ModelText, Network
from ssld.shared.config.training import EmaConfig, OptimConfig, TrainingConfig, in_steps
from ssld.shared.config.yaml_files import Alternatives, ShortForms, merge
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import kind_of
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.data_config import (
    FILES,
    DetectionDataConfig,
    file_pairs,
    listed_inputs,
    one_or_list,
    require_pairs,
    source_files,
    source_inputs,
)
from ssld.stage2_detect.distill_config import DistillConfig, MovingTeacherConfig
from ssld.stage2_detect.model_config import DetectorConfig, Fraction
from ssld.stage2_detect.published import PREFIX as PREFIX
from ssld.stage2_detect.published import PUBLISHED
from ssld.stage2_detect.published import published as published

RECIPES = Path(__file__).resolve().parent / "configs"
"""folder of the shipped recipes"""
Side = Annotated[int, Field(ge=32, le=16_384)]


class ResizeConfig(Config):
    """Image sizes and flips."""

    train_short_sides: list[Side] = Field([640, 672, 704, 736, 768, 800], min_length=1)
    """short sides in training, in pixels; one is drawn per image"""
    train_long_side: Side = 1333
    """largest long side in training, in pixels"""
    short_side: Side = 800
    """short side in evaluation and prediction, in pixels"""
    long_side: Side = 1333
    """largest long side in evaluation and prediction, in pixels"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip in training, 0 to 1"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """interpolation when resizing: bilinear or bicubic; without antialiasing, as in OpenCV"""
    kernel: Literal["reference", "fast"] = "reference"
    """implementation of the resize: reference, in float, within one grey level of OpenCV; fast, in uint8, within a few grey levels"""


class ExpectedConfig(Config):
    """Scores that a recipe is expected to reach; compared after the last evaluation."""

    images: Images | None = None
    """number of evaluation images that the expected scores refer to; a set of another size is not compared"""
    AP: float | None = Field(None, ge=0, le=100)
    """expected box AP, in percent"""
    AP_segm: float | None = Field(None, ge=0, le=100)
    """expected mask AP, in percent"""
    tolerance: float = Field(0.3, ge=0, le=100)
    """shortfall of AP that is still accepted, in percentage points, 0 to 100"""


class Stage2OptimConfig(OptimConfig):
    """Optimizer and learning-rate schedule: linear warm-up, then `schedule`, per step."""

    backbone_lr_factors: list[Weight] = Field([1.0] * 5, min_length=5, max_length=5)
    """learning-rate factors of the backbone's stem and stages of stride 4, 8, 16, 32: five numbers"""
    warmup_steps: Position = 1000
    """length of the warm-up in optimizer steps, or as a fraction of the run; limited to a tenth of the run"""
    warmup_start: float = Field(0.1, ge=0, le=1)
    """learning-rate factor at the first step of the warm-up, 0 to 1"""
    schedule: Literal["milestones", "cosine", "wsd"] = "milestones"
    """learning rate after the warm-up: milestones (multiplied by gamma at each), cosine (half a cosine to 0) or wsd (constant, then linear to 0)"""
    decay_steps: Position = 0.2
    """length of the final decay of wsd in optimizer steps, or as a fraction of the run"""
    milestones_epochs: list[Annotated[float, Field(ge=0, le=1_000_000)]] | None = None
    """passes over the training images after which the learning rate is multiplied by gamma; both milestones null: constant rate"""
    milestones_steps: list[Position] | None = None
    """optimizer steps, or fractions of the run, after which the learning rate is multiplied by gamma, in place of milestones_epochs; both null:
    constant rate"""
    gamma: float = Field(0.1, gt=0, le=1)
    """learning-rate factor at each milestone"""

    @model_validator(mode="after")
    def _one_kind_of_milestones(self) -> Self:
        if self.milestones_epochs is not None and self.milestones_steps is not None:
            raise ValueError("give one of milestones_epochs and milestones_steps")
        if self.schedule != "milestones" and (self.milestones_epochs or self.milestones_steps):
            raise ValueError(
                f"schedule {self.schedule} has no milestones: set milestones_epochs and milestones_steps to null"
            )
        for name, given in (("epochs", self.milestones_epochs), ("steps", self.milestones_steps)):
            if given and list(given) != sorted(given):
                raise ValueError(f"milestones_{name}: have to be in ascending order, but are {given}")
        if len({isinstance(milestone, float) for milestone in self.milestones_steps or []}) > 1:
            raise ValueError(f"milestones_steps: give all as steps or all as fractions, not {self.milestones_steps}")
        return self

    def total_warmup_steps(self, steps: int) -> int:
        """Return the warm-up steps of a run of `steps` steps, at most a tenth of them."""
        return min(in_steps(self.warmup_steps, steps), steps // 10)

    def milestones(self, steps_per_epoch: int, steps: int) -> list[int]:
        """Return the milestones of a run of `steps` steps in optimizer steps, `steps_per_epoch` of which are a pass over the images."""
        if self.milestones_steps is not None:
            return [in_steps(milestone, steps) for milestone in self.milestones_steps]
        return [round(epochs * steps_per_epoch) for epochs in self.milestones_epochs or []]


class TrainConfig(TrainingConfig):
    """Fine-tune a detector from a backbone file on COCO annotations."""

    recipes: ClassVar[Path | None] = RECIPES
    short_forms: ClassVar[ShortForms] = {"data": "source", "augment": "preset"}
    alternatives: ClassVar[Alternatives] = (
        *TrainingConfig.alternatives,
        *(("data.source", f"data.{name}") for name in FILES),
    )
    other_names: ClassVar[Mapping[str, str]] = {
        **TrainingConfig.other_names,
        "images": "data.train_images",
        "annotations": "data.train_annotations",
        "weights": "backbone",
        "pretrained": "backbone",
        "freeze": "model.freeze_stages",
        "imgsz": "resize.short_side",
        "img_size": "resize.short_side",
    }
    # For a run whose teacher finds nothing, or collapses.
    may_change_before_the_end: ClassVar[frozenset[str]] = TrainingConfig.may_change_before_the_end | {
        f"moving_teacher.{key}" for key in ("score_threshold", "weight", "ema_decay", "collapse")
    }
    backbone: ModelText | None = None
    """backbone file, timm:NAME or random:NAME; unused if `init` is a detector file; replaces the backbone of coco:NAME"""
    arch: str | None = None
    """timm name of the backbone, for a file whose metadata lack it"""
    data: DetectionDataConfig
    init: Path | None = None
    """detector file to start from, or coco:NAME, torchvision's detector trained on COCO (such as coco:fasterrcnn_resnet50_fpn_v2), whose settings
    become the defaults of `model` and `resize`; classes may differ: rows of its heads are reused by class name"""
    unit_scale: bool = False
    """divide the initial weights of the FPN's lateral convolutions by the scale (root mean square) of the backbone's feature maps, measured on eight
    training images, and their learning rate accordingly; false: as in published recipes; unused if `init` is given"""
    unlabeled: Path | list[Path] | None = None
    """unlabeled images for `distill`: folder, pattern, text file of paths, COCO JSON file, or a list of these; with `pseudo`: its images' folder"""
    pseudo: Path | None = None
    """pseudo_labels.json for `unlabeled`, from ssld predict --pseudo_labels: boxes to train on; images without boxes are left out"""
    labeled_ratio: float = Field(0.5, gt=0, le=1)
    """share of labeled images in a batch, above 0 to 1, if `unlabeled` is given; 1: no unlabeled images"""
    distill: DistillConfig | None = None
    moving_teacher: MovingTeacherConfig | None = None
    cache_annotations: bool = True
    """cache large annotation files, parsed, and the EXIF orientation of images in ~/.cache/ssld (or $XDG_CACHE_HOME/ssld) for later starts"""
    resize: ResizeConfig = ResizeConfig()
    augment: AugmentConfig = AugmentConfig()
    model: DetectorConfig = DetectorConfig()
    optim: Stage2OptimConfig
    val_batch_size: BatchSize = 4
    """images per forward pass and process in evaluation"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """rate of stochastic depth in the backbone, 0 to below 1; an error for an architecture without it"""
    ema: EmaConfig | None = None
    val_loss: bool = False
    """report the losses on the evaluation images too"""
    patience: Count | None = None
    """consecutive evaluations without improvement after which training stops; needs evaluate_every; null: never"""
    expected: ExpectedConfig | None = None
    export_check: bool = False
    """try an export to ONNX before the first step, so that a detector that cannot be exported costs no training"""

    @field_validator("unlabeled", mode="before")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        return one_or_list(value)

    @model_validator(mode="before")
    @classmethod
    def _follow_published(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Make the settings of published weights the defaults of `model` and `resize`."""
        init = str(values.get("init") or "")
        if not init.startswith(PREFIX):
            return values
        try:
            about = published(init, "init")
        except UserError as error:
            raise ValueError(str(error)) from None
        return values | {
            "model": merge(about.model, _given(values.get("model"))),
            "resize": merge(about.resize, _given(values.get("resize"))),
        }

    @property
    def init_is_published(self) -> bool:
        """Whether `init` names published weights in place of a file."""
        return self.init is not None and str(self.init).startswith(PREFIX)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.init_is_published:
            weights = DetectorConfig.model_validate(published(str(self.init), "init").model)
            for key, theirs in weights.geometry().items():
                if (ours := self.model.geometry()[key]) != theirs:
                    raise ValueError(
                        f"model.{key} is {ours}, the weights of {self.init} have {theirs}; leave it out, the settings follow the weights"
                    )
        if self.init is None and self.model.freeze_norm and (norms := self.model.new_batch_norms):
            raise ValueError(
                f"model.{norms[0]}: batch: its new BatchNorm layers would stay as they are, since model.freeze_norm freezes them too; "
                "set freeze_norm: false or the norm to group"
            )
        if self.backbone is None and self.init is None:
            raise ValueError(
                "backbone: missing; give a backbone file, timm:NAME or random:NAME, or a detector file as init"
            )
        if self.val_loss and not self.data.may_evaluate:
            raise ValueError("val_loss needs evaluation images: give data.val_annotations and data.val_images too")
        if self.patience is not None and (self.evaluate_every is None or not self.data.may_evaluate):
            raise ValueError("patience counts evaluations: give evaluate_every and data.val_annotations too")
        if self.pseudo is not None and self.unlabeled is None:
            raise ValueError("pseudo: has boxes of unlabeled images; give their folder as unlabeled")
        if self.pseudo is not None and isinstance(self.unlabeled, list):
            raise ValueError(
                "unlabeled: with pseudo, give the one folder that the file names in pseudo are relative to"
            )
        if self.moving_teacher is not None and (fault := self._moving_fault(self.moving_teacher)):
            raise ValueError(fault)
        if self.unlabeled is not None and self.distill is None and self.pseudo is None:
            raise ValueError(
                "unlabeled: the images are used by distillation or with pseudo-labels; give distill.teacher or pseudo, or the images as "
                "moving_teacher.unlabeled"
            )
        if self.distill is not None and (fault := self.distill.fault(self.model)):
            raise ValueError(fault)
        if self.unlabeled is not None and self.pseudo is None and self.model.is_dense:
            raise ValueError(
                f"unlabeled: images without pseudo-labels are used by R-CNN detectors only, and model.kind is {self.model.kind}; "
                "give pseudo, which ssld predict --pseudo_labels writes"
            )
        if (self.augment.auto_augment or self.augment.auto_augment_unlabeled) and self.model.has_masks:
            raise ValueError("augment.auto_augment moves pixels inside boxes: it cannot be used with masks")
        return self

    def _moving_fault(self, moving: MovingTeacherConfig) -> str | None:
        """Return an error message if other settings do not go with a moving teacher, else None."""
        if self.distill is not None:
            return "moving_teacher: the detector has one teacher; give distill or moving_teacher"
        if self.unlabeled is not None or self.pseudo is not None:
            key = "unlabeled" if self.unlabeled is not None else "pseudo"
            return f"{key}: belongs to training without a moving teacher, which has its own moving_teacher.unlabeled; leave {key} out"
        if self.ema is not None:
            return "ema: the moving teacher is the average of the weights, and is evaluated and exported; leave ema out, set moving_teacher.ema_decay"
        if self.augment.auto_augment_unlabeled or (
            self.augment.auto_augment and self.augment.auto_augment_unlabeled is None
        ):
            return (
                "augment.auto_augment moves pixels, and the two views of an unlabeled image show it at the same places; "
                "set augment.auto_augment_unlabeled to false"
            )
        return moving.fault(self.model)

    @property
    def labeled_share(self) -> float:
        """Share of labeled images in a batch with unlabeled ones."""
        return 1 - self.moving_teacher.ratio if self.moving_teacher else self.labeled_ratio

    def in_steps(self, steps: int) -> Self:
        """Return the settings of a run of `steps` steps, with the burn-in of a moving teacher as whole steps too, and numbers for the weights and
        thresholds that depend on the detector."""
        config, model, others = super().in_steps(steps), self.model, dict[str, Any]()
        if moving := self.moving_teacher:
            numbers = {
                "burn_in": in_steps(moving.burn_in, steps),
                "weight": moving.unlabeled_weight(dense=model.is_dense),
                "score_threshold": moving.threshold(model),
            }
            others["moving_teacher"] = moving.model_copy(update=numbers)
        if distill := self.distill:
            numbers = {"pkd_weight": distill.pkd(model), "roi_weight": distill.roi(model)}
            others["distill"] = distill.model_copy(update=numbers)
        return config.model_copy(update=others)

    def inputs(self) -> dict[str, Path]:
        files = self.data.inputs("data")
        if self.moving_teacher:
            files |= self.moving_teacher.inputs("moving_teacher")
        if self.unlabeled is not None:
            files |= source_files("unlabeled", self.unlabeled)
        if self.backbone and self.reads_backbone and kind_of(self.backbone) in ("file", "folder", "path"):
            files["backbone"] = Path(self.backbone)
        others = {
            "init": None if self.init_is_published else self.init,
            "pseudo": self.pseudo,
            "distill.teacher": self.distill.teacher if self.distill else None,
        }
        return files | {key: path for key, path in others.items() if path is not None}

    def hub_data(self) -> dict[str, str]:
        source = self.data.source
        return {"data.source": source} if source and source.startswith("hub:") else {}

    def networks(self) -> dict[str, Network]:
        return {"backbone": Network(self.backbone, self.arch)} if self.backbone and self.reads_backbone else {}

    def published_weights(self) -> dict[str, str]:
        if not self.init_is_published:
            return {}
        return {f"init: {self.init}": f"url:{published(str(self.init), 'init').url}"}

    @property
    def reads_backbone(self) -> bool:
        """Whether the weights of `backbone` are used: not beside a detector file, which has a backbone of its own."""
        return self.init is None or self.init_is_published

    @property
    def freezes_random_norms(self) -> bool:
        """Whether the backbone has random weights and its BatchNorm layers, if it has any, are frozen."""
        random = self.backbone is not None and kind_of(str(self.backbone)) == "random"
        return random and self.reads_backbone and self.model.freeze_norm


def _given(group: Any) -> dict[str, Any]:
    """Return the settings of a group that were given, as a dict."""
    return group.model_dump(exclude_unset=True) if isinstance(group, Config) else dict(group or {})


class TTAConfig(Config):
    """Test-time augmentation: detections of several views of an image, merged by NMS."""

    short_sides: list[Side] = []
    """short sides of the views, in pixels; empty: the one in the detector's recipe"""
    flip: bool = True
    """add the horizontal flip of each view"""
    nms_iou: Fraction = 0.5
    """IoU threshold of the NMS that merges the views, among the detections of one class"""


class RunDetectorConfig(ComputeConfig):
    """Settings of the commands that run a detector file over images."""

    model: Path
    """detector file"""
    short_side: Side | None = None
    """short side of the resized images, in pixels; null: from the detector's recipe"""
    long_side: Side | None = None
    """largest long side of the resized images, in pixels; null: from the detector's recipe"""
    tta: TTAConfig | None = None
    """settings of test-time augmentation; null: one view per image"""
    batch_size: BatchSize = 4
    """images per forward pass and process"""
    workers: Workers = 2
    """worker processes per rank that decode images; 0: decode in the main process"""


class EvaluateConfig(RunDetectorConfig):
    """Evaluate a detector file by COCO AP."""

    alternatives: ClassVar[Alternatives] = (("data", "annotations"), ("data", "images"))
    data: str | None = None
    """data set as in training: data.yaml or folder (YOLO), folder (VOC, LabelMe, COCO, Roboflow, Hugging Face), Parquet files or hub:ORG/NAME;
    null: the files of the next two settings"""
    split: str | None = None
    """name of the part of `data` to evaluate on; null: val, valid or validation, else test"""
    annotations: Path | list[Path] | None = None
    """COCO JSON file with the ground truth, or a list of files"""
    images: Path | list[Path] | None = None
    """folder that the file names in the COCO JSON file are relative to, or a list with one folder for each file"""
    backend: Literal["auto", "hotcoco", "pycocotools"] = "auto"
    """COCO evaluator: hotcoco, or pycocotools as a check, much slower with equal numbers; auto: hotcoco"""
    score_threshold: float = Field(0.5, ge=0, lt=1)
    """lowest score of the detections counted in precision, recall and F1 per class and in the confusion matrix"""
    cache_annotations: bool = True
    """cache large annotation files, parsed, and the EXIF orientation of images in ~/.cache/ssld (or $XDG_CACHE_HOME/ssld) for later starts"""
    expected: ExpectedConfig | None = None
    """scores to compare the result with, as recipes have them"""
    compare: Path | None = None
    """detections.json of another evaluation on the same annotations; the difference in AP is reported with a 95 % interval"""
    trackers: list[Literal["tensorboard"]] = []
    """trackers: tensorboard, for the scores and images; [] for none"""

    @field_validator("annotations", "images", mode="before")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        return one_or_list(value)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        files = [key for key in ("annotations", "images") if getattr(self, key) is not None]
        if self.data is not None and files:
            raise ValueError(f"data has its own parts; leave out {', '.join(files)}")
        if self.data is None and len(files) < 2:
            missing = "images" if self.annotations is not None else "annotations"
            raise ValueError(f"{missing}: missing; give annotations and images, or data, the path of a data set")
        if self.split is not None and self.data is None:
            raise ValueError("split: is a part of data; give data, or leave it out")
        require_pairs("annotations", "images", self.annotations, self.images)
        return self

    def pairs(self) -> list[tuple[Path, Path]]:
        """Return (COCO file, image folder) of each file given; empty with `data`."""
        return file_pairs(self.annotations, self.images)

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model} | (source_inputs("data", self.data) if self.data else {})
        files |= listed_inputs("annotations", self.annotations) | listed_inputs("images", self.images)
        return files | ({"compare": self.compare} if self.compare else {})


class ConvertDataConfig(CommandConfig):
    """Convert detection data in the layout of YOLO, Pascal VOC, LabelMe or Hugging Face to COCO JSON."""

    source: str
    """data to convert: data.yaml or folder (YOLO), folder with Annotations/ (Pascal VOC), folder of JSON files (LabelMe),
    folder with metadata.jsonl, .csv or .parquet (Hugging Face), Parquet file or folder of Parquet files, or hub:ORG/NAME"""
    splits: list[str] = []
    """names of the splits to convert; empty: all"""
    classes: Path | None = None
    """text file with one class name per line, in order of class number; null: names from the data"""
    box_format: Literal["xywh", "xyxy", "xyxy_relative", "cxcywh_relative"] = "xywh"
    """box format in data of Hugging Face: xywh or xyxy in pixels, xyxy_relative or cxcywh_relative in shares of the image size"""
    voc_inclusive: bool = True
    """read VOC corners as first and last pixel counted from 1, as in Pascal VOC; false, and where most have fractions: as edges counted from 0"""
    voc_difficult: Literal["ignore", "keep"] = "ignore"
    """treatment of VOC objects marked difficult: ignore, as iscrowd, neither trained on nor counted in evaluation; keep, as other objects"""
    allow_loss: bool = False
    """convert even if over half of the images or boxes of a split or a class, or all boxes of a class, are unusable; false: stop with an error"""

    def inputs(self) -> dict[str, Path]:
        return source_inputs("source", self.source) | ({"classes": self.classes} if self.classes else {})


class ConvertPaddleConfig(CommandConfig):
    """Convert an official PaddleDetection file of an R-CNN detector with FPN to a detector file; --config takes the recipe."""

    recipes: ClassVar[Path | None] = RECIPES
    weights: Path
    """PaddleDetection weights, a .pdparams file"""
    annotations: Path | None = None
    """COCO JSON file with the classes of the weights, in their order; null: the 80 classes of COCO"""
    resize: ResizeConfig = ResizeConfig()
    model: DetectorConfig = DetectorConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_training_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        training = TrainConfig.model_fields.keys() - cls.model_fields.keys()
        return {key: value for key, value in values.items() if key not in training}

    def inputs(self) -> dict[str, Path]:
        return {"weights": self.weights} | ({"annotations": self.annotations} if self.annotations else {})


class ConvertForeignConfig(CommandConfig):
    """Convert a detector with FPN of torchvision, detectron2 or mmdetection to a detector file."""

    weights: str
    """weights of torchvision, detectron2 or mmdetection, a .pth, .pkl or .safetensors file; or the name of weights that torchvision publishes,
    such as fasterrcnn_resnet50_fpn_v2"""
    annotations: Path | None = None
    """COCO JSON file with the classes of the weights in their order (torchvision: numbered from 1, or labeled by category id); null: the 80
    classes of COCO"""
    architecture: str | None = None
    """name of torchvision's detector that a file of weights is of, where two have the same tensors: fasterrcnn_mobilenet_v3_large_fpn, for images of
    800 to 1333 pixels, or fasterrcnn_mobilenet_v3_large_320_fpn, for 320 to 640; null: the one in the file's name, else the first"""
    norm_eps: Weight | None = None
    """epsilon of the backbone's BatchNorm in torchvision; null: 0 for the published ResNets of v1, else 1e-5; 0 for weights fine-tuned from those"""
    caffe: bool | None = None
    """use of a Caffe ResNet in detectron2 or mmdetection, which has its strides in the 1x1 convolutions and takes blue, green, red without a
    deviation; null: as the file shows"""

    def inputs(self) -> dict[str, Path]:
        files = {} if self.weights.removeprefix(PREFIX) in PUBLISHED else {"weights": Path(self.weights)}
        return files | ({"annotations": self.annotations} if self.annotations else {})
