"""The selection of a curation in two parts, each a process of its own where the pool is large: without torch, and with memory that it gives back.

    find      scores/, protected/ -> candidates.parquet, look_alikes.parquet
    decide    these and the cosines -> selected.parquet, classes.csv, kept.npy, outcome.json

What both have to know lies in selection.json. Each file is there whole or not at all; outcome.json, written last, says that a selection is finished.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.errors import Stopped
from ssld.shared.files import atomically, write_atomically
from ssld.stage1_ssld.curation.score_files import ScoreFiles
from ssld.stage1_ssld.curation.selection import (
    BEYOND,
    BINS,
    LIKE_BETTER,
    LIKE_TRAIN,
    LIKE_VAL,
    Candidates,
    Decision,
    LookAlikes,
    class_table,
    decide,
    find_candidates,
    find_look_alikes,
    load_candidates,
    load_look_alikes,
    numbers,
    save_candidates,
    save_look_alikes,
)
from ssld.stage1_ssld.data.manifest_file import write_manifest

KEPT_ROW = np.dtype([("id", np.int64), ("class", np.int32), ("score", np.float32)])
"""A row of kept.npy, in the order of the pool; `id` is its row there."""
_PLAN, _OUTCOME = "selection.json", "outcome.json"
_FAILED = 3
NOT_FINISHED = "the selection is not finished"


@dataclass(frozen=True)
class Plan:
    """What a selection has to know. `pool` are the settings of the pool's sources, `shard_sources` the source of each of its shards."""

    classes: int
    class_names: list[str] | None
    keep: int
    candidates: float
    min_score: float
    hash_distance: int
    mirrored: bool
    cosine: float
    examples: int
    pool: list[dict[str, Any]]
    shard_sources: list[str]
    protected_shards: int
    val_images: int
    teacher: dict[str, Any]

    def save(self, run: Path) -> None:
        """Write selection.json."""
        _write(run / _PLAN, asdict(self))


def outcome_of(run: Path) -> dict[str, Any] | None:
    """What `decide` found: metrics, lines for the log, what the pictures show; None before it has."""
    file = run / _OUTCOME
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def run_part(name: str, run: Path, *, apart: bool, stop: Callable[[], bool]) -> list[str]:
    """Do one part; lines for the log.

    Args:
        apart: in a fresh process, which has no torch.
        stop: asked now and then while that runs.

    Raises:
        Stopped: asked to; the same part does again what it had not written.
        OSError: of a disk that is full, of that process too.
    """
    if not apart:
        return _PARTS[name](run)
    line = [sys.executable, str(Path(__file__).resolve()), name, str(run)]
    # The child ends with this process, however that ends: its input is closed then.
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop():
                    process.terminate()
        assert process.stdout is not None
        told = process.stdout.read()  # a few lines: they fit into the pipe
    if process.returncode == -signal.SIGTERM:
        raise Stopped(NOT_FINISHED)
    if process.returncode == _FAILED:
        raise OSError(*json.loads(told))
    if process.returncode:
        raise RuntimeError(
            f"selecting.py {name} {run} ended with exit code {process.returncode}; what it said is above"
        )
    lines: list[str] = json.loads(told)
    return lines


def find(run: Path) -> list[str]:
    """Write candidates and their look-alikes, unless an earlier start has."""
    plan, lines = _plan(run), []
    file = run / "candidates.parquet"
    if not file.exists():
        scored = _scored(run, plan)
        keep = math.ceil(plan.keep * plan.candidates)
        found = find_candidates(
            scored, classes=plan.classes, keep=keep, min_score=plan.min_score, examples=plan.examples
        )
        save_candidates(file, found)
        lines.append(f"{len(found.id_N)} candidates among {len(scored)} images of {plan.classes} classes")
        del found
    file = run / "look_alikes.parquet"
    if not file.exists():
        protected = _protected(run, plan)
        names = ["hash", "mirrored"] if plan.mirrored else ["hash"]
        hashes = [column.to_numpy() for column in pq.read_table(run / "candidates.parquet", columns=names)]
        alike = find_look_alikes(
            hashes[0], hashes[1] if plan.mirrored else None, protected, distance=plan.hash_distance
        )
        del hashes
        save_look_alikes(file, alike, pq.read_table(run / "candidates.parquet", columns=["id"])["id"].to_numpy())
        lines.append(
            f"{len(alike.inside.left_P)} pairs of them, {len(alike.protected.left_P)} of them and one of {len(protected)} protected images "
            f"differ in at most {plan.hash_distance} bits"
        )
    return lines


