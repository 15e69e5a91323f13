"""Images of a source by row: files, rows of Arrow tables, members of tar files, or rows of other sources that a manifest names.

Every class implements `Rows`: the name of a row (relative path, row number, or tar file and member), its location for messages, and its bytes or
file. Lists are held in Arrow memory, so that loader workers share them.
"""

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, escaped, is_hidden, looks_like_image, says_nothing
from ssld.shared.tally import Tally
from ssld.stage1_ssld.data.batch import NO_LABEL

Encoded = bytes | Path | None
"""Encoded image: its bytes, its file, or None for an empty row."""


class Sample(NamedTuple):
    """Encoded image with its name in the source and its location for messages."""

    name: str
    location: str
    encoded: Encoded


class Rows(Protocol):
    """Images by row number."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Name that identifies the image in its source."""
        ...

    def location(self, row: int) -> str:
        """Location for messages: path or URL, and row or member."""
        ...

    def encoded(self, row: int) -> Encoded:
        """Bytes or file of the image. Raises OSError if it cannot be read."""
        ...


class FileRows:
    """Image files by path relative to a folder (local or URL); names may also be absolute paths or URLs.

    File names are bytes and not always UTF-8; messages and keys show them `escaped`.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder = folder.rstrip("/") or "/"
        self._names = datasets.Dataset.from_dict({"name": [os.fsencode(name) for name in names]}, features=_BYTES)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        return escaped(self._name(row))

    def location(self, row: int) -> str:
        return escaped(self._location(row))

    def _name(self, row: int) -> str:
        return os.fsdecode(self._names[row]["name"])

    def _location(self, row: int) -> str:
        name = self._name(row)
        return name if name.startswith("/") or "://" in name else f"{self._folder.rstrip('/')}/{name}"

    def encoded(self, row: int) -> Encoded:
        location = self._location(row)
        if "://" not in location:
            return Path(location)
        # Looked up in every process: many filesystems do not survive a fork, and fsspec caches the instances per process.
        filesystem, path = fsspec.core.url_to_fs(location)
        content: bytes = filesystem.cat_file(path)
        return content


class TableRows:
    """Images in one column of an Arrow table, as bytes or as {bytes, path}.

    Args:
        path: path of the source, for messages.
        table: table with the images.
        column: name of the image column.
        folder: folder that paths in the column are relative to.
        numbers: row numbers in the source, if the table holds only some of its rows.
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
    """Image in a table cell: bytes, or a struct of bytes and path."""
    if not isinstance(cell, dict):
        return cell if cell is None or isinstance(cell, bytes) else folder / str(cell)
    if cell.get("bytes"):
        content: bytes = cell["bytes"]
        return content
    return folder / cell["path"] if cell.get("path") else None


class TarRows:
    """Image members of local WebDataset tar files, read in place by offset and size.

    Args:
        folder: folder that the files' names are relative to.
        files: paths of the tar files.
        labels: whether to read the `.cls` members.
        field: part of the image's name after the first dot, if a sample has several images.

    Attributes:
        labels: class number per row, NO_LABEL where a sample has none; None if no sample has one.
        problem: reason why `.cls` members are not used as labels; None without one.
        tally: counts of images and other members.
    """

    def __init__(self, folder: str, files: Sequence[str], *, labels: bool, field: str) -> None:
        self.problem: str | None = None
        self.tally = Tally()
        self._files, self._folder = [Path(file) for file in files], folder
        columns: dict[str, list[Any]] = {"file": [], "name": [], "offset": [], "size": []}
        numbers: list[int | None] = []
        for number, file in enumerate(self._files):
            names: list[str] = []
            classes: dict[str, int | None] = {}
            members = self._images(file, classes if labels else None)
            for name, (offset, size) in one_of_a_sample(members, str(file), field, self.tally):
                for column, value in zip(columns.values(), (number, escaped(name), offset, size), strict=True):
                    column.append(value)
                names.append(name)
            numbers += [classes.get(stem_of(name)) for name in names]
        self._rows = datasets.Dataset.from_dict(columns, features=_MEMBER)
        self.tally.keep("image", len(numbers))
        given = any(label is not None for label in numbers) and not self.problem
        self.labels = [NO_LABEL if label is None else max(label, NO_LABEL) for label in numbers] if given else None

    def _images(self, file: Path, classes: dict[str, int | None] | None) -> Iterator[tuple[str, tuple[int, int]]]:
        """(name, (offset, size)) of the images of a tar file; `.cls` members fill `classes`."""
        for member, archive in walk_tar(file, self.tally):
            if is_image(member.name, head_of(archive, member)):
                yield member.name, (member.offset_data, member.size)
            elif classes is not None and member.name.endswith(".cls"):
                label = class_number(content_of(archive, member).read())
                stem = stem_of(member.name)
                if label is None:
                    self.problem = f"{file}, {escaped(member.name)}: is not a class number; correct it"
                elif classes.get(stem, label) != label:
                    self.problem = f"{file}, {escaped(member.name)}: its sample has another class number too; keep one"
                classes[stem] = label

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
    """Rows of other sources, by part and row; with `numbered`, names begin with the number of the part."""

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


