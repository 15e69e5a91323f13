"""Reader of LabelMe's JSON, one file per image, which X-AnyLabeling writes too.

Format: github.com/wkentaro/labelme, `labelme/_label_file.py`. Points are pixels of the upright image, counted from 0. A file belongs to the split
whose name a folder above it has; without such folders all files are of the split `train`. Images without a JSON file are not labeled yet: they are
counted and not read. Deliberately absent: images that are only inside the JSON files, flags, groups, and masks, of which the box is read.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, list_files
from ssld.shared.images import UnreadableImage
from ssld.shared.tally import Tally
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.convert.file_index import FileIndex
from ssld.stage2_detect.data.convert.records import (
    Corners,
    SourceData,
    SourceImage,
    SourceObject,
    check_class_names,
    check_splits,
    drop_image,
    finite_number,
    read_class_list,
    size_of,
    unread_kind,
)
from ssld.stage2_detect.layouts.coco import TEST, TRAIN, VAL
from ssld.stage2_detect.layouts.others import LABELME_KEYS

_SPLITS = (*TRAIN, *VAL, *TEST)
_LOOKED_AT = 20
"""JSON files of a folder that are looked at to recognize the format"""
_WITHOUT_AREA = ("point", "points", "line", "linestrip")
Points = list[tuple[float, float]]


def is_labelme(path: Path) -> bool:
    """Whether a folder has LabelMe's JSON among the first JSON files in and below it."""
    names = list_files(path, (".json",))[:_LOOKED_AT] if path.is_dir() else []
    return any(_is_one(path / name) for name in names)


def labelme_files(folder: Path) -> dict[str, list[Path]]:
    """Return the sorted files of each split. Raises UserError if some are in a folder with the name of a split and others are not."""
    files: dict[str, list[Path]] = {}
    for name in list_files(folder, (".json",)):
        if _is_one(folder / name):
            split = next((part for part in name.split("/")[:-1] if part.lower() in _SPLITS), "")
            files.setdefault(split, []).append(folder / name)
    if "" in files and len(files) > 1:
        others = some(sorted(split for split in files if split))
        raise UserError(f"{files[''][0]}: is beside {others}, which look like splits; move it into one of these")
    return {split or "train": of_split for split, of_split in files.items()}


def read_labelme(path: Path, *, classes: Path | None, splits: list[str]) -> SourceData:
    """Read a data set from a folder. Classes are those of `classes`, else the labels that occur, sorted.

    Raises UserError, naming the file and the number of the shape, for any fault of the data.
    """
    folder = path.resolve()
    files = labelme_files(folder)
    check_splits(splits, files, path)
    contents = {split: {file: _content(file) for file in files[split]} for split in splits or files}
    labels = {
        _label(shape, f"{file}, shape {number}")
        for of_split in contents.values()
        for file, content in of_split.items()
        for number, shape in enumerate(content["shapes"], 1)
    }
    names = read_class_list(classes) if classes else sorted(labels)
    check_class_names(names, str(classes or path))
    if unlisted := sorted(labels - set(names)):
        raise UserError(f"{path}: the label {unlisted[0]!r} is not among the {len(names)} of {classes}")
    data = SourceData("LabelMe", names, orientation="upright", certain=True, hint="is it of another image?")
    index = FileIndex(folder, IMAGE_SUFFIXES)
    for split, of_split in contents.items():
        data.tallies[split] = Tally()
        data.splits[split] = _read_split(of_split, index, names, data.tallies[split])
        data.searched[split] = f"in {count(len(of_split), 'JSON file')} in {folder}"
    return data


def _is_one(file: Path) -> bool:
    try:
        encoded = file.read_bytes()
    except OSError:
        return False
    return all(key in encoded for key in LABELME_KEYS)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(f"{file}: shapes: expected a list of objects")
    content.pop("imageData", None)  # the whole image, which would fill the memory; the files are read in its place
    return dict(content)


def _label(shape: dict[str, Any], place: str) -> str:
    label = shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{place}: has no label")
    return label.strip()


