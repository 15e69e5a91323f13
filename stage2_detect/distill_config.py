"""What a teacher detector teaches, as settings. Does not import torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ssld.shared.config.bounds import Positive, Weight
from ssld.shared.config.settings import Config
from ssld.stage2_detect.model_config import DetectorConfig, Fraction

PKD_WEIGHT, ROI_WEIGHT = 6.0, 1.0  # of an R-CNN student


class LDConfig(Config):
    """Localisation distillation of a GFL student (arXiv 2102.12252); the defaults are those behind its published 42.1."""

    ld_weight: Weight = 0.25
    """factor of loss_ld: distances to the sides, on the student's positives"""
    ld_vlr_weight: Weight = 0.25
    """factor of loss_ld_vlr: distances in the valuable region; divided by 4 as released"""
    kd_weight: Weight = 10.0
    """factor of loss_kd: classes, on positives"""
    kd_vlr_weight: Weight = 0.0
    """factor of loss_kd_vlr: classes, in the valuable region"""
    imitation_weight: Weight = 0.0
    """factor of loss_imitation: squared error of the feature maps, at imitated_cells"""
    ld_temperature: Positive = 10.0
    """temperature that softens the distances"""
    kd_temperature: Positive = 2.0
    """temperature that softens the classes"""
    valuable_region: Literal["objects", "negatives"] = "objects"
    """cells around the objects, by their IoU; or all negatives by the student's score, the form for heads without anchors"""
    gamma: Fraction = 0.25
    """share of an object's threshold, 0 to 1, at which its valuable region begins (objects)"""
    overlap: Literal["anchor", "union"] = "anchor"
    """overlap that decides about the region (objects): union is the paper's distance-IoU; anchor has the anchor's area in
    the union's place, as released"""
    imitated_cells: Literal["inside", "fine_grained", "gi"] = "fine_grained"
    """cells whose maps are imitated: with the centre inside an object; whose IoU is near the object's best; or, general
    instances, ten boxes per level and image on which student and teacher differ most"""
    normalization: Literal["global", "reference"] = "global"
    """reference sums over a process's images, as released, so that the strength grows with their number; global is equal
    to that at two images per process, on any number of processes"""


class ADLConfig(Config):
    """Adaptive distillation of a RetinaNet student (arXiv 1901.00366)."""

    weight: Weight = 1.0
    """factor of loss_adl"""
    beta: Weight = 1.0
    """factor of the teacher's entropy in the weight of an anchor; the released LOSS_BETA is 1 - beta"""
    gamma: Weight = 2.0
    """exponent: how much less anchors count on which student and teacher agree"""
    form: Literal["paper", "code", "focal"] = "paper"
    """what is weighted: paper, the divergence; code, half the soft cross-entropy, as released; focal, the ablation FDL"""
    normalization: Literal["global", "rank"] = "global"
    """whether the teacher's probabilities are summed over processes, or for each alone as released"""


class DistillConfig(Config):
    """What a teacher detector adds to the losses, on labeled and on unlabeled images."""

    teacher: Path
    """detector file"""
    pkd_weight: Weight | None = None
    """factor of loss_pkd: Pearson correlation of the feature pyramids (arXiv 2207.02039); null: 6 for R-CNN, 0 for one-stage students"""
    roi_weight: Weight | None = None
    """factor of loss_roi_kd: the teacher's soft labels for the student's RoIs; null: 1 for R-CNN, the only ones that have RoIs"""
    temperature: Positive = 1.0
    """temperature of the soft labels for RoIs"""
    ld: LDConfig | None = None
    """terms of a GFL student under a GFL teacher; null takes the defaults"""
    adl: ADLConfig | None = None
    """terms of a RetinaNet student under a RetinaNet teacher; null takes the defaults"""
    check_images: int = Field(100, ge=0, le=1_000_000)
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
            weights += [ld.ld_weight, ld.ld_vlr_weight, ld.kd_weight, ld.kd_vlr_weight, ld.imitation_weight]
        if model.kind == "retinanet":
            weights.append((self.adl or ADLConfig()).weight)
        if not any(weights):
            names = "distill.ld" if model.kind == "gfl" else "distill.adl.weight"
            which = f"{names} and pkd_weight" if model.is_dense else "pkd_weight and roi_weight"
            return f"{which} are {'' if model.kind == 'gfl' else 'both '}0: the teacher would teach nothing"
        return None
