"""Layouts of data sets in YOLO's format: class names, images and labels. Does not import torch, since settings list these files as inputs of a run.

Supported are `data.yaml` of Ultralytics (also under another name), the `.data` file of Darknet and CVAT, and folders without either: `images/` and
`labels/` (Label Studio), both in one folder per split (Roboflow), or labels beside the images (labelImg, Roboflow's Darknet). The label file of an
image has the path of the image with `labels` instead of `images`, or is beside it. Names of folders and suffixes match in any case; hidden files are
ignored.
"""

import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, ends_of, is_hidden, list_files, list_folders, read_text
from ssld.shared.wording import some

SPLITS = ("train", "val", "valid", "validation", "test")
CLASS_LISTS = ("classes.txt", "_darknet.labels", "obj.names", "classes.names")
_YAML = (".yaml", ".yml")
_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_LABELS = ("labels", "label")
_NULL = ("", "null", "Null", "NULL", "~")  # YAML's spellings of null


@dataclass
class YoloLayout:
    """Files of a data set.

    Attributes:
        file: description file of the data set, or its folder without one.
        root: folder that the places are relative to.
        names: classes in order; empty if unknown.
        places: by split, folders of images, or text files with one image per line.
        notes: lines for the log.
        class_lists: files with the classes, in a data set without description; they should be equal.
    """

    file: Path
    root: Path
    names: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    class_lists: list[Path] = field(default_factory=list)


def find_yolo(path: Path) -> YoloLayout | None:
    """Find the layout at a folder or description file; None for other data. Raises UserError for an invalid description."""
    if path.is_file():
        kind = path.suffix.lower()
        return _of_yaml(path) if kind in _YAML else _of_darknet(path) if kind == ".data" else None
    if not path.is_dir():
        return None
    files = [one for one in _entries(path) if one.is_file()]
    for suffixes, read in ((_YAML, _of_yaml), ((".data",), _of_darknet)):
        described = [one for one in files if one.suffix.lower() in suffixes and _describes(one)]
        usual = [one for one in described if one.stem.lower() in ("data", "dataset")]
        if len(usual or described) > 1:
            raise UserError(f"{path}: holds {some([one.name for one in described])}; give one of these files")
        if described:
            return read((usual or described)[0])
    return _of_folders(path)


def input_places(layout: YoloLayout) -> dict[str, Path]:
    """Return the folders and files of a data set that are inputs of a run, by a name for messages."""
    inputs: dict[str, Path] = {}
    for place in dict.fromkeys(place for places in layout.places.values() for place in places):
        path = located(layout.root, place)
        if path.is_file():
            listed = dict.fromkeys(image.parent for _, image in images_of_list(path, layout.root))
            folders = [one for one in listed if one.is_dir()]  # the reader reports missing ones with their line
        elif path.is_dir():
            folders = [path]
        else:
            continue
        for one in (path, *(labels for folder in folders for labels in label_folders(folder))):
            inputs[os.path.relpath(one, layout.root)] = one
    return inputs


def located(root: Path, place: str) -> Path:
    """Return the path that a place of a description refers to; it may not exist."""
    named = place.replace("\\", "/")
    candidates = [root / place, root / named]
    if named.startswith("../"):  # Roboflow writes ../train/images beside train/
        candidates.append(root / named[3:])
    if named.startswith("data/"):  # CVAT writes paths for Darknet, whose data set is in data/
        candidates.append(root / named[5:])
    return next((one for one in candidates if one.exists()), candidates[1])


