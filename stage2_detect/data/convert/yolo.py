"""Reader of detection data in YOLO's format: one text file of normalized boxes or polygons per image.

Layout: https://docs.ultralytics.com/datasets/detect/, and its variants (`stage2_detect/layouts/yolo.py`). An image without a label file has no
objects. Rows: `class x_center y_center width height`, or `class x y x y ...` for a polygon (three points or more), as shares of the upright image.
Deliberately absent: keypoints (an error), confidences; oriented boxes are read as polygons of four points.
"""

from pathlib import Path
from typing import NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.files import list_files, list_images, read_text
from ssld.shared.images import UnreadableImage
from ssld.shared.tally import Tally
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.convert.file_index import FileIndex
from ssld.stage2_detect.data.convert.records import (
    LISTED_AGAIN,
    NO_LABELS,
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
from ssld.stage2_detect.layouts.yolo import (
    CLASS_LISTS,
    LabelFiles,
    YoloLayout,
    has_rows,
    images_of_list,
    located,
    read_names,
)

_SLACK = 0.01
"""distance outside 0..1 up to which a coordinate is accepted; beyond it is an error (pixels, for example)"""


class _Row(NamedTuple):
    """A checked line of a label file."""

    label: int
    values: list[float]
    place: str


def read_yolo(layout: YoloLayout, *, classes: Path | None, splits: list[str]) -> SourceData:
    """Read the data set of a layout. Raises UserError, naming file and line, for any fault of the data."""
    names = read_class_list(classes) if classes else layout.names
    other = next((one for one in layout.class_lists if read_names(one) != names), None)
    if other and not classes:
        raise UserError(f"{other}: names other classes than {layout.class_lists[0]}; give --classes FILE")
    if not names:
        raise UserError(
            f"{layout.file}: no class names: neither data.yaml nor classes.txt has any; give --classes FILE"
        )
    check_class_names(names, str(classes or f"{layout.file}: names"))
    check_splits(splits, layout.places, layout.file)
    data = SourceData("YOLO", names, notes=list(layout.notes), orientation="upright", certain=True)
    data.hint = "is it center, width and height, not two corners or the upper left corner?"
    for split in splits or layout.places:
        tally = data.tallies[split] = Tally()
        data.splits[split], data.searched[split] = _read_split(layout, split, names, tally)
    return data


def _read_split(layout: YoloLayout, split: str, names: list[str], tally: Tally) -> tuple[list[SourceImage], str]:
    """Return (images, text on the folders searched for their labels)."""
    images, folders = _image_files(layout, split, tally)
    label_files = LabelFiles()
    labels = {image: label_files.of(image) for image in images}
    _refuse_shared(labels)
    _drop_unread(folders, label_files, labels, names, tally)
    rows_of = {image: _rows(label, names) if label else [] for image, label in labels.items()}
    _refuse_keypoints([row for rows in rows_of.values() for row in rows])
    source_images = []
    for image, label in labels.items():
        rows = rows_of[image]
        if not label:
            tally.change("image", NO_LABELS, image)
        kind = unread_kind(image)
        try:
            width, height = (0, 0) if kind else size_of(image)
        except UnreadableImage:
            kind, width = None, 0
        if width:
            source_images.append(SourceImage(image, width, height, [_object(row, width, height) for row in rows]))
        else:
            drop_image(tally, image, kind, [names[row.label] for row in rows])
    searched = dict.fromkeys(str(folder) for image in images for folder in label_files.folders(image.parent))
    read = sum(label is not None for label in labels.values())
    return source_images, f"{count(read, 'label file')}, searched in {some(list(searched))}"


def _image_files(layout: YoloLayout, split: str, tally: Tally) -> tuple[list[Path], list[Path]]:
    """Return (images of a split in order, each once; folders that were listed)."""
    images: dict[Path, None] = {}
    folders: list[Path] = []
    for place in layout.places[split]:
        path = located(layout.root, place)
        if path.is_dir():
            folders.append(path)
            listed = [(f"{path / name}", path / name) for name in list_images(path)]
        elif path.suffix.lower() == ".txt" and path.is_file():
            listed = [(f"{path}, line {number}", image) for number, image in images_of_list(path, layout.root)]
            missing = next(((where, image) for where, image in listed if not image.is_file()), None)
            if missing:
                raise UserError(f"{missing[0]}: no image {missing[1]}")
        else:
            raise UserError(
                f"{layout.file}: {split}: {path} is neither a folder nor a .txt list of images; correct it, or take {split} out of the file"
            )
        for where, image in listed:
            if image in images:
                tally.change("image", LISTED_AGAIN, where)
            images[image] = None
    if not images:
        raise UserError(f"{layout.file}: {split}: no images in {', '.join(layout.places[split])}")
    return list(images), folders


def _refuse_shared(labels: dict[Path, Path | None]) -> None:
    """Raise UserError for a label file that belongs to two images, such as a.jpg and a.png: it may fit only one of them."""
    owner: dict[Path, Path] = {}
    for image, label in labels.items():
        if label and owner.setdefault(label, image) != image:
            raise UserError(f"{label}: belongs to {owner[label]} and to {image}; remove one of the images")


def _drop_unread(
    folders: list[Path], label_files: LabelFiles, labels: dict[Path, Path | None], names: list[str], tally: Tally
) -> None:
    """Count label files with an unsupported kind of image. Raises UserError for label files without an image."""
    used = set(labels.values())
    for folder in folders:
        others: FileIndex | None = None
        for label_folder in label_files.folders(folder):
            for name in list_files(label_folder, (".txt",)):
                file = label_folder / name
                if file in used or file.name.lower() in CLASS_LISTS or (label_folder == folder and not has_rows(file)):
                    continue
                others = others or FileIndex(folder, ("",))
                matches = [one for one in others.find(name) if not one.lower().endswith((".txt", ".xml", ".json"))]
                if not matches:
                    raise UserError(f"{file}: no image in {folder} belongs to it")
                if folder / matches[0] in labels:
                    raise UserError(
                        f"{file}: is not in a folder for the labels of {folder / matches[0]}; move it to the same folder below labels"
                    )
                kind = Path(matches[0]).suffix.lower() or "no suffix"
                drop_image(tally, folder / matches[0], kind, [names[row.label] for row in _rows(file, names)])


def _rows(label: Path, names: list[str]) -> list[_Row]:
    lines = enumerate(read_text(label).splitlines(), 1)
    return [_row(line.split(), f"{label}, line {number}", names) for number, line in lines if line.strip()]


def _row(words: list[str], place: str, names: list[str]) -> _Row:
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        more = "; a confidence, angle or track behind the box is not read" if len(words) == 6 else ""
        raise UserError(
            f"{place}: has {len(words)} values; expected a class and a box (5), or a class and three points or more (7, 9, ...){more}"
        )
    label = finite_number(words[0], place, "the class")
    if label != int(label) or not 0 <= label < len(names):
        raise UserError(f"{place}: class {words[0]}, but there are {len(names)} classes, 0 to {len(names) - 1}")
    values = [finite_number(word, place, f"value {index}") for index, word in enumerate(words[1:], 2)]
    wrong = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
    if wrong:
        more = ", and keypoints are not read" if wrong[0] == 2 and len(values) > 4 else ""
        raise UserError(
            f"{place}: {wrong[0]:g} is outside 0..1; coordinates are shares of the image's width and height{more}"
        )
    return _Row(int(label), values, place)


def _refuse_keypoints(rows: list[_Row]) -> None:
    """Raise UserError for rows of a box and keypoints: read as polygons they would be accepted, and wrong.

    Pose data whose data.yaml says so is refused before. Else it is known by this: all rows have the same number of values, and behind the box are
    points that lie in it: of three values, the last of which is 0, 1 or 2, or of two values, at least three points. A keypoint at 0, 0 is one that is
    not there. Small polygons fulfill this too, so for points of two values width and height, read as a point, have to lie far from the others in most
    rows: the second point of a polygon does not.
    """
    lengths = {len(row.values) for row in rows}
    if len(rows) < 3 or len(lengths) != 1:
        return
    (length,) = lengths
    for size in (2, 3):
        points, rest = divmod(length - 4, size)
        if rest or points < (3 if size == 2 else 1) or not all(_is_pose(row.values, size) for row in rows):
            continue
        if size == 3 or 2 * sum(_second_is_far(row.values) for row in rows) > len(rows):
            raise UserError(
                f"{rows[0].place}: all {len(rows)} rows look like a box and {count(points, 'keypoint')}; keypoints are not "
                "supported: keep the first five values of each row"
            )


def _is_pose(values: list[float], size: int) -> bool:
    """Whether the values behind the first four can be keypoints of `size` values in their box."""
    x, y, w, h = values[:4]
    points = [values[at : at + size] for at in range(4, len(values), size)]
    seen = [point for point in points if point[:2] != [0.0, 0.0]]
    inside = all(abs(point[0] - x) <= w / 2 + _SLACK and abs(point[1] - y) <= h / 2 + _SLACK for point in seen)
    return inside and (size == 2 or all(point[2] in (0.0, 1.0, 2.0) for point in points))


def _second_is_far(values: list[float]) -> bool:
    """Whether the second point is further from the box around the other points than this box is long."""
    points = [point for point in zip(values[::2], values[1::2], strict=True) if point != (0.0, 0.0)]
    (x, y), others = points[1], [points[0], *points[2:]]
    (left, right), (top, bottom) = ((min(side), max(side)) for side in zip(*others, strict=True))
    return max(left - x, x - right, top - y, y - bottom) > max(right - left, bottom - top)


def _object(row: _Row, width: int, height: int) -> SourceObject:
    if len(row.values) == 4:
        x, y, w, h = (value * side for value, side in zip(row.values, (width, height) * 2, strict=True))
        return SourceObject(row.label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), row.place)
    xs = [min(max(value, 0.0), 1.0) * width for value in row.values[::2]]
    ys = [min(max(value, 0.0), 1.0) * height for value in row.values[1::2]]
    polygon = [round(value, 3) for point in zip(xs, ys, strict=True) for value in point]
    return SourceObject(row.label, (min(xs), min(ys), max(xs), max(ys)), row.place, shape=[polygon])
