"""The selection against the same rules written out in plain Python, on score files with ties, duplicates and unreadable images."""

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssld.stage1_ssld.curation.score_files import (
    HELD_OUT,
    SCORED,
    UNREADABLE,
    ScoreFiles,
    UnitEmbeddings,
    cosines,
    save_unit_embeddings,
    shard_file,
    write_shard,
)
from ssld.stage1_ssld.curation.selection import (
    BINS,
    REASONS,
    Decision,
    Ranked,
    TopK,
    add_cosines,
    class_table,
    cut_to,
    decide,
    find_candidates,
    find_close_pairs,
    load_candidates,
    load_close_pairs,
    numbers,
    pair_rows,
    save_candidates,
    save_close_pairs,
)

CLASSES, KEEP, DISTANCE, COSINE, VAL = 6, 5, 3, 0.85, 30
MIN_SCORE = 0.2


@pytest.fixture
def pool(tmp_path: Path) -> dict[str, Any]:
    """300 scored images in three files of unequal size, 70 held-out ones in two; hashes from few families, so that many are close."""
    generator = np.random.default_rng(0)
    families = generator.integers(0, 2**64, 40, dtype=np.uint64)

    def hashes(count: int) -> np.ndarray:
        turned = (np.uint64(1) << generator.integers(0, 64, count).astype(np.uint64)) * generator.integers(
            0, 2, count, dtype=np.uint64
        )
        return families[generator.integers(0, 40, count)] ^ turned

    classes = generator.integers(0, CLASSES - 1, 300).astype(np.int32)
    classes[generator.integers(0, 300, 9)] = UNREADABLE
    columns = {
        "key": np.array([f"image {number}" for number in range(300)]),
        "class": classes,
        "score": np.where(classes == UNREADABLE, 0, generator.integers(0, 30, 300) / 30).astype(np.float32),
        "hash": hashes(300),
        "mirrored": hashes(300),
    }
    held_out = {
        "key": np.array([f"other {number}" for number in range(70)]),
        "class": np.where(np.arange(70) % 10 == 3, UNREADABLE, 0).astype(np.int32),
        "hash": hashes(70),
        "mirrored": hashes(70),
    }
    for name, table, cuts, schema in (
        ("scores", columns, (0, 100, 101, 300), SCORED),
        ("held_out", held_out, (0, VAL, 70), HELD_OUT),
    ):
        (tmp_path / name).mkdir()
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            part = {key: value[low:high] for key, value in table.items()}
            lost = [key for key, label in zip(part["key"], part["class"], strict=True) if label == UNREADABLE]
            write_shard(shard_file(tmp_path / name, number), part, schema, lost)
    return {"folder": tmp_path, "pool": columns, "held_out": held_out}


def closeness(a: int, b: int) -> float:
    """A made-up cosine of the images with these hashes, or ids: any fixed rule does."""
    return ((a * 7919 + b * 104729) % 1000) / 1000


def written_out(pool: dict[str, Any], candidates: int, flips: bool) -> dict[int, str]:
    """{row of a candidate: what becomes of it}, one image and one rule at a time."""
    scored, held_out = pool["pool"], pool["held_out"]
    score, hashes, mirrored = (scored[name].tolist() for name in ("score", "hash", "mirrored"))
    ranked: list[int] = []
    for number in range(CLASSES):
        rows = [row for row in range(300) if scored["class"][row] == number and score[row] >= np.float32(MIN_SCORE)]
        ranked += sorted(rows, key=lambda row: (-score[row], row))[:candidates]
    ranked.sort(key=lambda row: (-score[row], row))
    fate: dict[int, str] = {}
    for row in ranked:
        for other in range(70):
            reference = [held_out[name].tolist()[other] for name in ("hash", "mirrored")]
            near = min((hashes[row] ^ bits).bit_count() for bits in reference) <= DISTANCE
            if near and held_out["class"][other] != UNREADABLE and closeness(row, other + 1000) >= COSINE:
                fate[row] = "like_val" if other < VAL or fate.get(row) == "like_val" else "like_train"
    for place, row in enumerate(ranked):
        for better in ranked[:place]:
            bits = [hashes[row] ^ hashes[better]]
            if flips:
                bits += [hashes[row] ^ mirrored[better], mirrored[row] ^ hashes[better]]
            near = min(part.bit_count() for part in bits) <= DISTANCE
            if near and row not in fate and fate.get(better) == "kept" and closeness(row, better) >= COSINE:
                fate[row] = "like_better"
        fate.setdefault(row, "kept")
    for number in range(CLASSES):
        mine = [row for row in ranked if fate[row] == "kept" and scored["class"][row] == number]
        fate |= dict.fromkeys(mine[KEEP:], "beyond_keep")
    return fate


