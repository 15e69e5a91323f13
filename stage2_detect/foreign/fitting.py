"""Weights of other projects on their way to this project's detectors: row orders, completion and comparison."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError

Tensors = dict[str, Tensor]
RATIOS, SCALES = 3, 3
"""of the anchors in a cell; scales of RetinaNet's"""
GROUPS = 32
"""of a GroupNorm"""
_CASCADE_STAGES = 3
SIDE_ABOVE_ZERO = 1e-6
"""rpn.min_size, in pixels, of projects that drop proposals without area: smaller sides are rounding"""


@dataclass(frozen=True)
class ForeignDetector:
    """A detector of another project as one of this project.

    Attributes:
        project, name: where it comes from, and what it is called there.
        arch: timm's name of its backbone.
        model, resize: settings of the groups `model` and `resize`.
        mean, std: of its input, for red, green, blue in units of 0..1.
        classes: K.
        class_names: names that the file gives its classes, in order; empty where it gives none.
        tensors: its weights under the names of this project.
        note: what was recognized by more than the names of its tensors, for the log.
    """

    project: str
    name: str
    arch: str
    model: dict[str, Any]
    resize: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    tensors: Tensors
    class_names: tuple[str, ...] = ()
    note: str = ""


def refuse(tensors: Iterable[str], reasons: Iterable[tuple[str, str]], project: str, source: object) -> None:
    """Raise UserError if a name begins with a pattern of `reasons`: pairs of a pattern and why a detector with such a name cannot be converted."""
    for pattern, reason in reasons:
        if name := next((one for one in tensors if re.match(pattern, one)), None):
            raise UserError(f"{source}: a detector of {project} that cannot be converted: {reason} (tensor {name})")


def is_cascade(tensors: Iterable[str], logits: str, project: str, source: object) -> bool:
    """Return whether the box heads of a two-stage detector are a cascade.

    Args:
        logits: pattern of the weights of their last layer for classes, whose first group is the stage of a cascade.

    Raises:
        UserError: there are no box heads, or a cascade has another number of stages than three.
    """
    stages = [match[1] for name in tensors if (match := re.fullmatch(logits, name))]
    if not stages:
        raise UserError(f"{source}: a detector of {project} without box heads, which cannot be converted")
    cascade = "0" in stages
    if cascade and len(stages) != _CASCADE_STAGES:
        raise UserError(f"{source}: a cascade of {len(stages)} stages; cascades of {_CASCADE_STAGES} are converted")
    return cascade


def rcnn_kind(*, cascade: bool, masks: bool) -> str:
    """Return the setting `model.kind` of a two-stage detector."""
    return ("cascade_" if cascade else "" if masks else "faster_") + ("mask_" if masks else "") + "rcnn"


def nearly_equal(values: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether numbers of a file are those of a configuration, to 0.01: files round them."""
    return len(values) == len(expected) and all(
        abs(one - other) <= 0.01 for one, other in zip(values, expected, strict=True)
    )


def listed(values: Sequence[float]) -> str:
    """Format numbers for a message."""
    return " ".join(f"{value:g}" for value in values)


def check_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, naming the first differences, if names or shapes differ from those of the detector."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is left over" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if wrong:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit the detector (names as in this project): {'; '.join(wrong[:3])}{more}")


def completed(tensors: Mapping[str, Tensor], source: object) -> Tensors:
    """Return the weights as float32, with the counters that frozen norms of other projects lack.

    Raises UserError for values that are not finite, for variances below 0 and for weights of whole numbers.
    """
    result = {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}
    for name in tensors:
        if name.endswith(".running_var"):
            result.setdefault(f"{name.removesuffix('running_var')}num_batches_tracked", torch.tensor(0))
    for name, one in result.items():
        if not one.isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite")
        if name.endswith(".running_var") and (one < 0).any():
            raise UserError(f"{source}: {name} has variances below 0; the file is damaged")
        if not one.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"{source}: {name} has whole numbers ({one.dtype}); give the file before its weights were quantized"
            )
    return result


def rows_of(tensors: Mapping[str, Tensor], name: str, source: object) -> int:
    """Return the number of rows of a tensor. Raises UserError where it is missing or is a single number."""
    if name not in tensors or tensors[name].ndim == 0:
        fault = "is a single number, without rows" if name in tensors else "is missing"
        raise UserError(f"{source}: {name} {fault}; the file is damaged, or of another kind of detector")
    return len(tensors[name])


def count_of(pattern: str, names: Iterable[str]) -> int:
    """Return how many names match a pattern as a whole."""
    return sum(bool(re.fullmatch(pattern, name)) for name in names)


def scales_first(rows: Tensor, scales: int) -> Tensor:
    """Reorder rows [ratios * scales * n, ...] from anchors of a cell in the order ratio, scale to this project's scale, ratio."""
    return rows.unflatten(0, (RATIOS, scales, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def norm_behind(layer: str, tensors: Mapping[str, Tensor], source: object) -> str:
    """Return the kind of norm, a setting of this project, whose layer `layer` is among the tensors.

    Raises UserError for a GroupNorm of one channel per group, which this project does not have.
    """
    if f"{layer}.running_mean" in tensors:
        return "batch"
    if f"{layer}.weight" not in tensors:
        return "none"
    if tensors[f"{layer}.weight"].numel() <= GROUPS:
        raise UserError(
            f"{source}: {layer} is a GroupNorm of {GROUPS} groups with one channel each, which this project does not have"
        )
    return "group"
