"""Reader of Hugging Face's image folders with boxes: images, and a metadata file with a row for each.

Layout: https://huggingface.co/docs/datasets/image_dataset. `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, in the folder or below it, has
`file_name`, relative to the metadata file, and `objects` as in `hub_objects.py`; in a table as JSON or as Python writes it. An image belongs to the
split whose name a folder above it has; without such folders all images are of the split `train`. Images without a row, or with a row without
`objects`, are not labeled yet: they are counted and not read; empty lists say that there is nothing to find.
"""

import ast
import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, list_files, read_text
from ssld.shared.images import UnreadableImage
from ssld.shared.tally import Tally
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.convert.hub_objects import (
    NO_OBJECTS,
    BoxFormat,
    Keys,
    is_labeled,
    keys_of,
    objects_of,
    read_object,
    side_of,
)
from ssld.stage2_detect.data.convert.records import (
    SourceData,
    SourceImage,
    check_class_names,
    check_splits,
    drop_image,
    read_class_list,
    size_of,
    unread_kind,
)
from ssld.stage2_detect.layouts.coco import TEST, TRAIN, VAL
from ssld.stage2_detect.layouts.others import IMAGE_FOLDER_FILES

_SPLITS = (*TRAIN, *VAL, *TEST)
_LONGEST_CELL = 1 << 30  # characters; the objects of one image with polygons pass the 131,072 of Python's default
NO_ROW = "without a row in the metadata"


class _Row(NamedTuple):
    """One row of a metadata file."""

    place: str
    """file and line or row, for messages"""
    values: dict[str, Any]


def is_imagefolder(path: Path) -> bool:
    """Whether a path is a folder with a metadata file in or below it, and without Parquet files of images."""
    if not path.is_dir():
        return False
    files = _metadata_files(path)
    return bool(files) and all(path / name in files for name in list_files(path, (".parquet",)))


def imagefolder_splits(path: Path) -> list[str]:
    """Return the names of the splits, in the order of their rows. Raises UserError for any fault of the metadata."""
    return list(_rows_by_split(path.resolve()))


def read_imagefolder(path: Path, *, classes: Path | None, splits: Sequence[str], box_format: BoxFormat) -> SourceData:
    """Read a data set from a folder. Classes are those of `classes`, else the names that occur, sorted.

    Raises UserError, naming file and line, for any fault of the data.
    """
    root = path.resolve()
    all_rows = _rows_by_split(root)
    check_splits(splits, all_rows, path)
    rows = {split: all_rows[split] for split in splits or all_rows}
    found = {image: (row.place, _objects(row)) for of_split in rows.values() for image, row in of_split.items()}
    objects = {
        image: (place, objects_of(several, place)) for image, (place, several) in found.items() if is_labeled(several)
    }
    keys = {
        image: keys_of(list(dict.fromkeys(key for one in several for key in one)), place)
        for image, (place, several) in objects.items()
        if several
    }
    names = read_class_list(classes) if classes else _names(objects, keys, path)
    label_of = {name: label for label, name in enumerate(names)}
    named: dict[Any, str] = dict(enumerate(names))
    data = SourceData("Hugging Face image folder", names, hint="are its numbers another box_format?")
    unlisted: dict[str, list[Path]] = {}
    for name in list_files(root, IMAGE_SUFFIXES):
        split = _split_of(root / name, root, list(all_rows))
        if root / name not in all_rows.get(split, {}):
            unlisted.setdefault(split, []).append(root / name)
    if outside := unlisted.get(""):
        data.notes.append(f"{count(len(outside), 'image')} in no folder of a split, not read (first: {outside[0]})")
    for split, of_split in rows.items():
        tally = data.tallies[split] = Tally()
        data.splits[split] = images = []
        for image, row in of_split.items():
            if image not in objects:
                tally.skip("image", NO_OBJECTS, row.place)
                continue
            place, several = objects[image]
            kind = unread_kind(image)
            try:
                size = None if kind else size_of(image, _stated(row), row.place)
            except UnreadableImage:
                size = None
            if size is None:
                categories = [one.get(keys[image].category) for one in several]
                drop_image(tally, image, kind, [str(named.get(one, one)) for one in categories])
                continue
            read = [
                read_object(one, keys[image], f"{place}, object {number}", label_of, box_format, size)
                for number, one in enumerate(several, 1)
            ]
            images.append(SourceImage(image, *size, read, unsized=_stated(row) is None))
        for image in unlisted.get(split, []):
            tally.skip("image", NO_ROW, image)
        files = dict.fromkeys(row.place.rpartition(", ")[0] for row in of_split.values())
        data.searched[split] = f"in {count(len(files), 'metadata file')}, the first {next(iter(files))}"
    return data


