"""K-means over embeddings larger than memory, without empty clusters and, optionally, with clusters of equal size.

Mini-batches (scikit-learn's `MiniBatchKMeans`; Sculley, "Web-scale k-means clustering", WWW 2010) find the centers, and a few passes over all images
(Lloyd) refine them. An image belongs to the center with the largest x.c - |c|^2 / 2 + w, the nearest one if all offsets w are 0.

Balanced: Sinkhorn's algorithm (Cuturi 2013, arXiv 1306.0895) between the images and centers of N / K images each. The equal sizes are expressed by
one offset w per center, so that the assignment stays linear in x (a power diagram).

Everything runs in one process, in the order of the files, and is determined by the seed. B images per block, N in all, D features, K centers.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ssld.shared.errors import UserError
from ssld.stage1_ssld.clustering.embedding_files import Embeddings, Standard, rows_of
from ssld.stage1_ssld.clustering.prototype_layer import scores, softmax, temperature_for

_BATCH = 1024  # fewest images per mini-batch
_STEPS, _PASSES = 60, 2  # fewest mini-batches, and fewest passes over all images that they make
_LLOYD = 10  # most passes that refine the centers
_SETTLED = 1e-3  # smallest relative improvement of the distance for another pass
_REFILLS = 20  # most further passes to refill empty clusters
# Balanced:
_SAMPLE, _SAMPLE_OF_EACH = 8192, 16  # fewest images that offsets are estimated on: in all, and per center
_PERPLEXITIES = (4.0, 1.05)  # of the soft assignment: first and last
_SHARPENINGS, _STEPS_OF_EACH = 6, 8  # number of perplexities, and Sinkhorn steps at each
_ROUNDS, _SAMPLE_LEVELLING, _LEVELLING = 5, 60, 15
_LEVEL = 0.05  # tolerated relative deviation of a size from N / K


class Clusters(NamedTuple):
    """center_KD and offset_K float64, for standardized embeddings; size_K images per cluster; refilled: empty clusters that were refilled."""

    center_KD: np.ndarray
    offset_K: np.ndarray
    size_K: np.ndarray
    refilled: int


Log = Callable[[str], None]


def find_clusters(
    embeddings: Embeddings, standard: Standard, count: int, *, seed: int, balanced: bool, threads: int, log: Log
) -> Clusters:
    """Run k-means.

    Args:
        standard: standardization of the embeddings.
        count: number K of centers.
        seed: seed of all draws.
        balanced: whether clusters have equal size.
        threads: threads of NumPy's matrix products and scikit-learn.
        log: called with a progress line after each part; an exception of it ends the work.

    Raises:
        UserError: scikit-learn is not installed; more centers than distinct embeddings.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(threads):
        center_KD = _by_mini_batches(embeddings, standard, count, seed, log)
        return (_balanced if balanced else _refined)(embeddings, standard, center_KD, log)


def require_scikit_learn() -> None:
    """Raise UserError if it is not installed, before hours of embedding."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UserError("prototypes need scikit-learn; pip install -e '.[prototypes]' in the clone")


def _by_mini_batches(embeddings: Embeddings, standard: Standard, count: int, seed: int, log: Log) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    generator = np.random.default_rng(seed)
    size = min(len(embeddings), max(_BATCH, 4 * count))
    steps = max(_STEPS, -(-_PASSES * len(embeddings) // size))
    batches = _random_batches(embeddings.readable_N, size, generator)
    # reassignment_ratio=0: random reassignment of small clusters costs more than it gains; empty ones are refilled afterwards.
    kmeans = MiniBatchKMeans(count, batch_size=size, n_init=1, random_state=seed, reassignment_ratio=0.0)
    for step in range(1, steps + 1):
        kmeans.partial_fit(standard(embeddings.rows(next(batches))))
        if step % _STEPS == 0 or step == steps:
            log(f"k-means: {step} of {steps} mini-batches of {size} images")
    center_KD: np.ndarray = kmeans.cluster_centers_.astype(np.float64)
    return center_KD


def _random_batches(rows_N: np.ndarray, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of rows: every pass has its own order, and its incomplete last batch is dropped."""
    while True:
        order = generator.permutation(len(rows_N))
        for first in range(0, len(order) - size + 1, size):
            yield rows_N[order[first : first + size]]


