"""Lookup of files by names as tools on other systems write them: suffixes in any case, accents composed or not, either slash."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ssld.shared.files import IMAGE_SUFFIXES, list_files, list_folders


class FileIndex:
    """Index of the files with some suffixes in a folder and its subfolders.

    Attributes:
        names: sorted posix paths relative to the folder.
    """

    def __init__(self, folder: Path, suffixes: tuple[str, ...]) -> None:
        self.folder = folder
        self.names = list_files(folder, suffixes)
        self._suffixes = suffixes
        self._by_stem: dict[str, list[str]] = {}
        self._by_last: dict[str, list[str]] = {}
        for name in self.names:
            stem = stem_of(name, suffixes)
            self._by_stem.setdefault(stem, []).append(name)
            self._by_last.setdefault(stem.rpartition("/")[2], []).append(name)

    def find(self, text: str) -> list[str]:
        """Find the files that a text refers to, usually one: by path, else by name in any folder; with or without a suffix."""
        written = unicodedata.normalize("NFC", text.replace("\\", "/").removeprefix("./"))
        stems = dict.fromkeys((written, stem_of(written, (*self._suffixes, *IMAGE_SUFFIXES))))
        for table, keys in (
            (self._by_stem, stems),
            (self._by_last, dict.fromkeys(stem.rpartition("/")[2] for stem in stems)),
        ):
            for key in keys:
                if key in table:
                    return table[key]
        return []


def stem_of(name: str, suffixes: Sequence[str]) -> str:
    """Return a path without its suffix if that is one of `suffixes`, in Unicode form NFC."""
    head, dot, last = name.rpartition(".")
    known = bool(head) and any(suffix in ("", dot + last.lower()) for suffix in suffixes)
    return unicodedata.normalize("NFC", head if known else name)


def subfolders(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """List the subfolders of a folder, sorted, without hidden ones and runs; with `names` only those of these names, in their order, in any case."""
    folders = [folder / name for name in list_folders(folder)]
    if not names:
        return folders
    return sorted((one for one in folders if one.name.lower() in names), key=lambda one: names.index(one.name.lower()))
