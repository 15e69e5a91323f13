"""Pictures with what was found in them: boxes, shapes, names and scores.

Legend: N objects of a picture.
"""

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stage2_detect.models.batch import Detections
from stage2_detect.models.mask_targets import decode_rle

_LEAST_SIDE = 480  # of the longer side of a drawn picture, so that names can be read
_SHAPE = 0.4  # how much of its colour an object's shape shows
_GOLDEN = 0.618034  # successive hues lie far apart
Color = tuple[int, int, int]
Area = tuple[float, float, float, float]


def draw_objects(picture: Image.Image, found: Detections, class_names: Sequence[str]) -> Image.Image:
    """An RGB picture with its objects, the best on top.

    Boxes are in pixels of `picture`: their outer edges are drawn. A small picture is enlarged by a whole factor, its boxes with it. A score of NaN,
    which stands for an annotation, is not written.
    """
    zoom = max(1, -(-_LEAST_SIDE // max(picture.size)))
    boxes_N4 = (found.boxes_N4.double() * zoom).round().long().tolist()
    labels, scores = found.labels_N.tolist(), found.scores_N.tolist()
    worst_first = range(len(labels) - 1, -1, -1)
    if found.masks is not None:
        picture = _with_shapes(picture, [(found.masks[i], class_color(labels[i])) for i in worst_first])
    drawn = picture.convert("RGB").resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    width = max(2, round(min(drawn.size) / 250))
    for i in worst_first:
        left, top, right, bottom = boxes_N4[i]
        right, bottom = max(right - 1, left), max(bottom - 1, top)  # the last pixel inside
        draw.rectangle((left, top, right, bottom), outline=class_color(labels[i]), width=width)
    font = _font(max(12, round(min(drawn.size) / 38)))
    taken: list[Area] = []
    for i, box in enumerate(boxes_N4):  # the best chooses its place first
        text = class_names[labels[i]] + ("" if math.isnan(scores[i]) else f" {scores[i]:.2f}")
        area = _place(draw, text, font, box, drawn.size, taken)
        color = class_color(labels[i])
        draw.rectangle(area, fill=color)
        ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
        draw.text((area[0] + 2, area[1]), text, fill=ink, font=font)
        taken.append(area)
    return drawn


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


def _place(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont,
    box: Sequence[int],
    size: tuple[int, int],
    taken: Sequence[Area],
) -> Area:
    """Where a name stands: above its box, below, inside at the top or at the bottom; the first that is free and in the picture."""
    left, top, right, bottom = box
    wide = draw.textlength(text, font=font) + 4
    high = sum(font.getmetrics())
    x = min(max(left, 0), max(size[0] - wide, 0))
    places = [(x, y, x + wide, y + high) for y in (top - high, bottom, top, bottom - high)]
    x = min(max(right - wide, 0), max(size[0] - wide, 0))
    places += [(x, y, x + wide, y + high) for y in (top - high, bottom, top, bottom - high)]
    inside = [place for place in places if place[1] >= 0 and place[3] <= size[1]] or [(x, 0, x + wide, high)]
    free = (place for place in inside if not any(_overlap(place, other) for other in taken))
    return next(free, inside[0])


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans, which has the letters of most European languages; Pillow's own has ASCII's."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
