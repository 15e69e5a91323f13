"""The scores that a recipe says it should reach, beside those it reached. Does not import torch."""

from collections.abc import Mapping
from typing import Any

from ssld.stage2_detect.config import ExpectedConfig


def compare(expected: ExpectedConfig, metrics: Mapping[str, Any], images: int) -> tuple[bool | None, str]:
    """(whether every expected score was reached within the tolerance, a line for the log); None where they cannot be compared.

    `metrics` are of `images` evaluation images, in 0..1; the expected scores are in percent.
    """
    wanted = {name: value for name in ("AP", "AP_segm") if (value := getattr(expected, name)) is not None}
    if not images:
        return None, "expected: not compared: there are no evaluation images"
    if expected.images is not None and images != expected.images:
        return None, f"expected: not compared: it is for {expected.images} evaluation images, these are {images}"
    missing = [name for name in wanted if metrics.get(name) is None]
    if missing:
        return None, f"expected: not compared: {missing[0]} was not measured"
    met = all(100 * metrics[name] >= value - expected.tolerance for name, value in wanted.items())
    shown = ", ".join(f"{name} {100 * metrics[name]:.2f} (expected {value:g})" for name, value in wanted.items())
    return met, f"expected: {'met' if met else 'NOT met'}: {shown}, tolerance {expected.tolerance:g}"
