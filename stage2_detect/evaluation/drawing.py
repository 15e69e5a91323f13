"""Images with drawn detections: boxes, masks, names and scores.

Legend: N detections of an image.
"""

import colorsys
import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssld.stage2_detect.data.coco_rows import clean_name
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.mask_targets import decode_rle

_LEAST_SIDE = 480  # pixels; smallest longer side of a drawn image, so that names are legible
_LEAST_TEXT = 10  # pixels; smallest height of text
_LITTLE_HIDDEN, _MOST_HIDDEN = 0.1, 0.35
"""share of a box under a name: up to the first it does not matter, above the second it is refused"""
_OPAQUE = 0.8  # opacity of the background of a name
_MASK = 0.4  # opacity of a mask
_GOLDEN = 0.618034  # golden ratio: successive hues are far apart
Color = tuple[int, int, int]
Area = tuple[int, int, int, int]


def draw_objects(
    image: Image.Image, detections: Detections, class_names: Sequence[str], *, legend: bool = False
) -> Image.Image:
    """Draw detections on an image, the best on top; returns RGB.

    A small image is enlarged by an integer factor. Lines and names get smaller with the objects, and a name is left out where it would cover
    another name or a small object; the best objects choose their place first.

    Args:
        detections: boxes in pixels of `image`, of which the outer edges are drawn. A score of NaN, as of an annotation, is not written.
        legend: add a strip of class colors below the image if a name was left out.
    """
    class_names = [
        clean_name(name) for name in class_names
    ]  # names of older files may have line breaks, which a font lacks
    zoom = max(1, -(-_LEAST_SIDE // max(image.size)))
    corners_N4 = (detections.boxes_N4.double() * zoom).round().long().numpy()
    labels, scores = detections.labels_N.tolist(), detections.scores_N.tolist()
    worst_first = range(len(labels) - 1, -1, -1)
    if detections.masks is not None:
        image = _with_masks(image, [(detections.masks[i], class_color(labels[i])) for i in worst_first])
    drawn = image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    # The median object decides, since all text of an image has one size.
    typical = float(np.median((corners_N4[:, 2:] - corners_N4[:, :2]).min(1))) if labels else 0.0
    width = (
        max(1, round(min(min(drawn.size) / 250, typical / 25)))
        if typical < 100
        else max(2, round(min(drawn.size) / 250))
    )
    for i in worst_first:
        left, top, right, bottom = corners_N4[i].tolist()
        right, bottom = max(right - 1, left), max(bottom - 1, top)  # the last pixel inside
        draw.rectangle((left, top, right, bottom), outline=class_color(labels[i]), width=width)
    usual = max(12, round(min(drawn.size) / 38))
    height = min(usual, max(_LEAST_TEXT, round(typical / 4)))
    tags = Tags(drawn, corners_N4)
    left_out = [
        i
        for i in range(len(labels))
        if not tags.add(i, _tag(class_names[labels[i]], scores[i]), class_color(labels[i]), height)
    ]
    if legend and left_out:
        counts = Counter(labels)
        return _with_legend(
            drawn, [(f"{class_names[label]} {counts[label]}", class_color(label)) for label in sorted(counts)], usual
        )
    return drawn


def _tag(name: str, score: float) -> str:
    return name if math.isnan(score) else f"{name} {score:.2f}"


class Tags:
    """Names of objects on an image, each where it covers least, or left out.

    Args:
        drawn: the image to draw on.
        boxes_N4: (x1, y1, x2, y2) of all objects.

    Attributes:
        areas: areas of the names, in the order of writing.
    """

    def __init__(self, drawn: Image.Image, boxes_N4: np.ndarray) -> None:
        self._drawn, self._boxes_N4 = drawn, boxes_N4.astype(np.float64)
        self.areas: list[Area] = []

    def add(self, number: int, text: str, color: Color, height: int) -> bool:
        """Write the name of an object beside or in its box, smaller if necessary; returns False if it does not fit."""
        for size in (height, max(_LEAST_TEXT, round(0.8 * height))):
            font = _font(size)
            area = self._place(number, math.ceil(font.getlength(text)) + 4, sum(font.getmetrics()))
            if area is not None:
                self._write(area, text, color, font)
                self.areas.append(area)
                return True
        return False

    def _place(self, number: int, wide: int, high: int) -> Area | None:
        """Choose an area above the box, below, or inside at the top or bottom, at its left or right edge: the first free one that covers least."""
        left, top, right, bottom = (int(edge) for edge in self._boxes_N4[number])
        limit_x, limit_y = self._drawn.size
        columns = [min(max(x, 0), max(limit_x - wide, 0)) for x in (left, right - wide)]
        areas = [(x, y, x + wide, y + high) for y in (top - high, bottom, top, bottom - high) for x in columns]
        areas = [area for area in areas if area[1] >= 0 and area[3] <= limit_y and area[2] <= limit_x]
        free = [area for area in areas if not any(_overlap(area, other) for other in self.areas)]
        hidden = [max(self._hidden(area), _LITTLE_HIDDEN) for area in free]
        return free[int(np.argmin(hidden))] if hidden and min(hidden) <= _MOST_HIDDEN else None

    def _hidden(self, area: Area) -> float:
        """Return the largest share of a box that an area covers."""
        least_N2 = np.maximum(self._boxes_N4[:, :2], area[:2])
        most_N2 = np.minimum(self._boxes_N4[:, 2:], area[2:])
        covered_N = (most_N2 - least_N2).clip(0).prod(1)
        sides_N2 = self._boxes_N4[:, 2:] - self._boxes_N4[:, :2]
        return float((covered_N / sides_N2.clip(1).prod(1)).max())

    def _write(self, area: Area, text: str, color: Color, font: ImageFont.FreeTypeFont) -> None:
        beneath = self._drawn.crop(area)
        tag = Image.blend(beneath, Image.new("RGB", beneath.size, color), _OPAQUE)
        ImageDraw.Draw(tag).text((2, 0), text, fill=_ink(color), font=font)
        self._drawn.paste(tag, area[:2])


def class_color(label: int) -> Color:
    """Return the color of a class, the same in every image."""
    hue, third = (label * _GOLDEN) % 1, label // 8 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.85)[third], (1.0, 0.95, 0.7)[third])
    return round(255 * red), round(255 * green), round(255 * blue)


def _with_masks(image: Image.Image, masks: Sequence[tuple[dict[str, Any], Color]]) -> Image.Image:
    pixels_HWC = np.array(image.convert("RGB"), dtype=np.float32)
    for code, color in masks:
        inside_HW = decode_rle(code).astype(bool)
        ink_3 = np.array(color, dtype=np.float32)
        pixels_HWC[inside_HW] = (1 - _MASK) * pixels_HWC[inside_HW] + _MASK * ink_3
        pixels_HWC[_edge(inside_HW)] = ink_3  # separates objects of one class
    return Image.fromarray(pixels_HWC.round().astype(np.uint8))


def _edge(inside_HW: np.ndarray) -> np.ndarray:
    """Mark the pixels of a mask that have a neighbor outside."""
    around_HW = np.pad(inside_HW, 1)
    surrounded = around_HW[:-2, 1:-1] & around_HW[2:, 1:-1] & around_HW[1:-1, :-2] & around_HW[1:-1, 2:]
    return inside_HW & ~surrounded


def _with_legend(drawn: Image.Image, entries: Sequence[tuple[str, Color]], size: int) -> Image.Image:
    """Add a strip of classes below the image, in as many lines as needed."""
    font = _font(size)
    high = sum(font.getmetrics()) + 4
    places, x, y = [], 4, 2
    for text, _ in entries:
        wide = high + math.ceil(font.getlength(text)) + 12
        if x > 4 and x + wide > drawn.width:
            x, y = 4, y + high
        places.append((x, y))
        x += wide
    whole = Image.new("RGB", (drawn.width, drawn.height + y + high), (255, 255, 255))
    whole.paste(drawn)
    draw = ImageDraw.Draw(whole)
    for (text, color), (left, line) in zip(entries, places, strict=True):
        top = drawn.height + line
        draw.rectangle((left, top + 4, left + high - 8, top + high - 6), fill=color)
        draw.text((left + high - 2, top), text, fill=(0, 0, 0), font=font)
    return whole


def _ink(color: Color) -> Color:
    """Return black or white, the one that is more legible on a color."""
    return (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's DejaVu Sans, which has the letters of most European languages; Pillow's default font has those of ASCII."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
