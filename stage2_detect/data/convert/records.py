"""Content of a data set in another format, its conversion to COCO JSON, and the checks that all formats share.

A reader, the module of a format in this folder, fills `SourceData`; `coco_content` converts a split to the content of a COCO file. Boxes that cross
the border of their image, by rounding in most data sets, are clipped; boxes outside their image or without area are dropped. Both are counted, with
the first one named. The readers raise errors for invalid numbers and unlisted classes.
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
"""distance in pixels beyond the border that rounding does not explain"""
_MANY, _MOST = 0.1, 0.5
"""shares of boxes beyond the border above which the box format is probably wrong: of an uncertain format, and of one that is defined"""
ALLOW_LOSS = "set allow_loss: true to convert the rest"
LISTED_AGAIN = "listed more than once, read once"
NO_LABELS = "without a label file, read as an image without objects"
_RUN_FILES = {
    "config.yaml",
    "environment",
    "metrics.jsonl",
    "log.txt",
    "quarantine.txt",
    "checkpoints",
    "result",
    "error",
}
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


class SourceObject(NamedTuple):
    """One object of an image."""

    label: int
    """class index"""
    corners: Corners
    """x1, y1, x2, y2: edges in pixels, counted from 0"""
    place: str
    """file and line or row, for messages"""
    crowd: bool = False
    """whether the object is ignored: neither trained on nor counted in evaluation"""
    shape: list[list[float]] | dict[str, Any] | None = None
    """polygons, x, y, x, y, ... in pixels, or RLE of the image's size"""
    area: float | None = None


class SourceImage(NamedTuple):
    """One image with its objects."""

    path: Path
    width: int
    height: int
    objects: list[SourceObject]
    image_id: int | None = None
    """id in COCO JSON; None: numbered from 1"""
    unsized: bool = False
    """whether the source gives no size, so that the upright size is used"""


@dataclass
class SourceData:
    """A data set as a reader returns it.

    Attributes:
        kind: name of the format.
        class_names: classes in order.
        splits: images by split.
        notes: lines for the log.
        hint: end of the message if many boxes reach far beyond their images.
        certain: whether the format defines its boxes: then most of them, in place of a tenth, have to reach beyond their images for an error.
        tallies: by split, rows that its reader dropped or changed.
        searched: by split, the files that were searched for objects: "of 3 XML files in FOLDER".
        crowd: reason why objects are ignored, as a cause in the tally.
        orientation: form of the images that the boxes refer to, if the format defines it; None: decided by the sizes.
    """

    kind: str
    class_names: list[str]
    splits: dict[str, list[SourceImage]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    certain: bool = False
    tallies: dict[str, Tally] = field(default_factory=dict)
    searched: dict[str, str] = field(default_factory=dict)
    crowd: str = "marked iscrowd"
    orientation: Convention | None = None


class Content(NamedTuple):
    """A split as the content of a COCO file."""

    folder: Path
    """folder that the file names are relative to"""
    data: dict[str, Any]
    counts: Counter[str]
    """`images`, `empty` images, `objects` written, `crowd` among them"""
    tally: Tally


def coco_content(data: SourceData, split: str, *, source: str, allow_loss: bool) -> Content:
    """Convert a split to the content of a COCO file; adds the boxes dropped and changed to the reader's tally.

    Raises UserError for large losses and for a majority of images without a label file unless `allow_loss`, if no object remains to train or evaluate
    on, and if many boxes reach far beyond their images: more than a tenth of them, or more than half in a format that defines its boxes.
    """
    images, tally = data.splits[split], data.tallies[split]
    if not tally.dropped("box") and not any(image.objects for image in images):
        raise UserError(
            f"{source}: split {split}: no object in {count(len(images), 'image')} ({data.searched[split]}); "
            "correct the source, or name the splits that have objects by --splits"
        )
    if not images:
        tally.check(f"{source}: split {split}", allow_loss=False, otherwise="name the other splits by --splits")
    trained = Tally()  # boxes as training will count them
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
            group = data.class_names[one.label]
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
                tally.change("box", data.crowd, one.place)
                trained.drop("box", CROWD, one.place, group=group)
            else:
                trained.keep("box", group=group)
            annotations.append(_annotation(len(annotations) + 1, image_id, one, corners, image))
    for each in (tally, trained):
        each.keep("image", len(images))
    total = len(annotations) + tally.dropped("box")
    if len(far) > max(1, _MANY * total):
        text = f"{far[0]}: the box reaches out of its image, as do {len(far) - 1:,} others of {total:,}; {data.hint}"
        if not data.certain or (len(far) > _MOST * total and not allow_loss):
            raise UserError(text)
        data.notes.append(text)
    trained.check(f"{source}: split {split}", allow_loss=allow_loss, otherwise=ALLOW_LOSS)
    unlabeled, listed = tally.changed("image", NO_LABELS), len(images) + tally.dropped("image")
    if unlabeled > _MOST * listed and not allow_loss:
        raise UserError(
            f"{source}: split {split}: {unlabeled:,} of the {count(listed, 'image')} have no label file ({data.searched[split]}) and would count "
            "as images without objects; move images that nobody has labeled to another folder, or set allow_loss: true if nothing is on them"
        )
    if not annotations:
        raise UserError(f"{source}: split {split}: no object is left: {tally.describe()}")
    if all(row["iscrowd"] for row in annotations):
        raise UserError(
            f"{source}: split {split}: of {count(len(annotations), 'object')} none is left to train on: all {data.crowd}"
        )
    counts = Counter(
        images=len(images),
        empty=len(images) - len({row["image_id"] for row in annotations}),
        objects=len(annotations),
        crowd=sum(row["iscrowd"] for row in annotations),
    )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(data.class_names)]
    return Content(folder, {"images": rows, "annotations": annotations, "categories": categories}, counts, tally)


