"""Row groups of Parquet files, read in order or by row.

By row, small sources are held in memory. Of a larger one a process holds one row group at a time and reads a whole group for one row: its images
should be read in order, be stored in small groups (`datasets` writes 100 rows), or be streamed.
"""

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.listing import PARQUET_ERRORS, Listing, filesystem_of, unreadable_parquet
from ssld.stage1_ssld.data.rows import Encoded, Rows, Sample, TableRows, image_of_cell, parent_of
from ssld.stage1_ssld.data_config import SourceConfig

_ROWS_AT_A_TIME = 64
_BUFFER = 1 << 20
IN_MEMORY = 1 << 30
"""Largest source that is held in memory, in bytes of its images."""


@dataclass(frozen=True)
class RowGroupShard:
    """One row group of a Parquet file.

    Attributes:
        path: path of the source.
        file: path or URL of the Parquet file.
        group: index of the row group in the file.
        first: number of its first row in the whole source.
        length: number of rows.
        column: column of the images.
        size: bytes of its images.
    """

    path: str
    file: str
    group: int
    first: int
    length: int
    column: str
    size: int

    @property
    def name(self) -> str:
        """Name of the shard, stable across runs."""
        return f"{self.file}#{self.group}"

    def samples(self, start: int = 0) -> Generator[Sample]:
        """Images from row `start` of the group on; few are in memory at a time.

        Raises OSError if the file is damaged or disappears.
        """
        filesystem, inner = filesystem_of(self.file)
        try:
            with pq.ParquetFile(
                inner, filesystem=filesystem, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            ) as opened:
                batches = opened.iter_batches(
                    _ROWS_AT_A_TIME, row_groups=[self.group], columns=[self.column], use_threads=False
                )
                row = 0
                for batch in batches:
                    for index in range(max(0, start - row), len(batch)):
                        number = self.first + row + index
                        encoded = image_of_cell(batch.column(0)[index].as_py(), parent_of(self.file))
                        yield Sample(str(number), f"{self.path}, row {number}", encoded)
                    row += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise OSError(f"{self.name}: {error}") from None

    def table(self) -> pa.Table:
        """All images of the group."""
        filesystem, inner = filesystem_of(self.file)
        with pq.ParquetFile(
            inner, filesystem=filesystem, memory_map=filesystem is None, page_checksum_verification=True
        ) as opened:
            # Threads do not survive a fork.
            table = opened.read_row_group(self.group, columns=[self.column], use_threads=False)
            return table.replace_schema_metadata(None)


def row_groups(listing: Listing, config: SourceConfig) -> list[RowGroupShard]:
    """Row groups of a source's files, in order. Raises UserError for a file that is not Parquet or has no image column."""
    shards: list[RowGroupShard] = []
    first = 0
    for file in listing.files:
        filesystem, inner = filesystem_of(file)
        try:
            with pq.ParquetFile(inner, filesystem=filesystem) as opened:
                metadata, names = opened.metadata, opened.schema_arrow.names
        except PARQUET_ERRORS as error:
            raise unreadable_parquet(file, error) from None
        if config.image_column not in names:
            raise UserError(
                f"{file}: has no column {config.image_column!r} (it has {', '.join(names)}); set image_column"
            )
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group)
            length = rows.num_rows
            if length:
                columns = [rows.column(number) for number in range(rows.num_columns)]
                size = sum(
                    column.total_uncompressed_size
                    for column in columns
                    if column.path_in_schema.split(".")[0] == config.image_column
                )
                shards.append(RowGroupShard(config.path, file, group, first, length, config.image_column, size))
            first += length
    if not shards:
        raise UserError(f"{config.path}: holds no images")
    return shards


class GroupRows:
    """Images of row groups by row; the row group of the last image is held in memory.

    Args:
        chosen: ascending rows of the source to use; None: all.
        named: whether an image is named by its row in the source, or by its index among the chosen rows.
    """

    def __init__(self, path: str, groups: Sequence[RowGroupShard], chosen: np.ndarray | None, *, named: bool) -> None:
        self._path, self._groups, self._chosen, self._named = path, groups, chosen, named
        self._first = np.array([group.first for group in groups])
        self._held: tuple[int, int, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        return self._groups[-1].first + self._groups[-1].length if self._chosen is None else len(self._chosen)

    def name(self, row: int) -> str:
        return str(row if self._chosen is None or not self._named else self._chosen[row])

    def location(self, row: int) -> str:
        return f"{self._path}, row {self.name(row)}"

    def encoded(self, row: int) -> Encoded:
        number = int(row if self._chosen is None else self._chosen[row])
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        group = self._groups[which]
        if self._held is None or self._held[:2] != (os.getpid(), which):
            self._held = None  # freed before the next group is read
            try:
                self._held = (os.getpid(), which, group.table().column(0))
            except (OSError, pa.ArrowException) as error:
                raise OSError(f"{group.name}: {error}") from None
        return image_of_cell(self._held[2][number - group.first].as_py(), parent_of(group.file))


def parquet_rows(
    listing: Listing,
    path: str,
    groups: Sequence[RowGroupShard],
    chosen: np.ndarray | None = None,
    *,
    named: bool = False,
) -> Rows:
    """Open images of row groups by row, in memory if they take at most IN_MEMORY bytes. Arguments as of GroupRows."""
    share = [1.0] * len(groups)
    if chosen is not None:
        edges = np.searchsorted(chosen, [[group.first, group.first + group.length] for group in groups])
        share = [float(high - low) / group.length for (low, high), group in zip(edges, groups, strict=True)]
    if sum(part * group.size for part, group in zip(share, groups, strict=True)) > IN_MEMORY:
        return GroupRows(path, groups, chosen, named=named)
    tables = []
    for number, group in enumerate(groups):
        if chosen is None:
            tables.append(group.table())
        elif share[number]:
            low, high = edges[number]
            tables.append(group.table().take(chosen[low:high] - group.first))
    if not tables:
        tables.append(groups[0].table().slice(0, 0))
    # One `take` per group: a single one would join all chunks of the column, and above 2 GB of images its offsets overflow.
    return TableRows(
        path,
        pa.concat_tables(tables, promote_options="permissive"),
        groups[0].column,
        Path(listing.folder),
        chosen if named else None,
    )
