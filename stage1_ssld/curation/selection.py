"""Selection from scored images: the best of each class, without near-duplicates. Memory grows with classes x k, not with the pool.

Yalniz et al. 2019 (arXiv 1905.00546) and SSLD (arXiv 2103.05959, section 3.3) keep the k best images of each class. Steps: choose more than k
candidates per class; find pairs with close hashes among them and between them and held-out images; of every confirmed pair, drop the worse image;
keep k per class. An image is a candidate for its most likely class only.

N candidates in the order of their rank (score, then row in the pool), P pairs.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.stage1_ssld.curation.near_duplicates import Pairs, close_images, confirmed_losers
from ssld.stage1_ssld.curation.score_files import UNREADABLE, ScoreFiles, write_table

SLACK = 1 << 20
"""Spare rows of the buffer; when it is full, the worse rows of each class are dropped."""
BINS = 50
"""Bins of the histogram of scores, from 0 to 1."""
KEPT, LIKE_VAL, LIKE_TRAIN, LIKE_BETTER, BEYOND = range(5)
"""Outcomes of a candidate: kept, near-duplicate of a validation image, of a training image, of a better candidate, or beyond the k best."""
REASONS = ("kept", "like_val", "like_train", "like_better", "beyond_keep")
_FACTS = b"facts"
_COLUMNS = ("class", "score", "id", "hash", "mirrored")


class Ranked(NamedTuple):
    """Rows sorted by descending score, then by id: class_N int32, score_N float32, id_N int64."""

    class_N: np.ndarray
    score_N: np.ndarray
    id_N: np.ndarray


class TopK:
    """Collector of the `keep` rows with the highest scores of each class; of equal scores, those with smaller ids.

    The result does not depend on the order in which rows are added.
    """

    def __init__(self, classes: int, keep: int, *, slack: int = SLACK) -> None:
        self._classes, self._keep = classes, keep
        capacity = classes * keep + classes * keep // 4 + slack
        self._rows = Ranked(np.empty(capacity, np.int32), np.empty(capacity, np.float32), np.empty(capacity, np.int64))
        self._filled = 0
        self._lowest = np.full(classes, -np.inf, np.float32)

    def add(self, class_N: np.ndarray, score_N: np.ndarray, id_N: np.ndarray) -> None:
        """Add rows of classes 0 to `classes` - 1."""
        while len(id_N):
            good = score_N >= self._lowest[class_N]  # of equal scores, the id decides
            class_N, score_N, id_N = class_N[good], score_N[good], id_N[good]
            count = min(len(id_N), len(self._rows.id_N) - self._filled)
            place = slice(self._filled, self._filled + count)
            for buffer, column in zip(self._rows, (class_N, score_N, id_N), strict=True):
                buffer[place] = column[:count]
            self._filled += count
            class_N, score_N, id_N = class_N[count:], score_N[count:], id_N[count:]
            if len(id_N):
                self._cut()

    def result(self) -> Ranked:
        """Return the kept rows of all classes, sorted by score. Call it last: rows cannot be added afterwards."""
        self._cut()
        rows = Ranked(*(column[: self._filled] for column in self._rows))
        order = np.lexsort((rows.id_N, -rows.score_N))
        return Ranked(*(column[order] for column in rows))

    def _cut(self) -> None:
        """Keep the best of each class, and record the lowest kept score of every full class, so that worse rows are not added."""
        rows = Ranked(*(column[: self._filled] for column in self._rows))
        order = np.lexsort((rows.id_N, -rows.score_N, rows.class_N))
        starts = np.searchsorted(rows.class_N[order], np.arange(self._classes + 1)).astype(np.int32)
        place = np.arange(len(order), dtype=np.int32)
        place -= np.repeat(starts[:-1], np.diff(starts))
        order = order[place < self._keep]
        for buffer in self._rows:
            buffer[: len(order)] = buffer[order]
        self._filled = len(order)
        full = np.flatnonzero(np.diff(starts) >= self._keep)
        ends = np.searchsorted(self._rows.class_N[: self._filled], full, side="right")
        self._lowest[full] = self._rows.score_N[ends - 1]


class Candidates(NamedTuple):
    """Pre-selected images of the pool.

    Attributes:
        class_N, score_N: most likely class and its probability.
        id_N: row in the pool.
        hash_N, mirrored_N: perceptual hashes of the image and of its mirror image.
        facts: counts over the pool: images; unreadable; below_min_score; class_images (per class, images that have it as most likely); histogram of
            all scores; low_ids (rows of a few images below min_score).
    """

    class_N: np.ndarray
    score_N: np.ndarray
    id_N: np.ndarray
    hash_N: np.ndarray
    mirrored_N: np.ndarray
    facts: dict[str, Any]


class ClosePairs(NamedTuple):
    """Pairs with close hashes: `inside`, of candidates (worse, better); `held_out`, of candidates and held-out images (candidate, row)."""

    inside: Pairs
    held_out: Pairs


def find_candidates(pool: ScoreFiles, *, classes: int, keep: int, min_score: float, examples: int = 8) -> Candidates:
    """Read the pool and choose the `keep` best images of each class with a score of at least `min_score`."""
    best = TopK(classes, keep)
    class_images = np.zeros(classes, np.int64)
    histogram = np.zeros(BINS, np.int64)
    unreadable = below = 0
    low_ids: list[int] = []
    for first, columns in pool.chunks("class", "score"):
        class_N, score_N = columns["class"], columns["score"]
        readable = class_N != UNREADABLE
        unreadable += int((~readable).sum())
        class_images += np.bincount(class_N[readable], minlength=classes)
        histogram += np.histogram(score_N[readable], BINS, (0, 1))[0]
        low = readable & (score_N < min_score)
        below += int(low.sum())
        low_ids += (first + np.flatnonzero(low)[: examples - len(low_ids)]).tolist()
        rows = np.flatnonzero(readable & ~low)
        best.add(class_N[rows], score_N[rows], first + rows)
    ranked: Ranked = best.result()
    del best
    facts = {
        "images": len(pool),
        "unreadable": unreadable,
        "below_min_score": below,
        "class_images": class_images.tolist(),
        "histogram": histogram.tolist(),
        "low_ids": low_ids,
    }
    hash_N, mirrored_N = (pool.column(name, ranked.id_N) for name in ("hash", "mirrored"))
    return Candidates(ranked.class_N, ranked.score_N, ranked.id_N, hash_N, mirrored_N, facts)


def save_candidates(path: Path, candidates: Candidates) -> None:
    """Write candidates to a file for `load_candidates`."""
    table = pa.table(dict(zip(_COLUMNS, candidates[:-1], strict=True)))
    write_table(path, table.replace_schema_metadata({_FACTS: json.dumps(candidates.facts)}))


def load_candidates(path: Path) -> Candidates:
    """Read the file of `save_candidates`."""
    table = pq.read_table(path)
    class_N, score_N, id_N, hash_N, mirrored_N = (table[name].to_numpy() for name in _COLUMNS)
    return Candidates(class_N, score_N, id_N, hash_N, mirrored_N, json.loads(table.schema.metadata[_FACTS]))


def find_close_pairs(
    hash_N: np.ndarray, mirrored_N: np.ndarray | None, held_out: ScoreFiles, *, hash_distance: int
) -> ClosePairs:
    """Find pairs whose hashes differ in at most `hash_distance` bits.

    Args:
        hash_N: hashes of the candidates.
        mirrored_N: hashes of their mirror images, to compare candidates with them too; None does not.
        held_out: files of the held-out images; their mirror images are always compared too.
    """
    parts = [
        (chunk.first + np.flatnonzero(chunk.columns["class"] != UNREADABLE), chunk.columns)
        for chunk in held_out.chunks("class", "hash", "mirrored")
    ]
    ids = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, np.int64)
    hashes = [
        np.concatenate([columns[name][columns["class"] != UNREADABLE] for _, columns in parts])
        if parts
        else np.empty(0, np.uint64)
        for name in ("hash", "mirrored")
    ]
    inside, outside = close_images(hash_N, np.concatenate(hashes), hash_distance, mirrored_N)
    # Image and mirror image may both be close; one pair is enough.
    image = outside.right_P % max(len(ids), 1)
    order = np.lexsort((outside.distance_P, image, outside.left_P))
    left, image, bits = outside.left_P[order], image[order], outside.distance_P[order]
    first = np.r_[True, (left[1:] != left[:-1]) | (image[1:] != image[:-1])][: len(left)]
    return ClosePairs(inside, Pairs(left[first], ids[image[first]], bits[first]))


def save_close_pairs(path: Path, pairs: ClosePairs, id_N: np.ndarray) -> None:
    """Write pairs, with the rows of their images among pool and held-out images; `id_N` holds the rows of the candidates."""
    candidate, other, distance = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    held_out = np.repeat([False, True], [len(part.left_P) for part in pairs])
    rows = np.r_[id_N[pairs.inside.right_P], pairs.held_out.right_P]
    columns = {
        "candidate": candidate,
        "other": other,
        "distance": distance,
        "held_out": held_out,
        "candidate_row": id_N[candidate],
        "other_row": rows,
    }
    write_table(path, pa.table(columns))


def add_cosines(path: Path, cosine_P: np.ndarray) -> None:
    """Add a column with the cosines of all pairs, in their order."""
    write_table(path, pq.read_table(path).append_column("cosine", pa.array(cosine_P.astype(np.float32))))


class PairRows(NamedTuple):
    """Pairs by the rows of their images: first pairs within the pool, then (held_out_P) pairs of a pool image and a held-out image."""

    left_P: np.ndarray
    right_P: np.ndarray
    held_out_P: np.ndarray


def pair_rows(path: Path) -> PairRows | None:
    """Read the pairs of a file without cosines; None if it has them."""
    if "cosine" in pq.read_schema(path).names:
        return None
    table = pq.read_table(path, columns=["candidate_row", "other_row", "held_out"])
    return PairRows(*(table[name].to_numpy() for name in table.column_names))


def load_close_pairs(path: Path) -> tuple[ClosePairs, np.ndarray | None]:
    """Read pairs, and their cosines if the file has them."""
    table = pq.read_table(path)
    held_out = table["held_out"].to_numpy()
    columns = [table[name].to_numpy() for name in ("candidate", "other", "distance")]
    parts = [Pairs(*(column[which] for column in columns)) for which in (~held_out, held_out)]
    return ClosePairs(*parts), table["cosine"].to_numpy() if "cosine" in table.column_names else None


class Decision(NamedTuple):
    """reason_N uint8 (see REASONS); other_N int64: the image that a near-duplicate duplicates (candidate, or row of a held-out image), else -1."""

    reason_N: np.ndarray
    other_N: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the kept candidates, by rank."""
        return np.flatnonzero(self.reason_N == KEPT)