def check_splits(asked: Iterable[str], present: Iterable[str], source: object) -> None:
    """Raise UserError for a split that is asked for, but not among those of a data set."""
    there = list(present)
    for split in asked:
        if split not in there:
            raise UserError(f"{source}: has no split {split!r} (it has {', '.join(there[:12])})")


def check_split_name(split: str, source: str) -> None:
    """Raise UserError for a split whose name is that of a file of the run."""
    if split.lower().removesuffix(".json") in _RUN_FILES:
        raise UserError(f"{source}: a split is called {split!r}, like a file of a run; rename it")


def note_shared_images(data: SourceData) -> None:
    """Add notes on images that are in two splits."""
    for one, other in itertools.combinations(data.splits, 2):
        paths = {image.path for image in data.splits[one]}
        both = [image.path for image in data.splits[other] if image.path in paths]
        if both:
            data.notes.append(f"{count(len(both), 'image')} of {other} in {one} too (first: {both[0]})")


def drop_image(tally: Tally, image: Path, kind: str | None, classes: Iterable[str]) -> None:
    """Count an image of an unsupported `kind`, or with None a damaged one, and its objects, given by their classes."""
    cause, on = (
        ("that cannot be read", "on images that cannot be read")
        if kind is None
        else (f"of a kind that is not read ({kind})", f"on images that are not read ({kind})")
    )
    tally.drop("image", cause, image)
    for name in classes:
        tally.drop("box", on, image, group=name)


def unread_kind(image: Path) -> str | None:
    """Return the suffix of an unsupported image file, None for all others, damaged ones included.

    Unsupported are files that the installed Pillow has no decoder for, and raw files of cameras, of which Pillow would read the thumbnail.
    """
    suffix = image.suffix.lower()
    Image.init()
    if suffix in Image.registered_extensions():
        return None
    try:
        with Image.open(image) as opened:
            return suffix if opened.format == "TIFF" else None
    except UnidentifiedImageError:
        return suffix or image.name
    except Exception:  # a supported but damaged file, which its reader reports
        return None


def clip(corners: Corners, width: int, height: int) -> Corners:
    """Clip corners to the image and round them to a thousandth of a pixel."""
    limits = (width, height, width, height)
    x1, y1, x2, y2 = (round(min(max(value, 0.0), limit), DIGITS) for value, limit in zip(corners, limits, strict=True))
    return x1, y1, x2, y2


def size_of(path: Path, stated: tuple[int, int] | None = None, place: str = "") -> tuple[int, int]:
    """Return (width, height) of an image: the `stated` size if the image has it, upright or as stored; without one, the upright size.

    Raises UnreadableImage for a damaged image, and UserError if the image has the stated size in neither form.
    """
    return _size(path, str(path), stated, place)


def size_of_bytes(encoded: bytes, name: str, stated: tuple[int, int] | None = None, place: str = "") -> tuple[int, int]:
    """Do the work of `size_of` for the bytes of an image; `name` names it in errors. Raises UserError for a damaged image too."""
    try:
        return _size(encoded, name, stated, place)
    except UnreadableImage as error:
        raise UserError(str(error)) from None


def _size(source: bytes | Path, name: str, stated: tuple[int, int] | None, place: str) -> tuple[int, int]:
    header = image_header(source, name=name)
    height, width = header.upright_size
    if stated is None:
        return width, height
    if fit_of(header, *stated) == "neither":
        raise UserError(
            f"{place or name}: gives the size {stated[0]}x{stated[1]}, but the image {name} is {width}x{height} pixels"
        )
    return stated


def settle_orientation(data: SourceData) -> Orientation:
    """Decide the orientation that the boxes of a data set refer to, from all its splits together.

    Images without a size in the source get the size of that orientation.
    """
    all_images = [image for images in data.splits.values() for image in images]
    paths = [image.path for image in all_images]
    headers = dict(zip(paths, image_headers([str(path) for path in paths]), strict=True))
    fits = [
        fit_of(header, image.width, image.height)
        for image in all_images
        if not image.unsized and (header := headers[image.path])
    ]
    orientation = orientation_of(fits, data.orientation)
    if not is_upright("both", orientation.convention):
        for images in data.splits.values():
            for index, image in enumerate(images):
                if image.unsized and (header := headers[image.path]):
                    images[index] = image._replace(width=header.width, height=header.height)
    return orientation


def finite_number(text: str, place: str, name: str) -> float:
    """Parse a finite number; `name` is the value's name in errors. Raises UserError for anything else, NaN and infinity included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}: {name} is {text!r}, not a number")
    return value


def is_marked(value: object, place: str, name: str) -> bool:
    """Parse a flag in any form that tools are known to write; `name` is its name in errors. Raises UserError for other values."""
    text = str("" if value is None else value).strip().lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number in (0, -1):  # -1: unknown
        return False
    if number == 1:
        return True
    raise UserError(f"{place}: {name} is {value!r}, neither yes (1, true, yes) nor no (0, false, no, Unspecified)")


def read_class_list(file: Path) -> list[str]:
    """Read class names from a text file, one per line. Raises UserError for a repeated name, an empty line, or no name."""
    names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    check_class_names(names, str(file))
    return names


def check_class_names(names: list[str], place: str) -> None:
    """Raise UserError unless there is at least one name and all names are different, not empty and without control characters."""
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


def _annotation(number: int, image_id: int, one: SourceObject, corners: Corners, image: SourceImage) -> dict[str, Any]:
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
