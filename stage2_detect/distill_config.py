"""Settings of distillation from a teacher detector, and of semi-supervised training under a moving teacher. Does not import torch.

A moving teacher, from files to losses: `data/unlabeled_images.py` lists the unlabeled images; `data/loaders.py` makes a weak and a strong view of
each, of equal geometry; `training/trained_detector.py` keeps the teacher, an average of the detector; `distillation/moving.py` computes the losses
between the two; `training/collapse.py` watches the teacher. The loop in `train.py` connects them.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import Position, Positive, Weight
from ssld.shared.config.settings import Config
from ssld.shared.files import ImageFolder
from ssld.stage2_detect.augment_config import StrongViewConfig
from ssld.stage2_detect.data_config import as_list, one_or_list, source_files
from ssld.stage2_detect.model_config import DetectorConfig, Fraction

# Steps below which the log doubts LD's temperature: it is published for 90,000, and harmed in 100; in 400 it neither harmed nor helped.
SHORT = 1000
PKD_WEIGHT, ROI_WEIGHT = 6.0, 1.0  # defaults for R-CNN students
RCNN_THRESHOLD, DENSE_THRESHOLD = 0.7, 0.3  # defaults of score_threshold: scores of one-stage detectors are lower
# Defaults of moving_teacher.weight: with 1 a RetinaNet fell 9 AP below training without unlabeled images.
RCNN_UNLABELED, DENSE_UNLABELED = 1.0, 0.25


class LDConfig(Config):
    """Localization distillation of a GFL student (arXiv 2102.12252); the defaults are those behind its published 42.1."""

    ld_weight: Weight = 0.25
    """weight of loss_ld: distributions of the distances to the box sides, on the student's positives"""
    ld_vlr_weight: Weight = 0.25
    """weight of loss_ld_vlr: distance distributions in the valuable localization region (VLR); divided by 4, as in the released code"""
    kd_weight: Weight = 10.0
    """weight of loss_kd: class probabilities, on the student's positives"""
    kd_vlr_weight: Weight = 0.0
    """weight of loss_kd_vlr: class probabilities in the valuable localization region"""
    imitation_weight: Weight = 0.0
    """weight of loss_imitation: squared error of the feature maps at imitated_cells"""
    ld_temperature: Positive = 10.0
    """temperature of the distance distributions"""
    kd_temperature: Positive = 2.0
    """temperature of the class probabilities"""
    valuable_region: Literal["objects", "negatives"] = "objects"
    """cells of the valuable localization region: objects, near an object by IoU; negatives, all negatives weighted by the student's score (the
    form for heads without anchors)"""
    gamma: Fraction = 0.25
    """share of an object's positive threshold, 0 to 1, from which cells are in its valuable region (valuable_region: objects)"""
    overlap: Literal["anchor", "union"] = "anchor"
    """overlap that defines the valuable region (valuable_region: objects): union, the paper's distance-IoU; anchor, divided by the
    anchor's area instead of the union, as in the released code"""
    imitated_cells: Literal["inside", "fine_grained", "gi"] = "fine_grained"
    """cells in loss_imitation: inside, with the center in an object; fine_grained, with an IoU near the object's best; gi (general
    instances), in the ten boxes per level and image on which student and teacher differ most"""
    normalization: Literal["global", "reference"] = "global"
    """normalization of the terms: reference, sum over the images of a process, as released (grows with their number); global, equal to
    reference with two images per process for any number of processes and images"""

    @property
    def weights(self) -> dict[str, float]:
        """Factor of each term, by the name of its loss."""
        return {
            "loss_ld": self.ld_weight,
            "loss_ld_vlr": self.ld_vlr_weight,
            "loss_kd": self.kd_weight,
            "loss_kd_vlr": self.kd_vlr_weight,
            "loss_imitation": self.imitation_weight,
        }


class ADLConfig(Config):
    """Adaptive distillation of a RetinaNet student (arXiv 1901.00366)."""

    weight: Weight = 1.0
    """weight of loss_adl"""
    beta: Weight = 1.0
    """factor of the teacher's entropy in the weight of an anchor; the released code's LOSS_BETA is 1 - beta"""
    gamma: Weight = 2.0
    """exponent that down-weights anchors on which student and teacher agree"""
    form: Literal["paper", "code", "focal"] = "paper"
    """loss variant: paper (weighted KL), code (half soft cross-entropy, as released), focal (FDL)"""
    normalization: Literal["global", "rank"] = "global"
    """sum of the teacher's probabilities that divides the loss: global, over all processes; rank, per process, as released"""

    @property
    def weights(self) -> dict[str, float]:
        """Factor of the term, by the name of its loss."""
        return {"loss_adl": self.weight}


