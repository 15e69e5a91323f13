"""Settings shared by the stage-1 commands: images, views, optimizer, networks, teachers, losses. Does not import torch."""

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import BatchSize, Position, Positive, Side, Weight, Workers
from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.settings import Config, ModelText, Network
from ssld.shared.config.training import OptimConfig, in_steps
from ssld.shared.errors import UserError
from ssld.shared.files import ImageFolder
from ssld.shared.models.downloads import kind_of

Part = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=100)]


def is_remote(path: str) -> bool:
    """Whether a source is remote: an fsspec URL (s3://..., gs://..., memory://...), or a data set of the Hugging Face hub."""
    return "://" in path or path.startswith("hub:")


class ForwardConfig(ComputeConfig):
    """Settings of commands that run a network over images without training it."""

    batch_size: BatchSize = 256
    """images per forward pass and process"""
    workers: Workers = 2
    """decoding processes per rank; 0 decodes in the main process"""


class SourceConfig(Config):
    """Images from one place, labeled or not."""

    path: str
    """folder of images (in class folders, or nested arbitrarily), Parquet files, WebDataset .tar files, list file (.txt: per line a path, optionally
    a class number), manifest of ssld curate, or hub:ORG/NAME; all but the last two as a local path, a pattern with *, or an fsspec URL"""
    weight: Positive | None = None
    """share of training images drawn from this source, relative to the weights of the others; null for all sources: they are concatenated"""
    labels: str = "auto"
    """labels of the images; auto: class folders or the label column; none: unlabeled; FILE.parquet: joined by `id_column`, negative ones dropped"""
    image_column: str = "image"
    """Parquet column of the images; for tar samples with several images, the part of the image's name after the first dot"""
    label_column: str = "label"
    """Parquet column of the class numbers"""
    id_column: str = "id"
    """Parquet column to join a label file by"""
    root: str | None = None
    """folder that paths of a list file are relative to; null: the folder of the file"""
    split: str | None = None
    """split to read of a data set with several; null: train for a hub data set, none for a folder"""
    subset: str | None = None
    """configuration (subset) of a hub data set with several"""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            value = {"path": value}
        path = value.get("path")
        if (path is None and "path" in value) or isinstance(path, bool | float | list | dict):
            raise ValueError(
                f"the path is {json.dumps(path)} to YAML; put a name like that in quotes, or write it as ./NAME"
            )
        if isinstance(path, str) and not path.strip():
            raise ValueError("the path is empty; name a folder or a file")
        return {**value, "path": str(path)} if isinstance(path, Path | int | date) else value

    def inputs(self, key: str) -> dict[str, Path]:
        """Local files of this source, by key."""
        files: dict[str, Path] = {} if is_remote(self.path) or "*" in self.path else {key: ImageFolder(self.path)}
        if self.labels not in ("auto", "none"):
            files[f"{key}.labels"] = Path(self.labels)
        return files