_BYTES = datasets.Features(name=datasets.Value("binary"))
_MEMBER = datasets.Features(
    file=datasets.Value("int32"),
    name=datasets.Value("string"),
    offset=datasets.Value("int64"),
    size=datasets.Value("int64"),
)


def parent_of(file: str) -> Path:
    """Folder that paths in a Parquet file are relative to."""
    return Path(file.rpartition("/")[0] or ".")


def is_image(name: str, head: bytes) -> bool:
    """Whether a member of a tar file is an image, by its suffix, or by its first bytes if it has no telling suffix."""
    if is_hidden(name):
        return False
    return name.lower().endswith(IMAGE_SUFFIXES) or (says_nothing(name) and looks_like_image(head))


def stem_of(name: str) -> str:
    """Common part of the names of one WebDataset sample: the path up to the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


MemberT = TypeVar("MemberT")


def one_of_a_sample(
    members: Iterable[tuple[str, MemberT]], file: str, field: str, tally: Tally
) -> Iterator[tuple[str, MemberT]]:
    """Choose one image of each WebDataset sample, in order.

    It is the only image, the one whose name continues with `field` after the first dot, or the one with nothing but a suffix after it. Others, such
    as masks, are left out and counted.

    Args:
        members: (name, payload) of the images of a tar file, in its order.
        file: tar file, for messages.
        field: see `TarRows`.
        tally: counts the images left out.

    Raises:
        UserError: several images fit, because names differ only after their first dot, or the members of a sample are not adjacent.
    """
    stems: set[str] = set()
    for stem, grouped in itertools.groupby(members, key=lambda member: stem_of(member[0])):
        group = list(grouped)
        ends = [name.rpartition("/")[2].partition(".")[2] for name, _ in group]
        if stem in stems:
            if any("." not in end for end in ends):
                raise UserError(
                    f"{file}: {escaped(group[0][0])} is not adjacent to the other images of its sample; pack the file again, sample by sample"
                )
            tally.skip("file", "images beside that of their sample", f"{file}, {escaped(group[0][0])}", len(group))
            continue
        stems.add(stem)
        chosen = [at for at, end in enumerate(ends) if end == field or end.startswith(f"{field}.")]
        chosen = chosen if len(chosen) == 1 else [at for at, end in enumerate(ends) if "." not in end]
        if len(group) > 1 and len(chosen) != 1:
            raise UserError(
                f"{file}: {escaped(group[0][0])} and {escaped(group[1][0])} are one sample, because their names agree up to the first dot; pack the "
                "file again with names without other dots, or set image_column to the part of the images' names between the first dot and the suffix"
            )
        which = chosen[0] if len(group) > 1 else 0
        others = [name for at, (name, _) in enumerate(group) if at != which]
        if others:
            tally.skip("file", "images beside that of their sample", f"{file}, {escaped(others[0])}", len(others))
        yield group[which]


def class_number(content: bytes) -> int | None:
    """Number in a `.cls` member; None if it is not a number."""
    text = content.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,9}", text) else None


def walk_tar(file: Path, tally: Tally) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Iterate over the files in a local tar file without reading their contents. Links to images, which have no content, are counted as dropped."""
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it would keep every member in memory
                member.name = member.name.encode(errors="backslashreplace").decode()  # bytes that are not UTF-8
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends after the file")
                    yield member, archive
                elif (member.islnk() or member.issym()) and member.name.lower().endswith(IMAGE_SUFFIXES):
                    tally.drop("image", "that are links inside a tar file", f"{file}, {escaped(member.name)}")
            if not check_end(archive):
                tally.change("file", "without an end marker, so perhaps truncated", file)
    # A damaged header may hold an impossible size.
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise unreadable_tar(str(file), error) from None


def check_end(archive: tarfile.TarFile) -> bool:
    """Whether a tar file that was read to its end has an end marker.

    Raises tarfile.ReadError if other bytes are there: `tarfile` treats a damaged or truncated header as the end, and does not read what `cat`
    appended after it.
    """
    content: Any = archive.fileobj
    if hasattr(content, "seekable"):  # otherwise it is a stream, which is past the marker already
        content.seek(archive.offset)
    length = 0
    while block := content.read(1 << 20):
        length += len(block)
        if block.strip(b"\0") or length < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"the bytes at {archive.offset} are neither a file nor the end marker")
    return length > 0


def head_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """First bytes of a member whose suffix does not tell whether it is an image; b"" for others."""
    return content_of(archive, member).read(64) if says_nothing(member.name) else b""


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """Open a member, which is a file, for reading."""
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    return content


def unreadable_tar(file: str, error: Exception) -> UserError:
    """Make the UserError for a file that is not a readable tar file."""
    return UserError(f"{file}: not readable as an uncompressed tar file ({error}); download or pack it again")


def member_name(folder: str, file: str, member: str) -> str:
    """Name of a tar member in its source: the file's path relative to the source's folder, and the member."""
    return f"{file.removeprefix(folder.rstrip('/') + '/')}/{escaped(member)}"
