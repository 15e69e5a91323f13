"""Marks of the images that a detector was trained on, kept in its file, so that an evaluation on the same images does not pass for one on others.

A mark is the size of an image file and the start of the SHA-256 of its content: copies under other names are recognized, images that were saved anew
are not.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssld.shared.files import file_sha256, spread
from ssld.stage2_detect.data.coco import CocoImage

MOST = 1000
"""images whose marks are kept, evenly spread; some 30 bytes each"""


def marks_of(images: Sequence[CocoImage]) -> list[str]:
    """Return the marks of at most `MOST` images; a file that cannot be read has none."""
    marks = (_mark(images[place].path) for place in spread(len(images), MOST))
    return sorted({mark for mark in marks if mark})


def images_with_marks(images: Iterable[CocoImage], marks: Iterable[str]) -> list[str]:
    """Return the paths of the images that have one of the marks; only files of a marked size are read."""
    known = set(marks)
    sizes = {mark.partition("-")[0] for mark in known}
    return [one.path for one in images if _size(one.path) in sizes and _mark(one.path) in known]


def _size(path: str) -> str | None:
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return None


def _mark(path: str) -> str | None:
    try:
        return f"{os.stat(path).st_size}-{file_sha256(Path(path))[:12]}"
    except OSError:
        return None