def _refined(embeddings: Embeddings, standard: Standard, center_KD: np.ndarray, log: Log) -> Clusters:
    """Run Lloyd's passes until the distance hardly improves; the last pass only counts, so that sizes belong to the returned centers."""
    count, refilled, before = len(center_KD), 0, np.inf
    offset_K = np.zeros(count)
    for number in range(1, _LLOYD + _REFILLS + 1):
        size_K, sum_KD = np.zeros(count), np.zeros_like(center_KD)
        distance, far = 0.0, _Farthest(count, embeddings.width)
        for ids_B, z_BD in embeddings.blocks(count):
            x_BD = standard(z_BD)
            score_BK = scores(x_BD, center_KD, offset_K)
            label_B = score_BK.argmax(1)
            # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2); for an image at its center, rounding may make it negative.
            distance_B = (x_BD.astype(np.float64) ** 2).sum(1) - 2 * score_BK[np.arange(len(label_B)), label_B]
            distance_B = np.maximum(distance_B, 0)
            _add_rows(sum_KD, label_B, x_BD)
            size_K += np.bincount(label_B, minlength=count)
            distance += float(distance_B.sum())
            far.add(ids_B, distance_B)
        empty = np.flatnonzero(size_K == 0)
        log(f"k-means: pass {number}, mean squared distance {distance / len(embeddings):.4g}, {len(empty)} empty")
        if not len(empty) and (number >= _LLOYD or before - distance <= _SETTLED * distance):
            return Clusters(center_KD, offset_K, size_K.astype(np.int64), refilled)
        before = distance
        center_KD = np.where(size_K[:, None] > 0, sum_KD / np.maximum(size_K, 1)[:, None], center_KD)
        if len(empty):
            ids = far.ids(len(empty))
            if len(ids) < len(empty):
                raise _too_many(count, len(embeddings))
            center_KD[empty] = standard(embeddings.rows(ids))
            refilled += len(empty)
            before = np.inf
    raise _too_many(count, len(embeddings))


def _too_many(count: int, images: int) -> UserError:
    return UserError(
        f"prototypes: {count} are more than the distinct embeddings of these {images} images allow: many images are copies, or the encoder gives "
        "the same for all; set fewer prototypes, or give other images"
    )


class _Farthest:
    """The `most` images farthest from their centers, to which empty centers are moved."""

    def __init__(self, most: int, width: int) -> None:
        self._most, self._rounding = most, 1e-5 * width  # a standardized embedding has a length of about sqrt(width)
        self._ids, self._distances = np.empty(0, np.int64), np.empty(0)

    def add(self, ids_B: np.ndarray, distance_B: np.ndarray) -> None:
        ids, distances = np.concatenate([self._ids, ids_B]), np.concatenate([self._distances, distance_B])
        order = np.argsort(-distances, kind="stable")[: self._most]
        self._ids, self._distances = ids[order], distances[order]

    def ids(self, count: int) -> np.ndarray:
        """Rows of the `count` farthest images; fewer if all others coincide with their centers."""
        return self._ids[self._distances > self._rounding][:count]


