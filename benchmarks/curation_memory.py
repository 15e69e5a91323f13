"""Memory and time of the selection step of a curation, in a process of its own that has nothing else in it.

    python benchmarks/curation_memory.py [--rows 20000000] [--classes 1000] [--keep 4000] [--protected 50000]

Writes score files of that many made-up images to a temporary folder, a thousand of them copies of protected images and a thousand copies of each
other, then selects in a fresh process: streaming top 1.5 x keep a class, close hashes among these and with the protected, what goes, the cut to
`keep`, and the manifest's columns. Cosines are taken as 1. Prints counts, seconds and the peak of resident memory; fails if a copy was not found.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa

from stage1_ssld.score_files import PROTECTED, SCORED, ScoreFiles, shard_file, write_shard, write_table
from stage1_ssld.selection import LIKE_BETTER, LIKE_VAL, decide, find_candidates, find_look_alikes

SHARD = 500_000
COPIES = 1000


def main() -> None:
    """Write score files, select in another process and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=int, default=4000)
    parser.add_argument("--protected", type=int, default=50_000)
    parser.add_argument("--select", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.select:
        print(json.dumps(select(arguments.select, arguments.rows, arguments.classes, arguments.keep)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.rows, arguments.classes, arguments.protected)
        line = [sys.executable, __file__, "--select", folder]
        for name in ("rows", "classes", "keep"):
            line += [f"--{name}", str(getattr(arguments, name))]
        print(subprocess.run(line, check=True, capture_output=True, text=True).stdout, end="")


def write(folder: Path, rows: int, classes: int, protected: int) -> None:
    """Score files of `rows` images of which the last COPIES are copies of protected ones, and those before them copies of those before them."""
    generator = np.random.default_rng(0)
    shielded = generator.integers(0, 2**64, (2, protected), dtype=np.uint64)
    twins = generator.integers(0, 2**64, COPIES, dtype=np.uint64)
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
        }
        if first + count == rows:  # copies differ in three bits and are sure of their class
            columns["score"][-3 * COPIES :] = np.float32(0.995)
            noise = np.uint64((1 << 3) | (1 << 30) | (1 << 61))
            columns["hash"][-3 * COPIES :] = np.r_[twins, twins ^ noise, shielded[0, :COPIES] ^ noise]
        write_shard(shard_file(folder / "scores", number), columns, SCORED, [])


def select(folder: Path, rows: int, classes: int, keep: int) -> dict[str, float]:
    """Select from these files, in this process; seconds, megabytes and counts."""
    files = ScoreFiles(folder / "scores", math.ceil(rows / SHARD))
    protected = ScoreFiles(folder / "protected", 1)
    before, begun = peak_megabytes(), time.perf_counter()
    candidates = find_candidates(files, classes=classes, keep=math.ceil(1.5 * keep), min_score=0)
    seconds = {"top_k": time.perf_counter() - begun}
    alike = find_look_alikes(candidates, protected, distance=6)
    cosine = np.ones(len(alike.inside.left_P) + len(alike.protected.left_P), np.float32)
    seconds["look_alikes"] = time.perf_counter() - begun - seconds["top_k"]
    decision = decide(candidates, alike, cosine, cosine=0.9, val_images=len(protected), keep=keep)
    kept = decision.kept[np.argsort(candidates.id_N[decision.kept])]
    table = {"key": files.keys(candidates.id_N[kept])}
    table |= {"class": candidates.class_N[kept], "score": candidates.score_N[kept], "hash": candidates.hash_N[kept]}
    write_table(folder / "selected.parquet", pa.table(table))
    dropped = [int((decision.reason_N == reason).sum()) for reason in (LIKE_VAL, LIKE_BETTER)]
    assert min(dropped) >= COPIES, "a copy was not found"
    assert "torch" not in sys.modules, "the selection has loaded torch"
    return {
        "rows": rows,
        "candidates": len(candidates.id_N),
        "kept": len(kept),
        "like_protected": dropped[0],
        "like_better": dropped[1],
        "top_k_seconds": round(seconds["top_k"], 1),
        "look_alikes_seconds": round(seconds["look_alikes"], 1),
        "start_megabytes": round(before),
        "peak_megabytes": round(peak_megabytes()),
    }


def peak_megabytes() -> float:
    """Most resident memory this process ever had. Linux keeps `ru_maxrss` across exec, so a child would inherit its parent's: VmHWM is its own."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
