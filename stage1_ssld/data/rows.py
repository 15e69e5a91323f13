"""How images lie in a source: files, rows of Arrow tables, members of tar files, or rows of other sources that a manifest names.

Every class here answers the same questions about a row: its name (relative path, row number, or tar file and member), where a person finds it,
its bytes or file. Lists live in Arrow memory, so that loader workers share them.
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
    """Image files, by path relative to a folder, which is a local path or a URL. Names may be whole paths or URLs too.

    File names are bytes, and not always UTF-8: what is told of them is `escaped`.
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
        field: what the name of the image ends in behind the first dot, where a sample has several.

    Attributes:
        labels: class number of every row, NO_LABEL where one has none; None without any.
        problem: why there are none, where there are members that look like them.
        tally: the images, and what lies beside them.
    """

    def __init__(self, folder: str, files: Sequence[str], *, labels: bool, field: str) -> None:
        self.problem: str | None = None
        self.tally = Tally()
        self._files, self._folder = [Path(file) for file in files], folder
        columns: dict[str, list[Any]] = {"file": [], "name": [], "offset": [], "size": []}
        found: list[int | None] = []
        for number, file in enumerate(self._files):
            names: list[str] = []
            classes: dict[str, int | None] = {}
            members = self._images(file, classes if labels else None)
            for name, (offset, size) in one_of_a_sample(members, str(file), field, self.tally):
                for column, value in zip(columns.values(), (number, escaped(name), offset, size), strict=True):
                    column.append(value)
                names.append(name)
            found += [classes.get(stem_of(name)) for name in names]
        self._rows = datasets.Dataset.from_dict(columns, features=_MEMBER)
        self.tally.keep("image", len(found))
        given = any(label is not None for label in found) and not self.problem
        self.labels = [NO_LABEL if label is None else max(label, NO_LABEL) for label in found] if given else None

    def _images(self, file: Path, classes: dict[str, int | None] | None) -> Iterator[tuple[str, tuple[int, int]]]:
        """(name, (offset, size)) of the images of a tar file; fills `classes` from its other members."""
        for member, archive in walk_tar(file, self.tally):
            if is_image(member.name, head_of(archive, member)):
                yield member.name, (member.offset_data, member.size)
            elif classes is not None and member.name.endswith(".cls"):
                label = class_number(content_of(archive, member).read())
                stem = stem_of(member.name)
                if label is None:
                    self.problem = f"{file}, {escaped(member.name)}: holds no class number; correct it"
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


_BYTES = datasets.Features(name=datasets.Value("binary"))
_MEMBER = datasets.Features(
    file=datasets.Value("int32"),
    name=datasets.Value("string"),
    offset=datasets.Value("int64"),
    size=datasets.Value("int64"),
)


def parent_of(file: str) -> Path:
    """The folder that relative paths in a Parquet file begin at."""
    return Path(file.rpartition("/")[0] or ".")


def is_image(name: str, head: bytes) -> bool:
    """Whether a member of a tar file is an image: by its name, or where that says nothing by its first bytes."""
    if is_hidden(name):
        return False
    return name.lower().endswith(IMAGE_SUFFIXES) or (says_nothing(name) and looks_like_image(head))


def stem_of(name: str) -> str:
    """What the members of one WebDataset sample share: the path up to the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"


MemberT = TypeVar("MemberT")


def one_of_a_sample(
    members: Iterable[tuple[str, MemberT]], file: str, field: str, tally: Tally
) -> Iterator[tuple[str, MemberT]]:
    """Of each WebDataset sample the image that is meant, in order.

    That is the only one; or the one whose name goes on, behind the first dot, with `field` or with nothing but a suffix. Others, such as masks, are
    left out and counted.

    Args:
        members: (name, anything) of the images of a tar file, in its order.

    Raises:
        UserError: several could be meant, as where names differ behind their first dot alone, or a sample's members are not together.
    """
    seen: set[str] = set()
    for stem, grouped in itertools.groupby(members, key=lambda member: stem_of(member[0])):
        group = list(grouped)
        ends = [name.rpartition("/")[2].partition(".")[2] for name, _ in group]
        if stem in seen:
            if any("." not in end for end in ends):
                raise UserError(
                    f"{file}: {escaped(group[0][0])} does not lie beside the other images of its sample; pack the file again, sample after sample"
                )
            tally.skip("file", "images beside that of their sample", f"{file}, {escaped(group[0][0])}", len(group))
            continue
        seen.add(stem)
        chosen = [at for at, end in enumerate(ends) if end == field or end.startswith(f"{field}.")]
        chosen = chosen if len(chosen) == 1 else [at for at, end in enumerate(ends) if "." not in end]
        if len(group) > 1 and len(chosen) != 1:
            raise UserError(
                f"{file}: {escaped(group[0][0])} and {escaped(group[1][0])} are one sample, named up to the first dot; pack the file again with "
                "names that have no dot but that of the suffix, or set image_column to what the names of the images go on with behind the first dot"
            )
        which = chosen[0] if len(group) > 1 else 0
        others = [name for at, (name, _) in enumerate(group) if at != which]
        if others:
            tally.skip("file", "images beside that of their sample", f"{file}, {escaped(others[0])}", len(others))
        yield group[which]


def class_number(content: bytes) -> int | None:
    """The number in a `.cls` member; None where it is none."""
    text = content.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,9}", text) else None


def walk_tar(file: Path, tally: Tally) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The files in a local tar file, in order; their contents are not read. Links to images are counted: they have no content of their own."""
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would remember every member it has seen
                member.name = member.name.encode(errors="backslashreplace").decode()  # of bytes that are no UTF-8
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends after the file")
                    yield member, archive
                elif (member.islnk() or member.issym()) and member.name.lower().endswith(IMAGE_SUFFIXES):
                    tally.drop("image", "that are links inside a tar file", f"{file}, {escaped(member.name)}")
            if not check_end(archive):
                tally.change("file", "without the mark of its end, so perhaps cut off", file)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:  # sizes that nothing has
        raise unreadable_tar(str(file), error) from None


def check_end(archive: tarfile.TarFile) -> bool:
    """Whether a tar file that was read to its end has the mark of its end.

    Raises tarfile.ReadError where something else stands there: `tarfile` takes a damaged header, and a file that is cut within one, for the end, and
    does not read what was put behind it by `cat`.
    """
    content: Any = archive.fileobj
    if hasattr(content, "seekable"):  # else it is read as it comes, and the mark is already behind it
        content.seek(archive.offset)
    length = 0
    while block := content.read(1 << 20):
        length += len(block)
        if block.strip(b"\0") or length < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"what stands at byte {archive.offset} is neither a file nor its end")
    return length > 0


def head_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The first bytes of a member whose name does not say whether it is an image."""
    return content_of(archive, member).read(64) if says_nothing(member.name) else b""


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    return content


def unreadable_tar(file: str, error: Exception) -> UserError:
    """What to tell when a tar file is none."""
    return UserError(f"{file}: not readable as an uncompressed tar file ({error}); fetch or pack it again")


def member_name(folder: str, file: str, member: str) -> str:
    """What identifies a member of a tar file in its source: the file's path relative to the source's folder, and the member."""
    return f"{file.removeprefix(folder.rstrip('/') + '/')}/{escaped(member)}"
