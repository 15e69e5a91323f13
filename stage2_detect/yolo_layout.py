"""Where a data set in YOLO's format keeps its class names, images and labels. Torch-free, since settings count these files as inputs of a run.

Known are `data.yaml` of Ultralytics (also under another name), Darknet's and CVAT's `.data` file, and folders without either: `images/` and `labels/`
(Label Studio), the same in a folder for each split (Roboflow), or labels beside the images (labelImg, Roboflow's Darknet). The label file of an image
lies where `images` is replaced by `labels` in its path, or beside it. Names of folders and suffixes count in any case; hidden files do not count.
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
from ssld.shared.files import IMAGE_SUFFIXES, is_hidden, list_files, list_folders, read_text
from ssld.shared.wording import some

SPLITS = ("train", "val", "valid", "validation", "test")
CLASS_LISTS = ("classes.txt", "_darknet.labels", "obj.names", "classes.names")
_YAML = (".yaml", ".yml")
_IMAGES = ("images", "image", "imgs", "img", "jpegimages")
_LABELS = ("labels", "label")
_NULL = ("", "null", "Null", "NULL", "~")  # YAML's words for nothing


@dataclass
class YoloLayout:
    """What is where.

    Attributes:
        file: what describes the data set, or the folder where nothing does.
        root: folder that the places are relative to.
        names: classes in order; none where nothing says them.
        class_lists: files of a data set without description that say the classes, all the same ones if it is sound.
        places: folders of images, or text files with an image a line, of each split.
    """

    file: Path
    root: Path
    names: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    class_lists: list[Path] = field(default_factory=list)


def find_yolo(path: Path) -> YoloLayout | None:
    """The layout at a folder or a file that describes one; None for what looks like no such data. Raises UserError for a wrong description."""
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
    """Folders and files outside of the described one that decide what is read, by a name for messages."""
    found: dict[str, Path] = {}
    for place in dict.fromkeys(place for places in layout.places.values() for place in places):
        path = located(layout.root, place)
        if path.is_file():
            listed = dict.fromkeys(image.parent for _, image in images_of_list(path, layout.root))
            folders = [one for one in listed if one.is_dir()]  # the reader tells what is missing, by its line
        elif path.is_dir():
            folders = [path]
        else:
            continue
        for one in (path, *(place for folder in folders for place in label_folders(folder))):
            found[os.path.relpath(one, layout.root)] = one
    return found


def located(root: Path, place: str) -> Path:
    """The path that a place means, which need not exist."""
    named = place.replace("\\", "/")
    tries = [root / place, root / named]
    if named.startswith("../"):  # Roboflow writes ../train/images beside train/
        tries.append(root / named[3:])
    if named.startswith("data/"):  # CVAT writes paths as Darknet sees them, whose data set lies in data/
        tries.append(root / named[5:])
    return next((one for one in tries if one.exists()), tries[1])


def images_of_list(file: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """(line, image, which need not exist) of a list."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name = line.strip()
        if name:
            starts = (file.parent, root) if name.startswith(("./", ".\\")) else (root, file.parent)
            tries = [located(start, name) for start in starts]
            yield number, next((one for one in tries if one.is_file()), tries[0])


def label_folders(folder: Path) -> list[Path]:
    """Where the labels of images in a folder may lie: where `images` is replaced by `labels` in its path, then beside them."""
    parts = folder.parts
    places = [number for number, part in enumerate(parts) if part.lower() in _IMAGES]
    found = []
    if places:
        above, below = Path(*parts[: places[-1]]), parts[places[-1] + 1 :]
        with suppress(PermissionError):  # a folder of somebody else, above the data set
            found = [one for one in _entries(above) if one.name.lower() in _LABELS and one.is_dir()]
        for part in below:
            found = [one for start in found for one in _entries(start) if _same(one.name, part) and one.is_dir()]
    return [*found, folder]


class LabelFiles:
    """Finds the label files of images: the only place that knows which file belongs to which."""

    def __init__(self) -> None:
        self._folders: dict[Path, list[Path]] = {}
        self._files: dict[Path, dict[str, list[Path]]] = {}

    def folders(self, folder: Path) -> list[Path]:
        """`label_folders`, remembered."""
        if folder not in self._folders:
            self._folders[folder] = label_folders(folder)
        return self._folders[folder]

    def of(self, image: Path) -> Path | None:
        """The label file of an image, None where it has none. Raises UserError where it has two."""
        names = dict.fromkeys(unicodedata.normalize("NFC", text) for text in (image.stem, image.name))
        *instead, beside = self.folders(image.parent)
        for folders in (instead, [beside]):
            found = [file for folder in folders for name in names for file in self._below(folder).get(name, ())]
            if len(found) > 1:
                raise UserError(f"{image}: has two label files, {found[0]} and {found[1]}; remove one of them")
            if found:
                return found[0]
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
    """Class names of a text file, one a line."""
    return [line.strip() for line in read_text(file).rstrip().splitlines()]


