"""Segmentations of COCO's objects: polygons, or run-length encoded masks (RLE). Have they the form they should have, and which box holds them?"""

import math
from itertools import accumulate, pairwise
from typing import Any

_FARTHEST = 1e6
"""pixels: pycocotools walks along the edges of polygons in memory of their length, and crashes where it gets none"""


def is_shape(segmentation: Any, height: int, width: int) -> bool:
    """Whether a segmentation has the form of polygons or of RLE for an image of this size."""
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
    ):  # cut off, not made of numbers, or of something else altogether
        return False


def _run_lengths(code: str) -> list[int]:
    """Run lengths of a compressed RLE (pycocotools' `rleFrString`), which does not say when a code is damaged but reads on beyond it.

    Six bits a character from "0" on: five of value, lowest first, and one that says whether more follow; from the fourth run on values are
    differences to the last but one. Raises IndexError for a code that breaks off, or has other characters.
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


def shape_box(segmentation: Any, height: int, width: int) -> list[float] | None:
    """x, y, width, height of the smallest box that holds a segmentation; None where it has not the form of one, or nothing is in it."""
    if not is_shape(segmentation, height, width):
        return None
    if isinstance(segmentation, list):
        columns = [value for polygon in segmentation for value in polygon[0::2]]
        rows = [value for polygon in segmentation for value in polygon[1::2]]
        return [min(columns), min(rows), max(columns) - min(columns), max(rows) - min(rows)]
    counts = segmentation["counts"]
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    edges = list(accumulate(runs, initial=0))
    # Pixels are counted down the columns; every second run is of the object.
    inside = [(first, end - 1) for first, end in list(pairwise(edges))[1::2] if end > first]
    if not inside:
        return None
    left, right = inside[0][0] // height, inside[-1][1] // height
    whole = any(first // height != last // height for first, last in inside)  # it goes on in the next column
    top = 0 if whole else min(first % height for first, _ in inside)
    bottom = height - 1 if whole else max(last % height for _, last in inside)
    return [left, top, right - left + 1, bottom - top + 1]
