"""Validation and bounding boxes of COCO segmentations, which are polygons or run-length encoded masks (RLE), and of turned rectangles."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

_FARTHEST = 1e6
"""largest coordinate in pixels: pycocotools allocates memory for the length of a polygon's edges, and crashes if that fails"""


def is_shape(segmentation: Any, height: int, width: int) -> bool:
    """Whether a segmentation consists of valid polygons or a valid RLE for an image of this size."""
    try:
        if isinstance(segmentation, list):
            return bool(segmentation) and all(
                isinstance(polygon, list)
                and len(polygon) >= 6
                and len(polygon) % 2 == 0
                and math.isfinite(sum(polygon))
                and max(map(abs, polygon)) <= _FARTHEST
                for polygon in segmentation
            )
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            return False
        if isinstance(counts, str):
            counts = _run_lengths(counts)
        whole = all(type(number) is int for number in (*segmentation["size"], *counts))
        return whole and sum(counts) == height * width and min(counts) >= 0
    except (
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
    ):  # truncated, not numbers, or another type
        return False


def _run_lengths(code: str) -> list[int]:
    """Decode the run lengths of a compressed RLE, as pycocotools' `rleFrString`, which reads beyond the end of a damaged code.

    Six bits per character from "0" on: five bits of value, lowest first, and one bit if more characters follow; from the fourth run on, values are
    differences to the run before the last. Raises IndexError for a truncated code or invalid characters.
    """
    if not all("0" <= letter <= "o" for letter in code):
        raise IndexError(code)
    runs: list[int] = []
    place = 0
    while place < len(code):
        value = shift = 0
        more = True
        while more:
            bits = ord(code[place]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            place, shift = place + 1, shift + 5
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def turned_box(box: Sequence[float], degrees: float) -> list[float]:
    """Return x, y, width, height of the smallest box around a rectangle, given like it, that is turned about its center."""
    x, y, width, height = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    wide, high = width * cos + height * sin, width * sin + height * cos
    return [round(value, 3) for value in (x + (width - wide) / 2, y + (height - high) / 2, wide, high)]


def shape_box(segmentation: Any, height: int, width: int) -> list[float] | None:
    """Return x, y, width, height of the smallest box around a segmentation; None for an invalid or empty one."""
    if not is_shape(segmentation, height, width):
        return None
    if isinstance(segmentation, list):
        columns = [value for polygon in segmentation for value in polygon[0::2]]
        rows = [value for polygon in segmentation for value in polygon[1::2]]
        return [min(columns), min(rows), max(columns) - min(columns), max(rows) - min(rows)]
    counts = segmentation["counts"]
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    edges = list(accumulate(runs, initial=0))
    # Pixels are counted down the columns; every second run belongs to the object.
    inside = [(first, end - 1) for first, end in list(pairwise(edges))[1::2] if end > first]
    if not inside:
        return None
    left, right = inside[0][0] // height, inside[-1][1] // height
    whole = any(first // height != last // height for first, last in inside)  # a run continues in the next column
    top = 0 if whole else min(first % height for first, _ in inside)
    bottom = height - 1 if whole else max(last % height for _, last in inside)
    return [left, top, right - left + 1, bottom - top + 1]
