"""Augmentation of a new pipeline's detectors: the user's choice, or a measured default. Does not import torch."""

from typing import Literal, get_args

Augment = Literal["none", "light", "strong", "aerial", "cells"]
AUGMENTS: tuple[str, ...] = ("auto", *get_args(Augment))

_DEFAULT: Augment = "none"
_REASON = "flips alone: on blood cells, strong and cells lost 2 to 6 AP in short trainings"
"""Measured on 41 and 160 labeled photos for 15 and 5 passes, one seed each (docs/benchmarks/few_labels_cpu_2026-12-01.md); longer trainings and other
photos are not measured. Boxes do not show whether objects have an up direction, so `auto` is never `aerial` or `cells`."""


def choose_augment(asked: str) -> tuple[Augment, str]:
    """Return the named set of augmentations of the detectors, and why, for one of `AUGMENTS`."""
    if asked != "auto":
        return asked, f"chosen by --augment {asked}"  # type: ignore[return-value]  # the parser allows no other
    return _DEFAULT, _REASON
