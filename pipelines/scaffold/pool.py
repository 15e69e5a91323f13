"""Split of the unlabeled photos of a new pipeline into photos to train on and held-out photos.

The folder of unlabeled photos often contains copies of annotated photos, possibly under other names; they are detected by content and left out.
Copies of evaluation photos would inflate the detector's score. Copies of training photos are listed for stage 1 anyway, and must not be held out.
The lists have one file per line, so photos whose path cannot be a line are left out of them; `unlisted` counts and names these.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssld.shared.errors import UserError
from ssld.shared.files import UNLISTED, copies, escaped, fits_a_list, list_images
from ssld.shared.tally import Tally

MOST_HELD_OUT, LEAST_HELD_OUT, SHARE = 500, 50, 0.05
MOST_SHOWN = 24
"""number of unlabeled photos whose predictions a report shows"""
SMALLEST_POOL = 5 * LEAST_HELD_OUT
"""number of photos from which some are held out"""


@dataclass(frozen=True)
class Pool:
    """Photos as sorted posix paths relative to their folder, and a tally of those left out."""

    train: list[str]
    held_out: list[str]
    tally: Tally


def divide_pool(folder: Path, training: Iterable[Path], evaluation: Iterable[Path], seed: int) -> Pool:
    """Split the photos in a folder, without copies of annotated ones: of 250 or more, a random twentieth (50 to 500 photos) is held out."""
    tally, names, listed = Tally(), [], _listable(folder)
    parts = {"copies of training photos": training, "copies of evaluation photos": evaluation}
    known = {cause: copies([folder / name for name in listed], photos) for cause, photos in parts.items()}
    for name in listed:
        if cause := next((cause for cause, files in known.items() if folder / name in files), None):
            tally.drop("photo", cause, name)
        else:
            names.append(name)
            tally.keep("photo")
    order = sorted(names, key=lambda name: _place(name, seed))
    number = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, round(SHARE * len(names)))) if len(names) >= SMALLEST_POOL else 0
    held_out = set(order[:number])
    return Pool([name for name in names if name not in held_out], sorted(held_out), tally)


def some_photos(folder: Path, seed: int) -> list[Path]:
    """Draw at most `MOST_SHOWN` photos of a folder, as sorted absolute paths."""
    names = sorted(_listable(folder), key=lambda name: _place(name, seed))[:MOST_SHOWN]
    return [folder.absolute() / name for name in sorted(names)]


def unlisted(folder: Path, training: Iterable[str]) -> str:
    """Describe in one line the photos that no list can hold, of a folder and of the names of training photos; empty where there are none.

    Raises UserError where these are more than half of either.
    """
    tally = Tally()
    fits = {str(folder.absolute() / name): _fits(folder, name) for name in list_images(folder)}
    for what, names in (("unlabeled photo", fits), ("training photo", {name: fits_a_list(name) for name in training})):
        for name, fit in names.items():
            if fit:
                tally.keep(what)
            else:
                tally.drop(what, UNLISTED, escaped(name))
    if sentence := tally.bulk_loss():
        raise UserError(f"lists of photos, one file per line: {sentence}; rename them")
    described = tally.describe()
    return f"lists of photos, one file per line: {described}" if described else ""


def _listable(folder: Path) -> list[str]:
    return [name for name in list_images(folder) if _fits(folder, name)]


def _fits(folder: Path, name: str) -> bool:
    """Whether a photo can stand in the lists of stage 1, below their root, and in that of a moving teacher, by its whole path."""
    return fits_a_list(name) and fits_a_list(folder.absolute() / name)


def _place(name: str, seed: int) -> bytes:
    """Return where a photo stands in a random order that does not depend on the other photos."""
    return hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest()