def images_of_list(file: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield (line number, image) of a list; the image may not exist."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name = line.strip()
        if name:
            starts = (file.parent, root) if name.startswith(("./", ".\\")) else (root, file.parent)
            candidates = [located(start, name) for start in starts]
            yield number, next((one for one in candidates if one.is_file()), candidates[0])


def label_folders(folder: Path) -> list[Path]:
    """Return the folders that may have the labels of images in a folder: with `labels` for `images` in its path, then the folder itself."""
    parts = folder.parts
    positions = [number for number, part in enumerate(parts) if part.lower() in _IMAGES]
    folders = []
    if positions:
        above, below = Path(*parts[: positions[-1]]), parts[positions[-1] + 1 :]
        with suppress(PermissionError):  # an unreadable folder above the data set
            folders = [one for one in _entries(above) if one.name.lower() in _LABELS and one.is_dir()]
        for part in below:
            folders = [one for start in folders for one in _entries(start) if _same(one.name, part) and one.is_dir()]
    return [*folders, folder]


class LabelFiles:
    """Lookup of the label files of images; the only place that matches them."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[Path]] = {}
        self._files: dict[Path, dict[str, list[Path]]] = {}

    def folders(self, folder: Path) -> list[Path]:
        """Return `label_folders`, cached."""
        if folder not in self._folders:
            self._folders[folder] = label_folders(folder)
        return self._folders[folder]

    def of(self, image: Path) -> Path | None:
        """Return the label file of an image, None without one. Raises UserError for two label files."""
        names = dict.fromkeys(unicodedata.normalize("NFC", text) for text in (image.stem, image.name))
        *instead, beside = self.folders(image.parent)
        for folders in (instead, [beside]):
            files = [file for folder in folders for name in names for file in self._below(folder).get(name, ())]
            if len(files) > 1:
                raise UserError(f"{image}: has two label files, {files[0]} and {files[1]}; remove one of them")
            if files:
                return files[0]
        return None

    def _below(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._files:
            files: dict[str, list[Path]] = {}
            for one in _entries(folder):
                if one.suffix.lower() == ".txt" and one.name.lower() not in CLASS_LISTS:
                    files.setdefault(unicodedata.normalize("NFC", one.stem), []).append(one)
            self._files[folder] = files
        return self._files[folder]


def read_names(file: Path) -> list[str]:
    """Read class names from a text file, one per line."""
    return [line.strip() for line in read_text(file).rstrip().splitlines()]


def _of_yaml(file: Path) -> YoloLayout:
    content = {str(key): value for key, value in read_yaml(file, as_text=True).items() if value not in _NULL}
    if "kpt_shape" in content:
        raise UserError(f"{file}: kpt_shape: pose data; keypoints are not supported")
    root = (file.parent / (_text(content.get("path"), file, "path") or ".")).resolve()
    places = {key: _places(value, file, key) for key, value in content.items() if key.lower() in SPLITS}
    notes = []
    if not places:
        raise UserError(f"{file}: has none of the keys {', '.join(SPLITS)}")
    if not root.is_dir():
        beside = file.parent.resolve()
        here = _found_here(beside, places)
        if not any(
            located(beside, here.get(place, place)).exists() for several in places.values() for place in several
        ):
            raise UserError(f"{file}: path: {root} is not a folder")
        notes.append(f"{file}: path: {root} does not exist; the folders beside the file are read")
        root = beside
    here = _found_here(root, places)
    for key, several in places.items():
        notes += [
            f"{file}: {key}: {place} does not exist; {root / here[place]} is read" for place in several if place in here
        ]
        places[key] = [here.get(place, place) for place in several]
    notes += _without_missing_test(file, root, places)
    for key, value in content.items():
        if key not in places and key != "path" and isinstance(value, str) and value and located(root, value).is_dir():
            notes.append(f"{file}: {key}: is no split ({', '.join(SPLITS)}) and is not read")
    return YoloLayout(file, root, _names(content, file, root), places, notes)


def _without_missing_test(file: Path, root: Path, places: dict[str, list[str]]) -> list[str]:
    """Take out the split for tests if nothing of it exists, which Roboflow names in any case, and return a note on it.

    Another split has to exist: without the images that it names, training or evaluation would be of another data set.
    """
    missing = not any(located(root, one).exists() for one in places.get("test", ()))
    if "test" not in places or not missing or len(places) == 1:
        return []
    return [f"{file}: test: {located(root, places.pop('test')[0])} does not exist; test is not read"]


def _found_here(root: Path, places: dict[str, list[str]]) -> dict[str, str]:
    """Return for each place that does not exist the longest end of its path that does: `train/images` for `/content/pets/train/images`.

    Left out is a folder or list that another place means too, or that is inside or above the folder of another place: splits must not share images.
    """
    all_places = {place for several in places.values() for place in several}
    lost = {place for place in all_places if not located(root, place).exists()}
    found = {place: next((end for end in ends_of(place) if (root / end).exists()), "") for place in sorted(lost)}
    ends = [end for end in found.values() if end]
    meant = [
        path.resolve() for path in (*(root / end for end in ends), *(located(root, one) for one in all_places - lost))
    ]

    def alone(end: str) -> bool:
        path = (root / end).resolve()
        return sum(path.is_relative_to(other) or other.is_relative_to(path) for other in meant) == 1

    return {place: end for place, end in found.items() if end and alone(end)}


def _names(content: dict[str, Any], file: Path, root: Path) -> list[str]:
    names = content.get("names", [])
    if isinstance(names, dict):
        if not all(key.isdecimal() for key in names) or sorted(map(int, names)) != list(range(len(names))):
            raise UserError(f"{file}: names: the class numbers are not 0..{len(names) - 1}")
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if isinstance(names, str) and located(root, names).is_file():
        names = read_names(located(root, names))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: names: expected a list, or numbers with names")
    names = [name.strip() for name in names]
    number = content.get("nc")
    if names and number is not None and number != str(len(names)):
        raise UserError(f"{file}: nc is {number}, but names has {len(names)}")
    return names


def _places(value: Any, file: Path, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise UserError(f"{file}: {key}: expected a folder, a list of folders, or a .txt list of images")
    return values


def _text(value: Any, file: Path, key: str) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"{file}: {key}: expected a path")
    return (value or "").replace("\\", "/")


def _of_darknet(file: Path) -> YoloLayout:
    """Read a description with one line per key, such as `train = data/train.txt`."""
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    content = {key.strip(): value.strip() for key, _, value in pairs}
    root = file.parent.resolve()
    places = {key: [value] for key, value in content.items() if key in SPLITS}
    if not places:
        raise UserError(f"{file}: has none of the keys {', '.join(SPLITS)}")
    notes = _without_missing_test(file, root, places)
    names = located(root, content["names"]) if content.get("names") else None
    return YoloLayout(file, root, read_names(names) if names else [], places, notes)


def _describes(file: Path) -> bool:
    """Whether a file in a folder describes a data set; data.yaml does, whatever its content."""
    if file.name.lower() in ("data.yaml", "data.yml"):
        return True
    try:
        if file.suffix.lower() == ".data":
            return any(line.partition("=")[0].strip() in SPLITS for line in read_text(file).splitlines())
        content = read_yaml(file, as_text=True)
        return "names" in content and any(key in SPLITS for key in content)
    except UserError:  # a file of another tool
        return False


def _of_folders(folder: Path) -> YoloLayout | None:
    """Find the layout of a folder without a description."""
    root = folder.resolve()
    inside = [root / name for name in list_folders(root)]
    layout = YoloLayout(folder, root)
    if pair := _pair(root):
        images, labels = pair
        deeper = [] if _holds_images(images) else [one.name for one in _entries(images) if one.is_dir()]
        layout.places = {name: [f"{images.name}/{name}"] for name in deeper} or {"train": [images.name]}
        searched = [root, labels, images, *(one for one in _entries(labels) if one.is_dir())]
    elif pairs := {one.name: pair for one in inside if (pair := _pair(one))}:
        whole = [name for name, (images, _) in pairs.items() if not _holds_images(images)]
        if whole and len(pairs) > 1:
            raise UserError(f"{folder}: holds {some(sorted(pairs))}, each with splits; give one of them")
        if whole:
            return _of_folders(root / whole[0])
        layout.places = {name: [f"{name}/{images.name}"] for name, (images, _) in pairs.items()}
        searched = [root, *(root / name for name in pairs), *(labels for _, labels in pairs.values())]
    elif _flat(root):
        layout.places, searched = {"train": ["."]}, [root]
    else:
        splits = [one for one in inside if _flat(one)]
        layout.places, searched = {one.name: [one.name] for one in splits}, [root, *splits]
    if not layout.places:
        return None
    layout.class_lists = [one for parent in searched for one in _entries(parent) if one.name.lower() in CLASS_LISTS]
    layout.names = read_names(layout.class_lists[0]) if layout.class_lists else []
    return layout


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and labels in a folder; None without both, and for labels in XML or JSON, which are other formats."""
    inside = [one for one in _entries(folder) if one.is_dir()]
    images = [one for one in inside if one.name.lower() in _IMAGES]
    labels = [one for one in inside if one.name.lower() in _LABELS]
    if not images or not labels:
        return None
    other = any(list_files(one, (".xml", ".json")) for one in labels)
    other = other and not any(list_files(one, (".txt",)) for one in labels)
    return None if other else (images[0], labels[0])


def _holds_images(folder: Path) -> bool:
    return any(one.suffix.lower() in IMAGE_SUFFIXES for one in _entries(folder))


def _flat(folder: Path) -> bool:
    """Whether a folder has images with label files beside them."""
    images = {one.stem for one in _entries(folder) if one.suffix.lower() in IMAGE_SUFFIXES}
    texts = (one for one in _entries(folder) if one.suffix.lower() == ".txt" and one.stem in images)
    return any(has_rows(one) for one in texts)


def has_rows(file: Path) -> bool:
    """Whether a text file begins like a label file, with a line of at least five numbers."""
    try:
        words = next((line.split() for line in read_text(file).splitlines() if line.strip()), [])
        return len([float(word) for word in words]) >= 5
    except (UserError, ValueError):
        return False


def _entries(folder: Path) -> list[Path]:
    """List the content of a folder, sorted, without hidden names."""
    return sorted(one for one in folder.iterdir() if not is_hidden(one.name))


def _same(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one).casefold() == unicodedata.normalize("NFC", other).casefold()
