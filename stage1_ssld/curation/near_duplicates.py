"""Near-duplicates: all pairs of perceptual hashes within a Hamming distance, and which images of confirmed pairs have to go.

The search is exact. Of h + 3 groups of bits, two hashes at distance h at most agree in three whole groups: sorting by every choice of three brings
them together (the block permutations of Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007).

Why not a library: of the kept ones faiss alone searches binary codes exactly, and its best index takes 17 times as long to join a million hashes with
themselves (benchmarks/close_hashes.py); approximate indices miss pairs, and a missed validation image is a leak.

N, M hashes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

PARTNERS = 16
"""Of a pool's images with one and the same hash, at most so many are compared with a given image, the best first: blank ones come by the million."""
PROTECTED_PARTNERS = 512
"""The same of validation and training images, which are fewer: one that is missed is a leak."""
_AGREEING = 3
_BLOCK = 1 << 22
_SORTED = 1 << 21
"""Hashes that are sorted at a time, about: the rest of the memory is the hashes themselves."""
_SCATTER = np.uint64(0x9E3779B97F4A7C15)


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
    parts = 1 + len(hash_N) // _SORTED
    for chosen in itertools.combinations(range(groups), _AGREEING):
        mask = np.bitwise_or.reduce([masks[group] for group in chosen])
        # A pair turns up for every choice of three that it agrees in; it is taken at the first.
        earlier = [masks[group] for group in range(chosen[-1]) if group not in chosen]
        for rows in _parts_of_equal(hash_N, mask, parts):
            _close_in(hash_N, rows, mask, earlier, distance, interesting_N, found)
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    return _sorted(Pairs(*(np.concatenate(column) for column in zip(*found, strict=True))))


def _parts_of_equal(hash_N: np.ndarray, mask: np.uint64, parts: int) -> Iterator[np.ndarray]:
    """Rows int32 in parts of about one size, so that hashes which agree under the mask lie in one part."""
    if parts == 1:
        yield np.arange(len(hash_N), dtype=np.int32)
        return
    part = np.empty(len(hash_N), np.uint16)
    for first in range(0, len(hash_N), _BLOCK):
        scattered = (hash_N[first : first + _BLOCK] & mask) * _SCATTER  # wraps around
        part[first : first + _BLOCK] = (scattered >> np.uint64(40)) % np.uint64(parts)
    for number in range(parts):
        yield np.flatnonzero(part == number).astype(np.int32)


def _close_in(
    hash_N: np.ndarray,
    rows: np.ndarray,
    mask: np.uint64,
    earlier: list[np.uint64],
    distance: int,
    interesting_N: np.ndarray | None,
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Add the close pairs among some rows that agree under the mask, and under none of the `earlier` ones."""
    key = hash_N[rows] & mask
    order = np.argsort(key, kind="stable")
    key, rows = key[order], rows[order]
    del order
    sorted_hashes = hash_N[rows]
    step = 1
    at = np.flatnonzero(key[1:] == key[:-1])
    while len(at):
        differ = sorted_hashes[at] ^ sorted_hashes[at + step]
        bits = np.bitwise_count(differ)
        near = np.flatnonzero(bits <= distance)
        for other in earlier:
            near = near[(differ[near] & other) != 0]
        if len(near):
            a, b = rows[at[near]].astype(np.int64), rows[at[near] + step].astype(np.int64)
            left, right, bits = np.minimum(a, b), np.maximum(a, b), bits[near]
            if interesting_N is not None:
                wanted = interesting_N[left] | interesting_N[right]
                left, right, bits = left[wanted], right[wanted], bits[wanted]
            found.append((left, right, bits))
        step += 1
        at = at[at + step < len(key)]
        at = at[key[at] == key[at + step]]


def close_images(
    hash_N: np.ndarray, other_hash_M: np.ndarray, distance: int, mirrored_N: np.ndarray | None = None
) -> tuple[Pairs, Pairs]:
    """(pairs among the N images, pairs of one of them with one of M others) whose hashes differ in at most `distance` bits.

    Args:
        hash_N: of images in the order of their rank, the best first.
        other_hash_M: of other images; pairs among them are not looked for.
        mirrored_N: hashes of the mirror images of the N: then an image and another's mirror image are a pair too.

    Returns:
        Pairs (worse, better) of the N, and pairs (one of the N, one of the M); see PARTNERS and PROTECTED_PARTNERS.
    """
    hashes = (hash_N, np.empty(0, np.uint64) if mirrored_N is None else mirrored_N, other_hash_M)
    unique = _unique(hashes)
    groups = [np.searchsorted(unique, part).astype(np.int32) for part in hashes]
    interesting = np.zeros(len(unique), bool)
    interesting[groups[0]] = True
    near = close_hashes(unique, distance, interesting)
    del unique
    images = sum(np.bincount(group, minlength=len(interesting)).astype(np.int32) for group in groups)
    same = np.flatnonzero(interesting & (images > 1))  # equal hashes
    del images, interesting
    # From here on only the groups that are in a pair.
    paired = np.unique(np.concatenate([near.left_P, near.right_P, same]))
    near = Pairs(np.searchsorted(paired, near.left_P), np.searchsorted(paired, near.right_P), near.distance_P)
    same = np.searchsorted(paired, same)
    mine, flipped, theirs = (_Members(group, paired) for group in groups)
    del groups
    left = np.concatenate([near.left_P, near.right_P, same])
    right = np.concatenate([near.right_P, near.left_P, same])
    bits = np.concatenate([near.distance_P, near.distance_P, np.zeros(len(same), np.uint8)])
    inside = [
        Pairs(a[a > b], b[a > b], bits[which][a > b])
        for a, b, which in _expanded(mine, left, mine, right, PARTNERS)
        if len(a)
    ]
    inside += [
        Pairs(np.maximum(a, b)[a != b], np.minimum(a, b)[a != b], bits[which][a != b])
        for a, b, which in _expanded(mine, left, flipped, right, PARTNERS)
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
    """Images by group of equal hashes, the best first: those of group `paired[g]` are image[starts[g]:starts[g + 1]]."""

    def __init__(self, group_of_N: np.ndarray, paired: np.ndarray) -> None:
        place = np.searchsorted(paired, group_of_N).clip(max=max(len(paired) - 1, 0))
        image = np.flatnonzero(paired[place] == group_of_N) if len(paired) else np.empty(0, np.int64)
        place = place[image]
        order = np.argsort(place, kind="stable")
        self.image = image[order]
        self.starts = np.searchsorted(place[order], np.arange(len(paired) + 1))


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


def _unique(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """All different hashes, in order, in half of the memory of `np.unique`."""
    joined = np.concatenate(hashes)
    joined.sort()
    return joined[np.r_[True, joined[1:] != joined[:-1]]] if len(joined) else joined


def _joined(parts: list[Pairs]) -> Pairs:
    """Each pair once, by its smallest distance: picture and mirror image may both be close."""
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    pairs = _sorted(Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))))
    left, right, _ = pairs
    first = np.r_[True, (left[1:] != left[:-1]) | (right[1:] != right[:-1])][: len(left)]
    return Pairs(*(column[first] for column in pairs))


def _sorted(pairs: Pairs) -> Pairs:
    order = np.lexsort((pairs.distance_P, pairs.right_P, pairs.left_P))
    return Pairs(*(column[order] for column in pairs))
