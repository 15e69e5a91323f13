"""Settings that the stage-1 commands share: images, views, networks, teachers, losses. Does not import torch."""

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from ssld.shared.config.bounds import Positive, Side, Weight
from ssld.shared.config.settings import Config, ModelText, Network
from ssld.shared.files import ImageFolder
from ssld.shared.models.downloads import kind_of

Part = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Precision = Literal["fp32", "bf16", "fp16"]


def is_remote(path: str) -> bool:
    """Whether a source lies elsewhere: an fsspec URL (s3://..., gs://..., memory://...), or a data set of the Hugging Face hub."""
    return "://" in path or path.startswith("hub:")


class SourceConfig(Config):
    """Images from one place, labeled or not."""

    path: str
    """folder (of class folders, or nested at will), Parquet file or folder of them, WebDataset .tar or folder of them, list file (.txt: a path, and a
    class number if there is one, a line), manifest that curate.py wrote, hub:ORG/NAME; all but the last two as a local path, with * in it, or as
    an fsspec URL"""
    weight: Positive | None = None
    """share of the training images that are drawn from this source, relative to the others' weights; null everywhere: the sources are concatenated"""
    labels: str = "auto"
    """auto: names of class folders, or the label column; none: unlabeled; FILE.parquet: labels joined by `id_column`, negative ones dropped"""
    image_column: str = "image"
    """Parquet column with the images; in tar files what the name of the image goes on with behind the first dot, where a sample has several"""
    label_column: str = "label"
    """Parquet column with the class numbers"""
    id_column: str = "id"
    """Parquet column that joins a label file"""
    root: str | None = None
    """folder that the paths of a list file are relative to; null: the folder of the file"""
    split: str | None = None
    """split of a data set that holds several; null: train for one of the hub, none for a folder"""
    subset: str | None = None
    """configuration of a data set of the hub, where it has several"""

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
        """The local files this source reads."""
        files: dict[str, Path] = {} if is_remote(self.path) or "*" in self.path else {key: ImageFolder(self.path)}
        if self.labels not in ("auto", "none"):
            files[f"{key}.labels"] = Path(self.labels)
        return files


class DataConfig(Config):
    """Images, and the view that student and teacher both see."""

    train: list[SourceConfig] = Field(min_length=1)
    """training sources, one after the other, or mixed by weight; distillation never reads their labels"""
    val: SourceConfig | None = None
    """images for evaluation; without labels only agreement and KL are measured"""
    streaming: bool = False
    """read the training sources in order of their files, shuffled in blocks, without an index: for pools that are remote or larger than memory"""
    allow_loss: bool = False
    """go on where more than half of the images of a source or of a class, or all of a class, cannot be used; the log says why"""
    decoder: Literal["pil", "torchcodec"] = "pil"
    """what decodes training images; torchcodec is faster where they are JPEGs, and has to be installed"""
    image_size: Side = 224
    """side of a view in pixels"""
    train_view: Literal["random", "center"] = "random"
    """random: crop, flip and augmentation; center: the evaluation view, for the Fix phase"""
    crop_area: tuple[Part, Part] = (0.08, 1.0)
    """smallest and largest part of the image that a training crop covers"""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    """narrowest and widest crop, width / height"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """of every resize"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a horizontal flip"""
    augment: str | None = None
    """timm's augmentation after the crop: a RandAugment (rand-m9-mstd0.5-inc1), an AutoAugment policy (original, originalr, v0, v0r, 3a), augmix-...,
    or trivial for TrivialAugment"""
    augment_probability: float = Field(1.0, ge=0, le=1)
    """share of the views that are augmented"""
    erase: float = Field(0.0, ge=0, le=1)
    """probability that a random rectangle of the view is replaced by noise"""
    mixup: float = Field(0.0, ge=0, le=1000)
    """alpha of mixup on the batch; the teacher sees the mixed image; 0 switches it off, 1 draws shares evenly"""
    cutmix: float = Field(0.0, ge=0, le=1000)
    """alpha of cutmix on the batch; with both, every batch takes one of them"""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """share of the batches that are mixed"""
    val_crop: float = Field(0.875, gt=0, le=1)
    """part of the short side that the central evaluation crop keeps"""

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

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def inputs(self, key: str) -> dict[str, Path]:
        """The local files of all sources."""
        files: dict[str, Path] = {}
        for number, source in enumerate(self.train):
            files |= source.inputs(f"{key}.train.{number}")
        if self.val:
            files |= self.val.inputs(f"{key}.val")
        return files

    def hub_data(self, key: str) -> dict[str, str]:
        """The data sets of the hub among the sources."""
        train = [(f"{key}.train.{number}", source) for number, source in enumerate(self.train)]
        return hub_sources([*train, (f"{key}.val", self.val)])


