"""Files of a selection: candidates, pairs with close hashes, then the manifest and the counts of outcomes.

    write_candidates     scores/                      -> candidates.parquet
    write_close_pairs    candidates and held_out/     -> near_duplicates.parquet
    write_outcome        these and the cosines        -> selected.parquet, classes.csv, kept.npy, outcome.json

Files are written atomically, and a file that matches its checksum is not written again; outcome.json is written last.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.checksums import atomically_with_sum, is_sound, made_again, write_with_sum
from ssld.shared.files import spread, write_atomically
from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.score_files import ScoreFiles
from ssld.stage1_ssld.curation.selection import (
    BEYOND,
    BINS,
    LIKE_BETTER,
    LIKE_TRAIN,
    LIKE_VAL,
    Candidates,
    ClosePairs,
    Decision,
    class_table,
    decide,
    find_candidates,
    find_close_pairs,
    load_candidates,
    load_close_pairs,
    numbers,
    save_candidates,
    save_close_pairs,
)
from ssld.stage1_ssld.data.manifest import write_manifest

KEPT_ROW = np.dtype([("id", np.int64), ("class", np.int32), ("score", np.float32)])
"""A row of kept.npy, in the order of the pool; `id` is its row there."""
_OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Selection:
    """Inputs of a selection.

    Attributes:
        config: settings of the curation.
        classes: number of the teacher's classes.
        class_names: their names; None where unknown.
        teacher: facts about the teacher, for the manifest.
        scored: files of the pool.
        shard_sources: path of the source of each shard of the pool.
        held_out: files of the held-out images, which no kept image may resemble.
        val_images: number of validation images, the first of the held-out images.
    """

    config: CurateConfig
    classes: int
    class_names: list[str] | None
    teacher: dict[str, Any]
    scored: ScoreFiles
    shard_sources: Sequence[str]
    held_out: ScoreFiles
    val_images: int


def outcome_of(run: Path) -> dict[str, Any] | None:
    """Read metrics, log lines and examples from the file of `write_outcome`; None if it or a file of its outcome is missing."""
    sound = all(is_sound(run / name) for name in ("kept.npy", _OUTCOME))
    if not sound or not all((run / name).is_file() for name in ("selected.parquet", "classes.csv")):
        return None
    outcome: dict[str, Any] = json.loads((run / _OUTCOME).read_text(encoding="utf-8"))
    return outcome


def write_candidates(run: Path, selection: Selection) -> list[str]:
    """Write the best images of each class, more than are kept; returns log lines."""
    file, config, pool = run / "candidates.parquet", selection.config, selection.scored
    if is_sound(file):
        return []
    lines = made_again([file])
    candidates = find_candidates(
        pool,
        classes=selection.classes,
        keep=math.ceil(config.keep * config.candidates),
        min_score=config.min_score,
        examples=config.examples,
    )
    save_candidates(file, candidates)
    return [*lines, f"{len(candidates.id_N)} candidates among {len(pool)} images of {selection.classes} classes"]


def write_close_pairs(run: Path, selection: Selection) -> list[str]:
    """Write pairs of candidates, and of candidates and held-out images, with close hashes; returns log lines."""
    file, config, held_out = run / "near_duplicates.parquet", selection.config, selection.held_out
    if is_sound(file):
        return []
    lines = made_again([file])
    names = ["hash", "mirrored"] if config.mirrored else ["hash"]
    hashes = [column.to_numpy() for column in pq.read_table(run / "candidates.parquet", columns=names)]
    pairs = find_close_pairs(
        hashes[0], hashes[1] if config.mirrored else None, held_out, hash_distance=config.hash_distance
    )
    del hashes
    save_close_pairs(file, pairs, pq.read_table(run / "candidates.parquet", columns=["id"])["id"].to_numpy())
    return [
        *lines,
        f"{len(pairs.inside.left_P)} pairs of candidates and {len(pairs.held_out.left_P)} pairs of a candidate and one of {len(held_out)} held-out "
        f"images have hashes that differ in at most {config.hash_distance} bits",
    ]


def write_outcome(run: Path, selection: Selection) -> list[str]:
    """Write the manifest and its summary files, unless they exist. Their log lines are in `outcome_of` and logged after the images are copied."""
    if outcome_of(run) is not None:
        return []
    config = selection.config
    candidates = load_candidates(run / "candidates.parquet")
    pairs, cosine_P = load_close_pairs(run / "near_duplicates.parquet")
    assert cosine_P is not None
    decision = decide(
        candidates, pairs, cosine_P, cosine=config.cosine, val_images=selection.val_images, keep=config.keep
    )
    metrics = _metrics(selection, candidates, decision, cosine_P)
    _write_kept(run, selection, candidates, decision, metrics)
    counts = np.bincount(candidates.class_N[decision.kept], minlength=selection.classes)
    scores = np.histogram(candidates.score_N[decision.kept], BINS, (0, 1))[0]
    outcome = {
        "metrics": metrics,
        "lines": list(_lines(selection, metrics, counts)),
        "kept_of_class": counts.tolist(),
        "histogram": candidates.facts["histogram"],
        "kept_histogram": scores.tolist(),
        "examples": list(_examples(selection, candidates, pairs, cosine_P, decision)),
    }
    write_with_sum(run / _OUTCOME, json.dumps(outcome, indent=1) + "\n")
    return []


def _metrics(selection: Selection, candidates: Candidates, decision: Decision, cosine_P: np.ndarray) -> dict[str, Any]:
    """Counts of images by outcome, and the thresholds."""
    scores = candidates.score_N[decision.kept]
    return {
        **numbers(candidates, decision, classes=selection.classes, keep=selection.config.keep),
        "lowest_kept_score": round(float(scores.min()), 6) if len(scores) else None,
        "mean_kept_score": round(float(scores.mean()), 6) if len(scores) else None,
        "pairs_compared": len(cosine_P),
        "pairs_confirmed": int((cosine_P >= selection.config.cosine).sum()),
        "thresholds": {
            key: getattr(selection.config, key)
            for key in ("keep", "min_score", "hash_distance", "mirrored", "cosine", "candidates")
        },
    }


def _write_kept(
    run: Path, selection: Selection, candidates: Candidates, decision: Decision, metrics: dict[str, Any]
) -> None:
    kept = decision.kept[np.argsort(candidates.id_N[decision.kept])]  # in the order of the pool, for sequential reads
    rows = np.empty(len(kept), KEPT_ROW)
    rows["id"], rows["class"], rows["score"] = (column[kept] for column in (candidates.id_N, *candidates[:2]))
    with atomically_with_sum(run / "kept.npy") as temporary, temporary.open("wb") as file:
        np.save(file, rows)
    sources = pa.array(selection.shard_sources, pa.string())
    columns = {
        "source": sources.take(pa.array(selection.scored.shard_of(rows["id"]))),
        "key": selection.scored.keys(rows["id"]),
        "class": rows["class"],
        "score": rows["score"],
        "hash": candidates.hash_N[kept],
    }
    facts = {"teacher": selection.teacher, "class_names": selection.class_names, "numbers": metrics}
    pool = [source.model_dump(mode="json") for source in selection.config.pool]
    write_manifest(run / "selected.parquet", columns, pool, facts)
    table = class_table(candidates, decision, selection.class_names, selection.classes)
    write_atomically(run / "classes.csv", table)


def _lines(selection: Selection, metrics: dict[str, Any], kept_of_class: np.ndarray) -> Iterator[str]:
    """Log lines on the outcomes, and on classes with fewer than `keep` images."""
    yield (
        f"kept {metrics['kept']} of {metrics['images']} images; near-duplicates dropped: {metrics['like_val']} of validation images, "
        f"{metrics['like_train']} of training images, {metrics['like_better']} of better ones; {metrics['beyond_keep'] + metrics['not_candidates']} "
        f"are not among the best of their class, {metrics['below_min_score']} below min_score, {metrics['unreadable']} unreadable"
    )
    short = np.flatnonzero(kept_of_class < selection.config.keep)
    if len(short):
        names = selection.class_names
        first = ", ".join(
            f"{names[number] if names else f'class {number}'} ({kept_of_class[number]})"
            for number in short[np.argsort(kept_of_class[short], kind="stable")][:5].tolist()
        )
        more = ", ..." if len(short) > 5 else ""
        yield f"{len(short)} of {selection.classes} classes have fewer than {selection.config.keep} images: {first}{more}"


def _examples(
    selection: Selection, candidates: Candidates, pairs: ClosePairs, cosine_P: np.ndarray, decision: Decision
) -> Iterator[dict[str, Any]]:
    """Rows of example images: kept ones, and those that each rule rejected, with the images they duplicate; each is [set, row in it, caption]."""
    most, kept, names = selection.config.examples, decision.kept, selection.class_names

    def some(which: np.ndarray) -> np.ndarray:
        return which[spread(len(which), most)]

    def row_of(title: str, which: np.ndarray) -> dict[str, Any]:
        images = []
        for number in which.tolist():
            label = int(candidates.class_N[number])
            caption = f"{names[label] if names else label}\n{candidates.score_N[number]:.3f}"
            images.append(["pool", int(candidates.id_N[number]), caption])
        return {"title": title, "images": images}

    yield row_of("kept, from best\nto worst", some(kept))
    yield row_of("kept, the worst", kept[-most:])
    yield row_of("more than k\nin their class", some(np.flatnonzero(decision.reason_N == BEYOND)))
    low = [["pool", row, ""] for row in candidates.facts["low_ids"]]
    yield {"title": f"below min_score\n{selection.config.min_score:g}", "images": low}
    for reason, name in ((LIKE_VAL, "validation"), (LIKE_TRAIN, "training"), (LIKE_BETTER, "better")):
        dropped = some(np.flatnonzero(decision.reason_N == reason))
        yield row_of(f"near-duplicates of\na {name} image", dropped)
        inside = reason == LIKE_BETTER
        part, first = (pairs.inside, 0) if inside else (pairs.held_out, len(pairs.inside.left_P))
        others = []
        for candidate, other in zip(dropped.tolist(), decision.other_N[dropped].tolist(), strict=True):
            at = int(np.flatnonzero((part.left_P == candidate) & (part.right_P == other))[0])
            caption = f"{part.distance_P[at]} bits\ncosine {cosine_P[first + at]:.3f}"
            row = int(candidates.id_N[other]) if inside else other
            others.append(["pool" if inside else "held_out", row, caption])
        yield {"title": f"the {name}\nimages they match", "images": others}
