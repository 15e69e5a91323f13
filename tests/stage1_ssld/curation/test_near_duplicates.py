"""Pairs of close hashes against comparing every pair, and who goes of a chain of duplicates."""

import numpy as np
import pytest

from ssld.stage1_ssld.curation import near_duplicates
from ssld.stage1_ssld.curation.near_duplicates import Pairs, close_hashes, close_images, confirmed_losers


def hashes(count: int, distance: int, seed: int = 0) -> np.ndarray:
    """Random hashes, half of them others with up to `distance` + 2 bits turned, so that many lie on the border."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 2**64, count, dtype=np.uint64)
    for number in range(count // 2, count):
        bits = generator.choice(64, generator.integers(0, distance + 3), replace=False)
        values[number] = values[number - count // 2] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    return values


def every_pair(a: np.ndarray, b: np.ndarray, distance: int) -> dict[tuple[int, int], int]:
    """{(number in a, number in b): distance} by counting bits of Python integers."""
    result = {}
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            bits = (x ^ y).bit_count()
            if bits <= distance:
                result[i, j] = bits
    return result


def as_dict(pairs: Pairs) -> dict[tuple[int, int], int]:
    result = {(int(left), int(right)): int(bits) for left, right, bits in zip(*pairs, strict=True)}
    assert len(result) == len(pairs.left_P), "a pair came twice"
    return result


@pytest.mark.parametrize(("distance", "sorted_at_a_time"), [(0, 10**6), (1, 50), (3, 10**6), (6, 7), (9, 100)])
def test_finds_every_pair_once(distance: int, sorted_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, and in so small ones that most hold a handful."""
    monkeypatch.setattr(near_duplicates, "_SORTED", sorted_at_a_time)
    values = np.unique(hashes(400, distance))
    expected = {pair: bits for pair, bits in every_pair(values, values, distance).items() if pair[0] < pair[1]}
    assert as_dict(close_hashes(values, distance)) == expected
    assert len(expected) > 50 or distance == 0


def test_leaves_out_pairs_that_nobody_asks_for() -> None:
    values = np.unique(hashes(300, 6))
    interesting = np.arange(len(values)) % 3 == 0
    expected = {
        pair: bits
        for pair, bits in every_pair(values, values, 6).items()
        if pair[0] < pair[1] and (interesting[pair[0]] or interesting[pair[1]])
    }
    assert as_dict(close_hashes(values, 6, interesting)) == expected


@pytest.mark.parametrize("distance", [0, 4])
def test_images_among_each_other_and_with_others(distance: int) -> None:
    """Equal hashes too: within both lists and across."""
    values = hashes(300, distance)
    mine, others = np.concatenate([values[:150], values[:20]]), np.concatenate([values[150:], values[:5], values[:5]])
    inside, outside = close_images(mine, others, distance)
    expected = {pair: bits for pair, bits in every_pair(mine, mine, distance).items() if pair[0] > pair[1]}
    assert as_dict(inside) == expected
    assert as_dict(outside) == every_pair(mine, others, distance)
    assert len(expected) >= 20


@pytest.mark.parametrize("distance", [0, 4])
def test_images_and_mirror_images_of_each_other(distance: int) -> None:
    """Either way round, each pair once and by the smaller distance; an image that looks like its own mirror image is no pair."""
    values = hashes(300, distance)
    mine, mirrored = values[:150].copy(), np.roll(values[150:], 3)
    mirrored[:10] = mine[:10]  # symmetric images
    mine[20], mirrored[20] = mine[21], mirrored[21]  # copies: close as they are and mirrored
    mirrored[30] = mine[31]
    mirrored[31] = mine[30]
    inside, outside = close_images(mine, values[:20], distance, mirrored)
    expected: dict[tuple[int, int], int] = {}
    for table in (every_pair(mine, mine, distance), every_pair(mine, mirrored, distance)):
        for (a, b), bits in table.items():
            if a != b:
                pair = max(a, b), min(a, b)
                expected[pair] = min(bits, expected.get(pair, 64))
    assert as_dict(inside) == expected
    assert {(21, 20), (31, 30)} <= expected.keys()
    assert as_dict(outside) == every_pair(mine, values[:20], distance)


def test_no_images() -> None:
    nothing = np.empty(0, np.uint64)
    values = hashes(10, 2)
    assert [len(part.left_P) for part in close_images(nothing, nothing, 6)] == [0, 0]
    assert [len(part.left_P) for part in close_images(nothing, values, 6)] == [0, 0]
    assert len(close_images(values, nothing, 6)[1].left_P) == 0


def test_a_thousand_blank_images_do_not_make_a_million_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared with the best 16 of equal hash, and with more held-out images; in blocks so small that a group is split."""
    monkeypatch.setattr(near_duplicates, "HELD_OUT_PARTNERS", 32)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 640)
    inside, outside = close_images(np.full(1000, 5, np.uint64), np.full(1000, 4, np.uint64), 6)
    expected = {(worse, better): 0 for worse in range(1000) for better in range(min(worse, 16))}
    assert as_dict(inside) == expected
    assert as_dict(outside) == {(mine, other): 1 for mine in range(1000) for other in range(32)}


def test_of_a_chain_the_worse_goes_unless_its_better_is_gone() -> None:
    """0-1, 1-2: 1 goes for 0, and 2 stays, because 1 is gone. 4 was gone before: it takes 5 with it no more."""
    better, worse = np.array([1, 0, 4, 6, 6, 7]), np.array([2, 1, 5, 8, 7, 8])
    gone = np.zeros(9, bool)
    gone[4] = True
    assert confirmed_losers(better, worse, gone).tolist() == [-1, 0, -1, -1, -1, -1, -1, 6, 6]
