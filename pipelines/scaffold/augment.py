"""Augmentation of a new pipeline's detectors: the user's choice, or by how often the training sees each photo. Does not import torch."""

from typing import Literal, get_args

Augment = Literal["none", "light", "strong", "aerial", "cells"]
AUGMENTS: tuple[str, ...] = ("auto", *get_args(Augment))

MANY_PASSES = 40.0
"""passes over the photos from which `auto` is `strong`. Measured on blood cells: +4.9 AP in 60 passes over 10 photos, +1.9 in 39 passes over 41, -4.1
in 15 passes over the same, -6.0 in 5 passes over 160 (docs/benchmarks/few_labels_cpu_2026-12-01.md). Boxes do not show whether objects have an up
direction, so `auto` is never `aerial` or `cells`."""


def choose_augment(asked: str, passes: float) -> tuple[Augment, str]:
    """Return the named set of augmentations of the detectors, and why, for one of `AUGMENTS` and a number of passes over the photos."""
    if asked != "auto":
        return asked, f"chosen by --augment {asked}"  # type: ignore[return-value]  # the parser allows no other
    if passes >= MANY_PASSES:
        return (
            "strong",
            f"each photo is seen {passes:.3g} times: on blood cells it gained 2 AP in 39 passes, 5 in 60; compare with --augment none",
        )
    return "none", "flips alone: on blood cells, strong and cells lost 2 to 6 AP in trainings of 5 and 15 passes"
