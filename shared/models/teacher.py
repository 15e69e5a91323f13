"""The frozen teacher: a plain object, not a module, so that no optimizer, EMA, DDP wrapper or checkpoint can ever hold it."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import get_model_args
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssld.shared.errors import UserError
from ssld.shared.images import seeded_torch
from ssld.shared.models.backbones import Classifier, create_classifier, licence, place
from ssld.shared.models.constant_outputs import refuse_constant, two_images
from ssld.shared.models.folding import fold_batchnorm as fold
from ssld.shared.models.model_file import content_hash
from ssld.shared.models.references import ModelReference, no_classes, parse_reference

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class TeacherFeatures:
    """Outputs of one forward pass of a teacher, float32.

    Attributes:
        logits_BK: logits; None for a teacher without classes.
        pooled_BD: input of its classification layer.
        map_BCHW: its last features before pooling, without prefix tokens; None where it was not requested.
    """

    logits_BK: Tensor | None
    pooled_BD: Tensor
    map_BCHW: Tensor | None


class FrozenTeacher:
    """Frozen network: pixels [B,3,H,W] in 0..255 -> float32 logits [B,K], without gradients and always in evaluation mode (no dropout).

    It normalizes with its own mean and std, and resizes the pixels where it works at one size only.

    Args:
        reference: see `shared/models/references.py`; pickles are read with `weights_only=True`.
        arch: timm name, for weights that do not name it.
        device: where it runs.
        dtype: of its forward pass, by autocast; float32 switches autocast off.
        channels_last: whether it runs in the memory format channels_last.
        size: side in pixels to resize its input to, for which a network of fixed size is built; "own" is the size of its weights' own settings;
            None takes the pixels as they come, or its own size where that is fixed or its classes are prototypes, which were made at that size.
        batchnorm: "eval" uses running statistics; "batch" those of the batch, as SSLD's teachers did in training (PaddleClas@d178931f,
            docs/en/models/.../distillation_en.md); the running ones stay as they are.
        fold_batchnorm: fold BatchNorm into the convolutions before it where the network can be traced and the outputs are unchanged.
        classes: whether class logits are needed; False also accepts networks without a classifier, for `features`.
        global_pool: timm's pooling of its features; removes the classifier, so only without `classes`. None: the network's own.

    Attributes:
        loaded: lines on where its weights come from, and why its BatchNorm could not be folded.
        num_classes, class_names: K and the names of the classes; 0 and None without a classifier, and None where the names are not known.
        folded: number of BatchNorm layers that were folded.
        own_size: (height, width) of its weights' own settings, or that a network of fixed size was built for.
        size: (height, width) that pixels are resized to; None: as they come.

    Raises:
        UserError: as `parse_reference` and `create_classifier`; `batchnorm="batch"` without any BatchNorm; no classes where they are needed; a
            pooling that the network does not have, or that its classes were not trained on; weights with which it gives the same outputs for
            every image.
    """

    def __init__(
        self,
        reference: str,
        *,
        arch: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        size: int | Literal["own"] | None = None,
        batchnorm: Literal["eval", "batch"] = "eval",
        fold_batchnorm: bool = False,
        classes: bool = True,
        global_pool: str | None = None,
    ) -> None:
        self.reference: ModelReference = parse_reference(reference, arch, allow_pickle=True)
        side = size if isinstance(size, int) else None
        with seeded_torch(reference, 0, 0):  # random weights are the same at every start and on every rank
            classifier, inputs = create_classifier(self.reference, image_size=side)
        classifier.requires_grad_(False).eval()
        self.own_size = inputs.size
        self._normalization = {"mean": list(inputs.mean), "std": list(inputs.std)}
        at_own_size = inputs.fixed_size or size == "own" or "prototypes" in self.reference.metadata
        self.size = (side, side) if side else inputs.size if at_own_size else None
        self.num_classes = int(getattr(classifier.net, "num_classes", 0))
        self.class_names: list[str] | None = self.reference.metadata.get("class_names")
        if self.num_classes < 2 and classes:
            raise UserError(no_classes(reference, self.num_classes))
        self._content_sha256 = content_hash(classifier.net.state_dict())
        if global_pool is not None:
            if classes:
                raise UserError(
                    f"teacher.global_pool: {reference}'s classifier needs its own pooling; remove global_pool, "
                    "or use feature losses only"
                )
            reset_head(classifier.net, 0, global_pool, key="teacher.global_pool", arch=self.reference.arch)
            self.num_classes, self.class_names = 0, None
        self._licence = licence(self.reference) or "unknown"
        self.loaded = [classifier.loaded]
        self.folded = 0
        if fold_batchnorm and batchnorm == "eval":
            noise = torch.randn(2, 3, *(self.size or inputs.size), generator=torch.Generator().manual_seed(0))
            classifier.net, self.folded, reason = fold(classifier.net, noise)
            if reason:
                self.loaded.append(f"{reference}: BatchNorm stays, which costs some speed: {reason}")
        self._classifier = place(classifier, device, channels_last=channels_last)
        self.device, self._dtype = torch.device(device), dtype
        if self.reference.pretrained:
            with torch.no_grad():
                images = two_images(*(self.size or inputs.size), device)
                refuse_constant(classifier(images) if classes else embed(classifier, images), reference)
        self._order: Tensor | None = None
        self._forward_features: Callable[[Tensor], Any] | None = None  # compiled
        self._norms = [module for module in classifier.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [(norm.running_mean, norm.running_var) for norm in self._norms]
        self.batchnorm = batchnorm
        if batchnorm == "batch":
            if not self._norms:
                raise UserError(f"{reference}: has no BatchNorm; set teacher.batchnorm: eval")
            self._forget_statistics()

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        with self._forward():
            logits: Tensor = self._classifier(self._resized(pixels_BCHW))
        logits = logits.float()
        return logits if self._order is None else logits[:, self._order]

    def each(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Logits [B,K] of every network: a list of one."""
        return [self(pixels_BCHW)]

    def compile(self) -> None:
        """Compile the network with torch.compile, for logits and features alike."""
        net: Any = self._classifier.net
        self._forward_features = torch.compile(net.forward_features)
        net.compile()

    def features(self, pixels_BCHW: Tensor, *, maps: bool) -> TeacherFeatures:
        """Logits and features, in one forward pass. Raises UserError where `maps` asks for a map of features that are none."""
        with self._forward():
            net: Any = self._classifier.net
            forward_features = self._forward_features or net.forward_features
            features = forward_features(self._classifier.normalized(self._resized(pixels_BCHW)))
            pooled_BD = net.forward_head(features, pre_logits=True)
            logits_BK = net.forward_head(features).float() if self.num_classes > 1 else None
            map_BCHW = feature_map(net, features, self.reference.text).float() if maps else None
        if logits_BK is not None and self._order is not None:
            logits_BK = logits_BK[:, self._order]
        return TeacherFeatures(logits_BK, pooled_BD.float(), map_BCHW)

    @property
    def references(self) -> list[ModelReference]:
        """References of all networks: a list of one."""
        return [self.reference]

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the pooled input of the classification layer: [B,D] float32."""
        with self._forward():
            return embed(self._classifier, self._resized(pixels_BCHW))

    @contextmanager
    def running_statistics(self) -> Iterator[None]:
        """Context manager: BatchNorm uses running statistics, as in evaluation, whatever `batchnorm` is."""
        for norm, (mean, variance) in zip(self._norms, self._statistics, strict=True):
            norm.running_mean, norm.running_var = mean, variance
        try:
            yield
        finally:
            if self.batchnorm == "batch":
                self._forget_statistics()

    def content_sha256(self) -> str:
        """Return the hash of its weights, as in a model file."""
        return self._content_sha256

    def match_classes(self, names: list[str] | None, count: int, owner: str) -> None:
        """Order the logits by the classes of `names` from now on.

        Raises UserError when the teacher has other classes than `owner`, by name where both have names, by count otherwise.
        """
        order = _class_order(self, names, count, owner)
        self._order = None if order is None else torch.tensor(order, device=self.device)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the teacher for a student's file."""
        return {
            "reference": self.reference.text,
            "arch": self.reference.arch,
            "licence": self._licence,
            "content_sha256": self._content_sha256,
        }

    def settings(self) -> dict[str, Any]:
        """Return what its logits depend on beside its weights: size that pixels are resized to (height, width; None: as they come), precision, mean
        and std (0..1 per channel)."""
        size = list(self.size) if self.size else None
        return {"size": size, "precision": PRECISIONS[self._dtype], **self._normalization}

    @contextmanager
    def _forward(self) -> Iterator[None]:
        mixed = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self._dtype, enabled=mixed):
            yield

    def _resized(self, pixels_BCHW: Tensor) -> Tensor:
        if self.size is None or tuple(pixels_BCHW.shape[-2:]) == self.size:
            return pixels_BCHW
        return F.interpolate(pixels_BCHW.float(), self.size, mode="bilinear", antialias=True, align_corners=False)

    def _forget_statistics(self) -> None:
        # Without running buffers BatchNorm normalizes by the batch, in evaluation mode too, and has nothing to update.
        for norm in self._norms:
            norm.running_mean = norm.running_var = None


