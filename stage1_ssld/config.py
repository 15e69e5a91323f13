"""Settings of the stage-1 commands, one class per command. Does not import torch, so that the runner checks them quickly."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count, Images, Seed, Side, Weight, Workers
from ssld.shared.config.compute import LONGEST_TIMEOUT, ProcessTimeout
from ssld.shared.config.settings import CommandConfig, ModelText, Network
from ssld.shared.config.training import EmaConfig, TrainingConfig
from ssld.shared.config.yaml_files import ShortForms
from ssld.stage1_ssld.data_config import (
    LOSSES,
    DataConfig,
    EncoderConfig,
    ForwardConfig,
    LossConfig,
    NetworkConfig,
    SourceConfig,
    Stage1OptimConfig,
    StudentConfig,
    TeacherConfig,
    hub_sources,
    is_remote,
    reference_input,
)

RECIPES = Path(__file__).resolve().parent / "configs"
"""folder of the shipped recipes"""


class Stage1Config(TrainingConfig):
    """Settings of distillation and supervised training, which share one training loop."""

    data: DataConfig
    optim: Stage1OptimConfig
    ema: EmaConfig | None = None
    trainable: Literal["all", "classifier"] = "all"
    """parameters to train; all, or the classifier alone, with everything before it frozen, BatchNorm too (Fix phase of SSLD)"""
    best_by: Literal["top1", "agreement"] | None = None
    """metric that selects the best weights and counts for `patience`; null: top1 with labels, agreement otherwise"""
    patience: Count | None = None
    """consecutive evaluations without improvement after which training stops; needs evaluate_every; null: never"""

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience is not None and (self.evaluate_every is None or not self.data.evaluates):
            raise ValueError("patience counts evaluations: give evaluate_every and data.val too, or leave it out")
        return self

    def inputs(self) -> dict[str, Path]:
        return self.data.inputs("data")

    def hub_data(self) -> dict[str, str]:
        return self.data.hub_data("data")


_LENGTHS = ("steps", "train_epochs", "train_images")
EVALUATION_BATCH = 128
"""Most images per evaluation batch; the memory trial of auto_batch runs one too."""
LR_OF_RANDOM, LR_OF_PRETRAINED = 4e-3, 5e-5
"""Rates of AdamW at batch 256; larger steps destroy pretrained weights (docs/distillation.md)."""

_NONE: Any = None  # as a default it fits the types that type checkers see below
if TYPE_CHECKING:  # `DistillConfig.fitted` has replaced None before anything reads these settings
    ChosenBatchSize = int
    ChosenOptim = Stage1OptimConfig
else:
    ChosenBatchSize, ChosenOptim = BatchSize | None, Stage1OptimConfig | None


class DistillConfig(Stage1Config):
    """Train a student from a teacher's soft labels on labeled and unlabeled images, without any human label in the loss."""

    recipes: ClassVar[Path | None] = RECIPES
    other_names: ClassVar[dict[str, str]] = {**TrainingConfig.other_names, "images": "data.train"}
    short_forms: ClassVar[ShortForms] = {"student": "model", "teacher": "model"}
    batch_size: ChosenBatchSize = Field(_NONE)
    """global batch size: images per optimizer step, over all processes and accumulated passes; null: 256 on a GPU, 32 on a CPU, at most all images"""
    optim: ChosenOptim = Field(_NONE)
    """optimizer and its schedule; null: AdamW at the rate of a pretrained or a random student, and data.image_size, if not given, is the student's"""
    student: StudentConfig
    teacher: TeacherConfig | None = None
    store: Path | None = None
    """folder `store` in the output of write_soft_labels.py, whose soft labels replace a live teacher; a teacher, if given, only measures agreement"""
    objective: Literal["teacher", "labels"] = "teacher"
    """training targets; teacher: SSLD; labels: the supervised baseline, on the labeled sources with the same settings"""
    losses: list[LossConfig] = Field([LossConfig(name="symmetric_kl")], min_length=1)
    """terms of the distillation loss: names, or mappings of name, weight and settings"""
    hard_label_weight: Weight = 0.0
    """weight of the cross-entropy with human labels on labeled images; 0 in SSLD"""
    keep_weights: Literal["last", "better"] = "last"
    """weights to save for a pretrained student; last: those of the last step; better: the last ones, the initial ones or their mean, whichever have
    most nearest neighbors in common with the teacher on the images of data.val (labels are not read)"""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in _LENGTHS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give at most one of {', '.join(_LENGTHS)} (given: {', '.join(given)})")
        if self.data.streaming and not self.has_length:
            raise ValueError(
                "data.streaming: the number of images is unknown; give batch_size, and steps or train_images"
            )
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether nothing is left to be chosen from the data."""
        return self.has_length and self.optim is not None

    @property
    def has_length(self) -> bool:
        """Whether the batch and the length are given, not left to be chosen from the data."""
        return self.batch_size is not None and any(getattr(self, key) is not None for key in _LENGTHS)

    @property
    def takes_own_size(self) -> bool:
        """Whether the size of the views is left to be that of the student's weights."""
        return self.optim is None and "image_size" not in self.data.model_fields_set

    def fitted(self, images: int, image_size: int, *, gpu: bool, ranks: int = 1) -> Self:
        """Return the settings with everything that was left out chosen for `images` training images and a student whose weights take `image_size`.

        The length is 10 passes; on a GPU more for few images, up to 100, until two million are seen; on a CPU at most 500 steps.
        """
        chosen: dict[str, Any] = {}
        if self.takes_own_size:
            chosen["data"] = self.data.model_copy(update={"image_size": image_size})
        if self.optim is None:
            chosen["optim"] = Stage1OptimConfig(
                name="adamw",
                lr=LR_OF_RANDOM if self.student.model.startswith("random:") else LR_OF_PRETRAINED,
                reference_batch=256,
                weight_decay=0.05,
                decay_norm_and_bias=False,
                warmup_steps=0.05,
            )
        batch = self.batch_size
        if batch is None:
            batch = max(1, min(256 if gpu else 32, images) // ranks) * ranks
            chosen |= {"batch_size": batch, "auto_batch": self.auto_batch or (gpu and self.accumulate == 1)}
        if all(getattr(self, key) is None for key in _LENGTHS):
            steps = round((min(100.0, max(10.0, 2e6 / images)) if gpu else 10) * images / batch)
            chosen["steps"] = max(20, steps if gpu else min(500, steps))
        return self.model_copy(update=chosen)

    @model_validator(mode="after")
    def _targets_exist(self) -> Self:
        if self.objective == "teacher" and self.teacher is None and self.store is None:
            raise ValueError("teacher.model is missing: distillation needs a teacher, or a store of soft labels")
        if self.teacher is None and self.data.held_out is not None:
            raise ValueError("data.held_out measures agreement with a teacher: give teacher.model, or data.val")
        if self.data.streaming and (self.objective == "labels" or self.hard_label_weight > 0):
            raise ValueError(
                "data.streaming: labels are not read from streams; set it to false, or set objective: teacher and hard_label_weight: 0"
            )
        return self

    @property
    def learns_classes(self) -> bool:
        """Whether any loss trains a classifier; with feature terms alone the network has none."""
        return (
            self.objective == "labels"
            or self.hard_label_weight > 0
            or not all(loss.of_features for loss in self.losses)
        )

    @model_validator(mode="after")
    def _feature_terms_fit(self) -> Self:
        features = [loss.name for loss in self.losses if loss.of_features]
        if self.objective == "labels" or not features:
            return self
        kinds = [loss.loss.compares for loss in self.losses if loss.of_features]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"losses: two terms compare {kind} features; keep one of them")
        if self.store is not None:
            raise ValueError(
                f"store: contains no features; remove {features[0]} from losses, or leave out store for a live teacher"
            )
        if self.teacher and self.teacher.ensemble and len(features) == len(self.losses):
            raise ValueError(
                "teacher.ensemble: feature terms use the first network only; leave it out, or add a term that compares logits to losses"
            )
        if self.trainable == "classifier":
            raise ValueError(f"losses: {features[0]} has no effect on frozen features; set trainable: all")
        for key in ("patience", "best_by"):
            if getattr(self, key) is not None and not self.learns_classes:
                raise ValueError(f"{key}: {' and '.join(features)} train no classifier to evaluate; leave it out")
        return self

    @model_validator(mode="after")
    def _store_fits(self) -> Self:
        if self.store is None or self.objective == "labels":
            return self
        if self.data.held_out is not None:
            raise ValueError("store: has the rows of all images; leave out data.held_out, and give data.val")
        if self.data.mixes:
            raise ValueError(
                "store: its soft labels belong to unmixed views; set data.mixup and data.cutmix to 0, or leave out store for a live teacher"
            )
        if self.data.streaming:
            raise ValueError("store: streams have no rows to look up; set data.streaming: false, or leave out store")
        if self.teacher is not None and self.teacher.batchnorm == "batch":
            raise ValueError("store: was written with running statistics; set teacher.batchnorm: eval")
        for loss in self.losses:
            if not loss.loss.stored or loss.temperature != 1 or loss.standardize:
                stored = ", ".join(name for name, one in LOSSES.items() if one.stored)
                raise ValueError(
                    f"store: {loss.name}{' at a temperature' if loss.temperature != 1 else ''}"
                    f"{' on standardized logits' if loss.standardize else ''} needs every logit; "
                    f"use one of {stored} at temperature 1, or leave out store"
                )
        return self

    def inputs(self) -> dict[str, Path]:
        teacher = self.teacher.inputs("teacher") if self.teacher else {}
        store = {"store": self.store / "store.json"} if self.store else {}
        return super().inputs() | self.student.inputs("student.model") | teacher | store

    def networks(self) -> dict[str, Network]:
        classes = self.objective == "labels" or not all(loss.of_features for loss in self.losses)
        teacher = self.teacher.networks("teacher", classes=classes) if self.teacher else {}
        return self.student.networks("student.model", None if self.takes_own_size else self.data.image_size) | teacher


