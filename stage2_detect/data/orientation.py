"""Orientation in which the images of a source are read: upright by EXIF, or as their pixels are stored. Only this module decides it.

A camera stores the pixels in the orientation of its sensor and writes the rotation into EXIF. Most tools show the upright image and draw boxes on it,
some show the stored pixels. The convention of an annotation file follows from its sideways images, which EXIF rotates by 90 degrees and which are not
square: the width and height in the file match either the upright image or the stored pixels, and each sideways image is read in the matching form.
For images that EXIF rotates by 180 degrees, mirrors, or rotates while they are square, both forms have the same size: they follow the majority of the
sideways images of their source, and are read upright without a majority. `info.image_orientation` of a COCO file states the convention, so that parts
and cleaned copies of a source keep it.

Legend: I images.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.files import write_atomically
from ssld.shared.images import ImageHeader, image_headers
from ssld.shared.wording import count
from ssld.stage2_detect.data.annotation_cache import SETTLED_SECONDS, entry_of
from ssld.stage2_detect.data.coco_json import Convention

Fit = Literal["plain", "upright", "stored", "both", "neither"]
"""Forms of an image that have the size given in the file; `plain`: EXIF does not rotate the image, so it has one form."""
LEAST_IMAGES = 1000
"""number of images from which the result is cached; fewer headers are read in less than a second"""
_VERSION = 1


@dataclass(frozen=True)
class Orientation:
    """Orientation in which the images of a source are read, and the counts that decided it."""

    convention: Convention = "upright"
    """form in which images are read that have the given size in both forms"""
    stated: bool = False
    """whether the source states the convention"""
    upright: int = 0
    """sideways images with the size of the upright image"""
    stored: int = 0
    """sideways images with the size of the stored pixels"""
    both: int = 0
    """rotated or mirrored images with equal size in both forms, which follow the convention"""

    @property
    def contradictory(self) -> bool:
        """Whether some sideways images match the upright form and others the stored form."""
        return bool(self.upright and self.stored)

    @property
    def guessed(self) -> bool:
        """Whether some images follow a convention without evidence for it."""
        return bool(self.both) and not self.stated and self.upright == self.stored

    def describe(self) -> str:
        """Return a clause for the log; empty if EXIF rotates no image."""
        forms = {"upright": "turned upright by EXIF", "stored": "read as stored"}
        way = f"read {'upright' if self.convention == 'upright' else 'as stored'}"
        parts = [
            f"{count(number, 'sideways image')} {forms[name]}, by {'its size' if number == 1 else 'their sizes'}"
            for name, number in (("upright", self.upright), ("stored", self.stored))
            if number
        ]
        if self.both:
            if self.stated:
                reason = "as the source states"
            elif self.contradictory:
                reason = "like most of these" if self.upright != self.stored else "without a majority of these"
            elif self.upright or self.stored:
                reason = "like these"
            else:
                reason = "although the form that the boxes refer to is unknown"
            parts.append(f"{count(self.both, 'image')} that EXIF turns without a change of size {way}, {reason}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return the fields for result.json."""
        return asdict(self)


def fit_of(header: ImageHeader, width: int, height: int) -> Fit:
    """Compare an image, upright and as stored, with the size in the file."""
    stored = (header.height, header.width) == (height, width)
    upright = header.upright_size == (height, width)
    if header.orientation == 1:
        return "plain" if stored else "neither"
    return "both" if stored and upright else "upright" if upright else "stored" if stored else "neither"


def orientation_of(fits: Iterable[Fit], stated: Convention | None = None) -> Orientation:
    """Decide the orientation of a source from its images; `stated` is the convention that the source states, if any."""
    counts = Counter(fits)
    majority: Convention = "stored" if counts["stored"] > counts["upright"] else "upright"
    numbers = {name: counts[name] for name in ("upright", "stored", "both")}
    return Orientation(stated or majority, stated is not None, **numbers)


def is_upright(fit: Fit, convention: Convention) -> bool:
    """Whether an image is read upright by its EXIF."""
    return convention == "upright" if fit == "both" else fit == "upright"


def find_orientation(
    source: str,
    paths: Sequence[str],
    widths_I: np.ndarray,
    heights_I: np.ndarray,
    *,
    stated: Convention | None = None,
    cache: bool = False,
) -> Orientation:
    """Decide the orientation of a source from the headers of all its images.

    Args:
        source: annotation file, for messages and the cache.
        paths: image files; unreadable ones are skipped.
        widths_I, heights_I: sizes in the annotation file.
        stated: convention that the file states.
        cache: store the result in the user's cache folder, valid while source, sizes and images do not change.

    Raises:
        UserError: an image has the given size neither upright nor as stored; names the first one.
    """
    entry = key = None
    if cache and len(paths) >= LEAST_IMAGES:
        entry, key = entry_of(source, ".orientation.json"), _key(paths, widths_I, heights_I, stated)
        if key and (known := _load(entry, key)):
            return known
    headers = image_headers(paths)
    sizes = zip(widths_I.tolist(), heights_I.tolist(), strict=True)
    fits = {
        index: fit_of(header, *size)
        for index, (header, size) in enumerate(zip(headers, sizes, strict=True))
        if header is not None
    }
    wrong = [index for index, fit in fits.items() if fit == "neither"]
    if wrong:
        header = headers[wrong[0]]
        assert header is not None
        more = f", and {len(wrong) - 1:,} others of its {len(paths):,} images do not fit either" if wrong[1:] else ""
        size = widths_I[wrong[0]], heights_I[wrong[0]]
        raise UserError(f"{source}: {misfit(paths[wrong[0]], header, *size)}{more}")
    orientation = orientation_of(fits.values(), stated)
    if entry and key:
        _store(entry, key, orientation)
    return orientation


def misfit(path: str, header: ImageHeader, width: int, height: int) -> str:
    """Return a message about an image that has the given size neither upright nor as stored."""
    high, wide = header.upright_size
    return f"image {path} is {wide}x{high}, but {width}x{height} in the annotations"


def _key(paths: Sequence[str], widths_I: np.ndarray, heights_I: np.ndarray, stated: Convention | None) -> str | None:
    """Return a digest of everything that decides the orientation; None if a file is missing or changed less than `SETTLED_SECONDS` ago."""
    digest = hashlib.sha256(json.dumps([_VERSION, stated]).encode())
    newest = 0
    try:
        for path, width, height in zip(paths, widths_I.tolist(), heights_I.tolist(), strict=True):
            stat = os.stat(path)
            newest = max(newest, stat.st_mtime_ns)
            digest.update(os.fsencode(path) + f"\0{width}\0{height}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    except OSError:
        return None
    return digest.hexdigest() if time.time() - newest / 1e9 >= SETTLED_SECONDS else None


def _load(entry: Path, key: str) -> Orientation | None:
    """Load an entry; None if there is no valid entry with this key."""
    try:
        content = json.loads(entry.read_bytes())
        sound = content["key"] == key and content["check"] == _checksum(content["orientation"])
        return Orientation(**content["orientation"]) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(entry: Path, key: str, orientation: Orientation) -> None:
    """Write an entry; failures to write are ignored, since the cache is optional."""
    record = orientation.record()
    content = {"key": key, "check": _checksum(record), "orientation": record}
    with contextlib.suppress(OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(entry, json.dumps(content))


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
