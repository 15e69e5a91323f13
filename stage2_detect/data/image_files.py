"""Images and videos that come without annotations: which files a path means, and a record for each."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_pattern, list_files, require_images
from ssld.shared.images import image_headers
from ssld.stage2_detect.data.coco import CocoImage, Id

_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


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


def find_images(images: str) -> ImageFiles:
    """The images and videos that a path means: a folder with all below it, one of them, a pattern (`**` for any depth), or a text file of paths,
    one a line, relative to that file. Raises UserError where there are none, or a listed one is missing."""
    path = Path(images)
    if path.is_dir():
        return ImageFiles(images, list_files(path, _SUFFIXES) or require_images(path))
    if path.is_file():
        return _together([images] if images.lower().endswith(_SUFFIXES) else _listed(path))
    if is_pattern(images):
        found = [one for one in glob.glob(images, recursive=True) if os.path.isfile(one)]
        names = [one for one in found if one.lower().endswith(_SUFFIXES)]
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


def _listed(file: Path) -> list[str]:
    """The paths in a list file; empty lines and those that begin with # do not count."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: neither an image or video ({' '.join(_SUFFIXES)}) nor a text file with a path a line"
        ) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    paths = []
    for number, line in numbered:
        if line and not line.startswith("#"):
            path = os.path.join(file.parent, line)
            if not os.path.isfile(path):
                raise UserError(f"{file}, line {number}: {line}: no such file")
            paths.append(path)
    if not paths:
        raise UserError(f"{file}: no path in it; it should list images, one a line")
    return paths


def _together(paths: Sequence[str]) -> ImageFiles:
    """Files below the deepest folder that holds them all."""
    whole = {os.path.normpath(os.path.abspath(path)) for path in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return ImageFiles(folder, sorted(Path(path).relative_to(folder).as_posix() for path in whole))
