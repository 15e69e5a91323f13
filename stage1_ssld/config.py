"""Settings of the stage-1 commands, one model a command. Does not import torch, so that the runner can check them at once."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Seed, Side, Weight, Workers
from ssld.shared.config.compute import LONGEST_TIMEOUT, ComputeConfig, ProcessTimeout
from ssld.shared.config.settings import CommandConfig, Config, ModelText, Network
from ssld.shared.config.training import EmaConfig, OptimConfig, TrainingConfig
from ssld.shared.errors import UserError
from ssld.stage1_ssld.data_config import (
    DataConfig,
    LossConfig,
    NetworkConfig,
    SourceConfig,
    TeacherConfig,
    hub_sources,
    is_remote,
    reference_input,
)


class Stage1OptimConfig(OptimConfig):
    """Optimizer and its schedule: linear warm-up, then cosine to zero, by step."""

    warmup_steps: int | None = Field(None, ge=0, le=1_000_000_000)
    """length of the warm-up in steps; no more than a tenth of the run is warm-up"""
    warmup_epochs: float | None = Field(None, ge=0, le=1_000_000)
    """length of the warm-up in passes over the training images; no more than a tenth of the run is warm-up"""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("give one of warmup_steps and warmup_epochs")
        return self

    def total_warmup_steps(self, images: int | None, batch_size: int, steps: int) -> int:
        """Steps of warm-up for a training set of `images` images and a run of `steps`, of which it is a tenth at most; raises UserError where the
        number of images is needed and unknown."""
        if self.warmup_epochs and images is None:
            raise UserError("optim.warmup_epochs: nobody knows how many images the stream holds; give warmup_steps")
        wanted = self.warmup_steps or round((self.warmup_epochs or 0) * (images or 0) / batch_size)
        return min(wanted, steps // 10)


class Stage1Config(TrainingConfig):
    """Settings that distillation and supervised training share: they are one loop with two objectives."""

    data: DataConfig
    optim: Stage1OptimConfig
    ema: EmaConfig | None = None
    trainable: Literal["all", "classifier"] = "all"
    """classifier: everything before it stays frozen, its BatchNorm too (the Fix phase)"""
    best_by: Literal["top1", "agreement"] | None = None
    """what the best checkpoint and `patience` go by; null: top1 where there are labels, agreement otherwise"""
    patience: Count | None = None
    """stop after this many evaluations in a row without a better one; needs evaluate_every"""

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience is not None and (self.evaluate_every is None or self.data.val is None):
            raise ValueError("patience counts evaluations: give evaluate_every and data.val too, or leave it out")
        return self

    def inputs(self) -> dict[str, Path]:
        return self.data.inputs("data")

    def hub_data(self) -> dict[str, str]:
        return self.data.hub_data("data")


EVALUATION_BATCH = 128
"""Most images per evaluation batch, of which the trial of memory runs one too."""
# Losses that the classes of a store and one bucket for the rest are enough for.
STORE_LOSSES = ("symmetric_kl", "kl", "soft_cross_entropy", "jensen_shannon")


class DistillConfig(Stage1Config):
    """Train a student from a teacher's soft labels on labeled and unlabeled images, without any human label in the loss."""

    student: NetworkConfig
    teacher: TeacherConfig | None = None
    store: Path | None = None
    """folder `store` in the output of write_soft_labels.py: the soft labels come from it, not from a live teacher; a teacher, if given,
    only measures agreement"""
    objective: Literal["teacher", "labels"] = "teacher"
    """teacher: SSLD; labels: the supervised baseline, same settings on the labeled sources alone"""
    losses: list[LossConfig] = Field([LossConfig(name="symmetric_kl")], min_length=1)
    """terms of the distillation loss, by name and weight"""
    hard_label_weight: Weight = 0.0
    """weight of the cross-entropy with human labels, where an image has one; SSLD leaves it at 0"""
    keep_weights: Literal["last", "better"] = "last"
    """weights that student.safetensors holds, for a student that began with trained weights; last: those of the last step; better: these, those of
    the start or the mean of both, whichever keep most of the teacher's nearest neighbours on the images of data.val (no label is read)"""

    @model_validator(mode="after")
    def _teacher_needed(self) -> Self:
        if self.objective == "teacher" and self.teacher is None and self.store is None:
            raise ValueError("teacher.model is missing: distillation needs a teacher, or a store of soft labels")
        return self

    @model_validator(mode="after")
    def _labels_of_streams(self) -> Self:
        if self.data.streaming and (self.objective == "labels" or self.hard_label_weight > 0):
            raise ValueError("data.streaming: labels are not read from streams; set it to false, or do without labels")
        return self

    @property
    def learns_classes(self) -> bool:
        """Whether anything trains a classifier; feature terms alone make a network without one."""
        return (
            self.objective == "labels"
            or self.hard_label_weight > 0
            or not all(loss.of_features for loss in self.losses)
        )

    @model_validator(mode="after")
    def _what_feature_terms_need(self) -> Self:
        features = [loss.name for loss in self.losses if loss.of_features]
        if self.objective == "labels" or not features:
            return self
        twice = next((name for name in features if features.count(name) > 1), None)
        if twice:
            raise ValueError(f"losses: {twice} is there twice; one is enough")
        if self.store is not None:
            raise ValueError(
                f"store: holds soft labels, no features; take {features[0]} out of losses, or leave out store for a live teacher"
            )
        if self.teacher and self.teacher.ensemble and len(features) == len(self.losses):
            raise ValueError(
                "teacher.ensemble: features are those of the first network; leave it out, or add a term of soft labels to losses"
            )
        if self.trainable == "classifier":
            raise ValueError(
                f"losses: {features[0]} teaches nothing where all features stay frozen; set trainable: all"
            )
        for key in ("patience", "best_by"):
            if getattr(self, key) is not None and not self.learns_classes:
                raise ValueError(
                    f"{key}: {' and '.join(features)} alone train no classes that could be evaluated; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _what_a_store_holds(self) -> Self:
        if self.store is None or self.objective == "labels":
            return self
        if self.data.mixes:
            raise ValueError(
                "store: its soft labels are of unmixed views; set data.mixup and data.cutmix to 0, or leave out store for a live teacher"
            )
        if self.data.streaming:
            raise ValueError("store: needs the row of every image; set data.streaming: false, or leave out store")
        if self.teacher is not None and self.teacher.batchnorm == "batch":
            raise ValueError("store: was written with running statistics; set teacher.batchnorm: eval")
        for loss in self.losses:
            if loss.name not in STORE_LOSSES or loss.temperature != 1 or loss.standardize:
                raise ValueError(
                    f"store: {loss.name}{' at a temperature' if loss.temperature != 1 else ''}"
                    f"{' on standardized logits' if loss.standardize else ''} needs every logit; "
                    f"take one of {', '.join(STORE_LOSSES)} at temperature 1, or leave out store"
                )
        return self

    def inputs(self) -> dict[str, Path]:
        teacher = self.teacher.inputs("teacher") if self.teacher else {}
        store = {"store": self.store / "store.json"} if self.store else {}
        return super().inputs() | self.student.inputs("student.model") | teacher | store

    def networks(self) -> dict[str, Network]:
        teacher = self.teacher.networks("teacher") if self.teacher else {}
        return self.student.networks("student.model", self.data.image_size) | teacher


class TeachConfig(Stage1Config):
    """Fine-tune a teacher on labeled images."""

    model: NetworkConfig
    objective: Literal["labels"] = "labels"
    """what is learnt from; a student that learns from a teacher is `distill`"""

    @model_validator(mode="after")
    def _no_streams(self) -> Self:
        if self.data.streaming:
            raise ValueError("data.streaming: labels are not read from streams; set it to false")
        return self

    def inputs(self) -> dict[str, Path]:
        return super().inputs() | self.model.inputs("model.model")

    def networks(self) -> dict[str, Network]:
        return self.model.networks("model.model", self.data.image_size)


class ForwardConfig(ComputeConfig):
    """Settings of commands that run a network over images without training it."""

    batch_size: BatchSize = 256
    """images a forward pass and process"""
    workers: Workers = 2
    """processes a rank that decode images; 0 decodes in the main process"""


class EvaluateConfig(ForwardConfig):
    """Evaluate a classifier: top-1, top-5, agreement with a teacher, and accuracy of its nearest neighbours."""

    model: ModelText
    """backbone file, timm:NAME, hf-hub:ID, a folder, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    teacher: TeacherConfig | None = None
    data: SourceConfig
    """images; without labels only agreement and KL are measured, and a teacher is needed"""
    bank: SourceConfig | None = None
    """labeled images: each image of `data` is also classified by the vote of its nearest neighbours among them"""
    allow_loss: bool = False
    """go on where more than half of the images of a source or of a class, or all of a class, cannot be used; the log says why"""
    neighbours: Count = 20
    """neighbours that vote"""
    image_size: Side | None = None
    """side of a view in pixels, for which a network of fixed size is rebuilt; null: the one the model was trained at"""
    val_crop: float | None = Field(None, gt=0, le=1)
    """part of the short side that the central crop keeps; null: the one the model was evaluated with in training"""

    def inputs(self) -> dict[str, Path]:
        teacher = self.teacher.inputs("teacher") if self.teacher else {}
        bank = self.bank.inputs("bank") if self.bank else {}
        return self.data.inputs("data") | bank | reference_input("model", self.model) | teacher

    def networks(self) -> dict[str, Network]:
        teacher = self.teacher.networks("teacher") if self.teacher else {}
        return {"model": Network(self.model, self.arch, self.image_size, allow_pickle=True)} | teacher

    def hub_data(self) -> dict[str, str]:
        return hub_sources([("data", self.data), ("bank", self.bank)])


class SoftLabelsConfig(ForwardConfig):
    """Write a store: the teacher's soft labels of V views of every image, once, for any number of students."""

    data: DataConfig
    """the settings of the distillation that will read the store; `val` is not read"""
    teacher: TeacherConfig
    views: Count
    """views an image; pass number p of a distillation sees view p modulo V"""
    top: Count = 10
    """classes kept a view, with their log-probabilities; the rest is one number"""
    store_precision: Literal["fp16", "fp32"] = "fp16"
    """of the stored log-probabilities"""
    seed: Seed = 0
    """every view follows from it, the image's key and the view's number"""
    channels_last: bool = False
    """memory layout of the teacher"""
    shard_images: int = Field(4096, ge=1, le=10_000_000)
    """images a file of the store; a killed run loses at most one file a process"""

    @model_validator(mode="after")
    def _replayable(self) -> Self:
        if self.teacher.batchnorm == "batch":
            raise ValueError(
                "teacher.batchnorm: batch depends on the other images of a batch and cannot be stored; set eval, or distil live"
            )
        if self.data.mixes:
            raise ValueError("data.mixup, data.cutmix: mixed images cannot be stored; set them to 0, or distil live")
        if self.data.streaming:
            raise ValueError("data.streaming: a store needs the row of every image; set it to false")
        return self

    def inputs(self) -> dict[str, Path]:
        return self.data.inputs("data") | self.teacher.inputs("teacher")

    def networks(self) -> dict[str, Network]:
        return self.teacher.networks("teacher")

    def hub_data(self) -> dict[str, str]:
        return self.data.hub_data("data")


class CurateConfig(ForwardConfig):
    """Select unlabeled images: the best k of each of the teacher's classes, no near-duplicates of validation or training images or each other."""

    process_timeout: ProcessTimeout = LONGEST_TIMEOUT  # the main process selects while the others wait
    """time limit, in minutes, of one process waiting for another, 1 to 10,080; the run ends after it"""

    pool: list[SourceConfig] = Field(min_length=1)
    """images to select from; labels are not read"""
    allow_loss: bool = False
    """go on where more than half of the images of a source or of one of its folders, or all of a folder, cannot be used; the log says why"""
    streaming: bool = False
    """read the pool file by file, without an index: for pools that are remote or larger than memory"""
    teacher: TeacherConfig
    keep: Images
    """most images kept a class (k)"""
    min_score: float = Field(0.0, ge=0, lt=1)
    """smallest probability of an image's first class"""
    val: list[SourceConfig] = []
    """images that nothing kept may resemble: the validation set"""
    train: list[SourceConfig] = []
    """the same for the training set"""
    hash_distance: int = Field(6, ge=0, le=16)
    """perceptual hashes of 64 bits that differ in at most so many are looked at more closely"""
    mirrored: bool = True
    """images of the pool are compared with each other's mirror images too; with those of val and train they always are"""
    cosine: float = Field(0.9, gt=0, le=1)
    """such a pair are duplicates when the cosine of the teacher's embeddings is at least this"""
    candidates: float = Field(1.5, ge=1, le=1000)
    """images a class, as a multiple of `keep`, that are compared with each other"""
    image_size: Side = 224
    """side of the view that is scored, in pixels"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """part of the short side that the view keeps"""
    channels_last: bool = False
    """memory layout of the teacher"""
    materialise: bool = False
    """also copy the selected images into Parquet files below `selected/`"""
    examples: int = Field(8, ge=1, le=100)
    """pictures a row of the examples"""

    @model_validator(mode="after")
    def _movable(self) -> Self:
        remote = [source.path for source in self.pool if is_remote(source.path)]
        if (remote or self.streaming) and not self.materialise:
            what = remote[0] if remote else "streaming"
            raise ValueError(f"materialise: {what}: single images of it cannot be read later; set materialise: true")
        return self

    def inputs(self) -> dict[str, Path]:
        files = self.teacher.inputs("teacher")
        for key in ("pool", "val", "train"):
            for number, source in enumerate(getattr(self, key)):
                files |= source.inputs(f"{key}.{number}")
        return files

    def networks(self) -> dict[str, Network]:
        return self.teacher.networks("teacher")

    def hub_data(self) -> dict[str, str]:
        keys = ("pool", "val", "train")
        return hub_sources((f"{key}.{number}", one) for key in keys for number, one in enumerate(getattr(self, key)))


class EncoderConfig(Config):
    """An encoder that is to become a teacher; a classifier's own classes are left out."""

    model: ModelText
    """timm NAME, hf-hub:ID, a folder, a .safetensors file, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    global_pool: str | None = None
    """timm's pooling (avg, max, avgmax; token and map of a ViT); null: the encoder's own"""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class PrototypesConfig(ForwardConfig):
    """Make a teacher of an encoder without classes: its classes are K prototypes, k-means centres of its embeddings of your images."""

    process_timeout: ProcessTimeout = LONGEST_TIMEOUT  # the main process clusters while the others wait
    """time limit, in minutes, of one process waiting for another, 1 to 10,080; the run ends after it"""

    pool: list[SourceConfig] = Field(min_length=1)
    """images whose embeddings are clustered: those that students will see; labels are not read"""
    allow_loss: bool = False
    """go on where more than half of the images of a source or of one of its folders, or all of a folder, cannot be used; the log says why"""
    streaming: bool = False
    """read the pool file by file, without an index: for pools that are remote or larger than memory"""
    encoder: EncoderConfig
    prototypes: int | None = Field(None, ge=2, le=1_000_000)
    """classes of the teacher (K); null: the power of two next to a fortieth of the images, from 16 to 4,096"""
    perplexity: float = Field(4.0, gt=1, le=1_000_000)
    """of the soft labels: over so many prototypes they spread; the temperature is found so that this is their median"""
    balanced: bool = False
    """prototypes of equal size: every one is the first class of about as many images of the pool"""
    image_size: Side | None = None
    """side of a view in pixels, for which a network of fixed size is rebuilt; null: the encoder's own"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """part of the short side that the view keeps"""
    channels_last: bool = False
    """memory layout of the encoder"""
    seed: Seed = 0
    """of the k-means"""
    examples: int = Field(8, ge=1, le=100)
    """pictures of each prototype shown"""

    @model_validator(mode="after")
    def _spread_over_some(self) -> Self:
        if self.prototypes is not None and self.perplexity >= self.prototypes:
            raise ValueError(
                f"perplexity: {self.perplexity:g} has to be less than the number of prototypes, {self.prototypes}"
            )
        return self

    def inputs(self) -> dict[str, Path]:
        files = reference_input("encoder.model", self.encoder.model)
        for number, source in enumerate(self.pool):
            files |= source.inputs(f"pool.{number}")
        return files

    def networks(self) -> dict[str, Network]:
        encoder = self.encoder
        return {"encoder.model": Network(encoder.model, encoder.arch, self.image_size, allow_pickle=True)}

    def hub_data(self) -> dict[str, str]:
        return hub_sources((f"pool.{number}", source) for number, source in enumerate(self.pool))


EXPORTED = {"onnx": "backbone.onnx", "torch": "backbone.pt2"}
"""What each format of an export is called."""


class ExportConfig(CommandConfig):
    """Export a backbone file: ONNX and torch.export, checked against torch, and a folder in the layout of the Hugging Face hub with a model card."""

    batch_size: BatchSize = 256
    """images per forward pass"""
    workers: Workers = 2
    """processes that decode images; 0 decodes in the main process"""

    model: Path
    """backbone file"""
    data: SourceConfig | None = None
    """images the files are checked on; null: noise"""
    formats: list[Literal["onnx", "torch"]] = Field(["onnx", "torch"], min_length=1)
    """onnx: backbone.onnx; torch: backbone.pt2, a torch.export program"""
    check_images: Count = 64
    """images of the check"""
    tolerance: float = Field(1e-3, gt=0, le=1)
    """largest difference of a logit, as a part of the largest logit"""
    image_size: Side | None = None
    """side in pixels; null: the one the model was trained at"""
    benchmark: bool = False
    """also measure latency (batch 1) and throughput (batch_size) of torch and of the files written"""
    push_to_hub: str | None = None
    """ORG/NAME: also upload the folder"""
    private: bool = False
    """whether a new repository there is private"""

    def inputs(self) -> dict[str, Path]:
        return {"model": self.model} | (self.data.inputs("data") if self.data else {})


class ConvertPaddleConfig(CommandConfig):
    """Turn an official PaddleClas file of a ResNet_vd into a backbone file."""

    weights: Path
    """.pdparams file"""
    arch: Literal["resnet50d", "resnet101d", "resnet152d", "resnet18d", "resnet34d", "resnet200d"] | None = None
    """timm name; null: found from the file"""
    input_size: Side | None = None
    """side in pixels it is evaluated at; null: 320 where the file's name begins with Fix_, else 224"""
    val_crop: float | None = Field(None, gt=0, le=1)
    """part of the short side that the central evaluation crop keeps; null: 0.875 up to 224, all of it above (Fix: no more is cut off)"""

    def inputs(self) -> dict[str, Path]:
        return {"weights": self.weights}
