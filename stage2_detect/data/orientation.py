"""Which way up the images of a source are read: upright, or as their pixels are stored. The one place that decides it.

A camera stores pixels as its sensor lies and writes into EXIF how to turn them. Most tools show the upright image and draw boxes on it, some the
stored pixels. What an annotation file means is told by its sideways images, those that EXIF turns by 90 degrees and that are not square: the width
and height that the file gives are those of the upright image or of the stored pixels, and each is read as its size says. Of images that EXIF turns by
180 degrees, mirrors, or turns while they are square, both have the same size: they follow the most of their source's sideways images, and are
read upright where there are none, or as many of either kind. `info.image_orientation` of a COCO file says it outright, so that parts and cleaned
copies of a source keep what the whole of it showed.

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
"""Which forms of an image have the size that is given for it; `plain`: it has one form, since EXIF does not turn it."""
LEAST_IMAGES = 1000
"""the headers of fewer are read in less than a second"""
_VERSION = 1


@dataclass(frozen=True)
class Orientation:
    """How the images of a source are read, and what shows it."""

    convention: Convention = "upright"
    """of images that have the given size both ways"""
    stated: bool = False
    """whether the source says so itself"""
    upright: int = 0
    """sideways images with the size of the upright image"""
    stored: int = 0
    """sideways images with the size of the stored pixels"""
    both: int = 0
    """turned images with the same size both ways, which follow the convention"""

    @property
    def contradictory(self) -> bool:
        """Whether some sideways images show the one and some the other."""
        return bool(self.upright and self.stored)

    @property
    def guessed(self) -> bool:
        """Whether some images follow a convention that nothing shows."""
        return bool(self.both) and not self.stated and self.upright == self.stored

    def describe(self) -> str:
        """A clause for the log; empty where EXIF turns no image."""
        turned = {"upright": "turned upright by EXIF", "stored": "read as stored"}
        way = f"read {'upright' if self.convention == 'upright' else 'as stored'}"
        parts = [
            f"{count(number, 'sideways image')} {turned[name]}, as {'its size says' if number == 1 else 'their sizes say'}"
            for name, number in (("upright", self.upright), ("stored", self.stored))
            if number
        ]
        if self.both:
            if self.stated:
                why = "as the source says"
            elif self.contradictory:
                why = "as most of these" if self.upright != self.stored else "since as many say the one as the other"
            elif self.upright or self.stored:
                why = "like these"
            else:
                why = "since nothing shows which form the boxes are for"
            parts.append(f"{count(self.both, 'image')} that EXIF turns without a change of size {way}, {why}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """The same for result.json."""
        return asdict(self)


def fit_of(header: ImageHeader, width: int, height: int) -> Fit:
    """How an image fits the size that is given for it."""
    stored = (header.height, header.width) == (height, width)
    upright = header.upright_size == (height, width)
    if header.orientation == 1:
        return "plain" if stored else "neither"
    return "both" if stored and upright else "upright" if upright else "stored" if stored else "neither"


def orientation_of(fits: Iterable[Fit], stated: Convention | None = None) -> Orientation:
    """What the images of a source show together; `stated` is what the source says itself."""
    counts = Counter(fits)
    majority: Convention = "stored" if counts["stored"] > counts["upright"] else "upright"
    numbers = {name: counts[name] for name in ("upright", "stored", "both")}
    return Orientation(stated or majority, stated is not None, **numbers)


def is_upright(fit: Fit, convention: Convention) -> bool:
    """Whether an image is turned by its EXIF."""
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
    """The orientation of a source from the headers of all its images, beside their sizes in the file `source`; what cannot be read is passed over.

    With `cache` what was found is kept beside the annotations in the user's cache folder, for the same source, sizes and unchanged images.
    Raises UserError naming the first image that has the given size neither upright nor as stored.
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
    found = orientation_of(fits.values(), stated)
    if entry and key:
        _store(entry, key, found)
    return found


def misfit(path: str, header: ImageHeader, width: int, height: int) -> str:
    """A sentence on an image that has the given size neither upright nor as stored."""
    high, wide = header.upright_size
    return f"image {path} is {wide}x{high}, but the annotations say {width}x{height}"


def _key(paths: Sequence[str], widths_I: np.ndarray, heights_I: np.ndarray, stated: Convention | None) -> str | None:
    """A digest of all that the answer depends on; None where a file is missing, or changed a moment ago and so perhaps again at the same time."""
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
    """What an entry says; None where there is no sound one of this key."""
    try:
        content = json.loads(entry.read_bytes())
        sound = content["key"] == key and content["check"] == _checksum(content["orientation"])
        return Orientation(**content["orientation"]) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(entry: Path, key: str, found: Orientation) -> None:
    """Write an entry; a cache that cannot be written is none."""
    content = {"key": key, "check": _checksum(found.record()), "orientation": found.record()}
    with contextlib.suppress(OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(entry, json.dumps(content))


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
