"""What a data set in another format holds, on its way to COCO JSON, and the checks that all formats share.

A reader (`yolo.py`, `voc.py`, `hub.py`) fills `Found`; `coco_content` turns a split into the content of a
COCO file. Boxes reach over the border of their image by rounding in most data sets: they are clipped. Boxes of which nothing is left are dropped.
Both are counted, and the first is named. Numbers that are no numbers, and classes that are not listed, are errors of the readers.
"""

import itertools
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from pycocotools import mask as mask_codec

from ssld.shared.errors import UserError
from ssld.shared.files import read_text
from ssld.shared.images import UnreadableImage, image_header, image_headers
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage2_detect.data.coco import CLIPPED, CROWD, FLAT, MIN_SIDE, OUTSIDE
from ssld.stage2_detect.data.coco_json import Convention
from ssld.stage2_detect.data.orientation import Orientation, fit_of, is_upright, orientation_of

Corners = tuple[float, float, float, float]
DIGITS = 3
_OVER = 1.0
"""pixels over the border that no rounding explains"""
_MANY = 0.1
"""share of such boxes at which their form is doubted"""
ALLOW_LOSS = "set allow_loss: true to convert the rest"
LISTED_AGAIN = "listed more than once, read once"
_OURS = {"config.yaml", "environment", "metrics.jsonl", "log.txt", "quarantine.txt", "checkpoints", "result", "error"}
_YES = {"true", "yes", "y", "t", "on"}
_NO = {
    "",
    "false",
    "no",
    "n",
    "f",
    "off",
    "none",
    "null",
    "nan",
    "na",
    "n/a",
    "unspecified",
    "not specified",
    "unknown",
    "undefined",
}


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


@dataclass
class Found:
    """A data set: its classes in order, its splits, and lines on what is worth knowing.

    Attributes:
        hint: what to say where many boxes reach far out of their images; empty where their form is beyond doubt.
        tallies: of each split, what its reader left out or changed.
        crowd: why objects are to be ignored, as the cause of a tally.
        orientation: which form of an image the format means; None: what the sizes in it show.
        looked: of each split, where its objects were looked for: "of 3 XML files in FOLDER".
    """

    kind: str
    class_names: list[str]
    splits: dict[str, list[FoundImage]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    tallies: dict[str, Tally] = field(default_factory=dict)
    looked: dict[str, str] = field(default_factory=dict)
    crowd: str = "marked iscrowd"
    orientation: Convention | None = None


class Content(NamedTuple):
    """A split as COCO JSON wants it."""

    folder: Path
    """what the file names are relative to"""
    data: dict[str, Any]
    counts: Counter[str]
    """`images`, `empty` images, `objects` written, `crowd` among them"""
    tally: Tally


def coco_content(found: Found, split: str, *, source: str, allow_loss: bool) -> Content:
    """The COCO file of a split; its tally is the reader's, with what is left out and changed here.

    Raises UserError for losses in bulk unless `allow_loss`, where no object is left to train or evaluate on, and with `found.hint` where a tenth of
    the boxes reach far out of their images.
    """
    images, tally = found.splits[split], found.tallies[split]
    if not tally.dropped("box") and not any(image.objects for image in images):
        raise UserError(
            f"{source}: split {split}: no object in {count(len(images), 'image')} ({found.looked[split]}); "
            "correct the source, or name the splits that have objects by --splits"
        )
    if not images:
        tally.check(f"{source}: split {split}", allow_loss=False, otherwise="name the other splits by --splits")
    trained = Tally()  # what training will say of the same boxes
    trained.merge(tally)
    folder = Path(os.path.commonpath([image.path.parent for image in images]))
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    far: list[str] = []
    for number, image in enumerate(images, 1):
        image_id = number if image.image_id is None else image.image_id
        name = Path(os.path.relpath(image.path, folder)).as_posix()
        rows.append({"id": image_id, "file_name": name, "width": image.width, "height": image.height})
        for one in image.objects:
            group = found.class_names[one.label]
            corners = clip(one.corners, image.width, image.height)
            over = max(abs(a - b) for a, b in zip(corners, one.corners, strict=True))
            if over > _OVER:
                far.append(one.place)
            if min(corners[2] - corners[0], corners[3] - corners[1]) <= MIN_SIDE:
                outside = min(one.corners[2] - one.corners[0], one.corners[3] - one.corners[1]) > MIN_SIDE
                for each in (tally, trained):
                    each.drop("box", OUTSIDE if outside else FLAT, one.place, group=group)
                continue
            tally.keep("box", group=group)
            tally.change("box", CLIPPED, one.place, int(over > 10**-DIGITS))
            if one.crowd:
                tally.change("box", found.crowd, one.place)
                trained.drop("box", CROWD, one.place, group=group)
            else:
                trained.keep("box", group=group)
            annotations.append(_annotation(len(annotations) + 1, image_id, one, corners, image))
    for each in (tally, trained):
        each.keep("image", len(images))
    every = len(annotations) + tally.dropped("box")
    if found.hint and len(far) > max(1, _MANY * every):
        raise UserError(
            f"{far[0]}: the box reaches out of its image, as do {len(far) - 1} others of {every}; {found.hint}"
        )
    trained.check(f"{source}: split {split}", allow_loss=allow_loss, otherwise=ALLOW_LOSS)
    if not annotations:
        raise UserError(f"{source}: split {split}: no object is left: {tally.describe()}")
    if all(row["iscrowd"] for row in annotations):
        raise UserError(
            f"{source}: split {split}: of {count(len(annotations), 'object')} none is left to train on: all {found.crowd}"
        )
    counts = Counter(
        images=len(images),
        empty=len(images) - len({row["image_id"] for row in annotations}),
        objects=len(annotations),
        crowd=sum(row["iscrowd"] for row in annotations),
    )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(found.class_names)]
    return Content(folder, {"images": rows, "annotations": annotations, "categories": categories}, counts, tally)