class DistillConfig(Config):
    """Losses from a teacher detector, on labeled and on unlabeled images."""

    teacher: Path
    """detector file of the teacher"""
    pkd_weight: Weight | None = None
    """weight of loss_pkd: Pearson correlation of the feature pyramids (arXiv 2207.02039); null: 6 for R-CNN students, 0 for one-stage students"""
    cwd_weight: Weight = 0.0
    """weight of loss_cwd: channel-wise divergence of the feature pyramids (arXiv 2011.13256)"""
    cwd_class_weight: Weight = 0.0
    """weight of loss_cwd_class: channel-wise divergence of a one-stage detector's class maps"""
    cwd_temperature: Positive = 1.0
    """temperature of loss_cwd and loss_cwd_class"""
    roi_weight: Weight | None = None
    """weight of loss_roi_kd: the teacher's soft labels for the student's RoIs; null: 1 for R-CNN students, 0 for one-stage students"""
    temperature: Positive = 1.0
    """temperature of the soft labels in loss_roi_kd"""
    ld: LDConfig | None = None
    """settings of the losses between a GFL student and a GFL teacher; null: the defaults"""
    adl: ADLConfig | None = None
    """settings of the losses between a RetinaNet student and a RetinaNet teacher; null: the defaults"""
    check_images: int = Field(100, ge=0, le=1_000_000)
    """number of evaluation images for a check of the teacher's AP before training; 0: no check"""
    check_ap: Fraction = 0.01
    """AP of the teacher, 0 to 1, below which the run stops before training"""

    def pkd(self, model: DetectorConfig) -> float:
        """Return `pkd_weight`, or its default for this student if it is null."""
        return (0.0 if model.is_dense else PKD_WEIGHT) if self.pkd_weight is None else self.pkd_weight

    def roi(self, model: DetectorConfig) -> float:
        """Return `roi_weight`, or its default for this student if it is null."""
        return (0.0 if model.is_dense else ROI_WEIGHT) if self.roi_weight is None else self.roi_weight

    def head_terms(self, model: DetectorConfig) -> LDConfig | ADLConfig | None:
        """Return the settings of the losses between the heads of this student and its teacher, or their defaults; None for an R-CNN."""
        if model.kind == "gfl":
            return self.ld or LDConfig()
        return (self.adl or ADLConfig()) if model.kind == "retinanet" else None

    def doubt(self, model: DetectorConfig, steps: int) -> str | None:
        """Return a line for the log if a term of LD is on at a temperature that is known to suit long trainings alone, else None."""
        ld = self.head_terms(model)
        if not isinstance(ld, LDConfig) or steps >= SHORT:
            return None
        if ld.ld_temperature <= 1 or not (ld.ld_weight or ld.ld_vlr_weight):
            return None
        return (
            f"distill.ld.ld_temperature: {ld.ld_temperature:g} suits trainings of many thousand steps; in 100 steps the defaults cost a small "
            "detector 1.5 to 5.8 AP, where ld_temperature 1 with ld_vlr_weight and kd_weight 0 gained 0 to 1.7 (docs/detectors.md, LD and adaptive "
            "distillation)"
        )

    def fault(self, model: DetectorConfig) -> str | None:
        """Return an error message if a setting does not fit a student of this architecture, else None."""
        fits = {"gfl": "distill.ld", "retinanet": "distill.adl"}.get(
            model.kind, "distill.pkd_weight, cwd_weight and roi_weight"
        )
        hint = f"model.kind is {model.kind}, whose settings are {fits}"
        if self.ld and model.kind != "gfl":
            return f"distill.ld: compares distributions of distances, which only gfl heads predict; {hint}"
        if self.adl and model.kind != "retinanet":
            return (
                f"distill.adl: compares class probabilities per anchor, as retinanet's focal loss trains them; {hint}"
            )
        if model.is_dense and (self.roi_weight or self.temperature != 1):
            key = "roi_weight" if self.roi_weight else "temperature"
            return f"distill.{key}: applies to RoIs, which a one-stage detector does not have; {hint}"
        if self.cwd_class_weight and not model.is_dense:
            return f"distill.cwd_class_weight: applies to class maps, which only one-stage detectors have; {hint}"
        weights = [self.pkd(model), self.roi(model), self.cwd_weight, self.cwd_class_weight]
        if terms := self.head_terms(model):
            weights += terms.weights.values()
        if not any(weights):
            names = "distill.ld" if model.kind == "gfl" else "distill.adl.weight"
            which = (
                f"{names}, pkd_weight, cwd_weight and cwd_class_weight"
                if model.is_dense
                else "pkd_weight, cwd_weight and roi_weight"
            )
            return f"{which} are 0: no loss uses the teacher"
        return None


