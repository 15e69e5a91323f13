"""Near-duplicates: all pairs of perceptual hashes within a Hamming distance, and the images of confirmed pairs to reject.

The search is exact. Of h + 3 groups of bits, two hashes at distance h or less agree in at least three whole groups, so sorting by every choice of
three groups puts them side by side (the block permutations of Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007).

Why not a library: of the maintained ones only faiss searches binary codes exactly, and its best index takes 17 times as long to join a million hashes
with themselves (benchmarks/close_hashes.py); approximate indices miss pairs, and a missed validation image is a leak.

N, M hashes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

PARTNERS = 16
"""Most images of the pool with one hash that are compared with a given image, the best first: a pool may hold a million blank images."""
HELD_OUT_PARTNERS = 512
"""Most held-out images with one hash that are compared with a given image; larger, because a missed one is a leak."""
_AGREEING = 3
_BLOCK = 1 << 22
_SORTED = 1 << 21
"""Hashes sorted at a time, approximately; other memory is that of the hashes themselves."""
_SCATTER = np.uint64(0x9E3779B97F4A7C15)


class Pairs(NamedTuple):
    """Pairs of images: left_P and right_P int64 numbers, distance_P uint8 Hamming distance of their hashes."""

    left_P: np.ndarray
    right_P: np.ndarray
    distance_P: np.ndarray


def close_hashes(hash_N: np.ndarray, distance: int, interesting_N: np.ndarray | None = None) -> Pairs:
    """Find all pairs (left < right) of N different 64-bit hashes that differ in at most `distance` bits, each once.

    Args:
        hash_N: uint64, all different.
        distance: largest Hamming distance in bits.
        interesting_N: bool; pairs of two uninteresting hashes are left out.
    """
    groups = distance + _AGREEING
    edges = np.linspace(0, 64, groups + 1).round().astype(int).tolist()
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in itertools.pairwise(edges)]
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    parts = 1 + len(hash_N) // _SORTED
    for chosen in itertools.combinations(range(groups), _AGREEING):
        mask = np.bitwise_or.reduce([masks[group] for group in chosen])
        # A pair appears for every choice of three groups that it agrees in; it is recorded at the first.
        earlier = [masks[group] for group in range(chosen[-1]) if group not in chosen]
        for rows in _parts_of_equal(hash_N, mask, parts):
            _close_in(hash_N, rows, mask, earlier, distance, interesting_N, pairs)
    if not pairs:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    return _sorted(Pairs(*(np.concatenate(column) for column in zip(*pairs, strict=True))))


def _parts_of_equal(hash_N: np.ndarray, mask: np.uint64, parts: int) -> Iterator[np.ndarray]:
    """Split the rows (int32) into parts of similar size, with hashes that agree under the mask in the same part."""
    if parts == 1:
        yield np.arange(len(hash_N), dtype=np.int32)
        return
    part = np.empty(len(hash_N), np.uint16)
    for first in range(0, len(hash_N), _BLOCK):
        scattered = (hash_N[first : first + _BLOCK] & mask) * _SCATTER  # overflows by design
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
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Append the close pairs of some rows that agree under `mask` and under none of the `earlier` masks to `pairs`."""
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
                relevant = interesting_N[left] | interesting_N[right]
                left, right, bits = left[relevant], right[relevant], bits[relevant]
            pairs.append((left, right, bits))
        step += 1
        at = at[at + step < len(key)]
        at = at[key[at] == key[at + step]]


def close_images(
    hash_N: np.ndarray, other_hash_M: np.ndarray, distance: int, mirrored_N: np.ndarray | None = None
) -> tuple[Pairs, Pairs]:
    """Find pairs among N images, and pairs of one of them with one of M others, whose hashes differ in at most `distance` bits.

    Args:
        hash_N: hashes of the images in the order of their rank, the best first.
        other_hash_M: hashes of the other images; pairs among them are not searched.
        mirrored_N: hashes of the mirror images of the N; then an image and another's mirror image are a pair too.

    Returns:
        Pairs (worse, better) of the N, and pairs (one of the N, one of the M). PARTNERS and HELD_OUT_PARTNERS limit their number.
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
    # The rest needs only groups that are in a pair.
    paired = np.unique(np.concatenate([near.left_P, near.right_P, same]))
    near = Pairs(np.searchsorted(paired, near.left_P), np.searchsorted(paired, near.right_P), near.distance_P)
    same = np.searchsorted(paired, same)
    own, flipped, others = (_Members(group, paired) for group in groups)
    del groups
    left = np.concatenate([near.left_P, near.right_P, same])
    right = np.concatenate([near.right_P, near.left_P, same])
    bits = np.concatenate([near.distance_P, near.distance_P, np.zeros(len(same), np.uint8)])
    inside = [
        Pairs(a[a > b], b[a > b], bits[which][a > b])
        for a, b, which in _expanded(own, left, own, right, PARTNERS)
        if len(a)
    ]
    inside += [
        Pairs(np.maximum(a, b)[a != b], np.minimum(a, b)[a != b], bits[which][a != b])
        for a, b, which in _expanded(own, left, flipped, right, PARTNERS)
        if len(a)
    ]
    outside = [
        Pairs(a, b, bits[which]) for a, b, which in _expanded(own, left, others, right, HELD_OUT_PARTNERS) if len(a)
    ]
    return _joined(inside), _joined(outside)


def confirmed_losers(better_P: np.ndarray, worse_P: np.ndarray, lost_N: np.ndarray) -> np.ndarray:
    """Return for each of N images the better image that it duplicates, or -1. An image is rejected if it duplicates a better one that is not.

    Args:
        better_P, worse_P: numbers of the images of confirmed pairs, by rank (better < worse).
        lost_N: bool, images already rejected; they do not reject others.
    """
    duplicate_of = np.full(len(lost_N), -1, np.int64)
    gone = lost_N.copy()
    for number in np.lexsort((better_P, worse_P)).tolist():
        better, worse = better_P[number], worse_P[number]
        if not gone[better] and not gone[worse]:
            gone[worse], duplicate_of[worse] = True, better
    return duplicate_of


class _Members:
    """Images by group of equal hashes, the best first; group `paired[g]` is image[starts[g]:starts[g + 1]]."""

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
    # One entry per pair of groups and image of its left group; a group of a million blank images makes a million.
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
    """Sorted distinct hashes, with half of the memory of `np.unique`."""
    joined = np.concatenate(hashes)
    joined.sort()
    return joined[np.r_[True, joined[1:] != joined[:-1]]] if len(joined) else joined


def _joined(parts: list[Pairs]) -> Pairs:
    """Each pair once, with its smallest distance: image and mirror image may both be close."""
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
    pairs = _sorted(Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))))
    left, right, _ = pairs
    first = np.r_[True, (left[1:] != left[:-1]) | (right[1:] != right[:-1])][: len(left)]
    return Pairs(*(column[first] for column in pairs))


def _sorted(pairs: Pairs) -> Pairs:
    order = np.lexsort((pairs.distance_P, pairs.right_P, pairs.left_P))
    return Pairs(*(column[order] for column in pairs))