class TeachConfig(Stage1Config):
    """Fine-tune a teacher on labeled images."""

    recipes: ClassVar[Path | None] = RECIPES
    short_forms: ClassVar[ShortForms] = {"model": "model"}
    model: NetworkConfig
    objective: Literal["labels"] = "labels"
    """training targets: human labels (the command distill has a teacher as target)"""

    @model_validator(mode="after")
    def _no_streams(self) -> Self:
        if self.data.streaming:
            raise ValueError("data.streaming: labels are not read from streams; set it to false")
        if self.data.held_out is not None:
            raise ValueError("data.held_out: measures agreement with a teacher, which teach lacks; give data.val")
        return self

    def inputs(self) -> dict[str, Path]:
        return super().inputs() | self.model.inputs("model.model")

    def networks(self) -> dict[str, Network]:
        return self.model.networks("model.model", self.data.image_size)


class EvaluateConfig(ForwardConfig):
    """Evaluate a classifier: top-1, top-5, agreement with a teacher, nearest-neighbor accuracy."""

    model: ModelText
    """backbone file, timm:NAME, hf-hub:ID, a folder, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name of the network, for a file that does not name it"""
    teacher: TeacherConfig | None = None
    data: SourceConfig
    """images to evaluate on; without labels only agreement and KL are measured, which needs a teacher"""
    bank: SourceConfig | None = None
    """labeled images for nearest-neighbor accuracy: each image of `data` gets the class that its nearest neighbors among them vote for"""
    allow_loss: bool = False
    """continue if more than half of the images of a source or class, or a whole class, cannot be used; the log has the causes"""
    neighbors: Count = 20
    """number of nearest neighbors that vote"""
    image_size: Side | None = None
    """side of the view in pixels; a network of fixed size is rebuilt for it; null: the size the model was trained at"""
    val_crop: float | None = Field(None, gt=0, le=1)
    """fraction of the short side in the central crop, above 0 to 1; null: the fraction of the evaluations during training"""
    trackers: list[Literal["tensorboard"]] = []
    """trackers: tensorboard, for the scores and images; [] for none"""

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
    """Write a store of soft labels: the teacher's soft labels of V views of every image, for any number of students."""

    data: DataConfig
    """data settings of the distillation that will read the store; `val` is not read"""
    teacher: TeacherConfig
    views: Count
    """augmented views stored per image (V); epoch p trains on view p mod V"""
    top: Count = 10
    """most likely classes stored per view, with their log-probabilities; all others share one number"""
    store_precision: Literal["fp16", "fp32"] = "fp16"
    """number format of the stored log-probabilities"""
    seed: Seed = 0
    """seed of the views, 0 to 2^32 - 1"""
    channels_last: bool = False
    """use the channels_last memory format, which is often faster on GPUs"""
    shard_images: int = Field(4096, ge=1, le=10_000_000)
    """images per file of the store; a killed run loses at most one file per process"""

    @model_validator(mode="after")
    def _replayable(self) -> Self:
        if self.teacher.batchnorm == "batch":
            raise ValueError(
                "teacher.batchnorm: batch depends on the other images of a batch and cannot be stored; set eval, or use a live teacher"
            )
        if self.data.mixes:
            raise ValueError(
                "data.mixup, data.cutmix: soft labels of mixed images cannot be stored; set them to 0, or use a live teacher"
            )
        if self.data.streaming:
            raise ValueError("data.streaming: a store needs sources with rows; set it to false")
        if self.data.held_out is not None:
            raise ValueError(
                "data.held_out: a store has all images; leave it out, and give data.val to the distillation"
            )
        return self

    def inputs(self) -> dict[str, Path]:
        return self.data.inputs("data") | self.teacher.inputs("teacher")

    def networks(self) -> dict[str, Network]:
        return self.teacher.networks("teacher")

    def hub_data(self) -> dict[str, str]:
        return self.data.hub_data("data")


