"""Several COCO files as one: classes unified by name, ids renumbered, file names relative to the folder that holds all images.

A class that a file lacks has no objects in its images, which training takes for images without them: the log names it. Names that differ in spelling
alone are an error, since one of them would be a class of its own.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.coco_json import CocoTable, Convention, read_table, with_orientation
from ssld.stage2_detect.data.coco_rows import plain_name
from ssld.stage2_detect.data.image_names import missing_names
from ssld.stage2_detect.data.orientation import Orientation, find_orientation

Pairs = Sequence[tuple[Path, Path]]


def common_folder(pairs: Pairs) -> Path:
    """Return the deepest folder that holds the image folders of all files."""
    return Path(os.path.commonpath([os.path.abspath(images) for _, images in pairs]))


def merge_files(pairs: Pairs) -> tuple[dict[str, Any], list[str]]:
    """Merge (COCO file, image folder) pairs; returns (content of a COCO file, lines for the log).

    Image and annotation ids are 1, 2, ... in the order of the files; file names are relative to `common_folder`.

    Raises:
        UserError: a fault of a file, a missing image, class names that differ in spelling alone, or files whose boxes refer to different
            orientations of their images.
    """
    tables = [read_table(str(file), segmentations=True) for file, _ in pairs]
    names = _class_names([file for file, _ in pairs], tables)
    folder = common_folder(pairs)
    number = {name: index for index, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    sizes = [f"{file} ({count(len(table.image_ids), 'image')})" for (file, _), table in zip(pairs, tables, strict=True)]
    notes = [f"{len(pairs)} files are read as one: {', '.join(sizes)}"]
    orientations: dict[Path, Orientation] = {}
    for (file, image_folder), table in zip(pairs, tables, strict=True):
        orientations[file] = _orientation(file, image_folder, table)
        first = len(images) + 1
        for name, width, height in zip(
            table.file_names, table.widths_I.tolist(), table.heights_I.tolist(), strict=True
        ):
            path = Path(os.path.relpath(os.path.join(os.path.abspath(image_folder), name), folder)).as_posix()
            images.append({"id": len(images) + 1, "file_name": path, "width": width, "height": height})
        assert table.segmentations is not None
        columns = (table.owners_N, table.labels_N, table.boxes_N4, table.areas_N, table.crowd_N)
        for owner, label, box, area, crowd, shape in zip(
            *(column.tolist() for column in columns), table.segmentations, strict=True
        ):
            row = {
                "id": len(annotations) + 1,
                "image_id": first + owner,
                "category_id": number[table.class_names[label]],
            }
            row |= {"bbox": box, "area": area, "iscrowd": int(crowd)}
            annotations.append(row if shape is None else row | {"segmentation": shape})
        lacking = [name for name in names if name not in table.class_names]
        if lacking:
            notes.append(f"{file}: has no class {some(lacking, 8)}: its images count as images without them")
        changes = Tally()
        for noun, cause, times, example in table.changes:
            changes.change(noun, cause, example, times)
        if line := changes.describe():
            notes.append(f"{file}: {line}")
    categories = [{"id": index, "name": name} for name, index in number.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    convention = _convention(orientations)
    return with_orientation(content, convention) if convention else content, notes


def write_merged(pairs: Pairs, file: Path) -> list[str]:
    """Write the content of `merge_files`; returns the lines for the log."""
    content, notes = merge_files(pairs)
    file.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return notes


def _class_names(files: Sequence[Path], tables: Sequence[CocoTable]) -> list[str]:
    """Return the classes of all files, in the order of their first appearance."""
    spelled: dict[str, dict[str, Path]] = defaultdict(dict)
    for file, table in zip(files, tables, strict=True):
        for name in table.class_names:
            spelled[plain_name(name)].setdefault(name, file)
    for known in spelled.values():
        (one, first), *others = known.items()
        # One file may have both names: then they are two classes.
        apart = [(other, file) for other, file in others if file != first]
        if apart:
            other, file = apart[0]
            raise UserError(f"{file}: its class {other!r} is spelled {one!r} in {first}; give both the same name")
    return list(dict.fromkeys(name for table in tables for name in table.class_names))


def _orientation(file: Path, folder: Path, table: CocoTable) -> Orientation:
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist")
    if missing := missing_names(str(folder), table.file_names):
        first = os.path.join(folder, table.file_names[missing[0]])
        raise UserError(
            f"{len(missing)} of the {len(table.file_names)} images of {file} are missing; the first is {first}"
        )
    paths = [os.path.join(folder, name) for name in table.file_names]
    return find_orientation(str(file), paths, table.widths_I, table.heights_I, stated=table.orientation)


def _convention(orientations: dict[Path, Orientation]) -> Convention | None:
    """Return the convention of all files that show or state one, None where EXIF rotates no image. Raises UserError where they differ."""
    shown = {file: one for file, one in orientations.items() if one.stated or one.upright or one.stored or one.both}
    conventions = {one.convention: file for file, one in shown.items()}
    if len(conventions) > 1 and any(one.both for one in shown.values()):
        raise UserError(
            f"{conventions['upright']} and {conventions['stored']}: the boxes of one refer to upright images, those of the other to images as "
            "stored, and some images have the same size in both forms; turn the images of one file"
        )
    return next(iter(conventions), None)
