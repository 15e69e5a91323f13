"""Start of a training run from a detector file: equal architecture, equal or other classes."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, create_body
from ssld.shared.models.model_file import read_metadata, read_tensors
from ssld.shared.models.references import ModelReference
from ssld.shared.models.timm_names import known_arch
from ssld.stage2_detect.detector_file import settings_of
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.class_rows import carry_rows, rows_per_class


class InitFile:
    """A detector file whose weights a training run starts from.

    Attributes:
        class_names: its classes in order.
        arch, model_args, inputs: architecture and inputs of its backbone.
        licence: licence of its weights; "unknown" if the file does not give one.
        backbone: origin of its backbone.

    Raises:
        UserError: not a detector file, or one of an earlier version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = read_metadata(path, kind="detector")
        if metadata.get("kind") != "detector":
            raise UserError(f"init: {path}: not a detector file: it has no metadata of this project")
        self._config = settings_of(metadata, "model", DetectorConfig, path)
        self.class_names: tuple[str, ...] = tuple(metadata["class_names"])
        self.arch = known_arch(metadata["arch"], path)
        self.model_args: dict[str, Any] = metadata.get("model_args") or {}
        self.inputs = InputSettings(tuple(metadata["mean"]), tuple(metadata["std"]), (0, 0), "bilinear", False)
        self.licence: str = metadata.get("licence", "unknown")
        self.backbone: dict[str, Any] = metadata.get("backbone", {})

    def create_body(self, **options: Any) -> nn.Module:
        """Create its features-only backbone with random weights, which `load` replaces. Raises UserError like the shared `create_body`."""
        return create_body(
            ModelReference(str(self.path), self.arch, metadata={"model_args": self.model_args}), **options
        )[0]

    def load(self, detector: nn.Module, config: DetectorConfig, class_names: tuple[str, ...]) -> str:
        """Load the file's weights into `detector`, rows of its heads by class name; returns a line for the log.

        Raises UserError if any tensor differs between the architectures; nothing is loaded then.
        """
        initial = detector.state_dict()
        tensors = read_tensors(self.path)
        self._check_fits(tensors, initial, config, class_names)
        agnostic = config.roi.class_agnostic or config.is_cascade
        detector.load_state_dict(
            carry_rows(tensors, initial, old=self.class_names, new=class_names, class_agnostic=agnostic)
        )
        kept = [name for name in class_names if name in self.class_names]
        new = [name for name in class_names if name not in self.class_names]
        dropped = [name for name in self.class_names if name not in class_names]
        parts = [f"rows of {len(kept)} classes kept{_some(kept)}"]
        parts += [f"{len(new)} new, at random{_some(new)}"] if new else []
        parts += [f"{len(dropped)} dropped{_some(dropped)}"] if dropped else []
        return f"{self.path}: loaded {len(tensors)}/{len(initial)} tensors; " + ", ".join(parts)

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
            settings = ", ".join(_differences(self._config, config)) or "none of the settings under model"
            raise UserError(
                f"init: {self.path}: another architecture than this run's model: {sorted(faults)[0]} "
                f"({len(faults)} such tensors; settings that differ: {settings})"
            )


def _differences(file: DetectorConfig, run: DetectorConfig) -> list[str]:
    """Return `model.KEY (file: x, run: y)` for settings that determine shapes of tensors."""
    pairs = {
        "kind": (file.kind, run.kind),
        "fpn_channels": (file.fpn_channels, run.fpn_channels),
        "dcn_strides": (file.dcn_strides, run.dcn_strides),
        "rpn.anchor_ratios": (len(file.rpn.anchor_ratios), len(run.rpn.anchor_ratios)),
        "roi.hidden": (file.roi.hidden, run.roi.hidden),
        "roi.class_agnostic": (file.roi.class_agnostic, run.roi.class_agnostic),
        "cascade.positive_ious": (len(file.cascade.positive_ious), len(run.cascade.positive_ious)),
        "mask.hidden": (file.mask.hidden, run.mask.hidden),
        "mask.convolutions": (file.mask.convolutions, run.mask.convolutions),
        "dense.convolutions": (file.dense.convolutions, run.dense.convolutions),
        "dense.p6_from": (file.dense.p6_from, run.dense.p6_from),
        "gfl.reg_max": (file.gfl.reg_max, run.gfl.reg_max),
        "gfl.tower_bias": (file.gfl.tower_bias, run.gfl.tower_bias),
    }
    return [f"model.{key} (file: {a}, run: {b})" for key, (a, b) in pairs.items() if a != b]


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:8])}{' ...' if len(names) > 8 else ''})" if names else ""
