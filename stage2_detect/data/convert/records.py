"""What a data set in another format holds, on its way to COCO JSON, and the checks that all formats share.

A reader (`yolo.py`, `voc.py`, `hub.py`) fills `Found`; `coco_content` turns a split into the content of a
COCO file. Boxes reach over the border of their image by rounding in most data sets: they are clipped and counted. Boxes
of which nothing is left are dropped, counted, and the first is named. Numbers that are no numbers, and classes that are
not listed, are errors of the readers.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools import mask as mask_codec

from ssld.shared.errors import UserError
from ssld.shared.files import read_text
from ssld.shared.images import UnreadableImage, image_header, image_headers
from ssld.stage2_detect.data.coco import MIN_SIDE
from ssld.stage2_detect.data.coco_json import Convention
from ssld.stage2_detect.data.orientation import Orientation, fit_of, is_upright, orientation_of

Corners = tuple[float, float, float, float]
DIGITS = 3
_OVER = 1.0
"""pixels over the border that no rounding explains"""
_MANY = 0.1
"""share of such boxes at which their form is doubted"""


class FoundObject(NamedTuple):
    """One object of an image."""

    label: int
    """position of its class"""
    corners: Corners
    """x1, y1, x2, y2: edges in pixels, counted from 0"""
    place: str
    """where it stands, for messages"""
    crowd: bool = False
    """to be ignored: neither trained on nor counted as missed"""
    shape: list[list[float]] | dict[str, Any] | None = None
    """polygons, x, y, x, y, ... in pixels, or RLE of the image's size"""
    area: float | None = None


class FoundImage(NamedTuple):
    """One image with its objects."""

    path: Path
    width: int
    height: int
    objects: list[FoundObject]
    image_id: int | None = None
    """None: numbered from 1"""
    unsized: bool = False
    """whether the source does not give its size, so that the upright one is taken"""


@dataclass(frozen=True)
class Found:
    """A data set: its classes in order, its splits, and lines on what is worth knowing."""

    kind: str
    class_names: list[str]
    splits: dict[str, list[FoundImage]]
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    """what to say where many boxes reach far out of their images; empty where their form is beyond doubt"""
    orientation: Convention | None = None
    """which form of an image the format means; None: what the sizes in it show"""


class Content(NamedTuple):
    """A split as COCO JSON wants it."""

    folder: Path
    """what the file names are relative to"""
    data: dict[str, Any]
    counts: Counter[str]
    """`images`, `empty` images, `objects` written, `clipped` among them, `crowd` among them, `dropped`"""
    first_dropped: str


def coco_content(images: list[FoundImage], class_names: list[str], hint: str = "") -> Content:
    """The COCO file of a split.

    Raises UserError with the `hint` (see `Found`) where a tenth of the boxes reach far out of their images.
    """
    folder = Path(os.path.commonpath([image.path.parent for image in images]))
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts = Counter(images=len(images), empty=0, objects=0, clipped=0, crowd=0, dropped=0)
    far: list[str] = []
    first_dropped = ""
    for number, image in enumerate(images, 1):
        image_id = number if image.image_id is None else image.image_id
        name = Path(os.path.relpath(image.path, folder)).as_posix()
        rows.append({"id": image_id, "file_name": name, "width": image.width, "height": image.height})
        before = len(annotations)
        for one in image.objects:
            corners = clip(one.corners, image.width, image.height)
            over = max(abs(a - b) for a, b in zip(corners, one.corners, strict=True))
            if over > _OVER:
                far.append(one.place)
            if min(corners[2] - corners[0], corners[3] - corners[1]) <= MIN_SIDE:
                counts["dropped"] += 1
                first_dropped = first_dropped or one.place
                continue
            counts["clipped"] += over > 10**-DIGITS
            counts["crowd"] += one.crowd
            annotations.append(_annotation(len(annotations) + 1, image_id, one, corners, image))
        counts["empty"] += before == len(annotations)
    counts["objects"] = len(annotations)
    every = counts["objects"] + counts["dropped"]
    if hint and len(far) > max(1, _MANY * every):
        raise UserError(f"{far[0]}: the box reaches out of its image, as do {len(far) - 1} others of {every}; {hint}")
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(class_names)]
    return Content(
        folder, {"images": rows, "annotations": annotations, "categories": categories}, counts, first_dropped
    )