def decide(
    candidates: Candidates, pairs: ClosePairs, cosine_P: np.ndarray, *, cosine: float, val_images: int, keep: int
) -> Decision:
    """Decide which candidates to keep.

    Args:
        cosine_P: cosines of the inside pairs, then of the held-out pairs.
        cosine: smallest cosine of a duplicate.
        val_images: number of validation images, the first rows of the held-out images; the others are training images.
        keep: most images kept per class.
    """
    reason = np.full(len(candidates.id_N), KEPT, np.uint8)
    other = np.full(len(candidates.id_N), -1, np.int64)
    count = len(pairs.inside.left_P)
    inside, outside = cosine_P[:count] >= cosine, cosine_P[count:] >= cosine
    left, right = pairs.held_out.left_P[outside], pairs.held_out.right_P[outside]
    of_val = right < val_images
    for which, why in ((~of_val, LIKE_TRAIN), (of_val, LIKE_VAL)):  # a validation image overrides a training image
        reason[left[which]], other[left[which]] = why, right[which]
    better = confirmed_losers(pairs.inside.right_P[inside], pairs.inside.left_P[inside], reason != KEPT)
    reason[better >= 0] = LIKE_BETTER
    other[better >= 0] = better[better >= 0]
    remaining = np.flatnonzero(reason == KEPT)
    reason[remaining[~cut_to(candidates.class_N[remaining], keep)]] = BEYOND
    return Decision(reason, other)