class NetworkConfig(Config):
    """A network to train."""

    model: ModelText
    """random:NAME, timm:NAME, hf-hub:ID, a folder or a .safetensors file to start from"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic depth, where the arch has it"""
    batchnorm: Literal["batch", "eval"] = "batch"
    """what BatchNorm normalises by in training: batch, the statistics of each batch, which also update the running ones; eval, the running statistics
    that a pretrained network brings, which stay as they are"""

    @model_validator(mode="after")
    def _statistics_to_keep(self) -> Self:
        if self.batchnorm == "eval" and self.model.startswith("random:"):
            raise ValueError(
                f"batchnorm: eval keeps the running statistics of {self.model}, which has measured none; set batch"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    def inputs(self, key: str) -> dict[str, Path]:
        """The local file of the reference, if it names one."""
        return reference_input(key, self.model)

    def networks(self, key: str, image_size: int | None = None) -> dict[str, Network]:
        """The network, which has to work at `image_size`."""
        return {key: Network(self.model, self.arch, image_size)}


class TeacherMember(Config):
    """One frozen network of a teacher."""

    model: ModelText
    """timm NAME, hf-hub:ID, a folder, a .safetensors file, or a .pth state dict of plain tensors"""
    arch: str | None = None
    """timm name, for a file that does not say it"""
    size: Side | None = None
    """side in pixels, that the same view is resized to for the teacher, and that a network of fixed size is built for; null: as the view
    comes, or the network's own size where that is fixed"""

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class TeacherConfig(TeacherMember):
    """The frozen teacher."""

    ensemble: list[TeacherMember] = []
    """further networks: the teacher's answer is the mean of everyone's softmax"""
    precision: Precision | None = None
    """of its forward pass; null: the student's"""
    batchnorm: Literal["eval", "batch"] = "eval"
    """eval: running statistics; batch: those of the batch on each process, as SSLD trained its students"""
    fold_batchnorm: bool = True
    """fold BatchNorm into the convolutions before it, where the network can be traced; not with batchnorm: batch"""
    global_pool: str | None = None
    """timm's pooling of its features (avg, max, avgmax; token and map of a ViT), where they alone are learned from; null: its own"""
    check_images: int = Field(1024, ge=0, le=1_000_000)
    """labeled images that the teacher is tried on before training; it stops where one of its networks guesses; 0 leaves it out"""

    def inputs(self, key: str) -> dict[str, Path]:
        """The local files of its networks."""
        files = reference_input(f"{key}.model", self.model)
        for number, member in enumerate(self.ensemble):
            files |= reference_input(f"{key}.ensemble.{number}.model", member.model)
        return files

    def networks(self, key: str) -> dict[str, Network]:
        """All of its networks."""
        members = {f"{key}.ensemble.{number}": member for number, member in enumerate(self.ensemble)}
        return {
            f"{name}.model": Network(one.model, one.arch, one.size, allow_pickle=True)
            for name, one in ({key: self} | members).items()
        }


Scalar = Literal["temperature", "beta"]
"""Numbers of LossConfig that a loss can take; 1 where it takes none."""


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
    compares: Literal["logits", "pooled", "spatial"] = "logits"
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


def register_loss(
    name: str, function: Callable[..., Any], *, compares: Literal["logits", "pooled", "spatial"] = "logits"
) -> None:
    """Make a loss of one's own available to `losses` by its name, in this process. Call it before the settings are parsed, on every rank.

    Args:
        name: how `losses` names it.
        function: (student, teacher) -> scalar tensor, the sum over the images of the batch (the loop divides by the global batch). Both arguments
            are [B,K] logits, or [B,D] and [B,N,D] features where `compares` says so. If it has parameters `temperature` or `beta`, they are set
            from the settings of the term.
        compares: what the function receives.

    Raises:
        ValueError: a name that is taken, or not an identifier.
    """
    if name in LOSSES or not name.isidentifier():
        raise ValueError(
            f"register_loss: {name!r} is {'taken' if name in LOSSES else 'not an identifier'}; give another name"
        )
    parameters = inspect.signature(function).parameters
    settings = tuple(key for key in get_args(Scalar) if key in parameters)
    LOSSES[name] = Loss(settings=settings, compares=compares, function=function)


Level = Literal["c3", "c4", "c5"]


class LossConfig(Config):
    """One term of the distillation loss."""

    name: str
    """distance between student and teacher: symmetric_kl, kl, soft_cross_entropy, jensen_shannon, dist, decoupled_kd or bernoulli_kl of their logits;
    pooled or spatial of their features, through a small head that is trained too; or a loss of one's own (register_loss)"""
    weight: Positive = 1.0
    """factor on this term in the sum of the losses"""
    temperature: Positive = 1.0
    """temperature of the softmax in kl and decoupled_kd; the loss is multiplied by its square"""
    beta: Weight = 1.0
    """weight of the non-target part of decoupled_kd (all classes but the teacher's most likely one)"""
    standardize: bool = False
    """standardize the logits of each image, of student and teacher: subtract their mean, divide by their standard deviation"""
    levels: list[Level] | None = Field(None, min_length=1)
    """student maps that spatial compares, by stride: c3 (8 pixels), c4 (16), c5 (32); null: all of these that the network has"""

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
    """The sources that are data sets of the hub, by key."""
    return {key: one.path for key, one in sources if one and one.path.startswith("hub:")}


def reference_input(key: str, reference: str) -> dict[str, Path]:
    """The local file or folder of a model reference, by the key that names it."""
    return {key: Path(reference)} if kind_of(reference) in ("file", "folder", "path") else {}
