"""The best k of every class of a stream of scored rows. Memory grows with classes x k, not with the stream. Torch-free.

N rows of a piece of the stream.
"""

from typing import NamedTuple

import numpy as np

SLACK = 1 << 20
"""Rows that are taken in, beyond half of what is kept, before the worse ones are thrown out."""


class Ranked(NamedTuple):
    """Rows by score, the best first, and by id where scores are equal: class_N int32, score_N float32, id_N int64."""

    class_N: np.ndarray
    score_N: np.ndarray
    id_N: np.ndarray


class TopK:
    """Takes in rows and keeps, of each class, the `keep` with the highest scores; of equal scores those with the smaller ids.

    The result does not depend on the order or the grouping of what is added.
    """

    def __init__(self, classes: int, keep: int, *, slack: int = SLACK) -> None:
        self._classes, self._keep = classes, keep
        capacity = classes * keep + classes * keep // 4 + slack
        self._rows = Ranked(np.empty(capacity, np.int32), np.empty(capacity, np.float32), np.empty(capacity, np.int64))
        self._filled = 0
        self._lowest = np.full(classes, -np.inf, np.float32)

    def add(self, class_N: np.ndarray, score_N: np.ndarray, id_N: np.ndarray) -> None:
        """Take in rows of classes 0 to `classes` - 1."""
        while len(id_N):
            wanted = score_N >= self._lowest[class_N]  # equal ones may have a smaller id
            class_N, score_N, id_N = class_N[wanted], score_N[wanted], id_N[wanted]
            count = min(len(id_N), len(self._rows.id_N) - self._filled)
            place = slice(self._filled, self._filled + count)
            for mine, column in zip(self._rows, (class_N, score_N, id_N), strict=True):
                mine[place] = column[:count]
            self._filled += count
            class_N, score_N, id_N = class_N[count:], score_N[count:], id_N[count:]
            if len(id_N):
                self._cut()

    def result(self) -> Ranked:
        """What is kept, over all classes by score. Nothing can be added afterwards."""
        self._cut()
        rows = Ranked(*(column[: self._filled] for column in self._rows))
        order = np.lexsort((rows.id_N, -rows.score_N))
        return Ranked(*(column[order] for column in rows))

    def _cut(self) -> None:
        """Keep the best of each class; note how low the last of every full class is, so that worse rows are never taken in."""
        rows = Ranked(*(column[: self._filled] for column in self._rows))
        order = np.lexsort((rows.id_N, -rows.score_N, rows.class_N))
        starts = np.searchsorted(rows.class_N[order], np.arange(self._classes + 1)).astype(np.int32)
        place = np.arange(len(order), dtype=np.int32)
        place -= np.repeat(starts[:-1], np.diff(starts))
        order = order[place < self._keep]
        for mine in self._rows:
            mine[: len(order)] = mine[order]
        self._filled = len(order)
        full = np.flatnonzero(np.diff(starts) >= self._keep)
        ends = np.searchsorted(self._rows.class_N[: self._filled], full, side="right")
        self._lowest[full] = self._rows.score_N[ends - 1]


def cut_to(ranked_class_N: np.ndarray, keep: int) -> np.ndarray:
    """Of rows in the order of their rank, which are among the first `keep` of their class: bool [N]."""
    order = np.argsort(ranked_class_N, kind="stable")
    classes = ranked_class_N[order]
    starts = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]]) if len(classes) else np.empty(0, np.int64)
    place = np.arange(len(classes)) - np.repeat(starts, np.diff(np.r_[starts, len(classes)]))
    kept = np.empty(len(classes), bool)
    kept[order] = place < keep
    return kept
