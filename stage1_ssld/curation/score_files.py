"""Files of scores, hashes and embeddings, one per shard of a pool or of held-out images, and their readers.

Held-out images are the validation and training images that no selected image may resemble. Scores and hashes: one Parquet file per shard. An image is
identified by its row number over all files of its folder, in their order; an unreadable one has class -1. Embeddings of the images in close pairs:
one NumPy file per shard, float16 of unit length. Memory does not grow with the number of images.

N images, D numbers per embedding, P pairs.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.checksums import atomically_with_sum

UNREADABLE = -1
SCORED = pa.schema(
    [
        ("key", pa.string()),
        ("class", pa.int32()),
        ("score", pa.float32()),
        ("hash", pa.uint64()),
        ("mirrored", pa.uint64()),
    ]
)
"""Columns of an image of the pool: its name in the source, the teacher's most likely class and its probability, the perceptual hashes of the image
and of its mirror image."""
HELD_OUT = pa.schema([("key", pa.string()), ("class", pa.int32()), ("hash", pa.uint64()), ("mirrored", pa.uint64())])
"""Columns of a held-out image."""
EMBEDDED = pa.schema([("key", pa.string()), ("class", pa.int32())])
"""Columns of an image whose embedding is in a NumPy file beside; see clustering/."""
_UNREADABLE = b"unreadable"
_BLOCK = 4096  # pairs whose cosines are computed at a time


def shard_file(folder: Path, number: int) -> Path:
    """File of shard `number`."""
    return folder / f"{number:06d}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically, and its checksum."""
    with atomically_with_sum(path) as temporary:
        pq.write_table(table, temporary)


def write_shard(path: Path, columns: dict[str, Any], schema: pa.Schema, unreadable: Sequence[str]) -> None:
    """Write the file of one shard; `unreadable` are the locations of the images that could not be read."""
    table = pa.table(columns, schema=schema.with_metadata({_UNREADABLE: json.dumps(list(unreadable))}))
    write_table(path, table)


class Chunk(NamedTuple):
    """Consecutive rows of a file; `first` is the number of the first one over all files."""

    first: int
    columns: dict[str, np.ndarray]


class ScoreFiles:
    """Files of the shards 0 to `count` - 1 of one folder, read one row group at a time.

    Attributes:
        starts: number of the first row of each file, then the total number of rows.
        unreadable: locations of the images that could not be read.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [shard_file(folder, number) for number in range(count)]
        self.unreadable: list[str] = []
        lengths = []
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                lengths.append(file.metadata.num_rows)
                self.unreadable += json.loads(file.schema_arrow.metadata[_UNREADABLE])
        self.starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def chunks(self, *columns: str) -> Iterator[Chunk]:
        """Iterate over all rows in order, with one row group in memory."""
        for start, path in zip(self.starts[:-1].tolist(), self.paths, strict=True):
            first = start
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=list(columns))
                    yield Chunk(first, {name: table[name].to_numpy() for name in columns})
                    first += table.num_rows

    def column(self, name: str, ids_N: np.ndarray) -> np.ndarray:
        """Values of a numeric column at the rows `ids_N`, in any order."""
        order = np.argsort(ids_N, kind="stable")
        ids = ids_N[order]
        values: np.ndarray | None = None
        for chunk in self.chunks(name):
            low, high = np.searchsorted(ids, [chunk.first, chunk.first + len(chunk.columns[name])])
            if values is None:
                values = np.empty(len(ids), chunk.columns[name].dtype)
            values[order[low:high]] = chunk.columns[name][ids[low:high] - chunk.first]
        assert values is not None
        return values

    def keys(self, ids_N: np.ndarray) -> pa.Array:
        """Keys of ascending rows `ids_N`."""
        parts = []
        for start, end, path in zip(self.starts[:-1], self.starts[1:], self.paths, strict=True):
            low, high = np.searchsorted(ids_N, [start, end])
            if low < high:
                keys = pq.read_table(path, columns=["key"])["key"]
                parts.append(keys.take(pa.array(ids_N[low:high] - start)).combine_chunks())
        return pa.concat_arrays(parts) if parts else pa.array([], pa.string())

    def shard_rows(self, ids_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, rows in it) for ascending rows `ids_N`; shards without any are left out."""
        for number in range(len(self.paths)):
            low, high = np.searchsorted(ids_N, self.starts[number : number + 2])
            if low < high:
                yield number, ids_N[low:high] - self.starts[number]

    def shard_of(self, ids_N: np.ndarray) -> np.ndarray:
        """Shard of each row."""
        return np.searchsorted(self.starts, ids_N, side="right") - 1


def save_unit_embeddings(path: Path, embedding_ND: np.ndarray) -> None:
    """Write the embeddings of one shard, scaled to length 1, as float16, atomically, and their checksum."""
    length = np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    with atomically_with_sum(path) as temporary, temporary.open("wb") as file:
        np.save(file, (embedding_ND / np.maximum(length, 1e-12)).astype(np.float16))


class UnitEmbeddings:
    """Embeddings of length 1 of the images `ids_N` (ascending), joined from the files of their shards into one file beside them."""

    def __init__(self, ids_N: np.ndarray, files: Sequence[Path], joined: Path) -> None:
        self._ids = ids_N
        parts = [np.load(file, mmap_mode="r") for file in files]
        assert sum(len(part) for part in parts) == len(ids_N)
        width = parts[0].shape[1] if parts else 0
        self._rows = np.lib.format.open_memmap(joined, "w+", np.float16, (len(ids_N), width))
        first = 0
        for part in parts:
            self._rows[first : first + len(part)] = part
            first += len(part)

    def rows(self, ids_P: np.ndarray) -> np.ndarray:
        """Embeddings of images, float64 [P,D]."""
        return self._rows[np.searchsorted(self._ids, ids_P)].astype(np.float64)


def cosines(left_P: np.ndarray, right_P: np.ndarray, left: UnitEmbeddings, right: UnitEmbeddings) -> np.ndarray:
    """Cosine similarity of each pair, float32, rounded to six decimals (1 for an image and its copy)."""
    result = np.empty(len(left_P), np.float32)
    for first in range(0, len(left_P), _BLOCK):
        block = slice(first, first + _BLOCK)
        a, b = left.rows(left_P[block]), right.rows(right_P[block])
        scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        result[block] = (np.einsum("pd,pd->p", a, b) / np.maximum(scale, 1e-12)).round(6)
    return result
