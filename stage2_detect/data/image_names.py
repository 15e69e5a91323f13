"""The file names of a COCO file: are the files there, which file would fit one that is not, and which names belong to one photo.

Names are compared as they are, with no form of a name taken for another: a hint says what would fit, and whoever wrote the file decides.
"""

import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ssld.shared.files import IMAGE_SUFFIXES, list_images

_ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z]{8,}\.[^.]+")


def missing_names(folder: str | Path, names: Iterable[str]) -> list[int]:
    """Positions of the names of which there is no file in the folder."""
    present: dict[str, set[str]] = {}  # one listing a folder instead of one system call an image
    missing = []
    for index, whole in enumerate(names):
        parent, name = os.path.split(os.path.join(folder, whole))
        if parent not in present:
            present[parent] = _files_in(parent)
        if name not in present[parent]:
            missing.append(index)
    return missing


def hint(folder: str | Path, missing: Sequence[str]) -> str:
    """The end of a message on missing files: for the first of them that is there under another form of its name, that form; empty where none is.

    Other forms: blanks and line breaks at its ends, slashes as backslashes, `%20` for a blank, letters composed otherwise (Unicode NFC and NFD) or in
    another case, another suffix of images, and the path to another folder before the name. The nearest form counts, and has to be that of one file
    alone.
    """
    try:
        files = list_images(folder)
    except OSError:
        return ""
    indexes: list[dict[str, list[str]]] = []
    for form in _FORMS:
        indexes.append(defaultdict(list))
        for file in files:
            indexes[-1][form(file)].append(file)
    for name in missing:
        found = next((fit for form, index in zip(_FORMS, indexes, strict=True) if (fit := index.get(form(name)))), [])
        if len(found) == 1:
            composed = unicodedata.normalize("NFC", found[0]) == unicodedata.normalize("NFC", name)
            look = " (its letters are composed otherwise, as Unicode NFC and NFD are)" if composed else ""
            meant = "" if name == missing[0] else f" for {name!r}"
            return f"; did you mean {found[0]!r}{look}{meant}?"
    return ""


def same_file(names: Sequence[str]) -> list[list[int]]:
    """Groups of positions whose names are of one file, as `a.jpg` and `./a.jpg`."""
    return _groups(posixpath.normpath(name) for name in names)


def same_photo(names: Sequence[str]) -> list[list[int]]:
    """Groups of positions whose files are augmented copies of one photo by their names, `NAME.rf.HASH.jpg`, which is what Roboflow calls them."""
    return _groups(photo_of(name) for name in names)


def photo_of(name: str) -> str | None:
    """What Roboflow's copies of one photo have in common; None for names of another kind."""
    found = _ROBOFLOW.fullmatch(posixpath.basename(name))
    return found[1] if found else None


def _groups(keys: Iterable[Any]) -> list[list[int]]:
    places: dict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None:
            places[key].append(index)
    return [group for group in places.values() if len(group) > 1]


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


def _plain(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", unquote(name).strip().replace("\\", "/")))


def _folded(name: str) -> str:
    return _plain(name).casefold()


def _stem(name: str) -> str:
    stem, suffix = posixpath.splitext(_folded(name))
    return stem if suffix in IMAGE_SUFFIXES else _folded(name)


_FORMS: tuple[Callable[[str], str], ...] = (
    _plain,
    _folded,
    _stem,
    lambda name: posixpath.basename(_folded(name)),
    lambda name: posixpath.basename(_stem(name)),
)
