"""How images lie in a source: files, rows of Arrow tables, members of tar files, or rows of other sources that a manifest names.

Every class here answers the same questions about a row: its name (relative path, row number, or tar file and member), where a person finds it,
its bytes or file. Lists live in Arrow memory, so that loader workers share them.
"""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from shared.errors import UserError
from shared.files import IMAGE_SUFFIXES

Encoded = bytes | Path | None
"""An image that is not decoded yet: its bytes, its file, or nothing where its row is empty."""


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
    """Image files, by path relative to a folder.

    Args:
        folder: local path or URL; "" where names are whole paths.
        filesystem: of fsspec, where the folder is a URL.
    """

    def __init__(self, folder: str, names: Sequence[str], filesystem: Any = None) -> None:
        self._folder, self._filesystem = folder.rstrip("/") if folder != "/" else folder, filesystem
        self._names = datasets.Dataset.from_dict({"name": list(names)}, features=_TEXT)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        name: str = self._names[row]["name"]
        return name

    def location(self, row: int) -> str:
        name = self.name(row)
        return f"{self._folder}/{name}" if self._folder and not name.startswith("/") and "://" not in name else name

    def encoded(self, row: int) -> Encoded:
        location = self.location(row)
        if self._filesystem is None:
            return Path(location)
        content: bytes = self._filesystem.cat_file(location)
        return content


class TableRows:
    """Images in one column of an Arrow table, as bytes or as {bytes, path}.

    Args:
        path: of the source, for messages; folder: that relative paths in the column begin at.
    """

    def __init__(self, path: str, table: pa.Table, column: str, folder: Path) -> None:
        self._path, self._folder = path, folder
        images = table.select([column]).rename_columns(["image"]).replace_schema_metadata(None)
        self._rows = datasets.Dataset(InMemoryTable(images))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        return str(row)

    def location(self, row: int) -> str:
        return f"{self._path}, row {row}"

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
    """Image members of local WebDataset tar files, read in place by offset and size."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        columns: dict[str, list[Any]] = {"file": [], "name": [], "offset": [], "size": []}
        labels: list[int | None] = []
        for number, file in enumerate(files):
            classes: dict[str, int] = {}
            first = len(columns["name"])
            for member, content in walk_tar(file):
                if content is not None:
                    classes[stem_of(member.name)] = class_number(content, f"{file}, {member.name}")
                elif is_image(member.name):
                    row = (number, member.name, member.offset_data, member.size)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
            labels += [classes.get(stem_of(name)) for name in columns["name"][first:]]
        self._rows = datasets.Dataset.from_dict(columns, features=_MEMBER)
        self.labels = [-1 if label is None else label for label in labels] if any_given(labels) else None

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        entry = self._rows[row]
        return f"{self._files[entry['file']].name}/{entry['name']}"

    def location(self, row: int) -> str:
        entry = self._rows[row]
        return f"{self._files[entry['file']]}, {entry['name']}"

    def encoded(self, row: int) -> Encoded:
        entry = self._rows[row]
        with self._files[entry["file"]].open("rb") as file:
            file.seek(entry["offset"])
            return file.read(entry["size"])


class ManifestRows:
    """Rows of other sources: part and row of each image."""

    def __init__(self, parts: Sequence[Rows], part_of_row: Sequence[int], row_in_part: Sequence[int]) -> None:
        self._parts = parts
        self._rows = datasets.Dataset.from_dict({"part": part_of_row, "row": row_in_part})

    def __len__(self) -> int:
        return len(self._rows)

    def _find(self, row: int) -> tuple[Rows, int]:
        entry = self._rows[row]
        return self._parts[entry["part"]], entry["row"]

    def name(self, row: int) -> str:
        part, inner = self._find(row)
        return f"{self._rows[row]['part']}/{part.name(inner)}"

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
        return int(content.decode().strip())
    except ValueError:
        raise UserError(f"{where}: holds no class number; set labels: none, or mend it") from None


def walk_tar(file: Path) -> Any:
    """(member, content of a .cls member or None) of a tar file in order, without reading the images."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile():
                    opened = archive.extractfile(member) if member.name.endswith(".cls") else None
                    yield member, opened.read() if opened else None
    except tarfile.TarError as error:
        raise UserError(f"{file}: not readable as an uncompressed tar file ({error})") from None


def any_given(labels: Sequence[int | None]) -> bool:
    """Whether any row has a label."""
    return any(label is not None for label in labels)