class CurateConfig(ForwardConfig):
    """Select unlabeled images: the best k of each of the teacher's classes, without near-duplicates of held-out or other selected images."""

    process_timeout: ProcessTimeout = LONGEST_TIMEOUT  # the main process selects while the others wait
    """time limit, in minutes, of one process waiting for another, 1 to 10,080; the run ends after it"""
    pool: list[SourceConfig] = Field(min_length=1)
    """sources to select images from; labels are not read"""
    allow_loss: bool = False
    """continue if more than half of the images of a source or folder, or a whole folder, cannot be used; the log has the causes"""
    streaming: bool = False
    """read the pool file by file, without an index; for pools that are remote or larger than memory"""
    teacher: TeacherConfig
    keep: Images
    """most images to keep per class (k)"""
    min_score: float = Field(0.0, ge=0, lt=1)
    """smallest probability of an image's most likely class, 0 to below 1"""
    val: list[SourceConfig] = []
    """validation images; near-duplicates of them are dropped"""
    train: list[SourceConfig] = []
    """training images; near-duplicates of them are dropped"""
    hash_distance: int = Field(6, ge=0, le=16)
    """largest number of differing bits (of 64) between perceptual hashes of a pair that is compared by embeddings"""
    mirrored: bool = True
    """compare images of the pool with mirror images of each other too; those of val and train are always compared"""
    cosine: float = Field(0.9, gt=0, le=1)
    """smallest cosine similarity of the teacher's embeddings, above 0 to 1, at which a pair counts as near-duplicates"""
    candidates: float = Field(1.5, ge=1, le=1000)
    """images per class that are searched for near-duplicates, as a multiple of `keep`"""
    image_size: Side = 224
    """side of the scored view in pixels"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """fraction of the short side in the central crop, above 0 to 1"""
    channels_last: bool = False
    """use the channels_last memory format, which is often faster on GPUs"""
    materialise: bool = False
    """copy the selected images into Parquet files in `selected/`"""
    examples: int = Field(8, ge=1, le=100)
    """images per row of examples.png"""

    @model_validator(mode="after")
    def _movable(self) -> Self:
        remote = [source.path for source in self.pool if is_remote(source.path)]
        if (remote or self.streaming) and not self.materialise:
            what = remote[0] if remote else "streaming"
            raise ValueError(
                f"materialise: {what}: its images cannot be read one by one later; set materialise: true to copy them"
            )
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


class PrototypesConfig(ForwardConfig):
    """Make a teacher from an encoder without classes: its classes are K prototypes, k-means centers of its embeddings of your images."""

    process_timeout: ProcessTimeout = LONGEST_TIMEOUT  # the main process clusters while the others wait
    """time limit, in minutes, of one process waiting for another, 1 to 10,080; the run ends after it"""

    pool: list[SourceConfig] = Field(min_length=1)
    """sources of the images to cluster, usually the students' training images; labels are not read"""
    allow_loss: bool = False
    """continue if more than half of the images of a source or folder, or a whole folder, cannot be used; the log has the causes"""
    streaming: bool = False
    """read the pool file by file, without an index; for pools that are remote or larger than memory"""
    encoder: EncoderConfig
    prototypes: int | None = Field(None, ge=2, le=1_000_000)
    """number of prototypes, the classes of the teacher (K); null: the power of two nearest to a fortieth of the images, 16 to 4,096"""
    perplexity: float = Field(4.0, gt=1, le=1_000_000)
    """median perplexity of the soft labels, about the number of prototypes that share an image; sets their temperature; above 1, below K"""
    balanced: bool = False
    """make prototypes of equal size: each is the most likely class of about equally many images"""
    image_size: Side | None = None
    """side of the view in pixels; a network of fixed size is rebuilt for it; null: the encoder's own"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """fraction of the short side in the central crop, above 0 to 1"""
    channels_last: bool = False
    """use the channels_last memory format, which is often faster on GPUs"""
    seed: Seed = 0
    """seed of k-means, 0 to 2^32 - 1"""
    examples: int = Field(8, ge=1, le=100)
    """images per prototype in prototypes.png"""

    @model_validator(mode="after")
    def _spread_over_some(self) -> Self:
        if self.prototypes is not None and self.perplexity >= self.prototypes:
            raise ValueError(
                f"perplexity: {self.perplexity:g} has to be less than the number of prototypes, {self.prototypes}; lower it"
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
"""File name of each export format."""


class ExportConfig(CommandConfig):
    """Export a backbone file to ONNX and torch.export, compared with torch, and to a Hugging Face hub folder with a model card."""

    batch_size: BatchSize = 256
    """images per forward pass"""
    workers: Workers = 2
    """processes that decode images; 0 decodes in the main process"""

    model: Path
    """backbone file to export"""
    data: SourceConfig | None = None
    """images for the comparison with torch; null: noise"""
    formats: list[Literal["onnx", "torch"]] = Field(["onnx", "torch"], min_length=1)
    """formats to write; onnx: backbone.onnx; torch: backbone.pt2, a torch.export program"""
    check_images: Count = 64
    """number of images for the comparison with torch"""
    tolerance: float = Field(1e-3, gt=0, le=1)
    """largest allowed difference of a logit, as a fraction of the largest logit, above 0 to 1"""
    image_size: Side | None = None
    """side of the input in pixels; null: the size the model was trained at"""
    benchmark: bool = False
    """measure latency (batch 1) and throughput (batch_size) of torch and of the exported files"""
    push_to_hub: str | None = None
    """repository ORG/NAME on the hub to upload the folder to; null: no upload"""
    private: bool = False
    """create a private repository, if it does not exist yet"""

    def inputs(self) -> dict[str, Path]:
        return {"model": self.model} | (self.data.inputs("data") if self.data else {})


class ConvertPaddleConfig(CommandConfig):
    """Convert an official PaddleClas file of a ResNet_vd to a backbone file."""

    weights: Path
    """PaddleClas file (.pdparams)"""
    arch: Literal["resnet50d", "resnet101d", "resnet152d", "resnet18d", "resnet34d", "resnet200d"] | None = None
    """timm name of the network; null: detected from the file"""
    input_size: Side | None = None
    """side of the evaluation view in pixels; null: 320 if the file's name begins with Fix_, else 224"""
    val_crop: float | None = Field(None, gt=0, le=1)
    """fraction of the short side in the central evaluation crop, above 0 to 1; null: 0.875 up to 224 pixels, 1 above"""

    def inputs(self) -> dict[str, Path]:
        return {"weights": self.weights}
