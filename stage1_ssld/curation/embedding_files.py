"""Teacher embeddings of some images on disk, and cosines of pairs of them. Torch-free; memory does not grow with the images.

One file a shard, float16 of unit length; D numbers an image, P pairs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssld.shared.files import atomically

_BLOCK = 4096


def save_embeddings(path: Path, embedding_ND: np.ndarray) -> None:
    """Write the embeddings of one shard, whole or not at all."""
    length = np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    with atomically(path) as temporary, temporary.open("wb") as file:
        np.save(file, (embedding_ND / np.maximum(length, 1e-12)).astype(np.float16))


class Embeddings:
    """Embeddings of the images `ids` (ascending), joined from the files of their shards, in order, into one file beside them."""

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


def cosines(left_P: np.ndarray, right_P: np.ndarray, left: Embeddings, right: Embeddings) -> np.ndarray:
    """Cosine of each pair, float32, right to six decimals (an image and its copy have exactly 1)."""
    result = np.empty(len(left_P), np.float32)
    for first in range(0, len(left_P), _BLOCK):
        block = slice(first, first + _BLOCK)
        a, b = left.rows(left_P[block]), right.rows(right_P[block])
        scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        result[block] = (np.einsum("pd,pd->p", a, b) / np.maximum(scale, 1e-12)).round(6)
    return result
