"""Checks of the images of a COCO file: unreadable files, sizes that differ from the annotations, duplicates and near-duplicates."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ssld.shared.files import IMAGE_SUFFIXES, is_hidden
from ssld.shared.images import ImageHeader, UnreadableImage, image_header, open_image
from ssld.shared.machine import cores
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.check.annotations import FileCheck
from ssld.stage2_detect.data.image_names import fitting_files, hint, missing_names
from ssld.stage2_detect.data.orientation import fit_of, is_upright, orientation_of

NEAR_DUPLICATE_BITS = 3
"""largest number of differing bits, of 64, between the hashes of near-duplicates"""
MANY_FRAMES = 0.1
"""share of images that resemble the one before them by name, above which they are probably frames of a video"""


@dataclass(frozen=True)
class ImageFacts:
    """Facts about one image file, from reading it once."""

    header: ImageHeader
    digest: bytes
    """SHA-256 of the file's content"""
    hash: int
    """difference hash of 64 bits"""


def check_images(check: FileCheck, *, quick: bool = False) -> dict[int, ImageFacts]:
    """Read and check all images of a file, or with `quick` only whether the files exist; returns {position of the image: facts}."""
    names = {index: check.content["images"][index]["file_name"] for index in check.image_of.values()}
    missing, fitting = _check_missing(check, names)
    present = {
        index: fitting.get(index, name) for index, name in names.items() if index in fitting or index not in missing
    }
    if quick:
        return {}
    with ThreadPoolExecutor(cores()) as pool:
        results = dict(
            zip(present, pool.map(read_facts, (check.folder / name for name in present.values())), strict=True)
        )
    facts = {index: one for index, one in results.items() if isinstance(one, ImageFacts)}
    _check_unreadable(check, {index: one for index, one in results.items() if isinstance(one, str)}, len(present))
    _check_sizes(check, facts)
    _check_copies(check, facts)
    return facts


def _check_missing(check: FileCheck, names: dict[int, str]) -> tuple[set[int], dict[int, str]]:
    """Report missing images; returns their positions, and the files that are meant by those whose name is another form of a file's."""
    listed = list(names)
    positions = missing_names(check.folder, names.values())
    missing = [listed[one] for one in positions]
    if not missing:
        return set(), {}
    texts = [names[index] for index in missing]
    question = hint(check.folder, texts)
    fitting = {listed[one]: file for one, file in fitting_files(check.folder, list(names.values()), positions).items()}
    left = [index for index in missing if index not in fitting]
    if fitting:
        fix: str | None = "writes the names of the files" + (
            f", removes {count(len(left), 'image')} without one" if left else ""
        )
    else:
        fix = None if question or len(missing) == len(names) else "removes them"
    if len(missing) == len(names):
        text = f"none of its {count(len(names), 'image')} is in {check.folder} ({some(texts)}){question or ': is that their folder?'}"
    else:
        text = f"{count(len(missing), 'image')} of {len(names):,} not in {check.folder} ({some(texts)}): training stops{question}"
    check.add("fault", text, fix)
    for index, file in fitting.items():
        check.repair.image_values.setdefault(index, {})["file_name"] = file
    if fix:
        check.repair.drop_images |= dict.fromkeys(left, "not in the folder")
    return set(missing), fitting


def read_facts(path: Path) -> ImageFacts | str:
    """Read an image; returns its facts, or the reason why it cannot be read."""
    try:
        encoded = path.read_bytes()
        image = open_image(encoded, name=str(path))
        header = image_header(encoded, name=str(path))
    except UnreadableImage as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)
    assert isinstance(image, Image.Image)  # of the decoder pil
    return ImageFacts(header, hashlib.sha256(encoded).digest(), difference_hash(image))


def difference_hash(image: Image.Image) -> int:
    """Return the dHash of an image, 64 bits: each pixel of the grey image at 9 x 8 is compared with the one to its left.

    The hash of an image of one color is 0. Source: N. Krawetz 2013, hackerfactor.com.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_duplicates(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Return (position in `first`, position in `second`) of hashes that differ in at most `NEAR_DUPLICATE_BITS` bits.

    Hashes without structure (nearly all bits equal) are not compared.
    """
    hashes = np.array(second, dtype=np.uint64)
    structured = (np.bitwise_count(hashes) > 8) & (np.bitwise_count(hashes) < 56)
    pairs = []
    for index, value in enumerate(first):
        near = np.flatnonzero(structured & (np.bitwise_count(hashes ^ np.uint64(value)) <= NEAR_DUPLICATE_BITS))
        pairs += [(index, int(position)) for position in near]
    return pairs