def _metadata_files(folder: Path) -> list[Path]:
    names = list_files(folder, IMAGE_FOLDER_FILES)
    return [folder / name for name in names if name.rpartition("/")[2].lower() in IMAGE_FOLDER_FILES]


def _rows_by_split(root: Path) -> dict[str, dict[Path, _Row]]:
    """Return the row of each image, by split. Raises UserError for images that are missing or listed twice, and for some outside of the splits."""
    files = _metadata_files(root)
    for one, other in itertools.pairwise(files):
        if one.parent == other.parent:
            raise UserError(f"{one.parent}: holds {one.name} and {other.name}; remove one of them")
    rows: dict[str, dict[Path, _Row]] = {}
    owner: dict[Path, _Row] = {}
    for file in files:
        for row in _rows(file):
            name = row.values.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{row.place}: has no file_name (it has {', '.join(map(str, row.values))})")
            image = Path(os.path.normpath(file.parent / name.strip().replace("\\", "/")))
            if not image.is_file():
                raise UserError(f"{row.place}: file_name: there is no image {image}")
            if image in owner:
                raise UserError(
                    f"{row.place}: {name} has a row already ({owner[image].place}); write one row with all of its objects"
                )
            owner[image] = row
            rows.setdefault(_split_of(image, root, _SPLITS), {})[image] = row
    if "" in rows and len(rows) > 1:
        others = some(sorted(split for split in rows if split))
        raise UserError(
            f"{next(iter(rows['']))}: is beside {others}, which look like splits; move it into one of these"
        )
    if not rows:
        raise UserError(f"{files[0]}: has no row")
    if not any("objects" in row.values for row in owner.values()):
        first = next(iter(owner.values()))
        raise UserError(
            f"{first.place}: has no column objects with bbox and category (it has {', '.join(map(str, first.values))}); a detector needs boxes"
        )
    return {split or "train": of_split for split, of_split in rows.items()}


def _split_of(image: Path, root: Path, splits: Sequence[str]) -> str:
    """Return the first folder between `root` and an image that has the name of a split; the only split if it is train, and an image has none."""
    above = image.relative_to(root).parts[:-1] if image.is_relative_to(root) else ()
    alone = splits[0] if list(splits) == ["train"] else ""
    return next((part for part in above if part in splits or part.lower() in splits), alone)


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the rows of a metadata file. Raises UserError for a damaged file."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        try:
            table = pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: is not a Parquet file: {' '.join(str(error).split())[:120]}") from None
        yield from (_Row(f"{file}, row {number}", row) for number, row in enumerate(table))
    elif kind == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            rows = [_Row(f"{file}, line {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num + 1}: is not a table: {error}") from None
        finally:
            csv.field_size_limit(limit)
        yield from rows
    else:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected an object with file_name and objects")
            yield _Row(f"{file}, line {number}", row)


def _objects(row: _Row) -> Any:
    """Return the objects of a row, None without any; a cell of a table holds them as text."""
    value = row.values.get("objects")
    if isinstance(value, str):
        value = _of_text(value, row.place) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, dict | list) or not all(isinstance(one, dict) for one in value if isinstance(value, list)):
        raise UserError(f"{row.place}: objects: expected bbox and category, as lists with an entry for each object")
    return value


def _of_text(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(
            f'{place}: objects: is not JSON, such as {{"bbox": [[1, 2, 30, 40]], "category": ["cat"]}}'
        ) from None


def _stated(row: _Row) -> tuple[int, int] | None:
    """Return the (width, height) that a row gives."""
    width, height = (side_of(row.values.get(name) or None, row.place, name) for name in ("width", "height"))
    return (width, height) if width and height else None


def _names(objects: dict[Path, tuple[str, list[dict[str, Any]]]], keys: dict[Path, Keys], path: Path) -> list[str]:
    """Return the names of the categories that occur, sorted. Raises UserError for numbers, whose names are not in these files."""
    names = set()
    for image, (place, several) in objects.items():
        for number, one in enumerate(several, 1):
            category = one.get(keys[image].category)
            if isinstance(category, int | float) and not isinstance(category, bool):
                raise UserError(
                    f"{place}, object {number}: the category {category!r} is a number without a class name; give --classes FILE"
                )
            if not isinstance(category, str) or not category:
                raise UserError(f"{place}, object {number}: category {category!r}, expected a name or a number")
            names.add(category)
    check_class_names(sorted(names), str(path))
    return sorted(names)
