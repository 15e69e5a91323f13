"""The unlabeled photos of a new pipeline: which ones stage 1 learns from, and which are held out to judge the result.

The annotated photos often lie in the folder of unlabeled photos too. Those of the evaluation part would make the detector's score look better than it
is; those of the training part are listed for stage 1 anyway, and must not be among the photos that are held out. They are found by content, whatever
they are called there.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssld.shared.files import file_sha256, list_images
from ssld.shared.tally import Tally

MOST_HELD_OUT, LEAST_HELD_OUT, SHARE = 500, 50, 0.05
SMALLEST_POOL = 5 * LEAST_HELD_OUT
"""photos below which none are held out"""


@dataclass(frozen=True)
class Pool:
    """Photos as posix paths relative to their folder, sorted; and what was left out."""

    train: list[str]
    held_out: list[str]
    tally: Tally


def divide_pool(folder: Path, training: Iterable[Path], evaluation: Iterable[Path], seed: int) -> Pool:
    """The photos below a folder without copies of annotated ones; a seeded twentieth (at least 50, at most 500) of 250 or more is held out."""
    tally, names = Tally(), []
    copies = {"copies of training photos": _copies(folder, training)}
    copies["copies of evaluation photos"] = _copies(folder, evaluation)
    for name in list_images(folder):
        if cause := next((cause for cause, found in copies.items() if name in found), None):
            tally.drop("photo", cause, name)
        else:
            names.append(name)
            tally.keep("photo")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest())
    number = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, round(SHARE * len(names)))) if len(names) >= SMALLEST_POOL else 0
    held_out = set(order[:number])
    return Pool([name for name in names if name not in held_out], sorted(held_out), tally)


def _copies(folder: Path, photos: Iterable[Path]) -> set[str]:
    """Photos of the folder that have the content of one of `photos`; only files of equal size are read."""
    by_size = defaultdict(list)
    for file in photos:
        by_size[file.stat().st_size].append(file)
    digests: dict[int, set[str]] = {}
    found = set()
    for name in list_images(folder):
        size = (folder / name).stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {file_sha256(file) for file in by_size[size]}
            if file_sha256(folder / name) in digests[size]:
                found.add(name)
    return found
