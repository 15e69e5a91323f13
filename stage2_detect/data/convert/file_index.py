"""Files of a data set by their names, as tools of other systems write them: suffixes in any case, either form of accents, either slash."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ssld.shared.files import IMAGE_SUFFIXES, list_files, list_folders


class FileIndex:
    """The files with some suffixes in a folder and below.

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
        """The files that a text means, mostly one: of this path, else of this name in any folder; with or without a suffix."""
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
    """A path without its suffix if that is one of `suffixes`; accents as one letter each (NFC)."""
    head, dot, last = name.rpartition(".")
    known = bool(head) and any(suffix in ("", dot + last.lower()) for suffix in suffixes)
    return unicodedata.normalize("NFC", head if known else name)


def subfolders(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Folders in a folder, sorted, hidden ones and runs left out; of these `names` alone, in their order and any case, where there are any."""
    found = [folder / name for name in list_folders(folder)]
    if not names:
        return found
    return sorted((one for one in found if one.name.lower() in names), key=lambda one: names.index(one.name.lower()))