class DataConfig(Config):
    """Images and the views that student and teacher share."""

    train: list[SourceConfig] = Field(min_length=1)
    """training sources, concatenated, or mixed by weight; distillation does not read their labels"""
    val: SourceConfig | None = None
    """evaluation images; without labels only agreement and KL are measured"""
    held_out: float | None = Field(None, gt=0, le=0.5)
    """share of the training images, above 0 to 0.5, that are not trained on but measure agreement and KL, in place of val; chosen by their names"""
    streaming: bool = False
    """read the training sources in file order, shuffled in blocks, without an index; for pools that are remote or larger than memory"""
    allow_loss: bool = False
    """continue if more than half of the images of a source or class, or a whole class, cannot be used; the log has the causes"""
    decoder: Literal["pil", "torchcodec"] = "pil"
    """decoder of training images; torchcodec is faster for JPEGs and has to be installed"""
    image_size: Side = 224
    """side of the views in pixels"""
    train_view: Literal["random", "center"] = "random"
    """kind of training view; random: crop, flip and augmentation; center: the evaluation view, for SSLD's Fix phase"""
    crop_area: tuple[Part, Part] = (0.08, 1.0)
    """smallest and largest area of a training crop, as fractions of the image"""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """smallest and largest aspect ratio of a training crop, width / height"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """interpolation when resizing: bilinear or bicubic"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip, 0 to 1"""
    augment: str | None = None
    """augmentation after the crop, by timm's name: RandAugment (rand-m9-mstd0.5-inc1), AutoAugment (original, originalr, v0, v0r, 3a), AugMix
    (augmix-m3-w3), or trivial for TrivialAugment; null: none"""
    augment_probability: float = Field(1.0, ge=0, le=1)
    """probability that a view is augmented, 0 to 1"""
    erase: float = Field(0.0, ge=0, le=1)
    """probability that a random rectangle of the view is replaced by noise, 0 to 1"""
    mixup: float = Field(0.0, ge=0, le=1000)
    """alpha of mixup (Beta distribution of the shares; 1: uniform; 0: off); the teacher sees the mixed images too"""
    cutmix: float = Field(0.0, ge=0, le=1000)
    """alpha of cutmix (0: off); if mixup is on too, each batch uses one of them"""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """probability that a batch is mixed, 0 to 1"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """fraction of the short side in the central evaluation crop, above 0 to 1"""

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _in_order(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError(f"the smaller number comes first (given: {pair[0]:g}, {pair[1]:g})")
        return pair

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> Self:
        given = [source.weight is not None for source in self.train]
        if any(given) and not all(given):
            raise ValueError(f"train.{given.index(False)}.weight is missing: give every source a weight, or none")
        return self

    @model_validator(mode="after")
    def _held_out_by_rows(self) -> Self:
        if self.held_out is not None and self.val is not None:
            raise ValueError("held_out replaces val: give one of them")
        if self.held_out is not None and self.streaming:
            raise ValueError(
                "held_out: images of streams are not known before they are read; give val, or set streaming: false"
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluation images."""
        return self.val is not None or self.held_out is not None

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def inputs(self, key: str) -> dict[str, Path]:
        """Local files of all sources, by key."""
        files: dict[str, Path] = {}
        for number, source in enumerate(self.train):
            files |= source.inputs(f"{key}.train.{number}")
        if self.val:
            files |= self.val.inputs(f"{key}.val")
        return files

    def hub_data(self, key: str) -> dict[str, str]:
        """Hub data sets among the sources, by key."""
        train = [(f"{key}.train.{number}", source) for number, source in enumerate(self.train)]
        return hub_sources([*train, (f"{key}.val", self.val)])


