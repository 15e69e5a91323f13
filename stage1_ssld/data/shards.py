"""Sources split into shards that are read in order: for streams, which have no index, and for sharing a pool among processes.

A shard yields encoded images under the names that the source by rows uses. Closing an iterator closes its files.
"""

import functools
import sys
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.errors import UserError
from ssld.shared.files import escaped, says_nothing
from ssld.shared.tally import Tally
from ssld.stage1_ssld.data.listing import ALL_SPLITS, Listing, filesystem_of, list_path, of_split, unreadable_parquet
from ssld.stage1_ssld.data.manifest import is_manifest
from ssld.stage1_ssld.data.row_groups import row_groups
from ssld.stage1_ssld.data.rows import (
    FileRows,
    Rows,
    Sample,
    check_end,
    content_of,
    is_image,
    member_name,
    one_of_a_sample,
    unreadable_tar,
)
from ssld.stage1_ssld.data.sources import HUB_SPLIT, ImageSource, list_rows
from ssld.stage1_ssld.data_config import SourceConfig

ROWS = 4096
"""Images per shard, for formats without shards of their own."""


class Shard(Protocol):
    """A part of a source; `name` is stable across runs, `length` is None where unknown before reading."""

    @property
    def name(self) -> str: ...

    @property
    def length(self) -> int | None: ...

    def samples(self, start: int = 0) -> Generator[Sample]:
        """Images in order, from number `start` on. Raises OSError if it cannot be read."""
        ...


@dataclass(frozen=True)
class RowShard:
    """Rows `first` to `last` (exclusive) of a source opened by rows."""

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
class TarShard:
    """One tar file, read from front to back. Names are relative to `folder`; `field` as in `TarRows`."""

    folder: str
    file: str
    field: str = "image"
    length: None = None

    @property
    def name(self) -> str:
        return self.file

    def samples(self, start: int = 0) -> Generator[Sample]:
        for number, (member, encoded) in enumerate(self.chosen(start)):
            if number >= start:
                name = member_name(self.folder, self.file, member)
                yield Sample(name, f"{self.file}, {escaped(member)}", encoded)

    def chosen(self, start: int = sys.maxsize) -> Iterator[tuple[str, bytes | None]]:
        """(name, content) of the image of every sample; contents before number `start` are None."""
        done = 0

        def members() -> Iterator[tuple[str, bytes | None]]:
            for name, head, opened in self._images():
                # `one_of_a_sample` reads the first member of the next sample before it yields the current one.
                yield name, head + opened.read() if done + 1 >= start else None

        for member in one_of_a_sample(members(), self.file, self.field, Tally()):
            yield member
            done += 1

    def _images(self) -> Iterator[tuple[str, bytes, IO[bytes]]]:
        """(name, bytes read to recognize it as an image, file with the rest) of the images. Other members of a local file are skipped by seeking; a
        remote file is read as a stream."""
        filesystem, inner = filesystem_of(self.file)
        try:
            with (
                open(inner, "rb") if filesystem is None else filesystem.open(inner, "rb") as raw,
                tarfile.open(fileobj=raw, mode="r:" if filesystem is None else "r|") as archive,
            ):
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # or it would keep every member in memory
                    if member.isfile():
                        opened = content_of(archive, member)
                        head = opened.read(64) if says_nothing(member.name) else b""
                        if is_image(member.name, head):
                            yield member.name, head, opened
                check_end(archive)
        except tarfile.TarError as error:
            raise unreadable_tar(self.file, error) from None


def count_samples(shard: Shard) -> int:
    """Number of images in a shard; a shard of unknown length is read through, once per process."""
    return _members(shard) if isinstance(shard, TarShard) else shard.length or 0


@functools.cache
def _members(shard: TarShard) -> int:
    return sum(1 for _ in shard.chosen())


def source_shards(config: SourceConfig, number: int, *, streaming: bool, tally: Tally | None = None) -> list[Shard]:
    """List the shards of a source, in order.

    Args:
        number: number of the source, for `ImageSource`.
        streaming: read Parquet by row group and tar files from front to back, without loading or indexing a whole file.
        tally: counts what is known of the images before reading.

    Raises:
        UserError: see `ImageSource`; a label file, which would leave out images that shards contain.
    """
    if config.labels not in ("auto", "none"):
        raise UserError(f"{config.path}: a label file is not supported for streams and pools; set labels: none")
    config, tally = config.model_copy(update={"labels": "none"}), Tally() if tally is None else tally
    if not streaming or _is_manifest(config.path):
        source = ImageSource(config, number)
        tally.merge(source.tally)
        return _runs(source.rows, config.path)
    hub = config.path.startswith("hub:")
    listing = list_path(
        f"hf://datasets/{config.path.removeprefix('hub:')}" if hub else config.path, ALL_SPLITS if hub else config.split
    )
    if hub and listing.kind == "images":
        listing = list_path(listing.folder, config.split)
    elif hub:
        listing = _of_split(listing, config)
    tally.merge(listing.tally)
    if listing.kind == "parquet":
        groups = row_groups(listing, config)
        tally.keep("image", sum(group.length for group in groups))
        return list[Shard](groups)
    if listing.kind == "tar":
        return [TarShard(listing.folder, file, config.image_column) for file in listing.files]
    if listing.kind == "list":
        listed = list_rows(listing, config)
        tally.merge(listed.tally)
        return _runs(listed.rows, config.path)
    return _runs(FileRows(listing.folder, listing.files), config.path)


def _is_manifest(path: str) -> bool:
    """Whether a source is a manifest, which names rows of other sources and holds no images."""
    if not path.endswith(".parquet") or "*" in path:
        return False
    filesystem, inner = filesystem_of(path)
    try:
        return is_manifest(pq.read_schema(inner, filesystem=filesystem))
    except FileNotFoundError:
        return False  # list_path reports it
    except (OSError, pa.ArrowException) as error:
        raise unreadable_parquet(path, error) from None


def _runs(rows: Rows, path: str) -> list[Shard]:
    if len(rows) == 0:
        raise UserError(f"{path}: holds no images")
    return [RowShard(rows, path, first, min(first + ROWS, len(rows))) for first in range(0, len(rows), ROWS)]


def _of_split(listing: Listing, config: SourceConfig) -> Listing:
    """Keep the files of the requested configuration and split of a hub data set."""
    files, split = listing.files, config.split or HUB_SPLIT
    place = {file: file.removeprefix(listing.folder).strip("/") for file in files}
    if config.subset is not None:
        files = [file for file in files if config.subset in place[file].split("/")[:-1]]
    files = [file for file in files if of_split(place[file], split)]
    if not files:
        raise UserError(
            f"{config.path}: none of its {len(listing.files)} files belongs to the split {split!r}; set split or subset"
        )
    if config.subset is None:
        # A data set with one configuration has its files in one folder, or in one per split.
        folders = {place[file].rpartition("/")[0] for file in files}
        names = {"/".join(part for part in folder.split("/") if part != split) for folder in folders}
        if len(names) > 1:
            first = ", ".join(repr(name) for name in sorted(names)[:5])
            raise UserError(
                f"{config.path}: has several configurations ({first}{', ...' if len(names) > 5 else ''}); set subset to one of them, "
                f"or path to the files to use: {listing.folder}/FOLDER/*.{'tar' if listing.kind == 'tar' else 'parquet'}"
            )
    return replace(listing, files=files)