def check_frames(check: FileCheck, facts: dict[int, ImageFacts]) -> None:
    """Warn of a random split if many images resemble the one before them by name, as frames of a video do: both sides would have the same scenes."""
    names = {index: str(check.content["images"][index]["file_name"]) for index in facts}
    order = sorted(facts, key=names.__getitem__)
    alike = [
        (one, other)
        for one, other in pairwise(order)
        if facts[one].digest != facts[other].digest and near_duplicates([facts[one].hash], [facts[other].hash])
    ]
    if len(alike) > max(1, MANY_FRAMES * len(order)):
        example = " ~ ".join(names[index] for index in alike[0])
        check.add(
            "warning",
            f"{len(alike):,} of its {count(len(order), 'image')} resemble the one before them ({example}): frames of videos? A random split "
            "has neighbors on both sides, so that scores are too good; split by video, into two files",
        )


def check_unlisted(checks: Sequence[FileCheck]) -> None:
    """Note images in the folders of a data set that none of its files lists."""
    listed = {
        check.folder
        / (check.repair.image_values.get(index, {}).get("file_name") or check.content["images"][index]["file_name"])
        for check in checks
        for index in check.image_of.values()
    }
    for folder in dict.fromkeys(check.folder for check in checks):
        inside = sorted({path.parent for path in listed if path.is_relative_to(folder)} | {folder})
        unlisted = [
            path.name
            for parent in inside
            if parent.is_dir()
            for path in sorted(parent.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and path not in listed and not is_hidden(path.name)
        ]
        if unlisted:
            owner = next(check for check in checks if check.folder == folder)
            text = f"{count(len(unlisted), 'image')} in {folder} without annotations ({some(unlisted)}): not read"
            owner.add("note", f"{text}; usable as unlabeled images, except those you evaluate on")


def _check_unreadable(check: FileCheck, reasons: dict[int, str], total: int) -> None:
    if not reasons:
        return
    rows = check.content["images"]
    reason = next(iter(reasons.values()))
    # shared/training/quarantine.py: more than one and more than 1 % stop a training run; a single one stops evaluation.
    ends = check.name == "val" or (len(reasons) > 1 and len(reasons) > 0.01 * total)
    effect = ("evaluation" if check.name == "val" else "training") + " stops" if ends else "training skips them"
    check.add(
        "fault" if ends else "warning",
        f"{count(len(reasons), 'image')} of {total:,} cannot be read ({some([rows[i]['file_name'] for i in reasons])}; {reason}): {effect}",
        "removes them",
    )
    check.repair.drop_images |= dict.fromkeys(reasons, "not readable")


def _check_sizes(check: FileCheck, facts: dict[int, ImageFacts]) -> None:
    """Compare image sizes, upright and as stored, with those in the file, and decide which of the two the file refers to."""
    rows = check.content["images"]
    sizes_I2 = check.rows.sizes_I2
    sized = {index: one for index, one in facts.items() if np.isfinite(sizes_I2[index]).all()}
    fits = {index: fit_of(one.header, *map(int, sizes_I2[index])) for index, one in sized.items()}
    orientation = orientation_of(fits.values(), check.stated)
    for index in facts.keys() - sized.keys():  # no size in the file
        header = facts[index].header
        high, wide = (
            header.upright_size if is_upright("both", orientation.convention) else (header.height, header.width)
        )
        check.repair.image_values.setdefault(index, {}).update(width=wide, height=high)
    wrong = [index for index, fit in fits.items() if fit == "neither"]
    if wrong:
        row, (high, wide) = rows[wrong[0]], facts[wrong[0]].header.upright_size
        check.add(
            "fault",
            f"{count(len(wrong), 'image')} of another size than in the file ({row['file_name']} is {wide} x {high}, not "
            f"{row['width']} x {row['height']}): training stops",
            "removes them: the size that the boxes refer to is unknown",
        )
        check.repair.drop_images |= dict.fromkeys(wrong, "of another size than in the file")
    check.statistics["orientation"] = orientation.record()
    if check.repair.orientation:  # the file states an invalid one
        check.repair.orientation = orientation.convention
    if text := orientation.describe():
        doubtful = orientation.contradictory or orientation.guessed
        check.add("warning" if doubtful else "note", f"{text}{': look at some' if doubtful else ''}")
        check.repair.orientation = orientation.convention  # the copy may lack the images that decided it


def _check_copies(check: FileCheck, facts: dict[int, ImageFacts]) -> None:
    """Report image files with equal content."""
    rows = check.content["images"]
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, one in facts.items():
        groups[one.digest].append(index)
    names = {index: rows[index]["file_name"] for index in facts}
    copies = [group for group in groups.values() if len({names[index] for index in group}) > 1]
    check.statistics["together"] += [[check.rows.image_ids[index] for index in group] for group in copies]
    if copies:
        pairs = some([" = ".join(names[index] for index in group[:3]) for group in copies], 2)
        check.add(
            "warning",
            f"{count(len(copies), 'image')} stored more than once under other names ({pairs}): trained on more often than others",
        )
