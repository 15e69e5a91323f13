"""Start of a training from a detector: a file of this project, or published weights. Equal architecture, equal or other classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, create_body
from ssld.shared.models.damage import refuse_damaged
from ssld.shared.models.model_file import is_pickle, read_metadata, read_tensors
from ssld.shared.models.references import ModelReference
from ssld.shared.models.timm_names import known_arch
from ssld.stage2_detect.detector_file import settings_of
from ssld.stage2_detect.foreign.coco_classes import coco_classes
from ssld.stage2_detect.foreign.torchvision_weights import convert, find_weights, read_weights
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.class_rows import carry_rows, rows_per_class
from ssld.stage2_detect.published import PREFIX, published
from ssld.stage2_detect.training.body import Body

_BODY = "pyramid.body."
_SHAPING = (
    "kind",
    "fpn_channels",
    "dcn_strides",
    "fpn_maps",
    "rpn.anchor_ratios",
    "fpn_norm",
    "rpn.anchor_scales",
    "rpn.convolutions",
    "roi.convolutions",
    "roi.fully_connected",
    "roi.norm",
    "mask.norm",
    "retinanet.tower_norm",
    "roi.hidden",
    "roi.class_agnostic",
    "cascade.positive_ious",
    "mask.hidden",
    "mask.convolutions",
    "dense.convolutions",
    "dense.p6_from",
    "gfl.reg_max",
    "gfl.tower_bias",
)
"""settings of `model` that determine shapes of tensors"""
_LISTS = {"rpn.anchor_ratios", "rpn.anchor_scales", "cascade.positive_ious"}
"""those whose length does, not the values"""


@dataclass(frozen=True)
class InitWeights:
    """A detector whose weights a training run starts from; `open_init` makes it.

    Attributes:
        source: the file or the name of the weights.
        file: the file.
        config: its settings.
        class_names: its classes in order.
        arch, model_args, inputs: architecture and inputs of its backbone.
        licence: licence of its weights; "unknown" if the file does not give one.
        backbone: origin of its backbone.
        trained_images: marks of images that it was trained on (`trained_images.marks_of`).
    """

    source: str
    file: Path
    config: DetectorConfig
    class_names: tuple[str, ...]
    arch: str
    model_args: dict[str, Any]
    inputs: InputSettings
    licence: str
    backbone: dict[str, Any] = field(default_factory=dict)
    trained_images: Sequence[str] = ()

    @property
    def is_published(self) -> bool:
        """Whether these are weights of torchvision."""
        return self.source.startswith(PREFIX)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names of this project."""
        if not self.is_published:
            return read_tensors(self.file)
        about = published(self.source, "init")
        return convert(read_weights(self.file), tuple(coco_classes()), norm_eps=about.norm_eps, source=self.file)

    def create_body(self, **options: Any) -> Body:
        """Create its features-only backbone with random weights, which `load` replaces. Raises UserError like the shared `create_body`."""
        reference = ModelReference(self.source, self.arch, metadata={"model_args": self.model_args})
        module, _ = create_body(reference, **options)
        return Body(module, self.arch, self.inputs, self.licence, self.model_args, self.backbone)

    def check_body(self, backbone: str, arch: str, model_args: dict[str, Any]) -> None:
        """Raise UserError where another backbone is not of this detector's architecture."""
        same = arch.partition(".")[0] == self.arch.partition(".")[0] and model_args == self.model_args
        if not same:
            raise UserError(
                f"backbone: {backbone} is a {_network(arch, model_args)}, the heads of {self.source} belong to a "
                f"{_network(self.arch, self.model_args)}; leave backbone out, or give one of that architecture"
            )

    def load(
        self, detector: nn.Module, config: DetectorConfig, class_names: tuple[str, ...], *, keep_body: bool = False
    ) -> str:
        """Load the weights into `detector`, rows of its heads by class name; returns a line for the log.

        Args:
            keep_body: leave the weights of the detector's backbone as they are.

        Raises UserError if any tensor differs between the architectures; nothing is loaded then.
        """
        initial = detector.state_dict()
        tensors = self.tensors
        self._check_fits(tensors, initial, config, class_names)
        body = {name: tensor for name, tensor in initial.items() if keep_body and name.startswith(_BODY)}
        agnostic = config.roi.class_agnostic or config.is_cascade
        detector.load_state_dict(
            carry_rows(tensors | body, initial, old=self.class_names, new=class_names, class_agnostic=agnostic)
        )
        loaded = f"{self.source}: loaded {len(initial) - len(body)}/{len(initial)} tensors"
        if body:
            loaded += f", all but the {len(body)} of the backbone"
        return f"{loaded}; {self._describe_rows(class_names)}"

    def _describe_rows(self, class_names: tuple[str, ...]) -> str:
        """Say which classes kept their rows, which are new, and which were dropped, by name."""
        kept = [name for name in class_names if name in self.class_names]
        new = [name for name in class_names if name not in self.class_names]
        dropped = [name for name in self.class_names if name not in class_names]
        parts = [f"rows of {len(kept)} classes kept{_some(kept)}"]
        parts += [f"{len(new)} new, at random{_some(new)}"] if new else []
        parts += [f"{len(dropped)} dropped{_some(dropped)}"] if dropped else []
        return ", ".join(parts)

    def _check_fits(
        self,
        tensors: dict[str, Tensor],
        initial: dict[str, Tensor],
        config: DetectorConfig,
        class_names: tuple[str, ...],
    ) -> None:
        faults = [f"{name} is missing" for name in initial if name not in tensors]
        faults += [f"{name} is unknown" for name in tensors if name not in initial]
        for name in initial.keys() & tensors.keys():
            expected, given = tuple(initial[name].shape), tuple(tensors[name].shape)
            rows = rows_per_class(name, initial[name], len(class_names))
            by_class = rows is not None and rows == rows_per_class(name, tensors[name], len(self.class_names))
            if expected[1:] != given[1:] or (expected != given and not by_class):
                faults.append(f"{name} is {given} instead of {expected}")
        if faults:
            settings = ", ".join(_differences(self.config, config)) or "none of the settings under model"
            raise UserError(
                f"init: {self.source}: another architecture than this run's model: {sorted(faults)[0]} "
                f"({len(faults)} such tensors; settings that differ: {settings})"
            )


