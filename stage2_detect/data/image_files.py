"""Images and videos that come without annotations: which files a path means, and a record for each."""

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
_EXPECTED = "give an image, a video, a folder, a quoted pattern or a text file with a path a line"
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class ImageFiles(NamedTuple):
    """Files as a folder and sorted posix paths relative to it."""

    folder: str
    names: list[str]


@contextmanager
def images_of_any_size(allowed: bool) -> Iterator[None]:
    """Lift PIL's limit meanwhile, above which (179 million pixels) it takes an image for an attack: what tiles are for is as large as that."""
    limit = Image.MAX_IMAGE_PIXELS
    if allowed:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def find_images(images: str, tally: Tally | None = None) -> ImageFiles:
    """The images and videos that a path means: a folder with all below it, one of them, a pattern (`**` for any depth), or a text file of paths,
    one a line, relative to that file. `tally` counts what else lies in a folder. Raises UserError where there are none, or a listed one is
    missing."""
    path = Path(images)
    if path.is_dir():
        return ImageFiles(images, list_images(path, _SUFFIXES, tally) or require_images(path))
    if path.is_file():
        return _together([images] if _is_one(path) else _listed(path))
    if is_pattern(images):
        names = [one for one in _matches(images) if one.lower().endswith(_SUFFIXES)]
        if not names:
            raise UserError(f"no images match {images} (looked for {' '.join(_SUFFIXES)})")
        return _together(names)
    raise UserError(f"{images}: no such image, video, folder or list")


def records_of(files: ImageFiles, ids: Sequence[Id]) -> tuple[list[CocoImage], list[str]]:
    """(a record without objects for each image, upright by its EXIF; names of those that cannot be read). Only headers are read."""
    paths = [os.path.join(files.folder, name) for name in files.names]
    headers = image_headers(paths)
    nothing = (
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, bool),
        np.zeros(0),
        np.zeros((0, 4)),
    )
    records = [
        CocoImage(image_id, path, *header.upright_size[::-1], *nothing, (), ())
        for image_id, path, header in zip(ids, paths, headers, strict=True)
        if header is not None
    ]
    return records, [name for name, header in zip(files.names, headers, strict=True) if header is None]


def _is_one(file: Path) -> bool:
    """Whether a file is an image or a video, by its name or, where that says nothing, by its content."""
    if file.name.lower().endswith(_SUFFIXES):
        return True
    with file.open("rb") as opened:
        return says_nothing(file.name) and looks_like_image(opened.read(64))


def _matches(pattern: str) -> list[str]:
    """The files that a pattern means; brackets and the like in the name of a folder that is there are letters of it."""
    parts, number = Path(pattern).parts, 0
    while number < len(parts) - 1 and Path(*parts[: number + 1]).is_dir():
        number += 1
    start = glob.escape(str(Path(*parts[:number]))) if number else ""
    return [one for one in glob.glob(os.path.join(start, *parts[number:]), recursive=True) if os.path.isfile(one)]


def _listed(file: Path) -> list[str]:
    """The paths in a list file; empty lines and those that begin with # do not count."""
    paths: list[str] = []
    for number, text in enumerate(_text_of(file).splitlines(), 1):
        line = text.strip()
        if line.startswith('"') and line.endswith('"'):
            line = line[1:-1]
        if not line or line.startswith("#"):
            continue
        tries = [os.path.join(file.parent, one) for one in (line, line.replace("\\", "/"))]
        path = next((one for one in tries if os.path.isfile(one)), None)
        if path is None:
            if not paths and line[0] in "{[<":
                raise UserError(f"{file}: begins with {_shown(line, 20)}, which is no path; {_EXPECTED}")
            raise UserError(f"{file}, line {number}: {_shown(line, 120)}: no such file")
        paths.append(path)
    if not paths:
        raise UserError(f"{file}: no path in it; it should list images, one a line")
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
        raise UserError(f"{file}: neither an image or video ({' '.join(_SUFFIXES)}) nor a text file with a path a line")
    return text


def _shown(line: str, most: int) -> str:
    """A line for a message, which may be anything."""
    return line if len(line) <= most and line.isprintable() else f"{line[:most]!r}..."


def _together(paths: Sequence[str]) -> ImageFiles:
    """Files below the deepest folder that holds them all."""
    whole = {os.path.normpath(os.path.abspath(path)) for path in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return ImageFiles(folder, sorted(Path(path).relative_to(folder).as_posix() for path in whole))