class Stage1OptimConfig(OptimConfig):
    """Optimizer and its schedule: linear warm-up, then cosine to zero, by step."""

    warmup_steps: Position | None = None
    """length of the warm-up in steps, or as a fraction of the run; at most a tenth of the run"""
    warmup_epochs: float | None = Field(None, ge=0, le=1_000_000)
    """length of the warm-up in passes over the training images; at most a tenth of the run"""

    layer_decay: float = Field(1.0, gt=0, le=1)
    """factor on the learning rate per layer below the top, for pretrained students (0.65 to 0.95 is usual); 1: one rate for all layers"""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("give one of warmup_steps and warmup_epochs")
        return self

    def total_warmup_steps(self, images: int | None, batch_size: int, steps: int) -> int:
        """Warm-up steps of a run of `steps` steps over `images` training images, at most a tenth of them; raises UserError if the number of images is
        needed and unknown."""
        if self.warmup_epochs and images is None:
            raise UserError("optim.warmup_epochs: the length of a stream is unknown; give warmup_steps")
        warmup = self.warmup_steps or round((self.warmup_epochs or 0) * (images or 0) / batch_size)
        return min(in_steps(warmup, steps), steps // 10)


class _ByReference(Config):
    """A network's settings, in place of which the text of `model` may be given alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class NetworkConfig(_ByReference):
    """Network to train."""

    model: ModelText
    """reference of the network and its initial weights: random:NAME, timm:NAME, hf-hub:ID, a folder or a .safetensors file"""
    arch: str | None = None
    """timm name of the network, for a file that does not name it"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic-depth rate (drop path), 0 to below 1; for architectures that support it"""
    batchnorm: Literal["batch", "eval"] = "batch"
    """BatchNorm mode in training: batch (batch statistics, running ones updated) or eval (running statistics, frozen)"""

    @model_validator(mode="after")
    def _statistics_to_keep(self) -> Self:
        if self.batchnorm == "eval" and self.model.startswith("random:"):
            raise ValueError(f"batchnorm: eval keeps the running statistics of {self.model}, which has none; set batch")
        return self

    def inputs(self, key: str) -> dict[str, Path]:
        """Local file of the reference, if it names one."""
        return reference_input(key, self.model)

    def networks(self, key: str, image_size: int | None = None) -> dict[str, Network]:
        """The network by key, with the image size it has to support."""
        return {key: Network(self.model, self.arch, image_size)}


if TYPE_CHECKING:  # the validator of `StudentConfig` replaces None
    ChosenBatchNorm = Literal["batch", "eval"]
else:
    ChosenBatchNorm = Literal["batch", "eval"] | None


class StudentConfig(NetworkConfig):
    """Network to train under a teacher."""

    batchnorm: ChosenBatchNorm = Field(cast(Any, None))
    """BatchNorm mode in training: batch (batch statistics, running ones updated) or eval (running statistics, frozen); null: eval for trained
    weights, batch for random ones"""

    @model_validator(mode="after")
    def _chosen_batchnorm(self) -> Self:
        """Keep the statistics of trained weights: those of crops fit no whole photo (docs/distillation.md, "Pretrained students")."""
        if self.batchnorm is None:
            # Past the frozen model, so that the setting does not count as given.
            object.__setattr__(self, "batchnorm", "batch" if self.model.startswith("random:") else "eval")
        return self


class _FrozenNetwork(_ByReference):
    model: ModelText
    """reference of the network: timm:NAME, hf-hub:ID, a folder, a .safetensors file, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name of the network, for a file that does not name it"""


class EncoderConfig(_FrozenNetwork):
    """Encoder to make a teacher from; the classes of a classifier are dropped."""

    global_pool: str | None = None
    """pooling by timm's name: avg, max, avgmax; token or map for a ViT; null: the encoder's own"""


class TeacherMember(_FrozenNetwork):
    """One network of a teacher."""

    size: Side | Literal["own"] | None = None
    """side in pixels to which the student's view is resized for the teacher; a network of fixed size is built for it; own: the input size stored
    with the weights; null: the size of the view, or the network's own where that is fixed or its classes are prototypes"""


class TeacherConfig(TeacherMember):
    """Frozen teacher."""

    ensemble: list[TeacherMember] = []
    """further networks of an ensemble; the soft labels are the mean of all softmax outputs"""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """precision of the teacher's forward pass; null: `precision` of the command"""
    batchnorm: Literal["eval", "batch"] = "eval"
    """BatchNorm mode of the teacher: eval (running statistics) or batch (statistics of the batch on each process, as in SSLD's trainings)"""
    fold_batchnorm: bool = True
    """fold BatchNorm into the preceding convolutions if the network can be traced; without effect with batchnorm: batch"""
    global_pool: str | None = None
    """pooling of the teacher's features by timm's name (avg, max, avgmax; token or map for a ViT), for feature losses only; null: the teacher's
    default"""
    check_images: int = Field(1024, ge=0, le=1_000_000)
    """number of labeled images on which the teacher is checked before training; the run stops if it does no better than guessing; 0: off"""

    def inputs(self, key: str) -> dict[str, Path]:
        """Local files of its networks, by key."""
        files = reference_input(f"{key}.model", self.model)
        for number, member in enumerate(self.ensemble):
            files |= reference_input(f"{key}.ensemble.{number}.model", member.model)
        return files

    def networks(self, key: str, *, classes: bool = True) -> dict[str, Network]:
        """Its networks, by key; `classes`: whether its logits are needed."""
        members = {f"{key}.ensemble.{number}": member for number, member in enumerate(self.ensemble)}
        return {
            f"{name}.model": Network(
                one.model, one.arch, one.size if isinstance(one.size, int) else None, allow_pickle=True, classes=classes
            )
            for name, one in ({key: self} | members).items()
        }


Scalar = Literal["temperature", "beta"]
"""Numbers of LossConfig that a loss can take; 1 where it takes none."""


Compared = Literal["logits", "pooled", "spatial"]


@dataclass(frozen=True)
class Loss:
    """A loss that `losses` can name. Its formula is the function of this name in `distillation/losses.py`, or `function`.

    Attributes:
        settings: fields of LossConfig that the function takes as keyword arguments.
        compares: logits [B,M], pooled features [B,D], or features of every cell of a map [B,N,D] (spatial).
        stored: whether log-probabilities of the stored classes and of all others together are enough, at temperature 1.
        function: (student, teacher) -> sum over the images of the batch, a scalar.
    """

    settings: tuple[Scalar, ...] = ()
    compares: Compared = "logits"
    stored: bool = False
    function: Callable[..., Any] | None = None


LOSSES: dict[str, Loss] = {
    "symmetric_kl": Loss(stored=True),
    "kl": Loss(settings=("temperature",), stored=True),
    "soft_cross_entropy": Loss(stored=True),
    "jensen_shannon": Loss(stored=True),
    "dist": Loss(),
    "decoupled_kd": Loss(settings=("temperature", "beta")),
    "bernoulli_kl": Loss(),
    "pooled": Loss(compares="pooled"),
    "spatial": Loss(compares="spatial"),
}
"""All losses by name; settings, checks and the training loop read their names and properties from here."""


def register_loss(name: str, function: Callable[..., Any], *, compares: Compared = "logits") -> None:
    """Register a custom loss under a name, in this process. Call it before the settings are parsed, on every rank.

        def reverse_kl(student, teacher):
            log_s, log_t = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
            return (log_s.exp() * (log_s - log_t)).sum()

        ssld.register_loss("reverse_kl", reverse_kl)
        ssld.distill("resnet50d", losses=[{"name": "reverse_kl"}], **settings)

    Args:
        name: name of the loss in `losses`.
        function: (student, teacher) -> scalar tensor, the sum over the images of the batch (the loop divides by the global batch). Both arguments
            are [B,K] logits, or [B,D] and [B,N,D] features as `compares` states. If it has parameters `temperature` or `beta`, they are set
            from the settings of the term. The function must not change its arguments in place: other terms read them too.
        compares: what the function receives.

    Raises:
        ValueError: a name that is taken, or not an identifier; or an unknown word in `compares`.
    """
    if compares not in get_args(Compared):
        raise ValueError(
            f"register_loss: {name}: compares: expected {', '.join(get_args(Compared))} (given: {compares!r})"
        )
    if not isinstance(name, str) or name in LOSSES or not name.isidentifier():
        raise ValueError(
            f"register_loss: {name!r} is {'taken' if isinstance(name, str) and name in LOSSES else 'not an identifier'}; give another name"
        )
    parameters = inspect.signature(function).parameters
    settings = tuple(key for key in get_args(Scalar) if key in parameters)
    LOSSES[name] = Loss(settings=settings, compares=compares, function=function)


Level = Literal["c3", "c4", "c5"]


class LossConfig(Config):
    """One term of the distillation loss."""

    name: str
    """loss between student and teacher; on logits: symmetric_kl, kl, soft_cross_entropy, jensen_shannon, dist, decoupled_kd, bernoulli_kl; on
    features, through a small trained head: pooled, spatial; or the name of a custom loss (register_loss)"""
    weight: Positive = 1.0
    """factor on this term in the sum of the losses"""
    temperature: Positive = 1.0
    """temperature of the softmax in kl and decoupled_kd; the loss is multiplied by its square"""
    beta: Weight = 1.0
    """weight of the non-target part of decoupled_kd (all classes but the teacher's most likely one)"""
    standardize: bool = False
    """standardize the logits of each image, of student and teacher: subtract their mean, divide by their standard deviation"""
    levels: list[Level] | None = Field(None, min_length=1)
    """student feature maps used by the loss spatial: c3 (stride 8), c4 (16), c5 (32); null: all of these that the network has"""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; give one of {', '.join(LOSSES)}")
        return name

    @model_validator(mode="after")
    def _settings_where_they_are_used(self) -> Self:
        for key in get_args(Scalar):
            if getattr(self, key) != 1 and key not in self.loss.settings:
                users = " or ".join(name for name, loss in LOSSES.items() if key in loss.settings)
                raise ValueError(f"{self.name} has no {key}; leave it at 1, or use {users}")
        if self.standardize and self.of_features:
            raise ValueError(f"{self.name} compares no logits; leave standardize at false")
        if self.levels is not None and self.loss.compares != "spatial":
            raise ValueError(f"{self.name} has no levels; leave them out, or use spatial")
        return self

    @field_validator("levels")
    @classmethod
    def _each_level_once(cls, levels: list[Level] | None) -> list[Level] | None:
        if levels is not None and len(set(levels)) < len(levels):
            raise ValueError(f"each level at most once (given: {', '.join(levels)})")
        return levels

    @property
    def loss(self) -> Loss:
        """Properties of the named loss."""
        return LOSSES[self.name]

    @property
    def of_features(self) -> bool:
        """Whether it compares features, not logits."""
        return self.loss.compares != "logits"


def hub_sources(sources: Iterable[tuple[str, SourceConfig | None]]) -> dict[str, str]:
    """Hub data sets among some sources, by key."""
    return {key: one.path for key, one in sources if one and one.path.startswith("hub:")}


def reference_input(key: str, reference: str) -> dict[str, Path]:
    """Local file or folder of a model reference, by its key."""
    return {key: Path(reference)} if kind_of(reference) in ("file", "folder", "path") else {}
