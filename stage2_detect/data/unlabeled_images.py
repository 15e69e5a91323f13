"""Unlabeled images of a training run, from folders, patterns, lists and COCO JSON files; images that the run has labels of are left out.

Names and headers are read here, and the content of files that are as large as one with labels: copies under other names are left out too. A COCO
file's annotations are not read, except pseudo-labels.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.files import VIDEO_SUFFIXES, copies, read_text, require_images
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.data.coco import CocoImage, read_coco, require_boxes, require_masks
from ssld.stage2_detect.data.image_files import ImageFiles, find_images, records_of
from ssld.stage2_detect.data.image_names import hint, missing_names

_TOO_MANY = 0.01
_LABELED, _EVALUATED, _TWICE = "labeled", "evaluated on", "given twice"
_COPIES = {_LABELED: "copies of labeled images", _EVALUATED: "copies of evaluation images"}


@dataclass(frozen=True)
class UnlabeledImages:
    """Unlabeled images of a run.

    Attributes:
        setting: name of the setting that names them.
        sources: where they come from.
        records: one per image, without objects or with pseudo-boxes.
        lines: lines for the log.
        tally: counts of images that are used, left out and unreadable.
        unreadable: names of images that cannot be read.
    """

    setting: str
    sources: str
    records: list[CocoImage]
    lines: list[str]
    tally: Tally
    unreadable: list[str]


class LabeledImages:
    """Lookup of the images that a run is trained or evaluated on with labels, by path and by content."""

    def __init__(self, labeled: Sequence[CocoImage], evaluated: Sequence[CocoImage]) -> None:
        self._parts = {
            _EVALUATED: [Path(record.path) for record in evaluated],
            _LABELED: [Path(record.path) for record in labeled],
        }
        self._real = real_paths()
        self._known = {self._real(str(path)): cause for cause, paths in self._parts.items() for path in paths}

    def leave_out(self, files: ImageFiles, tally: Tally) -> list[str]:
        """Return the names of the other files, each file once over all calls; `tally` counts those that are left out, by cause."""
        real = {name: self._real(os.path.join(files.folder, name)) for name in files.names}
        new = [Path(path) for path in real.values() if path not in self._known]
        same = {cause: copies(new, paths) for cause, paths in self._parts.items()}
        names = []
        for name, path in real.items():
            copied = (_COPIES[cause] for cause, paths in same.items() if Path(path) in paths)
            if cause := self._known.get(path) or next(copied, None):
                tally.skip("image", cause, name)
            else:
                self._known[path] = _TWICE
                names.append(name)
        return names


def unlabeled_images(
    setting: str,
    sources: Sequence[Path],
    known: LabeledImages,
    *,
    images: Path | None = None,
    images_setting: str | None = None,
) -> UnlabeledImages:
    """List unlabeled images, by source and sorted path; without those that the run has labels of and without copies of these files.

    Args:
        setting: name of the setting that has the sources, for messages.
        sources: folders, patterns, text files, COCO JSON files.
        known: the images with labels.
        images: folder that the file names in COCO JSON files are relative to; None: the folder of the file.
        images_setting: name of the setting that has `images`, for messages; None: there is none.

    Raises:
        UserError: a source without images, files that are missing, more than one image and more than 1 % that cannot be read, or no image left.
    """
    tally = Tally()
    found: list[tuple[ImageFiles, list[str]]] = []
    notes: list[str] = []
    for number, source in enumerate(sources):
        try:
            files, note = files_of(source, images, images_setting)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None
        notes += [note] if note else []
        names = known.leave_out(files, tally)
        found.append((ImageFiles(files.folder, names), [_id(number, name) for name in names]))
    places = ", ".join(map(str, sources))
    total = sum(len(files.names) for files, _ in found)
    _require_some(setting, places, total, tally)
    records: list[CocoImage] = []
    unreadable: list[str] = []
    for files, ids in found:
        some, bad = records_of(files, ids)
        records, unreadable = records + some, unreadable + bad
    check_unreadable(setting, places, total, unreadable)
    tally.keep("image", len(records))
    for name in unreadable:
        tally.drop("image", "unreadable", name)
    line = f"{count(len(records), 'unlabeled image')} of {places}"
    return UnlabeledImages(setting, places, records, [line, *notes], tally, unreadable)


def pseudo_labeled_images(
    file: Path,
    folder: Path,
    class_names: Sequence[str],
    known: LabeledImages,
    *,
    segmentations: bool,
    cache_annotations: bool,
    allow_loss: bool = False,
) -> UnlabeledImages:
    """Return the images of `folder` that have boxes in a COCO file, with these boxes; without those that the run has labels of.

    Raises UserError for an empty folder, for a file with other images or classes or without boxes, if no image is left, and for the faults of
    `read_coco`, `require_boxes` and, with `segmentations`, `require_masks`.
    """
    setting = "unlabeled"
    try:
        total = len(require_images(folder))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    try:
        data = read_coco(
            file,
            folder,
            training=True,
            keep_empty=False,
            segmentations=segmentations,
            class_names=class_names,
            cache_annotations=cache_annotations,
        )
        require_boxes(data, allow_loss=allow_loss)
        if segmentations:
            require_masks(data)
    except UserError as error:
        raise UserError(f"pseudo: {error}") from None
    by_name = {os.path.relpath(one.path, folder): one for one in data.images}
    tally = Tally()
    names = known.leave_out(ImageFiles(str(folder), list(by_name)), tally)
    _require_some(setting, str(folder), len(names), tally)
    tally.keep("image", len(names))
    records = [replace(by_name[name], image_id=_id(0, name)) for name in names]
    boxes = sum(len(one.labels_N) for one in records)
    line = f"{file}: {count(boxes, 'pseudo-box')} in {len(records)} of the {total} images in {folder}"
    return UnlabeledImages(setting, str(folder), records, [line], tally, [])


def _id(source: int, name: str) -> str:
    """Return the id of an unlabeled image. Random draws depend on it: equal with and without pseudo-boxes, different from those of labeled images."""
    return f"unlabeled/{source}/{name}"


def _require_some(setting: str, sources: str, images: int, tally: Tally) -> None:
    if not images:
        raise UserError(f"{setting}: {sources}: no unlabeled image is left: {tally.describe()}; give other images")


def check_unreadable(key: str, sources: str, total: int, unreadable: Sequence[str]) -> None:
    """Raise UserError if none of `total` images can be read, or if more than one and more than 1 % cannot."""
    if len(unreadable) == total == 1:
        raise UserError(f"{key}: {sources}: its only image, {unreadable[0]}, cannot be read")
    if len(unreadable) > max(1, _TOO_MANY * total):
        raise UserError(
            f"{key}: {len(unreadable)} of the {total} images in {sources} cannot be read (first: {unreadable[0]}); fix or remove them"
        )


def files_of(source: Path, images: Path | None, images_setting: str | None) -> tuple[ImageFiles, str]:
    """Return (the images of one source, a line for the log or "").

    Args:
        source: a folder, searched recursively; an image; a pattern; a text file with one path per line; a COCO JSON file.
        images: folder that the file names in a COCO JSON file are relative to; None: the folder of that file.

    Raises:
        UserError: nothing of this kind, no image in it, a file that is missing, or a video.
    """
    if source.suffix.lower() == ".json" and source.is_file():
        return _coco_files(source, images, images_setting)
    files = ImageFiles(str(source), require_images(source)) if source.is_dir() else find_images(str(source))
    videos = [name for name in files.names if name.lower().endswith(VIDEO_SUFFIXES)]
    if videos:
        raise UserError(f"{source}: {count(len(videos), 'video')} in it (first: {videos[0]}); give images")
    return files, ""


def _coco_files(file: Path, images: Path | None, images_setting: str | None) -> tuple[ImageFiles, str]:
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
        other = f"give their folder as {images_setting}" if images_setting else "give a text file with their paths"
        advice = "" if images else f"; {other}"
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {file} are missing; the first is "
            f"{printable(os.path.join(folder, names[missing[0]]))}{hint(folder, [names[index] for index in missing]) or advice}"
        )
    annotations = content.get("annotations")
    note = f"{file}: its {count(len(annotations), 'annotation')} are not read" if annotations else ""
    return ImageFiles(str(folder), names), note


def real_paths() -> Callable[[str], str]:
    """Return a function from paths to paths without links of folders, which resolves each folder once."""
    folders: dict[str, str] = {}

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    return real
