"""Embeddings of a pool, one NumPy file per shard, and their statistics. Read block by block: memory does not grow with the number of images.

An unreadable image has a row of NaN. N images, D features.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssld.shared.checksums import atomically_with_sum
from ssld.shared.files import spread

_NUMBERS = 1 << 23  # values per block, including derived ones
_BLOCK = 8192  # most rows per block
_DEAD = 1e-6  # a feature whose deviation is below this fraction of the largest one is constant


def save_embeddings(path: Path, embedding_ND: np.ndarray) -> None:
    """Write the embeddings of one shard atomically, as float32, and their checksum."""
    with atomically_with_sum(path) as temporary, temporary.open("wb") as file:
        np.save(file, embedding_ND.astype(np.float32))


class Embeddings:
    """Files of all shards, in order, as one table; rows are numbered over all files.

    Attributes:
        width: number D of features.
        readable_N: rows of readable images, ascending.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        lengths, self.width = [], 0
        for file in files:
            length, self.width = np.load(file, mmap_mode="r").shape
            lengths.append(length)
        self._starts = np.cumsum([0, *lengths])
        self.readable_N = np.empty(0, np.int64)
        self.readable_N = np.concatenate([np.flatnonzero(~np.isnan(z[:, 0])) + first for first, z in self._whole()])

    def __len__(self) -> int:
        return len(self.readable_N)

    def blocks(self, columns: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers, embeddings float32 [B,D]) of all readable images, in order; B x `columns` values take little memory."""
        for first, z_BD in self._whole(columns):
            readable = np.flatnonzero(~np.isnan(z_BD[:, 0]))
            if len(readable):
                yield readable + first, z_BD[readable]

    def rows(self, ids_B: np.ndarray) -> np.ndarray:
        """Embeddings float32 [B,D] of some rows, in any order."""
        result = np.empty((len(ids_B), self.width), np.float32)
        order = np.argsort(ids_B, kind="stable")
        edges = np.searchsorted(ids_B[order], self._starts)
        for number, file in enumerate(self._files):
            inside = order[edges[number] : edges[number + 1]]
            if len(inside):
                result[inside] = np.load(file, mmap_mode="r")[ids_B[inside] - self._starts[number]]
        return result

    def sample(self, most: int) -> np.ndarray:
        """Embeddings float32 [B,D] of at most `most` images, evenly spaced."""
        return self.rows(self.readable_N[spread(len(self), most)])

    def _whole(self, columns: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, rows including NaN) of each block."""
        rows = rows_of(columns)
        for start, file in zip(self._starts[:-1].tolist(), self._files, strict=True):
            table = np.load(file, mmap_mode="r")
            for first in range(0, len(table), rows):
                yield start + first, np.array(table[first : first + rows])


def rows_of(columns: int) -> int:
    """Rows of a block with this number of columns."""
    return max(1024, min(_BLOCK, _NUMBERS // columns))


class Standard(NamedTuple):
    """Mean and scale of every feature, float64 [D]: (z - mean) / scale has mean 0 and standard deviation 1."""

    mean_D: np.ndarray
    scale_D: np.ndarray

    def __call__(self, embedding_BD: np.ndarray) -> np.ndarray:
        """Standardize embeddings; float32."""
        return ((embedding_BD - self.mean_D) / self.scale_D).astype(np.float32)


def standard_of(embeddings: Embeddings) -> Standard:
    """Mean and standard deviation in one pass, in float64 (parts joined by Chan, Golub and LeVeque 1979); the scale of a constant feature is 1."""
    count, mean, squares = 0, np.zeros(embeddings.width), np.zeros(embeddings.width)
    for _, z in embeddings.blocks():
        part = z.astype(np.float64)
        part_mean = part.mean(0)
        shift, total = part_mean - mean, count + len(part)
        squares += ((part - part_mean) ** 2).sum(0) + shift**2 * count * len(part) / total
        mean += shift * len(part) / total
        count = total
    deviation = np.sqrt(squares / max(count, 1))
    return Standard(mean, np.where(deviation > _DEAD * deviation.max(), deviation, 1.0))
