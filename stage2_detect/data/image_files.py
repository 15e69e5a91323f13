"""Images and videos without annotations: the files that a path refers to, and a record for each."""

import codecs
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    decode_text,
    is_pattern,
    list_images,
    looks_like_image,
    require_images,
    says_nothing,
)
from ssld.shared.images import image_headers
from ssld.shared.tally import Tally
from ssld.stage2_detect.data.coco import CocoImage, Id

_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_EXPECTED = "give an image, a video, a folder, a quoted pattern or a text file with one path per line"
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class ImageFiles(NamedTuple):
    """Files as a folder and sorted posix paths relative to it."""

    folder: str
    names: list[str]


@contextmanager
def images_of_any_size(allowed: bool) -> Iterator[None]:
    """Lift PIL's limit of 179 million pixels inside, if `allowed`: PIL takes larger images for an attack, while prediction with tiles needs them."""
    limit = Image.MAX_IMAGE_PIXELS
    if allowed:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def find_images(images: str, tally: Tally | None = None) -> ImageFiles:
    """List the images and videos that a path refers to.

    Args:
        images: a folder (searched recursively), an image or video, a pattern (`**` for any depth), or a text file with one path per line,
            relative to that file.
        tally: counts the other files of a folder.

    Raises:
        UserError: there are no images, or a listed file is missing.
    """
    path = Path(images)
    if path.is_dir():
        return ImageFiles(images, list_images(path, _SUFFIXES, tally) or require_images(path))
    if path.is_file():
        return _together([images] if _is_one(path) else _listed(path))
    if is_pattern(images):
        names = [one for one in _matches(images) if one.lower().endswith(_SUFFIXES)]
        if not names:
            raise UserError(f"no images match {images} (suffixes: {' '.join(_SUFFIXES)})")
        return _together(names)
    raise UserError(f"{images}: no such image, video, folder or list")


def records_of(files: ImageFiles, ids: Sequence[Id]) -> tuple[list[CocoImage], list[str]]:
    """Return (a record without objects for each image, with the size upright by EXIF; names of unreadable images). Reads only headers."""
    paths = [os.path.join(files.folder, name) for name in files.names]
    headers = image_headers(paths)
    no_objects = (
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, bool),
        np.zeros(0),
        np.zeros((0, 4)),
    )
    records = [
        CocoImage(image_id, path, *header.upright_size[::-1], *no_objects, (), ())
        for image_id, path, header in zip(ids, paths, headers, strict=True)
        if header is not None
    ]
    return records, [name for name, header in zip(files.names, headers, strict=True) if header is None]


def _is_one(file: Path) -> bool:
    """Whether a file is an image or a video, by its suffix or, without a suffix that decides it, by its content."""
    if file.name.lower().endswith(_SUFFIXES):
        return True
    with file.open("rb") as opened:
        return says_nothing(file.name) and looks_like_image(opened.read(64))


def _matches(pattern: str) -> list[str]:
    """List the files that match a pattern; brackets and other special characters in names of existing folders are literal."""
    parts, number = Path(pattern).parts, 0
    while number < len(parts) - 1 and Path(*parts[: number + 1]).is_dir():
        number += 1
    start = glob.escape(str(Path(*parts[:number]))) if number else ""
    return [one for one in glob.glob(os.path.join(start, *parts[number:]), recursive=True) if os.path.isfile(one)]


def _listed(file: Path) -> list[str]:
    """Read the paths of a list file, ignoring empty lines and lines that begin with #."""
    paths: list[str] = []
    for number, text in enumerate(_text_of(file).splitlines(), 1):
        line = text.strip()
        if line.startswith('"') and line.endswith('"'):
            line = line[1:-1]
        if not line or line.startswith("#"):
            continue
        candidates = [os.path.join(file.parent, one) for one in (line, line.replace("\\", "/"))]
        path = next((one for one in candidates if os.path.isfile(one)), None)
        if path is None:
            if not paths and line[0] in "{[<":
                raise UserError(f"{file}: begins with {_shortened(line, 20)}, which is not a path; {_EXPECTED}")
            raise UserError(f"{file}, line {number}: {_shortened(line, 120)}: no such file")
        paths.append(path)
    if not paths:
        raise UserError(f"{file}: contains no path; it should list images, one per line")
    return paths


def _text_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(4096)
        text = decode_text(file.read_bytes() if b"\0" not in start or start.startswith(_MARKS) else start)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(
            f"{file}: neither an image or video ({' '.join(_SUFFIXES)}) nor a text file with one path per line"
        )
    return text


def _shortened(line: str, most: int) -> str:
    """Shorten and escape an arbitrary line for a message."""
    return line if len(line) <= most and line.isprintable() else f"{line[:most]!r}..."


def _together(paths: Sequence[str]) -> ImageFiles:
    """Return files relative to the deepest folder that contains all of them."""
    whole = {os.path.normpath(os.path.abspath(path)) for path in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return ImageFiles(folder, sorted(Path(path).relative_to(folder).as_posix() for path in whole))
