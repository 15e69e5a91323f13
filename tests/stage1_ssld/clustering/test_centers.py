"""K-means over files: statistics, blobs that are recovered, empty centers, equal sizes."""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssld.shared.errors import UserError
from ssld.stage1_ssld.clustering import centers, embedding_files
from ssld.stage1_ssld.clustering.centers import Clusters, find_clusters, require_scikit_learn
from ssld.stage1_ssld.clustering.embedding_files import Embeddings, save_embeddings, standard_of
from ssld.stage1_ssld.clustering.prototype_layer import scores

Files = Callable[[np.ndarray], Embeddings]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes a table in three unequal files."""

    def write(z_ND: np.ndarray) -> Embeddings:
        cuts = [0, len(z_ND) // 7, len(z_ND) // 2, len(z_ND)]
        paths = [tmp_path / f"{number}.npy" for number in range(3)]
        for number, path in enumerate(paths):
            save_embeddings(path, z_ND[cuts[number] : cuts[number + 1]])
        return Embeddings(paths)

    return write


def blobs(shares: list[float], count: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(points, number of the blob of each), ordered by blob as folders of classes are."""
    draw = np.random.default_rng(seed)
    labels = np.sort(draw.choice(len(shares), count, p=shares))
    return 8 * draw.normal(size=(len(shares), width))[labels] + draw.normal(size=(count, width)), labels


def clustered(embeddings: Embeddings, count: int, *, seed: int = 0, balanced: bool = False) -> Clusters:
    return find_clusters(
        embeddings,
        standard_of(embeddings),
        count,
        seed=seed,
        balanced=balanced,
        threads=1,
        log=lambda line: None,
    )


def test_statistics_are_those_of_the_whole_table(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, without rows that could not be read; a constant feature keeps its scale."""
    monkeypatch.setattr(embedding_files, "rows_of", lambda columns: 7)
    z = np.random.default_rng(1).normal(size=(90, 5)) * [1, 10, 0.1, 0, 3] + [1000, 0, -5, 7, 0]
    unreadable = [0, 12, 13, 89]
    z[unreadable] = np.nan
    embeddings = files(z)
    kept = np.delete(z, unreadable, 0).astype(np.float32).astype(np.float64)
    assert len(embeddings) == 86
    standard = standard_of(embeddings)
    np.testing.assert_allclose(standard.mean_D, kept.mean(0), rtol=1e-12)
    expected = kept.std(0)
    expected[3] = 1
    np.testing.assert_allclose(standard.scale_D, expected, rtol=1e-9)
    np.testing.assert_array_equal(np.concatenate([block for _, block in embeddings.blocks()]), kept)
    ids = np.array([40, 3, 88, 3])
    np.testing.assert_array_equal(embeddings.rows(ids), z[ids].astype(np.float32))
    assert len(embeddings.sample(10)) == 10
    assert not np.isnan(embeddings.sample(10)).any()


def test_finds_blobs_in_the_order_of_folders(files: Files) -> None:
    z, labels = blobs([0.4, 0.2, 0.2, 0.1, 0.1], 300)
    embeddings = files(z)
    result = clustered(embeddings, 5)
    assert sorted(result.size_K) == sorted(np.bincount(labels))
    assert not result.offset_K.any()
    label_N = scores(standard_of(embeddings)(z), result.center_KD, result.offset_K).argmax(1)
    assert len(set(zip(labels.tolist(), label_N.tolist(), strict=True))) == 5
    for k in range(5):  # centers are the means of what is nearest to them
        mean = standard_of(embeddings)(z)[label_N == k].mean(0)
        np.testing.assert_allclose(result.center_KD[k], mean, atol=1e-5)


def test_follows_from_the_seed(files: Files) -> None:
    embeddings = files(np.random.default_rng(0).normal(size=(200, 4)))
    one, again, other = (clustered(embeddings, 16, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.center_KD, again.center_KD)
    assert not np.allclose(one.center_KD, other.center_KD)
    assert one.size_K.sum() == 200
    assert one.size_K.min() > 0


def test_empty_centers_are_refilled(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four centers begin where no image is; afterwards every one has images."""
    z, _ = blobs([0.25] * 4, 80)
    embeddings = files(z)
    standard = standard_of(embeddings)
    start = standard(z[[0, -1]])
    away = np.concatenate([start, np.full((2, 6), 1e3)])
    monkeypatch.setattr(centers, "_by_mini_batches", lambda *_: away.astype(np.float64))
    result = clustered(embeddings, 4)
    assert result.refilled >= 2
    assert result.size_K.min() > 0
    assert result.size_K.sum() == 80


@pytest.mark.parametrize("balanced", [False, True])
def test_more_centers_than_different_images(files: Files, balanced: bool) -> None:
    z = np.repeat(np.random.default_rng(0).normal(size=(3, 4)), 10, axis=0)
    with pytest.raises(
        UserError, match="prototypes: 5 are more than the distinct embeddings of these 30 images allow: many"
    ):
        clustered(files(z), 5, balanced=balanced)


def test_as_many_centers_as_images(files: Files) -> None:
    """Every image is its own center: no distance below 0 from rounding, and no pass more than the one that counts."""
    embeddings = files(100 + np.random.default_rng(0).normal(size=(30, 64)))
    lines: list[str] = []
    standard = standard_of(embeddings)
    result = find_clusters(embeddings, standard, 30, seed=0, balanced=False, threads=1, log=lines.append)
    assert (result.size_K == 1).all()
    distances = [float(line.split("distance ")[1].split(",")[0]) for line in lines if "distance" in line]
    assert min(distances) >= 0
    assert len(distances) <= 3


def test_balanced_sizes_are_equal(files: Files) -> None:
    """One blob has 70 % of the images: without the option its center has them all, with it every center has about N / K."""
    z, _ = blobs([0.7, 0.1, 0.1, 0.1], 240)
    plain = clustered(files(z), 4)
    assert plain.size_K.max() > 140
    result = clustered(files(z), 4, balanced=True)
    assert result.size_K.sum() == 240
    assert abs(result.size_K - 60).max() <= 3
    embeddings = files(z)
    label_N = scores(standard_of(embeddings)(z), result.center_KD, result.offset_K).argmax(1)
    np.testing.assert_array_equal(np.bincount(label_N, minlength=4), result.size_K)


def test_balancing_takes_the_memory_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets from parts of the sample are those from all of it at once, without its copies."""
    draw = np.random.default_rng(0)
    sample_BD, center_KD = draw.normal(size=(20_000, 8)).astype(np.float32), draw.normal(size=(48, 8))

    def offsets() -> np.ndarray:
        score_BK = centers._scores_of_sample(sample_BD, center_KD)
        offset_K, entropy = centers._sinkhorn(score_BK, np.zeros(48))
        return centers._level(score_BK, offset_K, entropy)

    monkeypatch.setattr(centers, "rows_of", lambda columns: len(sample_BD))
    expected = offsets()
    monkeypatch.setattr(centers, "rows_of", lambda columns: 700)
    tracemalloc.start()
    try:
        actual = offsets()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(actual, expected, atol=1e-9)
    assert peak < 2 * 20_000 * 48 * 4
    sizes = np.bincount((scores(sample_BD, center_KD, actual)).argmax(1), minlength=48)
    assert abs(sizes - 20_000 / 48).max() < 0.1 * 20_000 / 48


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    require_scikit_learn()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"prototypes need scikit-learn; pip install -e '.\[prototypes\]' in the clone"):
        require_scikit_learn()
