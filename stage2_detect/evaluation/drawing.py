"""Pictures with what was found in them: boxes, shapes, names and scores.

Legend: N objects of a picture.
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

_LEAST_SIDE = 480  # of the longer side of a drawn picture, so that names can be read
_LEAST_TEXT = 10  # height in pixels
_LITTLE_HIDDEN, _MOST_HIDDEN = 0.1, 0.35  # of any box by a name: all the same up to the one, not beyond the other
_OPAQUE = 0.8  # the background of a name
_SHAPE = 0.4  # how much of its colour an object's shape shows
_GOLDEN = 0.618034  # successive hues lie far apart
Color = tuple[int, int, int]
Area = tuple[int, int, int, int]


def draw_objects(
    picture: Image.Image, found: Detections, class_names: Sequence[str], *, legend: bool = False
) -> Image.Image:
    """An RGB picture with its objects, the best on top.

    Boxes are in pixels of `picture`: their outer edges are drawn. A small picture is enlarged by a whole factor, its boxes with it. Lines and names
    get smaller with the objects, and a name is left out where it would hide another or a small object; the best objects choose first. With `legend` a
    strip below the picture says then which colour is which class, so that the drawing may be higher than the picture. A score of NaN, which stands
    for an annotation, is not written.
    """
    class_names = [
        clean_name(name) for name in class_names
    ]  # those of an older file may have line breaks, which a font has not
    zoom = max(1, -(-_LEAST_SIDE // max(picture.size)))
    corners_N4 = (found.boxes_N4.double() * zoom).round().long().numpy()
    labels, scores = found.labels_N.tolist(), found.scores_N.tolist()
    worst_first = range(len(labels) - 1, -1, -1)
    if found.masks is not None:
        picture = _with_shapes(picture, [(found.masks[i], class_color(labels[i])) for i in worst_first])
    drawn = picture.convert("RGB").resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    # The typical object decides, since a picture has one size of text.
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
    """Names of objects on a picture, each where it hides least, or nowhere.

    Args:
        drawn: the picture that is drawn on.
        boxes_N4: of all objects, (x1, y1, x2, y2).

    Attributes:
        areas: where names stand, in the order in which they were written.
    """

    def __init__(self, drawn: Image.Image, boxes_N4: np.ndarray) -> None:
        self._drawn, self._boxes_N4 = drawn, boxes_N4.astype(np.float64)
        self.areas: list[Area] = []

    def add(self, number: int, text: str, color: Color, height: int) -> bool:
        """Write the name of an object beside or in its box, smaller where that is needed; False where there is no room."""
        for size in (height, max(_LEAST_TEXT, round(0.8 * height))):
            font = _font(size)
            area = self._place(number, math.ceil(font.getlength(text)) + 4, sum(font.getmetrics()))
            if area is not None:
                self._write(area, text, color, font)
                self.areas.append(area)
                return True
        return False

    def _place(self, number: int, wide: int, high: int) -> Area | None:
        """Above the box, below, inside at the top or at the bottom, at its left or right edge: the first of the free that hide least of any box."""
        left, top, right, bottom = (int(edge) for edge in self._boxes_N4[number])
        limit_x, limit_y = self._drawn.size
        columns = [min(max(x, 0), max(limit_x - wide, 0)) for x in (left, right - wide)]
        areas = [(x, y, x + wide, y + high) for y in (top - high, bottom, top, bottom - high) for x in columns]
        areas = [area for area in areas if area[1] >= 0 and area[3] <= limit_y and area[2] <= limit_x]
        free = [area for area in areas if not any(_overlap(area, other) for other in self.areas)]
        hidden = [max(self._hidden(area), _LITTLE_HIDDEN) for area in free]
        return free[int(np.argmin(hidden))] if hidden and min(hidden) <= _MOST_HIDDEN else None

    def _hidden(self, area: Area) -> float:
        """The largest share of any box that an area covers."""
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
    """The colour of a class: the same in every picture."""
    hue, third = (label * _GOLDEN) % 1, label // 8 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.85)[third], (1.0, 0.95, 0.7)[third])
    return round(255 * red), round(255 * green), round(255 * blue)


def _with_shapes(picture: Image.Image, shapes: Sequence[tuple[dict[str, Any], Color]]) -> Image.Image:
    pixels_HWC = np.array(picture.convert("RGB"), dtype=np.float32)
    for code, color in shapes:
        inside_HW = decode_rle(code).astype(bool)
        ink_3 = np.array(color, dtype=np.float32)
        pixels_HWC[inside_HW] = (1 - _SHAPE) * pixels_HWC[inside_HW] + _SHAPE * ink_3
        pixels_HWC[_edge(inside_HW)] = ink_3  # tells two objects of a class apart
    return Image.fromarray(pixels_HWC.round().astype(np.uint8))


def _edge(inside_HW: np.ndarray) -> np.ndarray:
    """Pixels of a shape that have a neighbour outside."""
    around_HW = np.pad(inside_HW, 1)
    surrounded = around_HW[:-2, 1:-1] & around_HW[2:, 1:-1] & around_HW[1:-1, :-2] & around_HW[1:-1, 2:]
    return inside_HW & ~surrounded


def _with_legend(drawn: Image.Image, entries: Sequence[tuple[str, Color]], size: int) -> Image.Image:
    """The picture with a strip of classes below, in as many lines as they need."""
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
    """Black or white, whichever reads better on a colour."""
    return (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans, which has the letters of most European languages; Pillow's own has ASCII's."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