def clip(corners: Corners, width: int, height: int) -> Corners:
    """Corners inside the image, to a thousandth of a pixel."""
    limits = (width, height, width, height)
    x1, y1, x2, y2 = (round(min(max(value, 0.0), limit), DIGITS) for value, limit in zip(corners, limits, strict=True))
    return x1, y1, x2, y2


def size_of(path: Path, said: tuple[int, int] | None = None, place: str = "") -> tuple[int, int]:
    """(width, height) of an image: what is `said` of it, where that is its size upright or as stored, else upright by its header.

    Raises UserError for an image that cannot be read, and where neither fits.
    """
    return size_of_bytes(path, str(path), said, place)


def size_of_bytes(
    source: bytes | Path, name: str, said: tuple[int, int] | None = None, place: str = ""
) -> tuple[int, int]:
    """`size_of` for an image in memory; errors call it `name`."""
    try:
        header = image_header(source, name=name)
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    height, width = header.upright_size
    if said is None:
        return width, height
    if fit_of(header, *said) == "neither":
        raise UserError(f"{place or name}: says {said[0]}x{said[1]}, but the image {name} is {width}x{height} pixels")
    return said


def settle_orientation(found: Found) -> Orientation:
    """Which form of its images the boxes of a data set are for, shown by all its splits together.

    Images whose size the source does not give get the one of that form.
    """
    every = [image for images in found.splits.values() for image in images]
    headers = dict(
        zip((image.path for image in every), image_headers([str(image.path) for image in every]), strict=True)
    )
    fits = [
        fit_of(header, image.width, image.height)
        for image in every
        if not image.unsized and (header := headers[image.path])
    ]
    orientation = orientation_of(fits, found.orientation)
    if not is_upright("both", orientation.convention):
        for images in found.splits.values():
            for place, image in enumerate(images):
                if image.unsized and (header := headers[image.path]):
                    images[place] = image._replace(width=header.width, height=header.height)
    return orientation


def finite_number(text: str, place: str, what: str) -> float:
    """A number of a file. Raises UserError for anything else, NaN and infinity too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}: {what} is {text!r}, not a number")
    return value


def read_class_list(file: Path) -> list[str]:
    """Class names of a text file, one a line. Raises UserError for a name given twice, an empty line, or no name."""
    names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    check_class_names(names, str(file))
    return names


def check_class_names(names: list[str], place: str) -> None:
    """Raises UserError unless there are names, all of them different and none empty."""
    if not names:
        raise UserError(f"{place}: names no class")
    if "" in names:
        raise UserError(f"{place}: class number {names.index('')} has an empty name")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{place}: two classes are called {twice[0]!r}")


def _annotation(number: int, image_id: int, one: FoundObject, corners: Corners, image: FoundImage) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    box = [x1, y1, round(x2 - x1, DIGITS), round(y2 - y1, DIGITS)]
    row: dict[str, Any] = {"id": number, "image_id": image_id, "category_id": one.label + 1, "bbox": box}
    area = one.area
    if one.shape:
        row["segmentation"] = one.shape
        if area is None:
            compressed = isinstance(one.shape, dict) and isinstance(one.shape["counts"], str)
            codes = one.shape if compressed else mask_codec.frPyObjects(one.shape, image.height, image.width)
            area = float(mask_codec.area(codes if isinstance(codes, dict) else mask_codec.merge(codes)))
    return row | {"area": round(box[2] * box[3] if area is None else area, DIGITS), "iscrowd": int(one.crowd)}
