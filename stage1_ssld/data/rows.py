"""How images lie in a source: files, rows of Arrow tables, members of tar files, or rows of other sources that a manifest names.

Every class here answers the same questions about a row: its name (relative path, row number, or tar file and member), where a person finds it,
its bytes or file. Lists live in Arrow memory, so that loader workers share them.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES
from ssld.stage1_ssld.data.batch import NO_LABEL

Encoded = bytes | Path | None
"""An image that is not decoded yet: its bytes, its file, or nothing where its row is empty."""


class Sample(NamedTuple):
    """An image not decoded yet: its name in the source, where a person finds it, its bytes or file."""

    name: str
    location: str
    encoded: Encoded


class Rows(Protocol):
    """Images by row number."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What identifies the image in its source."""
        ...

    def location(self, row: int) -> str:
        """Where a person finds it."""
        ...

    def encoded(self, row: int) -> Encoded:
        """Its bytes or file. Raises OSError where it cannot be read."""
        ...


class FileRows:
    """Image files, by path relative to a folder, which is a local path or a URL. Names may be whole paths or URLs too."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder = folder.rstrip("/") or "/"
        self._names = datasets.Dataset.from_dict({"name": list(names)}, features=_TEXT)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        name: str = self._names[row]["name"]
        return name

    def location(self, row: int) -> str:
        name = self.name(row)
        return name if name.startswith("/") or "://" in name else f"{self._folder.rstrip('/')}/{name}"

    def encoded(self, row: int) -> Encoded:
        location = self.location(row)
        if "://" not in location:
            return Path(location)
        # Asked for in every process anew: many filesystems do not survive a fork. fsspec keeps the instances of a process.
        filesystem, path = fsspec.core.url_to_fs(location)
        content: bytes = filesystem.cat_file(path)
        return content


class TableRows:
    """Images in one column of an Arrow table, as bytes or as {bytes, path}.

    Args:
        path: of the source, for messages; folder: that relative paths in the column begin at.
        numbers: of the rows in the source, where the table holds only some of them.
    """

    def __init__(
        self, path: str, table: pa.Table, column: str, folder: Path, numbers: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self._path, self._folder, self._numbers = path, folder, None if numbers is None else np.asarray(numbers)
        images = table.select([column]).rename_columns(["image"]).replace_schema_metadata(None)
        self._rows = datasets.Dataset(InMemoryTable(images))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        return str(row if self._numbers is None else self._numbers[row])

    def location(self, row: int) -> str:
        return f"{self._path}, row {self.name(row)}"

    def encoded(self, row: int) -> Encoded:
        return image_of_cell(self._rows[row]["image"], self._folder)


def image_of_cell(cell: Any, folder: Path) -> Encoded:
    """The image in a cell of a table: bytes, or a struct of bytes and path."""
    if not isinstance(cell, dict):
        return cell if cell is None or isinstance(cell, bytes) else folder / str(cell)
    if cell.get("bytes"):
        content: bytes = cell["bytes"]
        return content
    return folder / cell["path"] if cell.get("path") else None


class TarRows:
    """Image members of local WebDataset tar files, read in place by offset and size.

    Args:
        folder: that the files' names are relative to.
        labels: whether to read the `.cls` members.
    """

    def __init__(self, folder: str, files: Sequence[str], *, labels: bool) -> None:
        self._files, self._folder = [Path(file) for file in files], folder
        columns: dict[str, list[Any]] = {"file": [], "name": [], "offset": [], "size": []}
        found: list[int | None] = []
        for number, file in enumerate(self._files):
            classes: dict[str, int] = {}
            first = len(columns["name"])
            for member, content in walk_tar(file, labels=labels):
                if content is not None:
                    classes[stem_of(member.name)] = class_number(content, f"{file}, {member.name}")
                elif is_image(member.name):
                    row = (number, member.name, member.offset_data, member.size)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
            found += [classes.get(stem_of(name)) for name in columns["name"][first:]]
        self._rows = datasets.Dataset.from_dict(columns, features=_MEMBER)
        given = any(label is not None for label in found)
        self.labels = [NO_LABEL if label is None else max(label, NO_LABEL) for label in found] if given else None

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        entry = self._rows[row]
        return member_name(self._folder, str(self._files[entry["file"]]), entry["name"])

    def location(self, row: int) -> str:
        entry = self._rows[row]
        return f"{self._files[entry['file']]}, {entry['name']}"

    def encoded(self, row: int) -> Encoded:
        entry = self._rows[row]
        with self._files[entry["file"]].open("rb") as file:
            file.seek(entry["offset"])
            return file.read(entry["size"])


class ManifestRows:
    """Rows of other sources: part and row of each image. `numbered`: names begin with the number of the part."""

    def __init__(
        self, parts: Sequence[Rows], part_of_row: Sequence[int], row_in_part: Sequence[int], *, numbered: bool = True
    ) -> None:
        self._parts, self._numbered = parts, numbered
        self._rows = datasets.Dataset.from_dict({"part": part_of_row, "row": row_in_part})

    def __len__(self) -> int:
        return len(self._rows)

    def _find(self, row: int) -> tuple[Rows, int]:
        entry = self._rows[row]
        return self._parts[entry["part"]], entry["row"]

    def name(self, row: int) -> str:
        part, inner = self._find(row)
        return f"{self._rows[row]['part']}/{part.name(inner)}" if self._numbered else part.name(inner)

    def location(self, row: int) -> str:
        part, inner = self._find(row)
        return part.location(inner)

    def encoded(self, row: int) -> Encoded:
        part, inner = self._find(row)
        return part.encoded(inner)


_TEXT = datasets.Features(name=datasets.Value("string"))
_MEMBER = datasets.Features(
    file=datasets.Value("int32"),
    name=datasets.Value("string"),
    offset=datasets.Value("int64"),
    size=datasets.Value("int64"),
)


def parent_of(file: str) -> Path:
    """The folder that relative paths in a Parquet file begin at."""
    return Path(file.rpartition("/")[0] or ".")


def is_image(name: str) -> bool:
    """Whether a file name is one of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem_of(name: str) -> str:
    """What the members of one WebDataset sample share: the path up to the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


def class_number(content: bytes, where: str) -> int:
    """The number in a `.cls` member."""
    try:
        return int(np.int32(int(content.decode().strip())))
    except (ValueError, OverflowError):
        raise UserError(f"{where}: holds no class number; set labels: none, or mend it") from None


def walk_tar(file: Path, *, labels: bool) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """(member, content of a .cls member or None) of a local tar file in order; the images are not read."""
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would remember every member it has seen
                member.name = member.name.encode(errors="backslashreplace").decode()  # of bytes that are no UTF-8
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends after the file")
                    opened = archive.extractfile(member) if labels and member.name.endswith(".cls") else None
                    yield member, opened.read(64) if opened else None
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:  # sizes that nothing has
        raise unreadable_tar(str(file), error) from None


def unreadable_tar(file: str, error: Exception) -> UserError:
    """What to tell when a tar file is none."""
    return UserError(f"{file}: not readable as an uncompressed tar file ({error}); fetch or pack it again")


def member_name(folder: str, file: str, member: str) -> str:
    """What identifies a member of a tar file in its source: the file's path relative to the source's folder, and the member."""
    return f"{file.removeprefix(folder.rstrip('/') + '/')}/{member}"
