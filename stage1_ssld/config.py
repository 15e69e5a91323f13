"""Settings of the stage-1 commands. Does not import torch, so that the runner can check them at once."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.config import CommandConfig, Config
from shared.training_config import OptimConfig, TrainingConfig

Part = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SourceConfig(Config):
    """Images from one place: a folder of class folders, a plain folder nested at will, or Parquet files."""

    path: Path
    """folder, Parquet file, or folder of Parquet files"""
    labels: str = "auto"
    """auto: names of class folders, or the label column; none: unlabelled; FILE.parquet: labels joined by `id_column`, negative ones dropped"""
    image_column: str = "image"
    """Parquet column with the images"""
    label_column: str = "label"
    """Parquet column with the class numbers"""
    id_column: str = "id"
    """Parquet column that joins a label file"""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    def inputs(self, key: str) -> dict[str, Path]:
        """The files this source reads."""
        files = {key: self.path}
        if self.labels not in ("auto", "none"):
            files[f"{key}.labels"] = Path(self.labels)
        return files


class DataConfig(Config):
    """Images, and the view that student and teacher both see."""

    train: list[SourceConfig] = Field(min_length=1)
    """training sources, one after the other; distillation never reads their labels"""
    val: SourceConfig | None = None
    """images for evaluation; without labels only agreement and KL are measured"""
    image_size: int = Field(224, ge=8)
    """side of a view in pixels"""
    crop_area: tuple[Part, Part] = (0.08, 1.0)
    """smallest and largest part of the image that a training crop covers"""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """narrowest and widest crop, width / height"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """part of the short side that the central evaluation crop keeps"""

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _in_order(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError(f"the smaller number comes first (given: {pair[0]:g}, {pair[1]:g})")
        return pair


class NetworkConfig(Config):
    """A network to train."""

    model: str
    """random:NAME, timm:NAME, hf-hub:ID, a folder or a .safetensors file to start from"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic depth, where the arch has it"""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class TeacherConfig(Config):
    """The frozen teacher."""

    model: str
    """timm NAME, hf-hub:ID, a folder, a .safetensors file, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    size: int | None = Field(None, ge=8)
    """side in pixels that the same view is resized to for the teacher; null: as it comes, or the teacher's own size where that is fixed"""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """of its forward pass; null: the student's"""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Stage1OptimConfig(OptimConfig):
    """Optimizer and its schedule: linear warm-up, then cosine to zero, by step."""

    warmup_steps: int | None = Field(None, ge=0)
    """length of the warm-up in steps"""
    warmup_epochs: float | None = Field(None, ge=0)
    """length of the warm-up in passes over the training images"""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("give one of warmup_steps and warmup_epochs")
        return self

    def total_warmup_steps(self, images: int, batch_size: int) -> int:
        """Steps of warm-up for a training set of `images` images."""
        return self.warmup_steps or round((self.warmup_epochs or 0) * images / batch_size)


class EmaConfig(Config):
    """Exponential moving average of the trained network's weights; it is what gets evaluated and exported."""

    decay: float = Field(0.9999, gt=0, lt=1)
    """share of the old average kept at a step"""
    warmup: bool = True
    """let the decay grow from small values over the first steps"""


class Stage1Config(TrainingConfig):
    """Settings that distillation and supervised training share: they are one loop with two objectives."""

    data: DataConfig
    optim: Stage1OptimConfig
    ema: EmaConfig | None = None

    def inputs(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for number, source in enumerate(self.data.train):
            files |= source.inputs(f"data.train.{number}")
        if self.data.val:
            files |= self.data.val.inputs("data.val")
        return files


def _reference_input(key: str, reference: str) -> dict[str, Path]:
    return (
        {key: Path(reference)}
        if reference.endswith((".safetensors", ".pth", ".pt")) or Path(reference).exists()
        else {}
    )


class DistillConfig(Stage1Config):
    """Train a student from a teacher's soft labels on labelled and unlabelled images, without any human label in the loss."""

    student: NetworkConfig
    teacher: TeacherConfig | None = None
    objective: Literal["teacher", "labels"] = "teacher"
    """teacher: SSLD; labels: the supervised baseline, same settings on the labelled sources alone"""

    @model_validator(mode="after")
    def _teacher_needed(self) -> Self:
        if self.objective == "teacher" and self.teacher is None:
            raise ValueError("teacher.model is missing: distillation needs a teacher")
        return self

    def inputs(self) -> dict[str, Path]:
        teacher = _reference_input("teacher.model", self.teacher.model) if self.teacher else {}
        return super().inputs() | _reference_input("student.model", self.student.model) | teacher


class TeachConfig(Stage1Config):
    """Fine-tune a teacher on labelled images."""

    model: NetworkConfig
    objective: Literal["labels"] = "labels"

    def inputs(self) -> dict[str, Path]:
        return super().inputs() | _reference_input("model.model", self.model.model)


class EvaluateConfig(CommandConfig):
    """Evaluate a backbone file: top-1, top-5, and agreement with a teacher."""

    model: Path
    """backbone file"""
    teacher: TeacherConfig | None = None
    data: SourceConfig
    """images; without labels only agreement and KL are measured, and a teacher is needed"""
    image_size: int | None = Field(None, ge=8)
    """side of a view in pixels; null: the one the model was trained at"""
    val_crop: float | None = Field(None, gt=0, le=1)
    """part of the short side that the central crop keeps; null: the one the model was evaluated with in training"""
    batch_size: int = Field(256, ge=1)
    workers: int = Field(2, ge=0)
    """processes that decode images"""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a CUDA GPU where there is one"""

    def inputs(self) -> dict[str, Path]:
        teacher = _reference_input("teacher.model", self.teacher.model) if self.teacher else {}
        return self.data.inputs("data") | {"model": self.model} | teacher