@pytest.mark.parametrize(("candidates", "flips"), [(9, True), (12, False), (300, True), (300, False)])
def test_equals_the_rules_written_out(pool: dict[str, Any], candidates: int, flips: bool) -> None:
    scored, held_out = ScoreFiles(pool["folder"] / "scores", 3), ScoreFiles(pool["folder"] / "held_out", 2)
    actual = find_candidates(scored, classes=CLASSES, keep=candidates, min_score=MIN_SCORE, examples=4)
    save_candidates(pool["folder"] / "candidates.parquet", actual)
    actual = load_candidates(pool["folder"] / "candidates.parquet")
    alike = find_close_pairs(actual.hash_N, actual.mirrored_N if flips else None, held_out, hash_distance=DISTANCE)
    ids = actual.id_N.tolist()
    cosine = np.array(
        [closeness(ids[a], ids[b]) for a, b, _ in zip(*alike.inside, strict=True)]
        + [closeness(ids[a], b + 1000) for a, b, _ in zip(*alike.held_out, strict=True)],
        np.float32,
    )
    save_close_pairs(pool["folder"] / "near_duplicates.parquet", alike, actual.id_N)
    rows = pair_rows(pool["folder"] / "near_duplicates.parquet")
    assert rows is not None
    expected_rows = [(ids[a], ids[b], False) for a, b, _ in zip(*alike.inside, strict=True)]
    expected_rows += [(ids[a], b, True) for a, b, _ in zip(*alike.held_out, strict=True)]
    assert list(zip(*(column.tolist() for column in rows), strict=True)) == expected_rows
    add_cosines(pool["folder"] / "near_duplicates.parquet", cosine)
    assert pair_rows(pool["folder"] / "near_duplicates.parquet") is None
    alike, known = load_close_pairs(pool["folder"] / "near_duplicates.parquet")
    assert known is not None
    decision = decide(actual, alike, known, cosine=COSINE, val_images=VAL, keep=KEEP)

    expected = written_out(pool, candidates, flips)
    assert dict(zip(ids, (REASONS[reason] for reason in decision.reason_N), strict=True)) == expected
    if candidates == 300:
        assert set(expected.values()) == set(REASONS)
    for number, reason in enumerate(decision.reason_N):
        assert (decision.other_N[number] >= 0) == REASONS[reason].startswith("like_")
        if REASONS[reason] == "like_val":
            assert decision.other_N[number] < VAL

    counted = numbers(actual, decision, classes=CLASSES, keep=KEEP)
    fates = (*REASONS, "not_candidates", "below_min_score", "unreadable")
    assert sum(counted[name] for name in fates) == counted["images"] == 300
    low = [
        row
        for row in range(300)
        if pool["pool"]["class"][row] != UNREADABLE and pool["pool"]["score"][row] < np.float32(MIN_SCORE)
    ]
    assert counted["below_min_score"] == len(low)
    assert actual.facts["low_ids"] == low[:4]
    assert counted["unreadable"] == (pool["pool"]["class"] == UNREADABLE).sum() == len(scored.unreadable)
    readable = pool["pool"]["score"][pool["pool"]["class"] != UNREADABLE]
    assert actual.facts["histogram"] == np.histogram(readable, BINS, (0, 1))[0].tolist()
    assert counted["empty_classes"] >= 1


