"""Sources cut into shards, each read in order: for streams, which have no index, and for sharing a pool among processes.

A shard gives the encoded images and their names, the same names as the source by rows gives. Iterators close their files when they are closed.
"""

import tarfile
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from shared.files import require_images
from stage1_ssld.data_config import SourceConfig
from stage1_ssld.formats import Encoded, FileRows, Rows, image_of_cell, is_image
from stage1_ssld.listing import Listing, filesystem_of, list_path, unreadable_parquet
from stage1_ssld.sources import ImageSource, read_list

ROWS = 4096
"""Images of a shard, where its format does not say."""


class Sample(NamedTuple):
    """An image not decoded yet: its name in the source, where a person finds it, its bytes or file."""

    name: str
    location: str
    encoded: Encoded


class Shard(Protocol):
    """A part of a source. `name` is the same at every start; `length` is None where only reading tells."""

    @property
    def name(self) -> str: ...

    @property
    def length(self) -> int | None: ...

    def samples(self, start: int = 0) -> Generator[Sample]:
        """Its images in order, from number `start`. Raises OSError where it cannot be read."""
        ...


@dataclass(frozen=True)
class RowShard:
    """Rows `first` to `last` (exclusive) of a source that is open by rows."""

    rows: Rows = field(repr=False)
    path: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.path}[{self.first}:{self.last}]"

    @property
    def length(self) -> int:
        return self.last - self.first

    def samples(self, start: int = 0) -> Generator[Sample]:
        for row in range(self.first + start, self.last):
            try:
                encoded = self.rows.encoded(row)
            except OSError:
                encoded = None
            yield Sample(self.rows.name(row), self.rows.location(row), encoded)


@dataclass(frozen=True)
class RowGroupShard:
    """One row group of a Parquet file; `first` is the number of its first row in the whole source."""

    path: str
    file: str
    group: int
    first: int
    length: int
    column: str
    remote: bool

    @property
    def name(self) -> str:
        return f"{self.file}#{self.group}"

    def samples(self, start: int = 0) -> Generator[Sample]:
        filesystem = filesystem_of(self.path)[0] if self.remote else None
        with pq.ParquetFile(self.file, filesystem=filesystem) as opened:
            cells = opened.read_row_group(self.group, columns=[self.column])[self.column]
        folder = Path(self.file).parent
        for row in range(start, self.length):
            number = self.first + row
            encoded = image_of_cell(cells[row].as_py(), folder)
            yield Sample(str(number), f"{self.path}, row {number}", encoded)


@dataclass(frozen=True)
class TarShard:
    """One tar file, read from its beginning to its end."""

    path: str
    file: str
    remote: bool
    length: None = None

    @property
    def name(self) -> str:
        return self.file

    def samples(self, start: int = 0) -> Generator[Sample]:
        base = self.file.rpartition("/")[2]
        number = 0
        with self._open() as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
            try:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would remember every member it has seen
                    if not member.isfile() or not is_image(member.name):
                        continue
                    number += 1
                    if number > start:
                        content = archive.extractfile(member)
                        encoded = content.read() if content else None
                        yield Sample(f"{base}/{member.name}", f"{self.file}, {member.name}", encoded)
            except tarfile.TarError as error:
                raise UserError(f"{self.file}: not readable as an uncompressed tar file ({error})") from None

    def count(self) -> int:
        """Images in it, found by reading it."""
        return sum(1 for _ in self.samples())

    def _open(self) -> Any:
        return filesystem_of(self.path)[0].open(self.file, "rb") if self.remote else open(self.file, "rb")


def source_shards(config: SourceConfig, number: int, *, streaming: bool) -> list[Shard]:
    """The shards of a source, in order.

    Args:
        number: of the source, for `ImageSource`.
        streaming: read Parquet by row group and tar files from front to back, without loading or indexing anything whole.

    Raises:
        UserError: see `ImageSource`.
    """
    if streaming and not _is_small(config):
        path = f"hf://datasets/{config.path.removeprefix('hub:')}" if config.path.startswith("hub:") else config.path
        listing = list_path(path)
        if listing.kind == "parquet":
            return _row_groups(path, listing, config)
        if listing.kind == "tar":
            return [TarShard(path, file, not listing.local) for file in _of_split(listing.files, config)]
        return _runs(_files(path, listing, config), config.path)
    source = ImageSource(config, number)
    return _runs(source.rows, config.path)


def _is_small(config: SourceConfig) -> bool:
    """Whether a source is a manifest: a list of rows, whose images lie elsewhere."""
    from stage1_ssld.manifest import is_manifest

    if not config.path.endswith(".parquet") or "://" in config.path or not Path(config.path).is_file():
        return False
    try:
        return is_manifest(pq.read_schema(config.path))
    except (OSError, pa.ArrowException) as error:
        raise unreadable_parquet(config.path, error) from None


def _runs(rows: Rows, path: str) -> list[Shard]:
    if len(rows) == 0:
        raise UserError(f"{path}: holds no images")
    return [RowShard(rows, path, first, min(first + ROWS, len(rows))) for first in range(0, len(rows), ROWS)]


def _files(path: str, listing: Listing, config: SourceConfig) -> Rows:
    if listing.kind == "list":
        names, _ = read_list(listing, path)
        folder = config.root if config.root is not None else path.rpartition("/")[0] or "."
        filesystem = None
        if "://" in folder:
            filesystem, folder = filesystem_of(folder)
        return FileRows(folder, names, filesystem)
    names = require_images(path) if listing.local and listing.folder else listing.files
    return FileRows(listing.folder, names, listing.filesystem)


def _row_groups(path: str, listing: Listing, config: SourceConfig) -> list[Shard]:
    shards: list[Shard] = []
    first = 0
    for file in _of_split(listing.files, config):
        try:
            with pq.ParquetFile(file, filesystem=listing.filesystem) as opened:
                metadata, names = opened.metadata, opened.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            raise unreadable_parquet(file, error) from None
        if config.image_column not in names:
            raise UserError(
                f"{file}: has no column {config.image_column!r} (it has {', '.join(names)}); set image_column"
            )
        for group in range(metadata.num_row_groups):
            length = metadata.row_group(group).num_rows
            shards.append(RowGroupShard(path, file, group, first, length, config.image_column, not listing.local))
            first += length
    if first == 0:
        raise UserError(f"{path}: holds no images")
    return shards


def _of_split(files: list[str], config: SourceConfig) -> list[str]:
    """Of a data set of the hub, the files of the split that is asked for; of anything else, all."""
    if not config.path.startswith("hub:"):
        return files
    chosen = [file for file in files if config.split in file.rpartition("/")[2] or f"/{config.split}/" in file]
    if not chosen:
        raise UserError(f"{config.path}: no file of the split {config.split!r} among its {len(files)} files; set split")
    return chosen
