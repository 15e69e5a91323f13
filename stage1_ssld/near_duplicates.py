"""Near-duplicates: all pairs of perceptual hashes within a Hamming distance, and which images of confirmed pairs have to go. Torch-free.

The search is exact. Of h + 3 groups of bits, two hashes at distance h at most agree in three whole groups: sorting by every choice of three brings
them together (the block permutations of Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007).

Why not a library: of the kept ones faiss alone searches binary codes exactly, and its best index takes 17 times as long to join a million hashes with
themselves (benchmarks/close_hashes.py); approximate indices miss pairs, and a missed validation image is a leak.

N, M hashes.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PARTNERS = 16
"""Of a pool's images with one and the same hash, at most so many are compared with a given image, the best first: blank ones come by the million."""
PROTECTED_PARTNERS = 512
"""The same of validation and training images, which are fewer: one that is missed is a leak."""
_AGREEING = 3
_BLOCK = 1 << 22


class Pairs(NamedTuple):
    """Pairs of images: left_P and right_P int64 numbers, distance_P uint8 of their hashes."""

    left_P: np.ndarray
    right_P: np.ndarray
    distance_P: np.ndarray


def close_hashes(hash_N: np.ndarray, distance: int, interesting_N: np.ndarray | None = None) -> Pairs:
    """All pairs (left < right) of the N different 64-bit hashes that differ in at most `distance` bits, each once.

    Args:
        interesting_N: bool; pairs of two that are not are left out.
    """
    groups = distance + _AGREEING
    edges = np.linspace(0, 64, groups + 1).round().astype(int).tolist()
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in itertools.pairwise(edges)]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for chosen in itertools.combinations(range(groups), _AGREEING):
        key_N = hash_N & np.bitwise_or.reduce([masks[group] for group in chosen])
        order_N = np.argsort(key_N, kind="stable")
        key_N, sorted_N = key_N[order_N], hash_N[order_N]
        # A pair turns up for every choice of three that it agrees in; it is taken at the first.
        earlier = [masks[group] for group in range(chosen[-1]) if group not in chosen]
        step = 1
        at = np.flatnonzero(key_N[1:] == key_N[:-1])
        while len(at):
            differ = sorted_N[at] ^ sorted_N[at + step]
            bits = np.bitwise_count(differ)
            near = np.flatnonzero(bits <= distance)
            for mask in earlier:
                near = near[(differ[near] & mask) != 0]
            if len(near):
                a, b = order_N[at[near]], order_N[at[near] + step]
                left, right, bits = np.minimum(a, b), np.maximum(a, b), bits[near]
                if interesting_N is not None:
                    wanted = interesting_N[left] | interesting_N[right]
                    left, right, bits = left[wanted], right[wanted], bits[wanted]
                found.append((left, right, bits))
            step += 1
            at = at[at + step < len(key_N)]
            at = at[key_N[at] == key_N[at + step]]
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    return _sorted(Pairs(*(np.concatenate(column) for column in zip(*found, strict=True))))


def close_images(hash_N: np.ndarray, other_hash_M: np.ndarray, distance: int) -> tuple[Pairs, Pairs]:
    """(pairs among the N images, pairs of one of them with one of M others) whose hashes differ in at most `distance` bits.

    Args:
        hash_N: of images in the order of their rank, the best first.
        other_hash_M: of other images; pairs among them are not looked for.

    Returns:
        Pairs (worse, better) of the N, and pairs (one of the N, one of the M); see PARTNERS and PROTECTED_PARTNERS.
    """
    unique, group_of = np.unique(np.concatenate([hash_N, other_hash_M]), return_inverse=True)
    group_of = group_of.astype(np.int32)
    interesting = np.zeros(len(unique), bool)
    interesting[group_of[: len(hash_N)]] = True
    near = close_hashes(unique, distance, interesting)
    mine, theirs = _Members(group_of[: len(hash_N)], len(unique)), _Members(group_of[len(hash_N) :], len(unique))
    same = np.flatnonzero(interesting & (np.diff(mine.starts) + np.diff(theirs.starts) > 1))  # equal hashes
    left = np.concatenate([near.left_P, near.right_P, same])
    right = np.concatenate([near.right_P, near.left_P, same])
    bits = np.concatenate([near.distance_P, near.distance_P, np.zeros(len(same), np.uint8)])
    inside = [
        Pairs(a[a > b], b[a > b], bits[which][a > b])
        for a, b, which in _expanded(mine, left, mine, right, PARTNERS)
        if len(a)
    ]
    outside = [
        Pairs(a, b, bits[which]) for a, b, which in _expanded(mine, left, theirs, right, PROTECTED_PARTNERS) if len(a)
    ]
    return _joined(inside), _joined(outside)


def confirmed_losers(better_P: np.ndarray, worse_P: np.ndarray, lost_N: np.ndarray) -> np.ndarray:
    """For each of N images, the better one that it duplicates, or -1: an image goes when a better one that stays is its duplicate.

    Args:
        better_P, worse_P: numbers of the images of confirmed pairs, by rank (better < worse).
        lost_N: bool, images that are gone already and drag no other down.
    """
    duplicate_of = np.full(len(lost_N), -1, np.int64)
    gone = lost_N.copy()
    for number in np.lexsort((better_P, worse_P)).tolist():
        better, worse = better_P[number], worse_P[number]
        if not gone[better] and not gone[worse]:
            gone[worse], duplicate_of[worse] = True, better
    return duplicate_of


class _Members:
    """Images by group of equal hashes, the best first: those of group g are image[starts[g]:starts[g + 1]]."""

    def __init__(self, group_of_N: np.ndarray, groups: int) -> None:
        self.image = np.argsort(group_of_N, kind="stable")
        self.starts = np.searchsorted(group_of_N[self.image], np.arange(groups + 1)).astype(np.int32)


def _expanded(
    left: _Members, left_P: np.ndarray, right: _Members, right_P: np.ndarray, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(images of the left group, their partners in the right group, number of the pair of groups), in blocks of bounded size."""
    partners = np.minimum(np.diff(right.starts)[right_P], most)
    # One entry an image of a left group and pair of groups; a group of a million blank images makes a million.
    images = np.where(partners > 0, np.diff(left.starts)[left_P], 0)
    ends = np.cumsum(images)
    for first in range(0, int(ends[-1]) if len(ends) else 0, _BLOCK // most):
        entry = np.arange(first, min(first + _BLOCK // most, int(ends[-1])))
        pair = np.searchsorted(ends, entry, side="right")
        image = left.image[left.starts[left_P[pair]] + entry - (ends[pair] - images[pair])]
        repeats = partners[pair]
        pair, image = np.repeat(pair, repeats), np.repeat(image, repeats)
        place = np.arange(len(pair)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield image, right.image[right.starts[right_P[pair]] + place], pair


def _joined(parts: list[Pairs]) -> Pairs:
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    return _sorted(Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))))


def _sorted(pairs: Pairs) -> Pairs:
    order = np.lexsort((pairs.right_P, pairs.left_P))
    return Pairs(*(column[order] for column in pairs))
