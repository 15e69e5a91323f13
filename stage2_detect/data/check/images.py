"""Checks that look at the pictures of a COCO file: can they be read, are they as large as the file says, are two of them the same."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ssld.shared.files import IMAGE_SUFFIXES, is_hidden
from ssld.shared.images import ImageHeader, UnreadableImage, image_header, open_image
from ssld.shared.machine import cores
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.check.annotations import FileCheck
from ssld.stage2_detect.data.image_names import hint, missing_names
from ssld.stage2_detect.data.orientation import fit_of, is_upright, orientation_of

LOOK_ALIKE_BITS = 3
"""of 64: pictures whose hashes differ in no more are called look-alikes"""


@dataclass(frozen=True)
class Seen:
    """What one look at a picture shows."""

    header: ImageHeader
    digest: bytes
    """of the file's content"""
    look: int
    """difference hash of 64 bits"""


def check_images(check: FileCheck, *, quick: bool = False) -> dict[int, Seen]:
    """Looks at all pictures of a file, or with `quick` only whether they are there; {position of the image: what was seen}."""
    rows = check.content["images"]
    places = {index: check.folder / rows[index]["file_name"] for index in check.image_of.values()}
    listed = list(places)
    missing = [listed[one] for one in missing_names(check.folder, (rows[index]["file_name"] for index in listed))]
    if missing:
        names = some([rows[index]["file_name"] for index in missing])
        fitting = hint(check.folder, [rows[index]["file_name"] for index in missing])
        if len(missing) == len(places):
            text = f"none of its {count(len(places), 'picture')} is in {check.folder} ({names})"
            check.add("fault", f"{text}{fitting or ': is that their folder?'}")
        else:
            text = (
                f"{count(len(missing), 'picture')} of {len(places):,} not in {check.folder} ({names}): training stops"
            )
            check.add("fault", f"{text}{fitting}", None if fitting else "leaves them out")
            if not fitting:
                check.repair.drop_images |= dict.fromkeys(missing, "not in the folder")
    present = [index for index in places if index not in set(missing)]
    if quick:
        return {}
    with ThreadPoolExecutor(cores()) as pool:
        looks = dict(zip(present, pool.map(look_at, (places[index] for index in present)), strict=True))
    seen = {index: look for index, look in looks.items() if isinstance(look, Seen)}
    _check_unreadable(check, {index: look for index, look in looks.items() if isinstance(look, str)}, len(present))
    _check_sizes(check, seen)
    _check_copies(check, seen)
    return seen


def look_at(path: Path) -> Seen | str:
    """What a picture is, or why it cannot be read."""
    try:
        encoded = path.read_bytes()
        picture = open_image(encoded, name=str(path))
        header = image_header(encoded, name=str(path))
    except UnreadableImage as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)
    assert isinstance(picture, Image.Image)  # of the decoder pil
    return Seen(header, hashlib.sha256(encoded).digest(), difference_hash(picture))