def check_split_name(split: str, source: str) -> None:
    """Raises UserError for a split whose files would take the place of those of the run."""
    if split.lower().removesuffix(".json") in _OURS:
        raise UserError(f"{source}: a split is called {split!r}, as is a file of a run; rename it")


def note_shared_images(found: Found) -> None:
    """Notes images that stand in two splits."""
    for one, other in itertools.combinations(found.splits, 2):
        mine = {image.path for image in found.splits[one]}
        both = [image.path for image in found.splits[other] if image.path in mine]
        if both:
            found.notes.append(f"{count(len(both), 'image')} of {other} in {one} too (first: {both[0]})")


def drop_image(tally: Tally, image: Path, kind: str, classes: Iterable[str]) -> None:
    """Count an image of a `kind` that is not read, and its objects, of which each names its class."""
    tally.drop("image", f"of a kind that is not read ({kind})", image)
    for name in classes:
        tally.drop("box", f"on images that are not read ({kind})", image, group=name)


def unread_kind(image: Path) -> str | None:
    """The suffix of a file that is not read here: Pillow at hand has no decoder for it, or it is a camera's raw file, of which Pillow would read the
    thumbnail. None for all others, whatever they are called, damaged ones too."""
    suffix = image.suffix.lower()
    Image.init()
    if suffix in Image.registered_extensions():
        return None
    try:
        with Image.open(image) as opened:
            return suffix if opened.format == "TIFF" else None
    except UnidentifiedImageError:
        return suffix or image.name
    except Exception:  # known to Pillow, and damaged: its reader says how
        return None


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


def is_marked(value: object, place: str, what: str) -> bool:
    """Whether a flag of a file says yes. Raises UserError for what is neither a yes nor a no that tools are known to write."""
    text = str("" if value is None else value).strip().lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number in (0, -1):  # -1: not known
        return False
    if number == 1:
        return True
    raise UserError(f"{place}: {what} is {value!r}, neither yes (1, true, yes) nor no (0, false, no, Unspecified)")


def read_class_list(file: Path) -> list[str]:
    """Class names of a text file, one a line. Raises UserError for a name given twice, an empty line, or no name."""
    names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    check_class_names(names, str(file))
    return names


def check_class_names(names: list[str], place: str) -> None:
    """Raises UserError unless there are names, all of them different, without control characters and none empty."""
    if not names:
        raise UserError(f"{place}: names no class")
    if "" in names:
        raise UserError(f"{place}: class number {names.index('')} has an empty name")
    odd = [name for name in names if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name)]
    if odd:
        raise UserError(f"{place}: the class name {odd[0]!r} has control characters, such as a line break")
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