def open_init(init: Path) -> InitWeights:
    """Open a detector file, or `coco:NAME`, which is downloaded where it is not in torch hub's cache; weights are read later.

    Raises UserError: not a detector file, one of an earlier version, an unknown name, a download that is not possible, a wrong sha256.
    """
    if str(init).startswith(PREFIX):
        about = published(str(init), "init")
        file = find_weights(str(init), "init")
        return InitWeights(
            source=str(init),
            file=file,
            config=DetectorConfig.model_validate(about.model),
            class_names=tuple(coco_classes().values()),
            arch=about.arch,
            model_args=about.model_args,
            inputs=InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            licence="bsd-3-clause",
            backbone={"reference": str(init)},
        )
    convert_first = f"`ssld convert-detector --weights {init} --output DIR` makes one of a detector of another project"
    refuse_damaged(init)
    if init.is_file() and is_pickle(init):
        raise UserError(f"init: {init}: not a detector file; {convert_first}")
    metadata = read_metadata(init, kind="detector")
    if metadata.get("kind") != "detector":
        raise UserError(f"init: {init}: not a detector file: it has no metadata of this project; {convert_first}")
    return InitWeights(
        source=str(init),
        file=init,
        config=settings_of(metadata, "model", DetectorConfig, init),
        class_names=tuple(metadata["class_names"]),
        arch=known_arch(metadata["arch"], init),
        model_args=metadata.get("model_args") or {},
        inputs=InputSettings.of_detector(metadata["mean"], metadata["std"]),
        licence=metadata.get("licence", "unknown"),
        backbone=metadata.get("backbone", {}),
        trained_images=metadata.get("trained_images") or (),
    )


def _network(arch: str, model_args: dict[str, Any]) -> str:
    return f"{arch} ({', '.join(f'{key}={value}' for key, value in model_args.items())})" if model_args else arch


def _differences(file: DetectorConfig, run: DetectorConfig) -> list[str]:
    """Return `model.KEY (file: x, run: y)` for settings that determine shapes of tensors; of lists, x and y are lengths."""
    pairs = {key: [attrgetter(key)(one) for one in (file, run)] for key in _SHAPING}
    pairs |= {key: [len(value) for value in pairs[key]] for key in _LISTS}
    return [f"model.{key} (file: {a}, run: {b})" for key, (a, b) in pairs.items() if a != b]


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:8])}{' ...' if len(names) > 8 else ''})" if names else ""
