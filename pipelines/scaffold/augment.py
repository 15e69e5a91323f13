"""Augmentation of a new pipeline's detectors: the user's choice, or that of the rules, which are measurements. Does not import torch."""

from collections.abc import Callable
from typing import Literal, get_args

from ssld.pipelines.scaffold.suggest import Facts

Augment = Literal["none", "light", "strong", "aerial", "cells"]
AUGMENTS: tuple[str, ...] = ("auto", *get_args(Augment))

RULES: tuple[tuple[Callable[[Facts], bool], Augment, str], ...] = (
    (lambda facts: True, "none", "flips alone: on blood cells, strong and cells lost 2 to 6 AP in short trainings"),
)
"""(condition, set, reason); the first rule whose condition holds decides. Measured on 41 and 160 labeled photos for 15 and 5 passes, one seed each
(docs/benchmarks/few_labels_cpu_2026-12-01.md); longer trainings and other photos are not measured. Boxes do not show whether objects have an up
direction, so no rule names `aerial` or `cells`."""


def choose_augment(asked: str, facts: Facts) -> tuple[Augment, str]:
    """Return the named set of augmentations of the detectors, and why.

    Args:
        asked: one of `AUGMENTS`.
        facts: the data.
    """
    if asked != "auto":
        return asked, f"chosen by --augment {asked}"  # type: ignore[return-value]  # the parser allows no other
    return next((chosen, reason) for condition, chosen, reason in RULES if condition(facts))
