"""Row groups of Parquet files: what a source of them is read by where it is not loaded whole."""

from collections.abc import Generator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from stage1_ssld.data_config import SourceConfig
from stage1_ssld.formats import Sample, image_of_cell, parent_of
from stage1_ssld.listing import Listing, filesystem_of, unreadable_parquet

_ROWS_AT_A_TIME = 64
_BUFFER = 1 << 20


@dataclass(frozen=True)
class RowGroupShard:
    """One row group of a Parquet file; `first` is the number of its first row in the whole source `path`."""

    path: str
    file: str
    group: int
    first: int
    length: int
    column: str

    @property
    def name(self) -> str:
        """Of the shard."""
        return f"{self.file}#{self.group}"

    def samples(self, start: int = 0) -> Generator[Sample]:
        """The images from row `start` of the group on; a few of them are in memory at a time."""
        filesystem, inner = filesystem_of(self.file)
        with pq.ParquetFile(inner, filesystem=filesystem, buffer_size=_BUFFER, pre_buffer=False) as opened:
            row = 0
            for batch in opened.iter_batches(
                _ROWS_AT_A_TIME, row_groups=[self.group], columns=[self.column], use_threads=False
            ):
                for index in range(max(0, start - row), len(batch)):
                    number = self.first + row + index
                    encoded = image_of_cell(batch.column(0)[index].as_py(), parent_of(self.file))
                    yield Sample(str(number), f"{self.path}, row {number}", encoded)
                row += len(batch)

    def table(self) -> pa.Table:
        """The group's images, all at once."""
        filesystem, inner = filesystem_of(self.file)
        with pq.ParquetFile(inner, filesystem=filesystem) as opened:
            return opened.read_row_group(self.group, columns=[self.column]).replace_schema_metadata(None)


def row_groups(listing: Listing, config: SourceConfig) -> list[RowGroupShard]:
    """The row groups of a source's files, in order. Raises UserError for a file that is not Parquet or has no column of images."""
    shards: list[RowGroupShard] = []
    first = 0
    for file in listing.files:
        filesystem, inner = filesystem_of(file)
        try:
            with pq.ParquetFile(inner, filesystem=filesystem) as opened:
                metadata, names = opened.metadata, opened.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            raise unreadable_parquet(file, error) from None
        if config.image_column not in names:
            raise UserError(
                f"{file}: has no column {config.image_column!r} (it has {', '.join(names)}); set image_column"
            )
        for group in range(metadata.num_row_groups):
            length = metadata.row_group(group).num_rows
            if length:
                shards.append(RowGroupShard(config.path, file, group, first, length, config.image_column))
            first += length
    if not shards:
        raise UserError(f"{config.path}: holds no images")
    return shards
