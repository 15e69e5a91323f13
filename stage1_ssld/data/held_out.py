"""Training images that are held out, to measure agreement and KL without labels: chosen by their names, so that the same ones are held out again."""

import copy
import hashlib
from collections.abc import Sequence

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage1_ssld.data.rows import Encoded, Rows
from ssld.stage1_ssld.data.sources import ImageSource


def hold_out(sources: Sequence[ImageSource], share: float, notes: list[str]) -> tuple[list[ImageSource], ImageSource]:
    """Divide sources into (sources to train on, the images held out as one source without labels); appends a line for the log to `notes`.

    An image is held out if the hash of its name in its source is below `share`; files added later do not change the choice of the others.
    Raises UserError if no image, or every image of a source, is held out.
    """
    training, held = [], []
    for source in sources:
        out_R = np.array([_hash(source.rows.name(row)) < share for row in range(len(source))])
        if out_R.all():
            raise UserError(
                f"data.held_out: {share:g} holds out every image of {source.path}; lower it, or give data.val"
            )
        training.append(_part(source, np.flatnonzero(~out_R)))
        held.append(_part(source, np.flatnonzero(out_R)))
    total, images = sum(map(len, held)), sum(map(len, sources))
    if not total:
        raise UserError(
            f"data.held_out: {share:g} holds out none of {count(images, 'image')}; raise it, or give data.val"
        )
    evaluation = copy.copy(held[0])
    evaluation.rows, evaluation.labels, evaluation.class_names = _ManyRows(held), None, None
    evaluation.path, evaluation.number, evaluation.tally = "data.held_out", 0, Tally()
    evaluation.unlabeled_because, evaluation.folders_are_classes = None, False
    evaluation.tally.keep("image", total)
    notes.append(f"data.held_out: {total:,} of {count(images, 'image')} held out, {images - total:,} to train on")
    return training, evaluation


def _hash(name: str) -> float:
    """Return a number from 0 to below 1 for a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _part(source: ImageSource, numbers_R: np.ndarray) -> ImageSource:
    """Return a source of some rows of another; keys of images stay."""
    part = copy.copy(source)
    part.rows = _SomeRows(source.rows, numbers_R)
    part.labels = None if source.labels is None else [source.labels[row] for row in numbers_R.tolist()]
    return part


class _SomeRows:
    """Some rows of other rows."""

    def __init__(self, rows: Rows, numbers_R: np.ndarray) -> None:
        self._rows, self._numbers_R = rows, numbers_R

    def __len__(self) -> int:
        return len(self._numbers_R)

    def name(self, row: int) -> str:
        return self._rows.name(int(self._numbers_R[row]))

    def location(self, row: int) -> str:
        return self._rows.location(int(self._numbers_R[row]))

    def encoded(self, row: int) -> Encoded:
        return self._rows.encoded(int(self._numbers_R[row]))


class _ManyRows:
    """Rows of several sources, one after the other; names begin with the number of the source."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, row: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._sources[number], row - int(self._ends[number]) + len(self._sources[number])

    def name(self, row: int) -> str:
        source, place = self._place(row)
        return source.key(place)

    def location(self, row: int) -> str:
        source, place = self._place(row)
        return source.location(place)

    def encoded(self, row: int) -> Encoded:
        source, place = self._place(row)
        return source.rows.encoded(place)
