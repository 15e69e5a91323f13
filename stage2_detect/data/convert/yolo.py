"""Reads detection data in YOLO's layout: an images folder, and a text file of normalised boxes or polygons for each image.

Layout: https://docs.ultralytics.com/datasets/detect/ (`data.yaml` with `path`, `train`, `val`, `test`, `names`), or a
folder with `images/`, `labels/` and `classes.txt`. The label file of an image lies where `images` is replaced by `labels`
in its path, else beside it; an image without one has no objects. Rows: `class x_center y_center width height`, or `class
x y x y ...` of a polygon (three points or more), all as shares of the upright image. Deliberately absent: keypoints,
confidences; oriented boxes are read as polygons of four points.
"""

from pathlib import Path
from typing import Any

from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, list_images, read_text
from ssld.stage2_detect.data.convert.records import (
    Found,
    FoundImage,
    FoundObject,
    check_class_names,
    finite_number,
    read_class_list,
    size_of,
)

SPLITS = ("train", "val", "test")
_SLACK = 0.01
"""by how much a coordinate may leave 0..1 before it is taken for a mistake (pixels, for example)"""


def is_yolo(path: Path) -> bool:
    """Whether a path looks like such data: a YAML file, a folder with one, or one with images/ and labels/."""
    if path.suffix in (".yaml", ".yml"):
        return True
    return (path / "data.yaml").is_file() or all((path / name).is_dir() for name in ("images", "labels"))


def read_yolo(path: Path, *, classes: Path | None, splits: list[str]) -> Found:
    """The data set at a folder or a data.yaml. Raises UserError, naming file and line, for whatever is wrong in it."""
    file = path if path.is_file() else path / "data.yaml"
    names, places, root = _described(file) if file.is_file() else _listed(path)
    if classes:
        names = read_class_list(classes)
    if not names:
        raise UserError(f"{path}: no class names: neither data.yaml nor classes.txt is there; give --classes FILE")
    unknown = [split for split in splits if split not in places]
    if unknown:
        raise UserError(f"{path}: has no split {unknown[0]!r} (it has {', '.join(places)})")
    found: dict[str, list[FoundImage]] = {}
    notes: list[str] = []
    for split in splits or places:
        images, folders = _image_files(places[split], root)
        if not images:
            raise UserError(f"{file if file.is_file() else path}: {split}: no images in {places[split]}")
        labels = {image: _label_file(image) for image in images}
        _refuse_orphans(folders, set(labels.values()))
        found[split] = [_read_image(image, label, names) for image, label in labels.items()]
        without = sum(not label.is_file() for label in labels.values())
        if without:
            notes.append(f"{split}: {without} images have no label file: images without objects")
    return Found("YOLO", names, found, notes, orientation="upright")


def _described(file: Path) -> tuple[list[str], dict[str, list[str]], Path]:
    """(class names, {split: folders or lists}, root) of a data.yaml."""
    content = read_yaml(file)
    if "kpt_shape" in content:
        raise UserError(f"{file}: kpt_shape: is pose data; keypoints are not read")
    names = content.get("names", [])
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{file}: names: the class numbers are not 0..{len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise UserError(f"{file}: names: expected a list, or numbers with names")
    names = [str(name) for name in names]
    if names:
        check_class_names(names, f"{file}: names")
    if "nc" in content and content["nc"] != len(names):
        raise UserError(f"{file}: nc is {content['nc']}, but names has {len(names)}")
    places = {split: _as_list(content[split], file, split) for split in SPLITS if content.get(split)}
    if not places:
        raise UserError(f"{file}: has none of the keys {', '.join(SPLITS)}")
    root = (file.parent / str(content.get("path") or ".")).resolve()
    if not root.is_dir():
        raise UserError(f"{file}: path: {root} is not a folder")
    return names, places, root


def _listed(folder: Path) -> tuple[list[str], dict[str, list[str]], Path]:
    """The same of a folder without data.yaml: its images, or those of each sub-folder, are a split."""
    lists = [folder / "classes.txt", folder / "labels" / "classes.txt"]
    names = next((read_class_list(file) for file in lists if file.is_file()), [])
    images = folder.resolve() / "images"
    deeper = sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in images.iterdir())
    places = {"train": ["images"]} if flat or not deeper else {name: [f"images/{name}"] for name in deeper}
    return names, places, folder.resolve()


def _as_list(value: Any, file: Path, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise UserError(f"{file}: {key}: expected a folder, a list of folders, or a .txt list of images")
    return values


def _image_files(places: list[str], root: Path) -> tuple[list[Path], list[Path]]:
    """(images in order, folders that were listed) of a split."""
    images: list[Path] = []
    folders: list[Path] = []
    for place in places:
        path = root / place
        if not path.exists() and place.startswith("../"):  # Roboflow writes ../train/images beside train/
            path = root / place[3:]
        if path.is_dir():
            folders.append(path)
            images += [path / name for name in list_images(path)]
        elif path.suffix == ".txt" and path.is_file():
            images += _images_of_list(path, root)
        else:
            raise UserError(f"{path}: is neither a folder nor a .txt list of images")
    twice = len(images) - len(set(images))
    if twice:
        raise UserError(f"{', '.join(places)}: {twice} images are listed more than once")
    return images, folders


def _images_of_list(file: Path, root: Path) -> list[Path]:
    images = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            name = line.strip()
            image = (file.parent / name[2:]) if name.startswith("./") else (root / name)  # "./": relative to the list
            if not image.is_file():
                raise UserError(f"{file}, line {number}: no image {image}")
            images.append(image)
    return images


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _refuse_orphans(folders: list[Path], labels: set[Path]) -> None:
    """Raises UserError for label files of images that are not there."""
    for folder in folders:
        beside = _label_file(folder / "x").parent
        files = sorted(beside.rglob("*.txt")) if beside.is_dir() and beside != folder else []
        orphans = [file for file in files if file not in labels and file.name != "classes.txt"]
        if orphans:
            raise UserError(f"{orphans[0]}: no image in {folder} belongs to it, nor to {len(orphans) - 1} others")


def _read_image(image: Path, label: Path, names: list[str]) -> FoundImage:
    width, height = size_of(image)
    objects = []
    if label.is_file():
        for number, line in enumerate(read_text(label).splitlines(), 1):
            if line.strip():
                objects.append(_read_row(line.split(), f"{label}, line {number}", names, width, height))
    return FoundImage(image, width, height, objects)


def _read_row(words: list[str], place: str, names: list[str], width: int, height: int) -> FoundObject:
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise UserError(
            f"{place}: has {len(words)} values; expected a class and a box (5), or a class and three points or more (7, 9, ...)"
        )
    label = finite_number(words[0], place, "the class")
    if label != int(label) or not 0 <= label < len(names):
        raise UserError(f"{place}: class {words[0]}, but there are {len(names)} classes, 0 to {len(names) - 1}")
    values = [finite_number(word, place, f"value {index}") for index, word in enumerate(words[1:], 2)]
    wrong = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
    if wrong:
        raise UserError(
            f"{place}: {wrong[0]:g} is outside 0..1; coordinates are shares of the image's width and height"
        )
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (width, height) * 2, strict=True))
        return FoundObject(int(label), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), place)
    xs = [min(max(value, 0.0), 1.0) * width for value in values[::2]]
    ys = [min(max(value, 0.0), 1.0) * height for value in values[1::2]]
    polygon = [round(value, 3) for point in zip(xs, ys, strict=True) for value in point]
    return FoundObject(int(label), (min(xs), min(ys), max(xs), max(ys)), place, shape=[polygon])
