"""Unlabeled images for a moving teacher, from folders, patterns, lists and COCO JSON files; images that the run has labels of are left out.

Names and headers are read here, and the content of files that are as large as one with labels: copies under other names are left out too. A COCO
file's annotations are not read.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.files import VIDEO_SUFFIXES, copies, read_text, require_images
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.data.coco import CocoImage
from ssld.stage2_detect.data.image_files import ImageFiles, find_images, records_of
from ssld.stage2_detect.data.image_names import hint, missing_names
from ssld.stage2_detect.distill_config import MovingTeacherConfig

_TOO_MANY = 0.01
_LABELED, _EVALUATED, _TWICE = "labeled", "evaluated on", "given twice"
_COPIES = {_LABELED: "copies of labeled images", _EVALUATED: "copies of evaluation images"}


@dataclass(frozen=True)
class UnlabeledImages:
    """Unlabeled images of a run.

    Attributes:
        records: one per image, without objects.
        unreadable: names of images that cannot be read.
        sources: where they come from.
        lines: lines for the log.
        tally: counts of images that are used, left out and unreadable.
    """

    records: list[CocoImage]
    unreadable: list[str]
    sources: str
    lines: list[str]
    tally: Tally


def unlabeled_images(
    config: MovingTeacherConfig, labeled: Sequence[CocoImage], evaluated: Sequence[CocoImage]
) -> UnlabeledImages:
    """List the unlabeled images that settings name, by source and sorted path; without those of `labeled` and `evaluated` and without copies of these
    files.

    Raises UserError for a source without images, for files that are missing, if more than one image and more than 1 % cannot be read, and if no
    image is left.
    """
    key = "moving_teacher.unlabeled"
    real, tally = _real_paths(), Tally()
    parts = {
        _EVALUATED: [Path(record.path) for record in evaluated],
        _LABELED: [Path(record.path) for record in labeled],
    }
    known = {real(str(path)): cause for cause, paths in parts.items() for path in paths}
    found: list[tuple[ImageFiles, list[str]]] = []
    notes: list[str] = []
    for number, source in enumerate(config.sources):
        try:
            files, note = files_of(source, config.images)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        notes += [note] if note else []
        names = []
        new = {name: path for name in files.names if (path := real(os.path.join(files.folder, name))) not in known}
        same = {cause: copies(map(Path, new.values()), paths) for cause, paths in parts.items()}
        for name in files.names:
            path = real(os.path.join(files.folder, name))
            copied = (_COPIES[cause] for cause, paths in same.items() if Path(path) in paths)
            if cause := known.get(path) or next(copied, None):
                tally.skip("image", cause, name)
            else:
                known[path] = _TWICE
                names.append(name)
        # Random draws depend on the image id: different from those of labeled images.
        ids = [f"unlabeled/{number}/{name}" for name in names]
        found.append((ImageFiles(files.folder, names), ids))
    sources = ", ".join(map(str, config.sources))
    total = sum(len(files.names) for files, _ in found)
    if not total:
        raise UserError(f"{key}: {sources}: no unlabeled image is left: {tally.describe()}; give other images")
    records: list[CocoImage] = []
    unreadable: list[str] = []
    for files, ids in found:
        some, bad = records_of(files, ids)
        records, unreadable = records + some, unreadable + bad
    check_unreadable(key, sources, total, unreadable)
    tally.keep("image", len(records))
    for name in unreadable:
        tally.drop("image", "unreadable", name)
    line = f"{count(len(records), 'unlabeled image')} of {sources}"
    return UnlabeledImages(records, unreadable, sources, [line, *notes], tally)


def check_unreadable(key: str, sources: str, total: int, unreadable: Sequence[str]) -> None:
    """Raise UserError if none of `total` images can be read, or if more than one and more than 1 % cannot."""
    if len(unreadable) == total == 1:
        raise UserError(f"{key}: {sources}: its only image, {unreadable[0]}, cannot be read")
    if len(unreadable) > max(1, _TOO_MANY * total):
        raise UserError(
            f"{key}: {len(unreadable)} of the {total} images in {sources} cannot be read (first: {unreadable[0]}); fix or remove them"
        )


def files_of(source: Path, images: Path | None) -> tuple[ImageFiles, str]:
    """Return (the images of one source, a line for the log or "").

    Args:
        source: a folder, searched recursively; an image; a pattern; a text file with one path per line; a COCO JSON file.
        images: folder that the file names in a COCO JSON file are relative to; None: the folder of that file.

    Raises:
        UserError: nothing of this kind, no image in it, a file that is missing, or a video.
    """
    if source.suffix.lower() == ".json" and source.is_file():
        return _coco_files(source, images)
    files = ImageFiles(str(source), require_images(source)) if source.is_dir() else find_images(str(source))
    videos = [name for name in files.names if name.lower().endswith(VIDEO_SUFFIXES)]
    if videos:
        raise UserError(f"{source}: {count(len(videos), 'video')} in it (first: {videos[0]}); give images")
    return files, ""


def _coco_files(file: Path, images: Path | None) -> tuple[ImageFiles, str]:
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
        advice = "" if images else "; give their folder as moving_teacher.images"
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {file} are missing; the first is "
            f"{printable(os.path.join(folder, names[missing[0]]))}{hint(folder, [names[index] for index in missing]) or advice}"
        )
    annotations = content.get("annotations")
    note = f"{file}: its {count(len(annotations), 'annotation')} are not read" if annotations else ""
    return ImageFiles(str(folder), names), note


def _real_paths() -> Callable[[str], str]:
    """Return a function from paths to paths without links of folders, which resolves each folder once."""
    folders: dict[str, str] = {}

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    return real
