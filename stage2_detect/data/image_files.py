"""Images and videos without annotations: the files that a path refers to. Does not import torch."""

import codecs
import glob
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    decode_text,
    is_pattern,
    list_images,
    looks_like_image,
    read_text,
    require_images,
    says_nothing,
)
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.data.image_names import hint, missing_names

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


def images_of_source(
    source: Path, images: Path | None = None, images_setting: str | None = None
) -> tuple[ImageFiles, str]:
    """Return (the images of one source, a line for the log or "").

    Args:
        source: a folder, searched recursively; an image; a pattern; a text file with one path per line; a COCO JSON file.
        images: folder that the file names in a COCO JSON file are relative to; None: the folder of that file.

    Raises:
        UserError: nothing of this kind, no image in it, a file that is missing, or a video.
    """
    if source.suffix.lower() == ".json" and source.is_file():
        return _coco_files(source, images, images_setting)
    files = ImageFiles(str(source), require_images(source)) if source.is_dir() else find_images(str(source))
    videos = [name for name in files.names if name.lower().endswith(VIDEO_SUFFIXES)]
    if videos:
        raise UserError(f"{source}: {count(len(videos), 'video')} in it (first: {videos[0]}); give images")
    return files, ""


def _coco_files(file: Path, images: Path | None, images_setting: str | None) -> tuple[ImageFiles, str]:
    """Return (the files that a COCO JSON file lists, a line for the log or "")."""
    try:
        content: Any = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {' '.join(str(error).split())}") from None
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{file}: no COCO JSON: it has no list called images")
    names: list[str] = []
    for number, row in enumerate(rows):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: images[{number}]: has no file_name")
        names.append(name)
    if not names:
        raise UserError(f"{file}: no image in it")
    folder = file.parent if images is None else images
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist")
    if missing := missing_names(folder, names):
        other = f"give their folder as {images_setting}" if images_setting else "give a text file with their paths"
        advice = "" if images else f"; {other}"
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {file} are missing; the first is "
            f"{printable(os.path.join(folder, names[missing[0]]))}{hint(folder, [names[index] for index in missing]) or advice}"
        )
    annotations = content.get("annotations")
    note = f"{file}: its {count(len(annotations), 'annotation')} are not read" if annotations else ""
    return ImageFiles(str(folder), names), note


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