class TeacherEnsemble:
    """Ensemble of frozen teachers: its logits are the logarithm of the mean of their softmax.

    Their classes are those of the first member that has names; members without names are taken to have the same order.
    Raises UserError when a member has other classes, or prototypes of its own.
    """

    def __init__(self, members: Sequence[FrozenTeacher]) -> None:
        self._members = members
        self.reference, self.batchnorm = members[0].reference, members[0].batchnorm
        self.device = members[0].device
        self.loaded = [line for member in members for line in member.loaded]
        named = next((member for member in members if member.class_names), members[0])
        self.num_classes, self.class_names = named.num_classes, named.class_names
        made = [member.reference for member in members if member.reference.metadata.get("prototypes")]
        for other in made[1:]:  # whose names are alike
            if other.metadata["prototypes"] != made[0].metadata["prototypes"]:
                raise UserError(f"{other.text}: its prototypes are not those of {made[0].text}; use only one of them")
        for member in members:
            member.match_classes(named.class_names, named.num_classes, named.reference.text)
        self._order: Tensor | None = None

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self._mean([member(pixels_BCHW) for member in self._members])

    def compile(self) -> None:
        """Compile the network of every member."""
        for member in self._members:
            member.compile()

    def features(self, pixels_BCHW: Tensor, *, maps: bool) -> TeacherFeatures:
        """Logits of all members, features of the first."""
        first = self._members[0].features(pixels_BCHW, maps=maps)
        assert first.logits_BK is not None
        logits_BK = self._mean([first.logits_BK, *(member(pixels_BCHW) for member in self._members[1:])])
        return TeacherFeatures(logits_BK, first.pooled_BD, first.map_BCHW)

    def each(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Logits [B,K] of every member, in the classes of the ensemble."""
        logits = [member(pixels_BCHW) for member in self._members]
        return logits if self._order is None else [one[:, self._order] for one in logits]

    def _mean(self, logits: list[Tensor]) -> Tensor:
        log_probs = torch.stack([F.log_softmax(one, dim=-1) for one in logits])
        mean = log_probs.logsumexp(0) - math.log(len(logits))
        return mean if self._order is None else mean[:, self._order]

    @property
    def references(self) -> list[ModelReference]:
        """References of all members."""
        return [member.reference for member in self._members]

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the embeddings of the first member."""
        return self._members[0].embed(pixels_BCHW)

    @contextmanager
    def running_statistics(self) -> Iterator[None]:
        """See FrozenTeacher."""
        with ExitStack() as stack:
            for member in self._members:
                stack.enter_context(member.running_statistics())
            yield

    def content_sha256(self) -> str:
        """Return the hash of the members' hashes, in their order."""
        return hashlib.sha256(" ".join(member.content_sha256() for member in self._members).encode()).hexdigest()

    def match_classes(self, names: list[str] | None, count: int, owner: str) -> None:
        """See FrozenTeacher."""
        order = _class_order(self, names, count, owner)
        self._order = None if order is None else torch.tensor(order, device=self.device)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the teacher for a student's file."""
        members = [member.facts() for member in self._members]
        return {
            "reference": ", ".join(facts["reference"] for facts in members),
            "arch": ", ".join(facts["arch"] for facts in members),
            "licence": " AND ".join(dict.fromkeys(facts["licence"] for facts in members)),
            "content_sha256": self.content_sha256(),
        }

    def settings(self) -> dict[str, Any]:
        """See FrozenTeacher; sizes, means and standard deviations of all members."""
        settings = [member.settings() for member in self._members]
        return settings[0] | {key: [one[key] for one in settings] for key in ("size", "mean", "std")}


Teacher = FrozenTeacher | TeacherEnsemble


def embed(classifier: Classifier, pixels_BCHW: Tensor) -> Tensor:
    """Return the pooled features that the classification layer of a network gets: [B,D] float32."""
    net: Any = classifier.net
    features = net.forward_features(classifier.normalized(pixels_BCHW))
    embedding: Tensor = net.forward_head(features, pre_logits=True)
    return embedding.float()


def feature_map(net: nn.Module, features: Any, name: str) -> Tensor:
    """[B,C,H,W] of what `forward_features` of a timm network gives: a map of either layout, or tokens, without those before the patches (class,
    registers).

    Raises UserError, with `name` in front, where it is neither.
    """
    width = int(getattr(net, "num_features", 0))
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    if len(shape) == 4:
        map_BCHW = features.permute(0, 3, 1, 2) if getattr(net, "output_fmt", None) == "NHWC" else features
    elif len(shape) == 3:
        tokens_BNC = features[:, int(getattr(net, "num_prefix_tokens", 0)) :]
        side = math.isqrt(tokens_BNC.shape[1])
        map_BCHW = tokens_BNC.transpose(1, 2)[..., : side * side].unflatten(-1, (side, side))
        # One token alone is a class token: some networks give nothing else.
        width = width if tokens_BNC.shape[1] == side * side > 1 else 0
    if len(shape) not in (3, 4) or map_BCHW.shape[1] != width:
        raise UserError(
            f"{name}: last features have shape {list(shape)}, not [B, C, H, W]; remove spatial from losses, or use another arch"
        )
    return map_BCHW


def reset_head(net: Any, classes: int, pool: str | None, *, key: str, arch: str) -> None:
    """Replace the head: `classes` classes and the requested pooling, or the network's own; without a name timm changes the pooling of some arches.

    Raises UserError where the network has no such pooling (`key` is the setting that names it), or cannot be given another head.
    """
    try:
        net.reset_classifier(classes, pool or get_model_args(net).get("global_pool"))
    except Exception as error:  # assertions, keys, types: every family has its own
        if pool is None:
            raise UserError(f"{arch}: cannot be given other classes by timm; use another arch") from None
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{key}: {arch}: has no pooling {pool!r} ({why})") from None


def _class_order(teacher: Teacher, names: list[str] | None, count: int, owner: str) -> list[int] | None:
    """Return the teacher's class numbers in the order of `names`; None where a side has no names."""
    text = teacher.reference.text
    if names and teacher.class_names:
        strange = sorted(set(names) ^ set(teacher.class_names))
        if strange:
            raise UserError(f"{text}: its classes are not those of {owner}: only one of them has {strange[0]!r}")
        return [teacher.class_names.index(name) for name in names]
    if count != teacher.num_classes:
        raise UserError(f"{text}: has {teacher.num_classes} classes, {owner} have {count}")
    return None