def difference_hash(picture: Image.Image) -> int:
    """64 bits: is a pixel of the grey picture at 9 x 8 brighter than the one to its left? (dHash, N. Krawetz 2013, hackerfactor.com.) The
    hash of a picture of one colour is 0."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def look_alikes(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """(position in `first`, position in `second`) of hashes that differ in few bits; hashes without structure (few bits set) are not compared."""
    wanted = np.array(second, dtype=np.uint64)
    structured = (np.bitwise_count(wanted) > 8) & (np.bitwise_count(wanted) < 56)
    pairs = []
    for index, value in enumerate(first):
        near = np.flatnonzero(structured & (np.bitwise_count(wanted ^ np.uint64(value)) <= LOOK_ALIKE_BITS))
        pairs += [(index, int(place)) for place in near]
    return pairs


def check_strays(checks: Sequence[FileCheck]) -> None:
    """Notes pictures beside the listed ones that no file of the data set lists."""
    listed = {
        check.folder / check.content["images"][index]["file_name"]
        for check in checks
        for index in check.image_of.values()
    }
    for folder in dict.fromkeys(check.folder for check in checks):
        inside = sorted({path.parent for path in listed if path.is_relative_to(folder)} | {folder})
        strays = [
            path.name
            for parent in inside
            if parent.is_dir()
            for path in sorted(parent.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and path not in listed and not is_hidden(path.name)
        ]
        if strays:
            owner = next(check for check in checks if check.folder == folder)
            text = f"{count(len(strays), 'picture')} in {folder} without annotations ({some(strays)}): not read"
            owner.add("note", f"{text}; they can serve as unlabeled ones, but for those you evaluate on")


def _check_unreadable(check: FileCheck, reasons: dict[int, str], total: int) -> None:
    if not reasons:
        return
    rows = check.content["images"]
    reason = next(iter(reasons.values()))
    # shared/training/quarantine.py: more than one and more than 1 % end a training run; evaluation stands none.
    ends = check.name == "val" or (len(reasons) > 1 and len(reasons) > 0.01 * total)
    then = ("evaluation" if check.name == "val" else "training") + " stops" if ends else "training leaves them out"
    check.add(
        "fault" if ends else "warning",
        f"{count(len(reasons), 'picture')} of {total:,} cannot be read ({some([rows[i]['file_name'] for i in reasons])}; {reason}): {then}",
        "leaves them out",
    )
    check.repair.drop_images |= dict.fromkeys(reasons, "not readable")


def _check_sizes(check: FileCheck, seen: dict[int, Seen]) -> None:
    """Whether the images have the sizes that the file says, upright or as stored, and which of the two it means."""
    rows = check.content["images"]
    sizes_I2 = check.rows.sizes_I2
    sized = {index: look for index, look in seen.items() if np.isfinite(sizes_I2[index]).all()}
    fits = {index: fit_of(look.header, *map(int, sizes_I2[index])) for index, look in sized.items()}
    orientation = orientation_of(fits.values(), check.stated)
    for index in seen.keys() - sized.keys():  # the file does not say
        header = seen[index].header
        high, wide = (
            header.upright_size if is_upright("both", orientation.convention) else (header.height, header.width)
        )
        check.repair.image_values.setdefault(index, {}).update(width=wide, height=high)
    wrong = [index for index, fit in fits.items() if fit == "neither"]
    if wrong:
        row, (high, wide) = rows[wrong[0]], seen[wrong[0]].header.upright_size
        check.add(
            "fault",
            f"{count(len(wrong), 'picture')} not of the size that the file says ({row['file_name']} is {wide} x {high}, not "
            f"{row['width']} x {row['height']}): training stops",
            "leaves them out: nobody knows which size the boxes are for",
        )
        check.repair.drop_images |= dict.fromkeys(wrong, "not of the size that the file says")
    check.statistics["orientation"] = orientation.record()
    if check.repair.orientation:  # the file says it in a word that is none
        check.repair.orientation = orientation.convention
    if text := orientation.describe():
        doubtful = orientation.contradictory or orientation.guessed
        check.add("warning" if doubtful else "note", f"{text}{': look at some' if doubtful else ''}")
        check.repair.orientation = orientation.convention  # the images that show it may be left out


def _check_copies(check: FileCheck, seen: dict[int, Seen]) -> None:
    rows = check.content["images"]
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, look in seen.items():
        groups[look.digest].append(index)
    names = {index: rows[index]["file_name"] for index in seen}
    copies = [group for group in groups.values() if len({names[index] for index in group}) > 1]
    check.statistics["together"] += [[check.rows.image_ids[index] for index in group] for group in copies]
    if copies:
        pairs = some([" = ".join(names[index] for index in group[:3]) for group in copies], 2)
        check.add(
            "warning",
            f"{count(len(copies), 'picture')} there more than once under other names ({pairs}): seen more often than others",
        )
