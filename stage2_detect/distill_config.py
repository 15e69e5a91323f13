"""What a teacher detector teaches, as settings. Does not import torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssld.shared.config.settings import Config
from ssld.stage2_detect.model_config import DetectorConfig, Fraction, Positive

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PKD_WEIGHT, ROI_WEIGHT = 6.0, 1.0  # of an R-CNN student


class LDConfig(Config):
    """Localisation distillation of a GFL student (arXiv 2102.12252); the defaults are those behind its published 42.1."""

    ld: Weight = 0.25
    """distances to the sides, on the student's positives"""
    vlr_ld: Weight = 0.25
    """the same in the valuable region; divided by 4 as released"""
    kd: Weight = 10.0
    """classes, on positives"""
    vlr_kd: Weight = 0.0
    """classes, in the valuable region"""
    imitation: Weight = 0.0
    """squared error of the feature maps, near the objects"""
    ld_temperature: Positive = 10.0
    """that softens the distances"""
    kd_temperature: Positive = 2.0
    """that softens the classes"""
    valuable: Literal["objects", "negatives"] = "objects"
    """that region: cells around the objects, by their IoU; or all negatives by the student's score, the form for heads without anchors"""
    gamma: Fraction = 0.25
    """of objects: share of an object's threshold at which its region begins"""
    overlap: Literal["anchor", "union"] = "anchor"
    """of objects: union is the paper's distance-IoU; anchor has the anchor's area in the union's place, as released"""
    region: Literal["inside", "fine_grained", "gi"] = "fine_grained"
    """cells whose maps are imitated: with the centre inside an object; whose IoU is near the object's best; or, general
    instances, ten boxes a level and image on which student and teacher differ most"""
    normalization: Literal["global", "reference"] = "global"
    """reference sums over a process's images, as released, so that the strength grows with their number; global is equal
    to that at two images a process, on any number of processes"""


class ADLConfig(Config):
    """Adaptive distillation of a RetinaNet student (arXiv 1901.00366)."""

    weight: Weight = 1.0
    """of the term in the loss"""
    beta: Weight = 1.0
    """of the teacher's entropy in the weight of an anchor; the released LOSS_BETA is 1 - beta"""
    gamma: Weight = 2.0
    """how much less anchors count on which student and teacher agree"""
    form: Literal["paper", "code", "focal"] = "paper"
    """what is weighted: paper, the divergence; code, half the soft cross-entropy, as released; focal, the ablation FDL"""
    normalization: Literal["global", "rank"] = "global"
    """whether the teacher's probabilities are summed over processes, or for each alone as released"""


class DistillConfig(Config):
    """What a teacher detector adds to the losses, on labelled and on unlabelled images."""

    teacher: Path
    """detector file"""
    pkd_weight: Weight | None = None
    """Pearson correlation of the feature pyramids (PKD, arXiv 2207.02039); null: 6 for R-CNN, 0 for one-stage students"""
    roi_weight: Weight | None = None
    """the teacher's soft labels for the student's RoIs; null: 1 for R-CNN, the only ones that have RoIs"""
    temperature: Positive = 1.0
    """of the soft labels for RoIs"""
    ld: LDConfig | None = None
    """of a GFL student under a GFL teacher; null takes the defaults"""
    adl: ADLConfig | None = None
    """of a RetinaNet student under a RetinaNet teacher; null takes the defaults"""
    check_images: int = Field(100, ge=0)
    """evaluation images that the teacher is scored on before training; 0 does not check"""
    check_ap: Fraction = 0.01
    """AP below which the run stops before it begins"""

    def pkd(self, model: DetectorConfig) -> float:
        """`pkd_weight` as it is for this student."""
        return (0.0 if model.is_dense else PKD_WEIGHT) if self.pkd_weight is None else self.pkd_weight

    def roi(self, model: DetectorConfig) -> float:
        """`roi_weight` as it is for this student."""
        return (0.0 if model.is_dense else ROI_WEIGHT) if self.roi_weight is None else self.roi_weight

    def fault(self, model: DetectorConfig) -> str | None:
        """What does not fit a student of this architecture, and what does."""
        fits = {"gfl": "distill.ld", "retinanet": "distill.adl"}.get(model.kind, "distill.pkd_weight and roi_weight")
        here = f"model.kind is {model.kind}, whose terms are {fits}"
        if self.ld and model.kind != "gfl":
            return f"distill.ld: compares distributions of distances, which only the heads of gfl have; {here}"
        if self.adl and model.kind != "retinanet":
            return f"distill.adl: compares classes anchor by anchor, each a focal-loss probability of retinanet; {here}"
        if model.is_dense and (self.roi_weight or self.temperature != 1):
            key = "roi_weight" if self.roi_weight else "temperature"
            return f"distill.{key}: is of RoIs, which a one-stage detector does not have; {here}"
        weights = [self.pkd(model), self.roi(model)]
        if model.kind == "gfl":
            ld = self.ld or LDConfig()
            weights += [ld.ld, ld.vlr_ld, ld.kd, ld.vlr_kd, ld.imitation]
        if model.kind == "retinanet":
            weights.append((self.adl or ADLConfig()).weight)
        if not any(weights):
            names = "distill.ld" if model.kind == "gfl" else "distill.adl.weight"
            which = f"{names} and pkd_weight" if model.is_dense else "pkd_weight and roi_weight"
            return f"{which} are {'' if model.kind == 'gfl' else 'both '}0: the teacher would teach nothing"
        return None