def _add_rows(sum_KD: np.ndarray, label_B: np.ndarray, x_BD: np.ndarray) -> None:
    """Add every row to the sum of its label."""
    order = np.argsort(label_B, kind="stable")
    labels = label_B[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    sum_KD[labels[starts]] += np.add.reduceat(x_BD[order].astype(np.float64), starts, axis=0)


def _balanced(embeddings: Embeddings, standard: Standard, center_KD: np.ndarray, log: Log) -> Clusters:
    """Alternate offsets and centers: offsets from a sample, then the means of the images assigned with them, in a pass over all images.

    The last passes adjust the offsets on all images with fixed centers. Returns the clusters with the most equal sizes.
    """
    count, share = len(center_KD), len(embeddings) / len(center_KD)
    sample_BD = standard(embeddings.sample(max(_SAMPLE, _SAMPLE_OF_EACH * count)))
    offset_K, best, off_by = np.zeros(count), None, np.inf
    for number in range(1, _ROUNDS + _LEVELLING + 1):
        if number <= _ROUNDS:
            score_BK = _scores_of_sample(sample_BD, center_KD)
            offset_K, entropy = _sinkhorn(score_BK, offset_K)
            offset_K = _level(score_BK, offset_K, entropy)
            leveller = _Leveller(count, entropy)
        size_K, sum_KD = np.zeros(count), np.zeros_like(center_KD)
        for _, z_BD in embeddings.blocks(count):
            x_BD = standard(z_BD)
            label_B = scores(x_BD, center_KD, offset_K).argmax(1)
            _add_rows(sum_KD, label_B, x_BD)
            size_K += np.bincount(label_B, minlength=count)
        log(f"k-means: balanced pass {number}, sizes from {size_K.min():.0f} to {size_K.max():.0f} images")
        if number < _ROUNDS:
            center_KD = np.where(size_K[:, None] > 0, sum_KD / np.maximum(size_K, 1)[:, None], center_KD)
            continue
        if (off := float(abs(size_K - share).max())) < off_by:
            best, off_by = Clusters(center_KD, offset_K.copy(), size_K.astype(np.int64), 0), off
        if off <= max(_LEVEL * share, 1.0):
            break
        offset_K = offset_K + leveller.change(size_K, share)
    assert best is not None
    if best.size_K.min() == 0:
        raise _too_many(count, len(embeddings))
    return best


def _scores_of_sample(sample_BD: np.ndarray, center_KD: np.ndarray) -> np.ndarray:
    """`scores` without offsets, float32 and made in parts: of 65,536 images and 4,096 centers they take 1 GB, in float64 with copies 6 GB."""
    score_BK = np.empty((len(sample_BD), len(center_KD)), np.float32)
    for part in _parts(score_BK):
        score_BK[part] = scores(sample_BD[part], center_KD, np.zeros(len(center_KD)))
    return score_BK


def _parts(score_BK: np.ndarray) -> list[slice]:
    """Row ranges of a table whose copies in float64 take little memory."""
    rows = rows_of(score_BK.shape[1])
    return [slice(first, first + rows) for first in range(0, len(score_BK), rows)]


def _sinkhorn(score_BK: np.ndarray, offset_K: np.ndarray) -> tuple[np.ndarray, float]:
    """Return offsets at which every center has the same mass under the softmax of (score + offset) / entropy, and the last entropy.

    The softmax normalizes rows, the offsets normalize columns. The entropy decreases step by step; a small constant one converges far slower.
    """
    count, some = score_BK.shape[1], slice(None, None, max(1, len(score_BK) // 1024))
    widest, sharpest = (
        temperature_for(score_BK[some] + offset_K, min(perplexity, (1 + count) / 2)) for perplexity in _PERPLEXITIES
    )
    entropies = np.geomspace(max(widest, sharpest), sharpest, _SHARPENINGS)
    for entropy in np.repeat(entropies, _STEPS_OF_EACH):
        mass_K = np.zeros(count)
        for part in _parts(score_BK):
            mass_K += softmax((score_BK[part] + offset_K) / entropy).sum(0) / len(score_BK)
        offset_K = offset_K - entropy * np.log(np.maximum(mass_K * count, 1e-30))
    return offset_K - offset_K.mean(), sharpest


def _level(score_BK: np.ndarray, offset_K: np.ndarray, step: float) -> np.ndarray:
    """Refine the offsets of the soft assignment to the most equal sizes of the hard one."""
    count, share = score_BK.shape[1], len(score_BK) / score_BK.shape[1]
    best, off_by, leveller = offset_K, np.inf, _Leveller(count, step)
    for _ in range(_SAMPLE_LEVELLING):
        size_K = np.zeros(count, np.int64)
        for part in _parts(score_BK):
            size_K += np.bincount((score_BK[part] + offset_K).argmax(1), minlength=count)
        if (off := float(abs(size_K - share).max())) < off_by:
            best, off_by = offset_K, off
        offset_K = offset_K + leveller.change(size_K, share)
    return best


class _Leveller:
    """Update of the offsets: raised for small clusters, lowered for large ones, by steps that grow while the sign stays and are halved when it
    changes (Rprop; Riedmiller and Braun 1993)."""

    def __init__(self, count: int, step: float) -> None:
        self._step_K, self._before_K = np.full(count, step), np.zeros(count)

    def change(self, size_K: np.ndarray, share: float) -> np.ndarray:
        """Change of the offsets for the current sizes."""
        sign_K = np.where(abs(size_K - share) <= max(0.5 * _LEVEL * share, 0.5), 0.0, np.sign(share - size_K))
        turn_K = sign_K * self._before_K
        self._step_K *= np.where(turn_K > 0, 1.3, np.where(turn_K < 0, 0.5, 1.0))
        self._before_K = sign_K
        change_K: np.ndarray = sign_K * self._step_K
        return change_K