class MovingTeacherConfig(Config):
    """Semi-supervised training: a moving average of the detector, the teacher, finds objects in unlabeled images for it."""

    unlabeled: Path | list[Path]
    """unlabeled images: a folder, a quoted pattern, a text file with one path per line, or a COCO JSON file, whose annotations are not read; or a
    list of these"""
    images: Path | None = None
    """folder that the file names in COCO JSON files of `unlabeled` are relative to; null: the folder of the JSON file"""
    ratio: float = Field(0.5, gt=0, lt=1)
    """share of unlabeled images in a batch after the burn-in, above 0 to below 1; batches of the burn-in have the labeled images alone"""
    burn_in: Position = 0.3
    """length of the burn-in on labeled images alone, in optimizer steps, or as a fraction of the run; the teacher then begins as a copy"""
    ema_decay: float = Field(0.999, ge=0, le=1)
    """decay of the teacher's average per optimizer step, 0 to 1; increased from small values after the burn-in; 1: the teacher stays that copy"""
    weight: Weight | None = None
    """weight of the losses on unlabeled images; null: 1 for R-CNN detectors, 0.25 for one-stage detectors"""
    score_threshold: Fraction | None = None
    """score, 0 to 1, from which the teacher's detections are pseudo-boxes; null: 0.7 for R-CNN detectors, 0.3 for one-stage detectors, which do not
    learn from these boxes: they are counted"""
    class_thresholds: dict[str, Fraction] = {}
    """scores in place of score_threshold for single classes, by class name"""
    soft: bool = True
    """learn the teacher's class probabilities for the regions of an R-CNN; false: learn the classes of the pseudo-boxes"""
    box_jitter: int = Field(10, ge=0, le=100)
    """shifted copies of each pseudo-box that the teacher refines, to see how certain its sides are; 0: learn the sides of all pseudo-boxes"""
    box_spread: Positive = 0.02
    """standard deviation of the refined copies, as a share of the box's mean side, below which the sides of a pseudo-box are learned"""
    dense_loss: Literal["quality", "adaptive"] = "quality"
    """loss between the class scores of one-stage detectors: quality, quality focal loss (arXiv 2207.02541); adaptive, as in ADL"""
    dense_share: float = Field(0.01, gt=0, le=1)
    """share of the anchors, those with the teacher's highest scores, whose boxes are learned and whose scores divide the losses; above 0 to 1"""
    adl: ADLConfig | None = None
    """settings of dense_loss adaptive; null: the defaults"""
    strong: StrongViewConfig = StrongViewConfig()
    collapse: float = Field(0.2, ge=0, lt=1)
    """share of the highest number of pseudo-boxes per image, or of the highest agreement, below which the log warns of a collapse; 0: no warning"""

    @field_validator("unlabeled", mode="before")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        return one_or_list(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.box_jitter == 1:
            raise ValueError("box_jitter: one copy has no spread; give 2 or more, or 0")
        if self.images and not any(source.suffix.lower() == ".json" for source in self.sources):
            raise ValueError("images: the folder of COCO JSON files, and unlabeled has none; leave images out")
        if self.adl and self.dense_loss != "adaptive":
            raise ValueError("adl: has the settings of dense_loss adaptive; set that too, or leave adl out")
        return self

    @property
    def sources(self) -> list[Path]:
        """Return the sources of unlabeled images."""
        return as_list(self.unlabeled)

    def inputs(self, key: str) -> dict[str, Path]:
        """Return files and folders by their keys; the files of a pattern are known when it is read."""
        files = source_files(f"{key}.unlabeled", self.unlabeled)
        return files | ({f"{key}.images": ImageFolder(self.images)} if self.images else {})

    def unlabeled_weight(self, *, dense: bool) -> float:
        """Return `weight`, or its default for a detector of one stage (`dense`) or of two if it is null."""
        default = DENSE_UNLABELED if dense else RCNN_UNLABELED
        return default if self.weight is None else self.weight

    def threshold(self, model: DetectorConfig) -> float:
        """Return `score_threshold`, or its default for this detector if it is null."""
        default = DENSE_THRESHOLD if model.is_dense else RCNN_THRESHOLD
        return default if self.score_threshold is None else self.score_threshold

    def fault(self, model: DetectorConfig) -> str | None:
        """Return an error message if a setting does not fit a detector of this architecture, else None."""
        kind = f"model.kind is {model.kind}"
        if self.weight == 0:
            return "moving_teacher.weight: with 0 nothing is learned from the unlabeled images; give a weight above 0, or leave moving_teacher out"
        if model.is_dense and not self.soft:
            return f"moving_teacher.soft: one-stage detectors learn from scores, never from pseudo-boxes, and {kind}; leave it out"
        if not model.is_dense and self.dense_loss != "quality":
            return f"moving_teacher.dense_loss: applies to one-stage detectors, and {kind}; leave it out"
        return None
