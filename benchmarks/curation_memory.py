"""Memory and time of the selection of a curation, by the very processes that `curate.py` starts for it.

    python benchmarks/curation_memory.py [--rows 20000000] [--classes 1000] [--keep 4000] [--protected 50000]

Writes score files of that many made-up images to a temporary folder, a thousand of them copies of protected images, a thousand copies of each
other, and a thousand mirror images of each other. Then come `find` (best 1.5 x keep a class, close hashes among these and with the protected) and
`decide` (what goes, the cut to `keep`, the manifest) of selecting.py, with cosines of 1 in between. Prints counts, seconds and each process's peak of
resident memory; fails if a copy was not found.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ssld.stage1_ssld.curation.outcome import Plan, outcome_of, run_part
from ssld.stage1_ssld.curation.score_files import PROTECTED, SCORED, shard_file, write_shard
from ssld.stage1_ssld.curation.selection import add_cosines, pair_rows

SHARD = 500_000
COPIES = 1000
CANDIDATES = 1.5


def main() -> None:
    """Write score files, select in other processes and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=4000)
    parser.add_argument("--protected", type=int, default=50_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.rows, arguments.classes, arguments.protected)
        print(json.dumps(select(Path(folder), arguments.rows, arguments.classes, arguments.keep, arguments.protected)))


def write(folder: Path, rows: int, classes: int, protected: int) -> None:
    """Score files of `rows` images; the last of them are copies of protected ones, before them mirror images and copies of those before them."""
    generator = np.random.default_rng(0)
    shielded = generator.integers(0, 2**64, (2, protected), dtype=np.uint64)
    twins = generator.integers(0, 2**64, (2, COPIES), dtype=np.uint64)
    for name in ("scores", "protected"):
        (folder / name).mkdir()
    columns = {
        "key": [str(number) for number in range(protected)],
        "class": np.zeros(protected, np.int32),
        "hash": shielded[0],
        "mirrored": shielded[1],
    }
    write_shard(shard_file(folder / "protected", 0), columns, PROTECTED, [])
    for number, first in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - first)
        columns = {
            "key": [f"{first + row:09d}.jpg" for row in range(count)],
            "class": generator.integers(0, classes, count, dtype=np.int32),
            "score": generator.random(count, np.float32) * np.float32(0.99),
            "hash": generator.integers(0, 2**64, count, dtype=np.uint64),
            "mirrored": generator.integers(0, 2**64, count, dtype=np.uint64),
        }
        if first + count == rows:  # copies differ in three bits and are sure of their class
            columns["score"][-4 * COPIES :] = np.float32(0.995)
            noise = np.uint64((1 << 3) | (1 << 30) | (1 << 61))
            columns["hash"][-4 * COPIES :] = np.r_[
                twins[0], twins[0] ^ noise, twins[1] ^ noise, shielded[0, :COPIES] ^ noise
            ]
            columns["mirrored"][-4 * COPIES :][:COPIES] = twins[1]
        write_shard(shard_file(folder / "scores", number), columns, SCORED, [])


def select(folder: Path, rows: int, classes: int, keep: int, protected: int) -> dict[str, float]:
    """Select from these files; seconds, megabytes and counts."""
    shards = len(range(0, rows, SHARD))
    Plan(
        classes=classes,
        class_names=None,
        keep=keep,
        candidates=CANDIDATES,
        min_score=0.0,
        hash_distance=6,
        mirrored=True,
        cosine=0.9,
        examples=8,
        pool=[{"path": "pool"}],
        shard_sources=["pool"] * shards,
        protected_shards=1,
        val_images=protected,
        teacher={},
    ).save(folder)
    found: dict[str, float] = {"rows": rows}
    for part in ("find", "decide"):
        begun = time.perf_counter()
        lines = run_part(part, folder, apart=True, stop=lambda: False)
        found[f"{part}_seconds"] = round(time.perf_counter() - begun, 1)
        peak = [line.split() for line in lines if line.endswith(" MB of memory at the peak")]
        found[f"{part}_megabytes"] = int(peak[0][2]) if peak else -1
        if part == "find":
            pairs = pair_rows(folder / "look_alikes.parquet")
            assert pairs is not None
            add_cosines(folder / "look_alikes.parquet", np.ones(len(pairs.left_P), np.float32))
    outcome = outcome_of(folder)
    assert outcome is not None
    metrics = outcome["metrics"]
    assert metrics["like_val"] >= COPIES, "a copy of a protected image was not found"
    assert metrics["like_better"] >= 2 * COPIES, "a copy or a mirror image was not found"
    return found | {name: metrics[name] for name in ("candidates", "kept", "like_val", "like_better")}


if __name__ == "__main__":
    main()
