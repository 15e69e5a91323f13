"""Layouts of data sets in COCO's format: the annotation file and the image folder of each part. Does not import torch.

Supported are Roboflow's export (`train/_annotations.coco.json` beside the images), COCO's own folders (`annotations/instances_train2017.json` and
`train2017/`), `train.json` and `val.json` beside folders of images, the output of `convert_data.py`, and one annotation file. The part that a file
belongs to is the first of the words train, val, test, ... in its name, else in the name of its folder; the data set's own folder has to be called so
alone. Its image folder is the first of the usual places that holds the first image of the file, so that no file has to be parsed as a whole.
"""

import json
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from ssld.shared.errors import UserError
from ssld.shared.files import ends_of, is_hidden
from ssld.shared.wording import some

TRAIN, VAL, TEST = ("train", "training", "trainval"), ("val", "valid", "validation", "dev"), ("test", "testing")
"""names of parts in lower case"""
_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_FIRST_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_FOLDERS = ("images", "JPEGImages", "image", "imgs", "photos", "data")
_OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
"""beginnings of the names of COCO's files for other tasks"""


@dataclass
class CocoLayout:
    """Files of a data set.

    Attributes:
        parts: by part, (annotation file, folder of its images).
        notes: lines for the log.
    """

    parts: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_coco(path: Path) -> CocoLayout | None:
    """Find the layout at a folder or an annotation file; None for other data.

    Raises UserError for two annotation files of one part, and for one whose images are in none of the usual places.
    """
    if path.is_file():
        if path.suffix.lower() != ".json" or not _is_coco(path):
            return None
        return CocoLayout({_part_of(path, path.parent) or "train": (path, _images_of(path))})
    if not path.is_dir():
        return None
    if converted := _converted(path):
        return converted
    files = list(_annotation_files(path))
    instances = [file for file in files if file.stem.lower().startswith("instances")]
    layout = CocoLayout()
    for file in instances or files:
        part = _part_of(file, path) or ("train" if len(files) == 1 else file.stem)
        if part in layout.parts:
            others = [str(one.relative_to(path)) for one in (layout.parts[part][0], file)]
            raise UserError(f"{path}: {' and '.join(others)} are both of the part {part}; name the files themselves")
        layout.parts[part] = (file, _images_of(file))
    left = [file.name for file in files if instances and file not in instances]
    if left:
        layout.notes.append(f"{path}: beside instances_*.json, {some(left)} are not read")
    return layout if layout.parts else None


def part_kind(name: str) -> str | None:
    """Return train, val or test for the name of a part, a file or a folder (`Validation`, `instances_train2017`); None without such a word."""
    for word in re.findall("[a-z]+", name.lower()):
        for kind, words in (("train", TRAIN), ("val", VAL), ("test", TEST)):
            if word in words:
                return kind
    return None


def _part_of(file: Path, root: Path | None = None) -> str | None:
    """Return the name of the part that an annotation file belongs to, as its file or its folder spells it.

    The folder `root` of the whole data set counts if its name is one word alone: `valid`, but not `first test`.
    """
    folder = file.absolute().parent
    counts = root is None or folder != root.absolute() or re.fullmatch(r"[A-Za-z]+\d*", folder.name)
    for name in (file.stem, *([folder.name] if counts else [])):
        word = next((one for one in re.findall("[A-Za-z]+", name) if part_kind(one)), None)
        if word:
            return word
    return None


def _annotation_files(folder: Path) -> Iterator[Path]:
    """Yield the annotation files in a folder and directly below it, sorted."""
    entries = sorted(one for one in folder.iterdir() if not is_hidden(one.name))
    folders = [one for one in entries if one.is_dir() and not _is_run(one)]
    inside = [one for below in folders for one in sorted(below.iterdir()) if not is_hidden(one.name)]
    for one in (*entries, *inside):
        other = one.name.lower().startswith(_OTHER_TASKS)
        if one.suffix.lower() == ".json" and one.is_file() and not other and _is_coco(one):
            yield one


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, such as the output of a conversion inside its own source."""
    return (folder / "config.yaml").is_file() and (folder / "log.txt").is_file()


def _is_coco(file: Path) -> bool:
    """Whether a JSON file has the keys of a COCO file; searched without parsing it."""
    try:
        with _content(file) as content:
            return all(content.find(key) >= 0 for key in _KEYS)
    except (OSError, ValueError):  # unreadable or empty
        return False


@contextmanager
def _content(file: Path) -> Iterator[mmap.mmap | bytes]:
    """Yield the content of a JSON file in UTF-8, mapped unless the file is in UTF-16 or UTF-32. Raises OSError or ValueError."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        encoding = json.detect_encoding(content[:4])
        yield content if encoding.startswith("utf-8") else content[:].decode(encoding).encode()


def _first_name(file: Path) -> str | None:
    with _content(file) as content:
        found = _FIRST_NAME.search(content)
        try:
            return str(json.loads(found[1])) if found else None
        except ValueError:
            return None


def _images_of(file: Path) -> Path:
    """Return the folder that the file names of a file are relative to. Raises UserError where none of the usual ones holds its first image."""
    name = _first_name(file)
    if name is None:  # a file without images, which its reader reports
        return file.parent
    own = re.sub("^(instances|person_keypoints)_", "", file.stem.lower()).removesuffix("_annotations")
    part = _part_of(file)
    names = list(dict.fromkeys([own, *([part] if part else [])]))
    roots = [file.parent, file.parent.parent]
    tried = [root / one for root in roots for one in names]
    tried += [root / folder / one for root in roots for folder in _FOLDERS for one in names]
    tried += [file.parent, *(root / folder for root in roots for folder in _FOLDERS), file.parent.parent]
    for forms in ([name], _other_forms(name)):
        for folder in tried:
            if any((folder / form).is_file() for form in forms):
                return folder
    raise UserError(
        f"{file}: its first image, {name}, is neither beside it nor in {some([f'{one}/' for one in (*names, *_FOLDERS)], 4)}; "
        "give the annotation files and the image folders themselves"
    )


def _other_forms(name: str) -> list[str]:
    """Return the ends of a path as Windows, a web server or another machine writes it, the longest first.

    They find the folder that is meant; that its files have other names is an error of the reader, which names the correction.
    """
    return ends_of(unquote(name))


def _converted(folder: Path) -> CocoLayout | None:
    """Return the parts in the output of `convert_data.py`, which names the folders of the images."""
    try:
        result = json.loads((folder / "result.json").read_bytes())
        splits = result["metrics"]["splits"] if result["command"] == "convert_data" else {}
        parts = {name: (folder / f"{name}.json", Path(one["image_folder"])) for name, one in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return CocoLayout(parts) if parts else None