def decide_all(run: Path) -> list[str]:
    """Write the manifest and all that is told about it, unless an earlier start has."""
    if outcome_of(run) is not None:
        return []
    plan = _plan(run)
    candidates = load_candidates(run / "candidates.parquet")
    pairs, cosine_P = load_look_alikes(run / "look_alikes.parquet")
    assert cosine_P is not None
    decision = decide(candidates, pairs, cosine_P, cosine=plan.cosine, val_images=plan.val_images, keep=plan.keep)
    metrics = _metrics(plan, candidates, decision, cosine_P)
    _write_kept(run, plan, candidates, decision, metrics)
    counts = np.bincount(candidates.class_N[decision.kept], minlength=plan.classes)
    scores = np.histogram(candidates.score_N[decision.kept], BINS, (0, 1))[0]
    outcome = {
        "metrics": metrics,
        "lines": list(_lines(plan, metrics, counts)),
        "kept_of_class": counts.tolist(),
        "histogram": candidates.facts["histogram"],
        "kept_histogram": scores.tolist(),
        "examples": list(_examples(plan, candidates, pairs, cosine_P, decision)),
    }
    _write(run / _OUTCOME, outcome)
    return []


_PARTS = {"find": find, "decide": decide_all}


def _metrics(plan: Plan, candidates: Candidates, decision: Decision, cosine_P: np.ndarray) -> dict[str, Any]:
    """Counts of images by what became of them, and the thresholds."""
    scores = candidates.score_N[decision.kept]
    return {
        **numbers(candidates, decision, classes=plan.classes, keep=plan.keep),
        "lowest_kept_score": round(float(scores.min()), 6) if len(scores) else None,
        "mean_kept_score": round(float(scores.mean()), 6) if len(scores) else None,
        "pairs_compared": len(cosine_P),
        "pairs_confirmed": int((cosine_P >= plan.cosine).sum()),
        "thresholds": {
            key: getattr(plan, key)
            for key in ("keep", "min_score", "hash_distance", "mirrored", "cosine", "candidates")
        },
    }


def _write_kept(run: Path, plan: Plan, candidates: Candidates, decision: Decision, metrics: dict[str, Any]) -> None:
    kept = decision.kept[np.argsort(candidates.id_N[decision.kept])]  # in the order of the pool, as a reader wants them
    rows = np.empty(len(kept), KEPT_ROW)
    rows["id"], rows["class"], rows["score"] = (column[kept] for column in (candidates.id_N, *candidates[:2]))
    with atomically(run / "kept.npy") as temporary, temporary.open("wb") as file:
        np.save(file, rows)
    scored = _scored(run, plan)
    sources = pa.array(plan.shard_sources, pa.string())
    columns = {
        "source": sources.take(pa.array(scored.shard_of(rows["id"]))),
        "key": scored.keys(rows["id"]),
        "class": rows["class"],
        "score": rows["score"],
        "hash": candidates.hash_N[kept],
    }
    facts = {"teacher": plan.teacher, "class_names": plan.class_names, "numbers": metrics}
    write_manifest(run / "selected.parquet", columns, plan.pool, facts)
    write_atomically(run / "classes.csv", class_table(candidates, decision, plan.class_names, plan.classes))