def test_pairs_are_kept_without_cosines_until_these_are_known(pool: dict[str, Any]) -> None:
    scored, held_out = ScoreFiles(pool["folder"] / "scores", 3), ScoreFiles(pool["folder"] / "held_out", 2)
    actual = find_candidates(scored, classes=CLASSES, keep=12, min_score=0)
    alike = find_close_pairs(actual.hash_N, actual.mirrored_N, held_out, hash_distance=DISTANCE)
    save_close_pairs(pool["folder"] / "pairs.parquet", alike, actual.id_N)
    again, cosine = load_close_pairs(pool["folder"] / "pairs.parquet")
    assert cosine is None
    for mine, read in zip([*alike[0], *alike[1]], [*again[0], *again[1]], strict=True):
        np.testing.assert_array_equal(mine, read)
    none_held_out = ScoreFiles(pool["folder"] / "held_out", 0)
    assert len(find_close_pairs(actual.hash_N, None, none_held_out, hash_distance=DISTANCE).held_out.left_P) == 0


def test_the_table_of_classes(pool: dict[str, Any]) -> None:
    actual = find_candidates(ScoreFiles(pool["folder"] / "scores", 3), classes=CLASSES, keep=2, min_score=0)
    decision = Decision(np.zeros(len(actual.id_N), np.uint8), np.full(len(actual.id_N), -1))
    names = ["a", 'b "quoted"', "c, d", "e", "f", "never"]
    lines = class_table(actual, decision, names, CLASSES).splitlines()
    assert lines[0] == "class,name,pool_images,kept,lowest_score"
    assert lines[2].startswith('1,"b ""quoted""",')
    assert lines[6] == '5,"never",0,0,'
    lowest = sorted(actual.score_N[actual.class_N == 2].tolist())[0]
    count = int((pool["pool"]["class"] == 2).sum())
    assert lines[3] == f'2,"c, d",{count},2,{lowest:.4f}'
    assert class_table(actual, decision, None, CLASSES).splitlines()[6] == "5,,0,0,"


def test_rows_of_files(pool: dict[str, Any]) -> None:
    """Columns at any rows in any order, keys and shards of ascending ones."""
    files = ScoreFiles(pool["folder"] / "scores", 3)
    rows = np.random.default_rng(1).permutation(300)[:120]
    np.testing.assert_array_equal(files.column("hash", rows), pool["pool"]["hash"][rows])
    rows.sort()
    assert files.keys(rows).to_pylist() == pool["pool"]["key"][rows].tolist()
    assert files.keys(rows[:0]).to_pylist() == []
    starts = [0, 100, 101]
    actual = {number: part.tolist() for number, part in files.shard_rows(rows)}
    assert sorted(actual[n][i] + starts[n] for n in actual for i in range(len(actual[n]))) == rows.tolist()
    assert files.shard_of(np.array([0, 99, 100, 101, 299])).tolist() == [0, 0, 1, 2, 2]
    assert files.unreadable == [
        key for key, label in zip(pool["pool"]["key"], pool["pool"]["class"], strict=True) if label == UNREADABLE
    ]


def test_cosines_of_embeddings_on_disk(tmp_path: Path) -> None:
    """Against float64 of what was given: half precision on disk costs less than 0.001; an image and its copy have exactly 1."""
    vectors = np.random.default_rng(0).normal(size=(50, 12)) * 30
    vectors[7] = vectors[31]
    vectors[3] = 0  # no direction: like nothing
    ids = np.arange(50) * 3
    for number, part in enumerate(np.split(vectors, [20, 21])):
        save_unit_embeddings(tmp_path / f"{number}.npy", part)
    stored = UnitEmbeddings(ids, [tmp_path / f"{number}.npy" for number in range(3)], tmp_path / "joined")
    left, right = np.random.default_rng(1).integers(0, 50, (2, 9000))
    left[:2], right[:2] = (7, 3), (31, 4)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    actual = cosines(ids[left], ids[right], stored, stored)
    np.testing.assert_allclose(actual, (unit[left] * unit[right]).sum(1), atol=1e-3)
    assert actual[0] == 1
    assert actual[1] == 0


# ---- the best k of a class, against sorting everything in Python; and memory that does not follow the stream


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