def cut_to(ranked_class_N: np.ndarray, keep: int) -> np.ndarray:
    """Whether each row, in the order of rank, is among the first `keep` of its class: bool [N]."""
    order = np.argsort(ranked_class_N, kind="stable")
    classes = ranked_class_N[order]
    starts = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]]) if len(classes) else np.empty(0, np.int64)
    place = np.arange(len(classes)) - np.repeat(starts, np.diff(np.r_[starts, len(classes)]))
    kept = np.empty(len(classes), bool)
    kept[order] = place < keep
    return kept


def numbers(candidates: Candidates, decision: Decision, *, classes: int, keep: int) -> dict[str, Any]:
    """Count the images of the pool by outcome; the counts add up to `images`."""
    facts = candidates.facts
    among = len(candidates.id_N)
    outside = facts["images"] - facts["unreadable"] - facts["below_min_score"] - among
    counts = np.bincount(decision.reason_N, minlength=len(REASONS)).tolist()
    kept = np.bincount(candidates.class_N[decision.kept], minlength=classes)
    return {
        "images": facts["images"],
        **dict(zip(REASONS, counts, strict=True)),
        "not_candidates": outside,
        "below_min_score": facts["below_min_score"],
        "unreadable": facts["unreadable"],
        "candidates": among,
        "classes": classes,
        "full_classes": int((kept >= keep).sum()),
        "empty_classes": int((kept == 0).sum()),
    }


def class_table(candidates: Candidates, decision: Decision, names: list[str] | None, classes: int) -> str:
    """CSV text with one line per class: images in the pool, kept images, and their lowest score."""
    kept = decision.kept
    counts = np.bincount(candidates.class_N[kept], minlength=classes)
    lowest = np.full(classes, np.nan)
    np.fmin.at(lowest, candidates.class_N[kept], candidates.score_N[kept])
    lines = ["class,name,pool_images,kept,lowest_score"]
    for number in range(classes):
        name = '"' + names[number].replace('"', '""') + '"' if names else ""
        score = "" if math.isnan(lowest[number]) else f"{lowest[number]:.4f}"
        lines.append(f"{number},{name},{candidates.facts['class_images'][number]},{counts[number]},{score}")
    return "\n".join(lines) + "\n"