def _read_split(
    files: dict[Path, dict[str, Any]], index: FileIndex, names: list[str], tally: Tally
) -> list[SourceImage]:
    images: list[SourceImage] = []
    owner: dict[Path, Path] = {}
    for file, content in files.items():
        image = _image_of(file, content, index)
        if owner.setdefault(image, file) != file:
            raise UserError(f"{file}: is of the image {image}, as is {owner[image]}; remove one of them")
        shapes = [(f"{file}, shape {number}", shape) for number, shape in enumerate(content["shapes"], 1)]
        labels = [names.index(_label(shape, place)) for place, shape in shapes]
        objects = [
            one
            for label, (place, shape) in zip(labels, shapes, strict=True)
            if (one := _object(shape, label, place, names, tally))
        ]
        kind = unread_kind(image)
        try:
            size = None if kind else size_of(image, _stated(content, file), str(file))
        except UnreadableImage:
            size = None
        if size:
            images.append(SourceImage(image, *size, objects))
        else:
            drop_image(tally, image, kind, [names[one.label] for one in objects])
    folders = {image.parent for image in owner}
    for image in (index.folder / name for name in index.names):
        if image not in owner and image.parent in folders:
            tally.skip("image", "without a JSON file", image)
    return images


def _image_of(file: Path, content: dict[str, Any], index: FileIndex) -> Path:
    """Return the image that a file mentions, relative to itself, else the one of its own name: beside it, or the only one in the data set."""
    mentioned = str(content.get("imagePath") or "").replace("\\", "/")
    found = [index.folder / name for name in index.find(file.relative_to(index.folder).with_suffix("").as_posix())]
    found = [image for image in found if image.parent == file.parent] or found
    for image in [*([file.parent / mentioned] if mentioned else []), *(found if len(found) == 1 else [])]:
        if image.is_file():
            return Path(os.path.normpath(image))
    raise UserError(
        f"{file}: its image is not there, neither as {mentioned!r} nor as the only {file.stem}.* in {index.folder}"
    )


def _stated(content: dict[str, Any], file: Path) -> tuple[int, int] | None:
    sides = [content.get(key) for key in ("imageWidth", "imageHeight")]
    width, height = (int(finite_number(str(side or 0), str(file), "the size of the image")) for side in sides)
    return (width, height) if width and height else None


def _object(shape: dict[str, Any], label: int, place: str, names: list[str], tally: Tally) -> SourceObject | None:
    kind = shape.get("shape_type") or "polygon"  # the oldest files have polygons alone
    read = _SHAPES.get(kind)
    if read is None:
        why = "has no area" if kind in _WITHOUT_AREA else "is not read"
        tally.drop("box", f"of the kind {kind!r}, which {why}", place, group=names[label])
        return None
    given = shape.get("points")
    if not isinstance(given, list) or not all(isinstance(point, list) and len(point) == 2 for point in given):
        raise UserError(f"{place}: points: expected a list of x, y")
    points = [(finite_number(str(x), place, "x"), finite_number(str(y), place, "y")) for x, y in given]
    if len(points) < (3 if read is _polygon else 2):
        raise UserError(f"{place}: has {count(len(points), 'point')}, too few for a {kind}")
    corners, outline = read(points)
    return SourceObject(label, corners, place, shape=outline)


def _around(points: Points) -> tuple[Corners, None]:
    xs, ys = zip(*points, strict=True)
    return (min(xs), min(ys), max(xs), max(ys)), None


def _polygon(points: Points) -> tuple[Corners, list[list[float]]]:
    return _around(points)[0], [[round(value, 3) for point in points for value in point]]


def _circle(points: Points) -> tuple[Corners, None]:
    (x, y), edge = points[:2]
    radius = math.dist((x, y), edge)
    return (x - radius, y - radius, x + radius, y + radius), None


_SHAPES: dict[str, Callable[[Points], tuple[Corners, list[list[float]] | None]]] = {
    "rectangle": _around,
    "polygon": _polygon,
    "oriented_rectangle": _polygon,
    "rotation": _polygon,  # X-AnyLabeling's turned rectangle
    "quadrilateral": _polygon,
    "circle": _circle,
    "mask": _around,  # its points are the corners of the box
}
