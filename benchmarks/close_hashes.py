"""All pairs of close 64-bit hashes: ours against faiss' exact binary indices, one thread, the same hashes.

    pip install faiss-cpu
    python benchmarks/close_hashes.py [--hashes 1000000] [--distance 6] [--queries 20000] [--rounds 3]

Random hashes, 5,000 of them three bits from others. faiss looks up `--queries` of them, and its time is scaled up to all; ours joins all with
themselves. In turn, `--rounds` times; printed are the median seconds for all hashes, and the pairs that were found.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np

from ssld.stage1_ssld.curation.near_duplicates import close_hashes

PLANTED = 5000


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hashes", 1_000_000), ("distance", 6), ("queries", 20_000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**64, arguments.hashes, dtype=np.uint64)
    values[:PLANTED] = values[-PLANTED:] ^ np.uint64((1 << 3) | (1 << 30) | (1 << 61))
    values = np.unique(values)
    rows = values.view(np.uint8).reshape(-1, 8)

    def multi_hash(tables: int, bits: int) -> Callable[[], tuple[float, int]]:
        # Of `tables` parts of the hash one differs in at most distance // tables bits: with so many flips the index is exact.
        index = faiss.IndexBinaryMultiHash(64, tables, bits)
        index.nflip = arguments.distance // tables
        index.add(rows)
        return lambda: query(index)

    def flat() -> tuple[float, int]:
        index = faiss.IndexBinaryFlat(64)
        index.add(rows)
        return query(index)

    def query(index: "faiss.IndexBinary") -> tuple[float, int]:
        chosen = rows[:: max(1, len(rows) // arguments.queries)]
        start = time.perf_counter()
        limits, _, _ = index.range_search(chosen, arguments.distance + 1)
        return (time.perf_counter() - start) * len(rows) / len(chosen), int(limits[-1]) - len(chosen)

    def ours() -> tuple[float, int]:
        start = time.perf_counter()
        pairs = close_hashes(values, arguments.distance)
        return time.perf_counter() - start, len(pairs.left_P)

    methods = {
        "ours": ours,
        "faiss IndexBinaryMultiHash(64, 3, 21)": multi_hash(3, 21),
        "faiss IndexBinaryMultiHash(64, 4, 16)": multi_hash(4, 16),
        "faiss IndexBinaryFlat": flat,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    pairs = {}
    for _, (name, method) in itertools.product(range(arguments.rounds), methods.items()):
        took, pairs[name] = method()
        seconds[name].append(took)
    print(f"{len(values)} hashes, distance {arguments.distance}, faiss {faiss.__version__}, 1 thread")
    for name, rounds in seconds.items():
        note = "" if name == "ours" else f" to {len(values) // max(1, len(values) // arguments.queries)} queries"
        print(f"{name:40} {statistics.median(rounds):8.1f} s, {pairs[name]} pairs{note}")


if __name__ == "__main__":
    main()