def _lines(plan: Plan, metrics: dict[str, Any], kept_of_class: np.ndarray) -> Iterator[str]:
    """What became of the pool, and which classes have fewer than was asked for."""
    yield (
        f"kept {metrics['kept']} of {metrics['images']} images; near-duplicates dropped: {metrics['like_val']} of validation images, "
        f"{metrics['like_train']} of training images, {metrics['like_better']} of better ones; {metrics['beyond_keep'] + metrics['not_candidates']} "
        f"are not among the best of their class, {metrics['below_min_score']} below min_score, {metrics['unreadable']} unreadable"
    )
    short = np.flatnonzero(kept_of_class < plan.keep)
    if len(short):
        names = plan.class_names
        first = ", ".join(
            f"{names[number] if names else f'class {number}'} ({kept_of_class[number]})"
            for number in short[np.argsort(kept_of_class[short], kind="stable")][:5].tolist()
        )
        more = ", ..." if len(short) > 5 else ""
        yield f"{len(short)} of {plan.classes} classes have fewer than {plan.keep} images: {first}{more}"


def spread(numbers_N: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread, with the first and the last."""
    return numbers_N[np.unique(np.linspace(0, len(numbers_N) - 1, min(most, len(numbers_N))).round().astype(int))]


def _examples(
    plan: Plan, candidates: Candidates, pairs: LookAlikes, cosine_P: np.ndarray, decision: Decision
) -> Iterator[dict[str, Any]]:
    """Rows of pictures: kept ones, and those that each rule rejected, with what they duplicate. A picture is [whose, its row there, caption]."""
    most, kept, names = plan.examples, decision.kept, plan.class_names

    def shown(title: str, which: np.ndarray) -> dict[str, Any]:
        pictures = []
        for number in which.tolist():
            label = int(candidates.class_N[number])
            caption = f"{names[label] if names else label}\n{candidates.score_N[number]:.3f}"
            pictures.append(["pool", int(candidates.id_N[number]), caption])
        return {"title": title, "pictures": pictures}

    yield shown("kept, from the best\nto the worst", spread(kept, most))
    yield shown("kept, the worst", kept[-most:])
    yield shown("more than k\nin their class", spread(np.flatnonzero(decision.reason_N == BEYOND), most))
    low = [["pool", row, ""] for row in candidates.facts["low_ids"]]
    yield {"title": f"below min_score\n{plan.min_score:g}", "pictures": low}
    for reason, name in ((LIKE_VAL, "validation"), (LIKE_TRAIN, "training"), (LIKE_BETTER, "better")):
        dropped = spread(np.flatnonzero(decision.reason_N == reason), most)
        yield shown(f"like a {name}\nimage", dropped)
        inside = reason == LIKE_BETTER
        part, first = (pairs.inside, 0) if inside else (pairs.protected, len(pairs.inside.left_P))
        others = []
        for mine, other in zip(dropped.tolist(), decision.other_N[dropped].tolist(), strict=True):
            at = int(np.flatnonzero((part.left_P == mine) & (part.right_P == other))[0])
            caption = f"{part.distance_P[at]} bits\ncosine {cosine_P[first + at]:.3f}"
            row = int(candidates.id_N[other]) if inside else other
            others.append(["pool" if inside else "protected", row, caption])
        yield {"title": f"the {name} image\nabove is like", "pictures": others}


def _plan(run: Path) -> Plan:
    return Plan(**json.loads((run / _PLAN).read_text(encoding="utf-8")))


def _scored(run: Path, plan: Plan) -> ScoreFiles:
    return ScoreFiles(run / "scores", len(plan.shard_sources))


def _protected(run: Path, plan: Plan) -> ScoreFiles:
    return ScoreFiles(run / "protected", plan.protected_shards)


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def peak_megabytes() -> float | None:
    """Most resident memory this process ever had, where the system tells (Linux; `ru_maxrss` would be inherited from the parent)."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Entry point of the process apart: lines for the log on standard output, as JSON."""
    name, run = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        lines = _PARTS[name](Path(run))
    except OSError as error:
        print(json.dumps([error.errno, error.strerror, error.filename]))
        return _FAILED
    assert "torch" not in sys.modules, "the selection has loaded torch"
    peak = peak_megabytes()
    if peak is not None:
        lines.append(f"selection, {name}: {peak:.0f} MB of memory at the peak")
    print(json.dumps(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
