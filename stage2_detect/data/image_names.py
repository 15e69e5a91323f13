"""File names of a COCO file: missing files, suggestions for them, and names that belong to one photo.

Names are compared exactly; no other form of a name is accepted. A hint names the file that would fit, and the user decides: a cleaned copy has the
names of the files (`fitting_files`).
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
_LABEL_STUDIO = re.compile(r"(?!(?:19|20)[0-9]{6}-)[0-9a-f]{8}-(.+)")
"""name of a photo that Label Studio has received: eight hexadecimal digits before its own name; digits that can be a date are not taken for these"""


def missing_names(folder: str | Path, names: Iterable[str]) -> list[int]:
    """Return the positions of the names without a file in the folder."""
    present: dict[str, set[str]] = {}  # one listing per folder instead of one system call per image
    missing = []
    for index, whole in enumerate(names):
        parent, name = os.path.split(os.path.join(folder, whole))
        if parent not in present:
            present[parent] = _files_in(parent)
        if name not in present[parent]:
            missing.append(index)
    return missing


def hint(folder: str | Path, missing: Sequence[str]) -> str:
    """Return the end of a message on missing files: the existing file whose name is another form of a missing one; empty if there is none.

    Other forms: blanks and line breaks at the ends, slashes as backslashes, `%20` for a blank, letters composed differently (Unicode NFC and NFD) or
    in another case, another image suffix, other folders before the name, and Label Studio's digits before it. The closest form decides, and must fit
    exactly one file.
    """
    fits = _fits(folder, missing)
    for name, files in zip(missing, fits, strict=True):
        if len(files) == 1:
            composed = unicodedata.normalize("NFC", files[0]) == unicodedata.normalize("NFC", name)
            note = " (its letters are composed differently, as in Unicode NFC and NFD)" if composed else ""
            meant = "" if name == missing[0] else f" for {name!r}"
            return f"; did you mean {files[0]!r}{note}{meant}?"
    return ""


def fitting_files(folder: str | Path, names: Sequence[str], missing: Sequence[int]) -> dict[int, str]:
    """Return by position the file that is meant by each missing name that fits one, in the forms of `hint`.

    Empty if a name fits several files, or one in a folder of another name (`cam1/1.jpg` and `cam2/1.jpg`), or if two names would refer to one file:
    then the user has to decide.
    """
    fits = dict(zip(missing, _fits(folder, [names[index] for index in missing]), strict=True))
    found = {index: files[0] for index, files in fits.items() if len(files) == 1}
    meant: dict[str, str] = {}
    clear = all(len(files) < 2 for files in fits.values())
    clear &= all(_one_ends_in_the_other(names[index], file) for index, file in found.items())
    for index, name in enumerate(map(posixpath.normpath, names)):
        clear &= meant.setdefault(found.get(index, name), name) == name
    return found if clear else {}


def same_file(names: Sequence[str]) -> list[list[int]]:
    """Group the positions whose names refer to one file, such as `a.jpg` and `./a.jpg`."""
    return _groups(posixpath.normpath(name) for name in names)


def same_photo(names: Sequence[str]) -> list[list[int]]:
    """Group the positions whose files are augmented copies of one photo by Roboflow's names, `NAME.rf.HASH.jpg`."""
    return _groups(photo_of(name) for name in names)


def photo_of(name: str) -> str | None:
    """Return the part of a Roboflow name that all copies of one photo share; None for other names."""
    match = _ROBOFLOW.fullmatch(posixpath.basename(name))
    return match[1] if match else None


def _groups(keys: Iterable[Any]) -> list[list[int]]:
    """Group the positions of equal keys; groups of one and the key None are left out."""
    positions: dict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None:
            positions[key].append(index)
    return [group for group in positions.values() if len(group) > 1]


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or an invalid name
        return set()


def _fits(folder: str | Path, names: Sequence[str]) -> list[list[str]]:
    """Return for each name the files of a folder, relative to it, that it may mean, in the closest form that any file fits."""
    try:
        files = list_images(folder)
    except OSError:
        return [[] for _ in names]
    indexes: list[dict[str, list[str]]] = []
    for form in _FORMS:
        indexes.append(defaultdict(list))
        for file in files:
            indexes[-1][form(file)].append(file)
    lasts: list[dict[str, list[str]]] = [defaultdict(list), defaultdict(list)]
    for last, index in zip(lasts, indexes[1:], strict=True):
        for written, several in index.items():
            last[posixpath.basename(written)] += several

    # Eight decimal digits may be a date or a number of a series: they are Label Studio's only beside names whose digits have a letter.
    uploads = any(_uploaded(name) and not posixpath.basename(_plain(name))[:8].isdecimal() for name in names)

    def fits(name: str) -> list[str]:
        for form, index in zip(_FORMS, indexes, strict=True):
            if found := index.get(form(name)):
                return found
        for form, index in zip(
            _FORMS[1:], indexes[1:], strict=True
        ):  # the longest end of the path that is a file's whole path
            parts = form(name).split("/")
            for start in range(1, len(parts)):
                if found := index.get("/".join(parts[start:])):
                    return found
        for form, last in zip(_FORMS[1:], lasts, strict=True):
            if found := last.get(posixpath.basename(form(name))):
                return found
        own = _uploaded(name) if uploads else None
        return fits(own) if own else []

    return [fits(name) for name in names]


def _one_ends_in_the_other(name: str, file: str) -> bool:
    """Whether two names differ in the folders before them alone, such as `a/b/1.jpg` and `b/1.JPG`."""
    one, other = (_stem(each).split("/") for each in (name, file))
    if one[-1] != other[-1] and (own := _uploaded(name)):
        one = _stem(own).split("/")
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]


def _uploaded(name: str) -> str | None:
    """Return the path of a photo without Label Studio's digits, `upload/3/a.jpg` for `upload/3/676b1b69-a.jpg`; None for other names."""
    folder, last = posixpath.split(_plain(name))
    match = _LABEL_STUDIO.fullmatch(last)
    return posixpath.join(folder, match[1]) if match else None


def _plain(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", unquote(name).strip().replace("\\", "/")))


def _folded(name: str) -> str:
    return _plain(name).casefold()


def _stem(name: str) -> str:
    stem, suffix = posixpath.splitext(_folded(name))
    return stem if suffix in IMAGE_SUFFIXES else _folded(name)


_FORMS: tuple[Callable[[str], str], ...] = (_plain, _folded, _stem)
