"""Memory and time of the selection of a curation, by the functions that `curate.py` calls for it, in a process that has loaded torch as that one has.

    python benchmarks/curation_memory.py [--rows 20000000] [--classes 1000] [--keep 4000] [--held_out 50000]

Writes score files of that many made-up images to a temporary folder, in a process of its own: a thousand of them copies of held-out images, a
thousand copies of each other, and a thousand mirror images of each other. Then come candidates (best 1.5 x keep per class), their near-duplicates
(close hashes among these and with the held-out images) and the outcome (rejections, the cut to `keep`, the manifest), with cosines of 1 before the
last. Prints counts, seconds, and the peak of resident memory so far at the start and after each part; fails if a copy was not found.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.score_files import HELD_OUT, SCORED, ScoreFiles, shard_file, write_shard
from ssld.stage1_ssld.curation.selection import add_cosines, pair_rows
from ssld.stage1_ssld.curation.selection_files import (
    Selection,
    outcome_of,
    write_candidates,
    write_close_pairs,
    write_outcome,
)

SHARD = 500_000
COPIES = 1000


def main() -> None:
    """Write score files in another process, select in this one and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=4000)
    parser.add_argument("--held_out", type=int, default=50_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (Path(folder), arguments.rows, arguments.classes, arguments.held_out)
        writer = multiprocessing.get_context("spawn").Process(target=write, args=given)
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        print(json.dumps(select(Path(folder), arguments.rows, arguments.classes, arguments.keep, arguments.held_out)))


def write(folder: Path, rows: int, classes: int, held_out: int) -> None:
    """Score files of `rows` images; the last are copies of held-out images, those before them mirror images and copies of earlier ones."""
    generator = np.random.default_rng(0)
    shielded = generator.integers(0, 2**64, (2, held_out), dtype=np.uint64)
    twins = generator.integers(0, 2**64, (2, COPIES), dtype=np.uint64)
    for name in ("scores", "held_out"):
        (folder / name).mkdir()
    columns = {
        "key": [str(number) for number in range(held_out)],
        "class": np.zeros(held_out, np.int32),
        "hash": shielded[0],
        "mirrored": shielded[1],
    }
    write_shard(shard_file(folder / "held_out", 0), columns, HELD_OUT, [])
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


def select(folder: Path, rows: int, classes: int, keep: int, held_out: int) -> dict[str, float]:
    """Select from these files; seconds, megabytes and counts."""
    settings = {"output": folder, "pool": ["pool"], "teacher": "random:test_resnet", "keep": keep}
    selection = Selection(
        CurateConfig.model_validate(settings),
        classes=classes,
        class_names=None,
        teacher={},
        scored=ScoreFiles(folder / "scores", len(range(0, rows, SHARD))),
        shard_sources=["pool"] * len(range(0, rows, SHARD)),
        held_out=ScoreFiles(folder / "held_out", 1),
        val_images=held_out,
    )
    result: dict[str, float] = {"rows": rows, "start_megabytes": peak_megabytes()}
    for name, part in (
        ("candidates", write_candidates),
        ("near_duplicates", write_close_pairs),
        ("outcome", write_outcome),
    ):
        begun = time.perf_counter()
        part(folder, selection)
        result[f"{name}_seconds"] = round(time.perf_counter() - begun, 1)
        result[f"{name}_megabytes"] = peak_megabytes()
        if name == "near_duplicates":
            pairs = pair_rows(folder / "near_duplicates.parquet")
            assert pairs is not None
            add_cosines(folder / "near_duplicates.parquet", np.ones(len(pairs.left_P), np.float32))
    outcome = outcome_of(folder)
    assert outcome is not None
    metrics = outcome["metrics"]
    assert metrics["like_val"] >= COPIES, "a copy of a held-out image was not found"
    assert metrics["like_better"] >= 2 * COPIES, "a copy or a mirror image was not found"
    return result | {name: metrics[name] for name in ("candidates", "kept", "like_val", "like_better")}


def peak_megabytes() -> int:
    """Most resident memory this process ever had; -1 where the system does not say (`ru_maxrss` would be inherited from the parent)."""
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        return -1
    return int(peak[1]) // 1024 if peak else -1


if __name__ == "__main__":
    main()
