"""Split of the unlabeled photos of a new pipeline into photos to train on and held-out photos.

The folder of unlabeled photos often contains copies of annotated photos, possibly under other names; they are detected by content and left out.
Copies of evaluation photos would inflate the detector's score. Copies of training photos are listed for stage 1 anyway, and must not be held out.
Photos whose header cannot be read, such as a phone's HEIC, are left out too: every stage that reads them stops where they are more than 1 %.
The lists have one file per line, so photos whose path cannot be a line are left out of them; `unlisted` counts and names these.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssld.shared.apart import call_apart
from ssld.shared.errors import UserError
from ssld.shared.files import UNLISTED, copies, escaped, fits_a_list, list_images
from ssld.shared.tally import Tally
from ssld.shared.wording import count

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


def unreadable_photos(photos: Iterable[Path]) -> set[Path]:
    """Return the photos whose header cannot be read; they are read in a process of their own, so that torch is not imported here.

    Raises UserError where that process fails.
    """
    files = [str(photo) for photo in photos]
    bad = call_apart(_unreadable, files) if files else []
    if bad is None:
        raise UserError(
            f"{count(len(files), 'photo')}, first {files[0]}: the process that reads them fails; run ssld doctor"
        )
    return {Path(file) for file in bad}


def _unreadable(files: list[str]) -> list[str]:
    from ssld.shared.images import image_headers

    return [file for file, header in zip(files, image_headers(files), strict=True) if header is None]


def divide_pool(
    folder: Path, training: Iterable[Path], evaluation: Iterable[Path], seed: int, unreadable: Iterable[Path] = ()
) -> Pool:
    """Split the photos in a folder, without copies of annotated ones: of 250 or more, a random twentieth (50 to 500 photos) is held out.

    Args:
        unreadable: photos to leave out, of `unreadable_photos`.

    Raises UserError where more than half of the photos cannot be read.
    """
    tally, names, listed = Tally(), [], _listable(folder)
    left_out = set(unreadable)
    bad = [name for name in listed if folder / name in left_out]
    for name in bad:
        tally.drop("photo", f"that cannot be read ({Path(name).suffix.lower() or 'without a suffix'})", name)
    if 2 * tally.dropped("photo") > len(listed):
        raise UserError(f"{folder}: {tally.describe()}; of {len(listed):,} in all: convert them to JPEG or PNG first")
    listed = [name for name in listed if folder / name not in left_out]
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


def some_photos(folder: Path, annotated: Iterable[Path], seed: int) -> list[Path]:
    """Draw at most `MOST_SHOWN` photos of a folder that can be read and are no copies of annotated ones, as sorted absolute paths.

    Raises UserError where all are copies, or none of those drawn can be read.
    """
    names = _listable(folder)
    known = copies([folder / name for name in names], annotated)
    new = [name for name in names if folder / name not in known]
    if names and not new:
        raise UserError(
            f"{folder}: all {count(len(names), 'photo')} are copies of annotated ones; leave out --unlabeled"
        )
    drawn = [folder.absolute() / name for name in sorted(sorted(new, key=lambda name: _place(name, seed))[:MOST_SHOWN])]
    bad = unreadable_photos(drawn)
    if drawn and len(bad) == len(drawn):
        raise UserError(
            f"{folder}: none of {count(len(drawn), 'photo')} drawn can be read, first {drawn[0]}; convert them to JPEG or PNG"
        )
    return [photo for photo in drawn if photo not in bad]


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