def _of_yaml(file: Path) -> YoloLayout:
    content = {str(key): value for key, value in read_yaml(file, as_text=True).items() if value not in _NULL}
    if "kpt_shape" in content:
        raise UserError(f"{file}: kpt_shape: is pose data; keypoints are not read")
    root = (file.parent / (_text(content.get("path"), file, "path") or ".")).resolve()
    places = {key: _places(value, file, key) for key, value in content.items() if key.lower() in SPLITS}
    notes = []
    if not places:
        raise UserError(f"{file}: has none of the keys {', '.join(SPLITS)}")
    if not root.is_dir():
        beside = file.parent.resolve()
        if not all(located(beside, place).exists() for several in places.values() for place in several):
            raise UserError(f"{file}: path: {root} is not a folder")
        notes.append(f"{file}: path: {root} is not here; the folders beside the file are read")
        root = beside
    for key, value in content.items():
        if key not in places and key != "path" and isinstance(value, str) and value and located(root, value).is_dir():
            notes.append(f"{file}: {key}: is no split ({', '.join(SPLITS)}) and is not read")
    return YoloLayout(file, root, _names(content, file, root), places, notes)


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
    """`train = data/train.txt`, a line for each key."""
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    content = {key.strip(): value.strip() for key, _, value in pairs}
    root = file.parent.resolve()
    places = {key: [value] for key, value in content.items() if key in SPLITS}
    if not places:
        raise UserError(f"{file}: has none of the keys {', '.join(SPLITS)}")
    names = located(root, content["names"]) if content.get("names") else None
    return YoloLayout(file, root, read_names(names) if names else [], places)


def _describes(file: Path) -> bool:
    """Whether a file in a folder describes a data set; one that is called so does, whatever is in it."""
    if file.name.lower() in ("data.yaml", "data.yml"):
        return True
    try:
        if file.suffix.lower() == ".data":
            return any(line.partition("=")[0].strip() in SPLITS for line in read_text(file).splitlines())
        content = read_yaml(file, as_text=True)
        return "names" in content and any(key in SPLITS for key in content)
    except UserError:  # of some other tool
        return False


def _of_folders(folder: Path) -> YoloLayout | None:
    """Of a folder without a description."""
    root = folder.resolve()
    inside = [root / name for name in list_folders(root)]
    layout = YoloLayout(folder, root)
    if pair := _pair(root):
        images, labels = pair
        deeper = [] if _holds_images(images) else [one.name for one in _entries(images) if one.is_dir()]
        layout.places = {name: [f"{images.name}/{name}"] for name in deeper} or {"train": [images.name]}
        looked = [root, labels, images, *(one for one in _entries(labels) if one.is_dir())]
    elif pairs := {one.name: pair for one in inside if (pair := _pair(one))}:
        whole = [name for name, (images, _) in pairs.items() if not _holds_images(images)]
        if whole and len(pairs) > 1:
            raise UserError(f"{folder}: holds {some(sorted(pairs))}, with splits of their own; give one of them")
        if whole:
            return _of_folders(root / whole[0])
        layout.places = {name: [f"{name}/{images.name}"] for name, (images, _) in pairs.items()}
        looked = [root, *(root / name for name in pairs), *(labels for _, labels in pairs.values())]
    elif _flat(root):
        layout.places, looked = {"train": ["."]}, [root]
    else:
        splits = [one for one in inside if _flat(one)]
        layout.places, looked = {one.name: [one.name] for one in splits}, [root, *splits]
    if not layout.places:
        return None
    layout.class_lists = [one for place in looked for one in _entries(place) if one.name.lower() in CLASS_LISTS]
    layout.names = read_names(layout.class_lists[0]) if layout.class_lists else []
    return layout


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and labels in one; labels in XML are of another format."""
    inside = [one for one in _entries(folder) if one.is_dir()]
    images = [one for one in inside if one.name.lower() in _IMAGES]
    labels = [one for one in inside if one.name.lower() in _LABELS]
    if not images or not labels:
        return None
    xml = any(list_files(one, (".xml",)) for one in labels) and not any(list_files(one, (".txt",)) for one in labels)
    return None if xml else (images[0], labels[0])


def _holds_images(folder: Path) -> bool:
    return any(one.suffix.lower() in IMAGE_SUFFIXES for one in _entries(folder))


def _flat(folder: Path) -> bool:
    """Whether images and label files lie side by side."""
    images = {one.stem for one in _entries(folder) if one.suffix.lower() in IMAGE_SUFFIXES}
    texts = (one for one in _entries(folder) if one.suffix.lower() == ".txt" and one.stem in images)
    return any(has_rows(one) for one in texts)


def has_rows(file: Path) -> bool:
    """Whether a text begins as a label file does: a line of five numbers or more."""
    try:
        words = next((line.split() for line in read_text(file).splitlines() if line.strip()), [])
        return len([float(word) for word in words]) >= 5
    except (UserError, ValueError):
        return False


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; hidden names are left out."""
    return sorted(one for one in folder.iterdir() if not is_hidden(one.name))


def _same(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one).casefold() == unicodedata.normalize("NFC", other).casefold()
