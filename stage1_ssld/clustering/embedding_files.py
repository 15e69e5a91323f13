"""The embeddings that a pass leaves, one NumPy file per shard, and their statistics. Read a block at a time: memory does not grow with the images.

An image that could not be read keeps its row, of NaN. N images, D numbers per embedding.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssld.shared.checksums import atomically_with_sum
from ssld.shared.files import spread

_NUMBERS = 1 << 23  # of a block and what is computed of it
_BLOCK = 8192  # rows, at most
_DEAD = 1e-6  # a feature that varies by less than this part of the most varied one is a constant


def save_embeddings(path: Path, embedding_ND: np.ndarray) -> None:
    """Write the embeddings of one shard, float32, whole or not at all, and their checksum."""
    with atomically_with_sum(path) as temporary, temporary.open("wb") as file:
        np.save(file, embedding_ND.astype(np.float32))


class Embeddings:
    """The files of all shards, in their order, as one table; a row is known by its number over all of them.

    Attributes:
        width: D.
        readable_N: rows that are embeddings, ascending.
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
        """(row numbers, embeddings float32 [B,D]) of all readable images, in order; B is such that B x `columns` numbers take little memory."""
        for first, z_BD in self._whole(columns):
            readable = np.flatnonzero(~np.isnan(z_BD[:, 0]))
            if len(readable):
                yield readable + first, z_BD[readable]

    def rows(self, ids_B: np.ndarray) -> np.ndarray:
        """Embeddings float32 [B,D] of some rows, in any order."""
        found = np.empty((len(ids_B), self.width), np.float32)
        order = np.argsort(ids_B, kind="stable")
        edges = np.searchsorted(ids_B[order], self._starts)
        for number, file in enumerate(self._files):
            mine = order[edges[number] : edges[number + 1]]
            if len(mine):
                found[mine] = np.load(file, mmap_mode="r")[ids_B[mine] - self._starts[number]]
        return found

    def sample(self, most: int) -> np.ndarray:
        """Embeddings float32 [B,D] of at most so many images, evenly chosen."""
        return self.rows(self.readable_N[spread(len(self), most)])

    def _whole(self, columns: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, rows as they are), in blocks."""
        rows = rows_of(columns)
        for start, file in zip(self._starts[:-1].tolist(), self._files, strict=True):
            table = np.load(file, mmap_mode="r")
            for first in range(0, len(table), rows):
                yield start + first, np.array(table[first : first + rows])


def rows_of(columns: int) -> int:
    """Rows of a block that has so many columns."""
    return max(1024, min(_BLOCK, _NUMBERS // columns))


class Standard(NamedTuple):
    """Mean and scale of every feature, float64 [D]: (z - mean) / scale has mean 0 and deviation 1."""

    mean_D: np.ndarray
    scale_D: np.ndarray

    def __call__(self, embedding_BD: np.ndarray) -> np.ndarray:
        """Standardised embeddings, float32."""
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
