"""What a curation hands over: the manifest, copies of the images where they are asked for, a table of classes, pictures and numbers."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import Stopped
from shared.images import UnreadableImage, pixels_of
from shared.ranks import rank, world_size
from shared.run_dir import RunDir, write_atomically
from shared.stop import StopRequest
from stage1_ssld.config import CurateConfig
from stage1_ssld.curation_pictures import Picture, Row, draw_examples, draw_numbers
from stage1_ssld.data_config import SourceConfig
from stage1_ssld.manifest import write_manifest
from stage1_ssld.score_files import ScoreFiles
from stage1_ssld.selection import (
    BEYOND,
    LIKE_BETTER,
    LIKE_TRAIN,
    LIKE_VAL,
    Candidates,
    Decision,
    LookAlikes,
    class_table,
    numbers,
)
from stage1_ssld.shard_pass import picked
from stage1_ssld.shards import Shard
from stage1_ssld.sources import decode
from stage1_ssld.views import val_view

_SIDE = 96  # pixels of an example
_COPIED = 256  # images a row group of the copies
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COPIES = pa.schema(
    [("image", _IMAGE), ("source", pa.string()), ("key", pa.string()), ("class", pa.int32()), ("score", pa.float32())]
)


class Images(NamedTuple):
    """Images by their row over all shards of a folder of score files."""

    files: ScoreFiles
    shards: Sequence[Shard]
    source: Sequence[SourceConfig]


class Selection(NamedTuple):
    """A finished selection: its images, what was found, and what was decided. cosine_P: of inside and protected pairs, in this order."""

    pool: Images
    protected: Images
    candidates: Candidates
    pairs: LookAlikes
    cosine_P: np.ndarray
    decision: Decision
    class_names: list[str] | None
    classes: int


def describe(selection: Selection, config: CurateConfig) -> dict[str, Any]:
    """The numbers of result.json: counts of images by what became of them, and the thresholds."""
    found = numbers(selection.candidates, selection.decision, classes=selection.classes, keep=config.keep)
    kept = selection.decision.kept
    scores = selection.candidates.score_N[kept]
    return {
        **found,
        "lowest_kept_score": round(float(scores.min()), 6) if len(kept) else None,
        "mean_kept_score": round(float(scores.mean()), 6) if len(kept) else None,
        "pairs_compared": len(selection.cosine_P),
        "pairs_confirmed": int((selection.cosine_P >= config.cosine).sum()),
        "thresholds": {
            key: getattr(config, key) for key in ("keep", "min_score", "hash_distance", "cosine", "candidates")
        },
    }


def log_numbers(run: RunDir, metrics: dict[str, Any], selection: Selection) -> None:
    """Say what became of the pool, and which classes have fewer than was asked for."""
    run.log(
        f"kept {metrics['kept']} of {metrics['images']} images; near-duplicates dropped: {metrics['like_val']} of validation images, "
        f"{metrics['like_train']} of training images, {metrics['like_better']} of better ones; {metrics['beyond_keep'] + metrics['not_candidates']} "
        f"are not among the best of their class, {metrics['below_min_score']} below min_score, {metrics['unreadable']} unreadable"
    )
    keep = metrics["thresholds"]["keep"]
    counts = np.bincount(selection.candidates.class_N[selection.decision.kept], minlength=selection.classes)
    short = np.flatnonzero(counts < keep)
    if len(short):
        names = selection.class_names
        first = ", ".join(
            f"{names[number] if names else f'class {number}'} ({counts[number]})"
            for number in short[np.argsort(counts[short], kind="stable")][:5].tolist()
        )
        run.log(
            f"{len(short)} of {selection.classes} classes have fewer than {keep} images: {first}{', ...' if len(short) > 5 else ''}"
        )


def write_selection(run: RunDir, config: CurateConfig, selection: Selection, facts: dict[str, Any]) -> list[Path]:
    """Write manifest, table of classes and pictures; the paths of what was written.

    Args:
        facts: JSON values that the manifest says about itself.
    """
    candidates, kept = selection.candidates, selection.decision.kept
    kept = kept[np.argsort(candidates.id_N[kept])]  # in the order of the pool, as a reader of it wants them
    ids = candidates.id_N[kept]
    columns = {
        "source": _sources(selection.pool, ids),
        "key": selection.pool.files.keys(ids),
        "class": candidates.class_N[kept],
        "score": candidates.score_N[kept],
        "hash": candidates.hash_N[kept],
    }
    paths = [run.path / name for name in ("selected.parquet", "classes.csv", "curation.png", "examples.png")]
    write_manifest(paths[0], columns, config.pool, facts)
    write_atomically(paths[1], class_table(candidates, selection.decision, selection.class_names, selection.classes))
    counts = np.bincount(candidates.class_N[kept], minlength=selection.classes)
    draw_numbers(paths[2], counts, config.keep, np.array(candidates.facts["histogram"]), candidates.score_N[kept])
    draw_examples(paths[3], list(_examples(selection, config)), config.examples)
    return paths


def materialise(run: RunDir, pool: Images, candidates: Candidates, decision: Decision) -> None:
    """Copy the kept images, encoded as they are, to one Parquet file a shard; the ranks share the shards. Raises Stopped after a whole file."""
    folder = run.path / "selected"
    folder.mkdir(exist_ok=True)
    order = np.argsort(candidates.id_N[decision.kept])
    kept = decision.kept[order]
    ids = candidates.id_N[kept]
    jobs = list(pool.files.shard_rows(ids))[rank() :: world_size()]
    with StopRequest() as stop:
        for number, rows in jobs:
            file = folder / f"part-{number:06d}.parquet"
            if not file.exists():
                first = int(np.searchsorted(ids, pool.files.starts[number]))
                mine = kept[first : first + len(rows)]
                temporary = file.with_name(f".{file.name}.tmp")
                with pq.ParquetWriter(temporary, COPIES) as writer:
                    for rows_of_group in _copies(
                        pool, number, rows, candidates.class_N[mine], candidates.score_N[mine]
                    ):
                        writer.write_table(pa.Table.from_pylist(rows_of_group, COPIES))
                temporary.replace(file)
            if stop.requested:
                raise Stopped(f"{number + 1} of {len(pool.shards)} shards are copied")


def _copies(
    pool: Images, number: int, rows: np.ndarray, class_N: np.ndarray, score_N: np.ndarray
) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    source = pool.source[number].path
    with closing(picked(pool.shards[number], rows)) as samples:  # type: ignore[type-var]
        for sample, label, score in zip(samples, class_N.tolist(), score_N.tolist(), strict=True):
            content = sample.encoded.read_bytes() if isinstance(sample.encoded, Path) else sample.encoded
            image = {"bytes": content, "path": None}
            group.append({"image": image, "source": source, "key": sample.name, "class": label, "score": score})
            if len(group) == _COPIED:
                yield group
                group = []
    if group:
        yield group


def _sources(images: Images, ids_N: np.ndarray) -> pa.Array:
    """Path of the source of each row."""
    paths = pa.array([source.path for source in images.source], pa.string())
    return paths.take(pa.array(images.files.shard_of(ids_N)))


def _examples(selection: Selection, config: CurateConfig) -> Iterator[Row]:
    """Rows of pictures: kept ones, and those that each rule rejected, with what they duplicate."""
    candidates, decision, most = selection.candidates, selection.decision, config.examples
    kept = decision.kept
    yield _row(selection, "kept, from the best\nto the worst", spread(kept, most))
    yield _row(selection, "kept, the worst", kept[-most:])
    yield _row(selection, "more than k\nin their class", spread(np.flatnonzero(decision.reason_N == BEYOND), most))
    low = _read(selection.pool, np.array(candidates.facts["low_ids"], np.int64))
    yield Row(f"below min_score\n{config.min_score:g}", [Picture(image, "") for image in low.values()])
    for reason, name in ((LIKE_VAL, "validation"), (LIKE_TRAIN, "training"), (LIKE_BETTER, "better")):
        dropped = spread(np.flatnonzero(decision.reason_N == reason), most)
        other = decision.other_N[dropped]
        yield _row(selection, f"like a {name}\nimage", dropped)
        captions = [_pair_caption(selection, mine, its) for mine, its in zip(dropped, other, strict=True)]
        if reason == LIKE_BETTER:
            images = _read(selection.pool, candidates.id_N[other])
            pictures = [images[int(candidates.id_N[its])] for its in other]
        else:
            images = _read(selection.protected, other)
            pictures = [images[int(its)] for its in other]
        yield Row(f"the {name} image\nabove is like", [Picture(*pair) for pair in zip(pictures, captions, strict=True)])


def spread(numbers_N: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread, with the first and the last."""
    return numbers_N[np.unique(np.linspace(0, len(numbers_N) - 1, min(most, len(numbers_N))).round().astype(int))]


