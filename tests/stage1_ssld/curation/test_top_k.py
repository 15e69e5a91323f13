"""The best k of a class, against sorting everything in Python; and memory that does not follow the stream."""

import tracemalloc

import numpy as np
import pytest

from ssld.stage1_ssld.curation.top_k import Ranked, TopK, cut_to


def stream(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows with many equal scores."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 40, rows).astype(np.float32) / 40
    return generator.integers(0, classes, rows), scores, generator.permutation(rows)


def sorted_reference(
    class_N: np.ndarray, score_N: np.ndarray, id_N: np.ndarray, keep: int
) -> list[tuple[int, float, int]]:
    kept = []
    for number in set(class_N.tolist()):
        rows = [row for row in zip(class_N.tolist(), score_N.tolist(), id_N.tolist(), strict=True) if row[0] == number]
        kept += sorted(rows, key=lambda row: (-row[1], row[2]))[:keep]
    return sorted(kept, key=lambda row: (-row[1], row[2]))


def as_list(rows: Ranked) -> list[tuple[int, float, int]]:
    return list(zip(*(column.tolist() for column in rows), strict=True))


@pytest.mark.parametrize("keep", [1, 3, 50, 1000])
@pytest.mark.parametrize("piece", [1, 7, 900])
def test_equals_sorting_everything(keep: int, piece: int) -> None:
    """In pieces of any size, with a buffer so small that it is cut again and again; class 11 of 12 never comes."""
    rows = stream(900, 11)
    best = TopK(12, keep, slack=5)
    for first in range(0, 900, piece):
        best.add(*(column[first : first + piece] for column in rows))
    assert as_list(best.result()) == sorted_reference(*rows, keep)


def test_the_order_of_the_stream_does_not_matter() -> None:
    rows = stream(2000, 5)
    results = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(2000)
        best = TopK(5, 20, slack=11)
        for part in np.array_split(order, 9):
            best.add(*(column[part] for column in rows))
        results.append(as_list(best.result()))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 100


def test_an_empty_stream_gives_nothing() -> None:
    best = TopK(3, 2)
    best.add(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64))
    assert as_list(best.result()) == []


def test_memory_does_not_grow_with_the_stream() -> None:
    """Eight times the rows, the same peak."""
    peaks = []
    for pieces in (8, 64):
        tracemalloc.start()
        best = TopK(50, 100, slack=2000)
        for number in range(pieces):
            generator = np.random.default_rng(number)
            best.add(
                generator.integers(0, 50, 5000), generator.random(5000, np.float32), np.arange(5000) + 5000 * number
            )
        assert len(best.result().id_N) == 5000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


def test_cut_to_takes_the_first_of_each_class() -> None:
    classes = np.array([2, 0, 2, 2, 1, 0, 0])
    assert cut_to(classes, 2).tolist() == [True, True, True, False, True, True, False]
    assert cut_to(np.empty(0, np.int32), 2).tolist() == []