def _row(selection: Selection, title: str, candidates_N: np.ndarray) -> Row:
    """Candidates with their class and score."""
    found = selection.candidates
    images = _read(selection.pool, found.id_N[candidates_N])
    names = selection.class_names
    captions = [
        f"{names[found.class_N[number]] if names else found.class_N[number]}\n{found.score_N[number]:.3f}"
        for number in candidates_N
    ]
    return Row(
        title,
        [
            Picture(images[int(found.id_N[number])], caption)
            for number, caption in zip(candidates_N, captions, strict=True)
        ],
    )


def _pair_caption(selection: Selection, candidate: int, other: int) -> str:
    """Distance of the hashes and cosine of the pair that made a candidate go."""
    inside, outside = selection.pairs
    better = selection.decision.reason_N[candidate] == LIKE_BETTER
    part, first = (inside, 0) if better else (outside, len(inside.left_P))
    at = int(np.flatnonzero((part.left_P == candidate) & (part.right_P == other))[0])
    return f"{part.distance_P[at]} bits\ncosine {selection.cosine_P[first + at]:.3f}"


def _read(images: Images, ids_N: np.ndarray) -> dict[int, np.ndarray]:
    """Small square views [S,S,3] of some rows; grey where one cannot be read."""
    views = {}
    wanted = np.unique(ids_N)
    for number, rows in images.files.shard_rows(wanted):
        with closing(picked(images.shards[number], rows)) as samples:  # type: ignore[type-var]
            for row, sample in zip(rows.tolist(), samples, strict=True):
                try:
                    image = pixels_of(decode(sample.encoded, sample.location))
                    view = val_view(image, size=_SIDE, crop=1.0).permute(1, 2, 0).numpy()
                except UnreadableImage:
                    view = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
                views[int(images.files.starts[number]) + row] = view
    return views
