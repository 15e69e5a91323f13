"""The parts of a curation, in their order; each leaves files in the run directory that a run which was killed goes on from.

scores/, protected/   one file a shard: what the teacher says about each image, perceptual hashes        (all ranks)
candidates.parquet    the best of each class                                                            (main rank)
look_alikes.parquet   pairs of them, and of them and protected images, with close hashes                 (main rank), and cosines (all ranks)
selected.parquet      the manifest (main rank); selected/ the images themselves, if asked for             (all ranks)

What the main rank does alone takes memory by classes x `keep`, not by the size of the pool: see selection_files.py.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ssld.shared.distributed.processes import to_device, uses_gpu
from ssld.shared.distributed.ranks import from_main_rank, rank, world_size
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import RunDir
from ssld.shared.training.progress import Clock
from ssld.shared.training.quarantine import Quarantine
from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.output import Images, draw, materialise
from ssld.stage1_ssld.curation.score_files import (
    PROTECTED,
    SCORED,
    UNREADABLE,
    Embeddings,
    ScoreFiles,
    cosines,
    save_embeddings,
    shard_file,
    write_shard,
)
from ssld.stage1_ssld.curation.selection import PairRows, add_cosines, pair_rows
from ssld.stage1_ssld.curation.selection_files import (
    Selection,
    outcome_of,
    write_candidates,
    write_look_alikes,
    write_outcome,
)
from ssld.stage1_ssld.curation.shard_pass import Job, Piece, Reading, over_shards
from ssld.stage1_ssld.data.shards import Shard, source_shards
from ssld.stage1_ssld.data_config import SourceConfig, is_remote
from ssld.stage1_ssld.distillation.teacher import make_teacher

_PATIENCE = timedelta(days=7)  # the main rank selects while the others wait


class Shards(NamedTuple):
    """The shards of some sources, one after the other, and the source of each."""

    shards: list[Shard]
    source: list[SourceConfig]

    def images(self) -> int | None:
        """How many there are, None where only reading tells."""
        lengths = [shard.length for shard in self.shards]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def names(self) -> list[str]:
        """What the shards are, for the record."""
        return [f"{shard.name} ({'?' if shard.length is None else shard.length})" for shard in self.shards]


def curate(config: CurateConfig) -> None:
    """Select images as `config` says and write the manifest, pictures and result.json."""
    on_gpu = uses_gpu(config.device)
    accelerator = Accelerator(cpu=not on_gpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    with closing(RunDir(config, "curate", main=rank() == 0)) as run:
        if from_main_rank(run.status) == "finished":
            run.log(f"{run.path}: this run is finished; nothing to do")
        else:
            _curate(config, run, accelerator.device)
    accelerator.end_training()


def _curate(config: CurateConfig, run: RunDir, device: torch.device) -> None:
    pool, protected, val_shards = _open(config)
    teacher = _Teacher(config, device)
    _compare_pool(run, pool, protected)

    # ---- scores of the pool, hashes of what is protected: shared among the ranks
    _work(run, "scores", pool, config, Reading(True, config.image_size, config.val_crop), teacher.scores, _write_scored)
    _work(run, "protected", protected, config, Reading(True), _nothing, _write_protected)
    scored = ScoreFiles(run.path / "scores", len(pool.shards))
    shielded = ScoreFiles(run.path / "protected", len(protected.shards))
    quarantine = Quarantine(run, len(scored) + len(shielded))
    quarantine.add([*scored.unreadable, *shielded.unreadable] if run.main else [])
    quarantine.judge(len(scored) + len(shielded))
    if config.keep > len(scored):
        raise _keeps_too_many(config, len(scored))

    # ---- the best of each class, and which of them look alike; cosines of these pairs, by embeddings shared among the ranks; what is left
    selection = Selection(
        config,
        classes=teacher.classes,
        class_names=teacher.names,
        teacher=teacher.facts(),
        scored=scored,
        shard_sources=[source.path for source in pool.source],
        protected=shielded,
        val_images=int(shielded.starts[val_shards]),
    )
    _on_main_rank(run, write_candidates, selection)
    _on_main_rank(run, write_look_alikes, selection)
    pairs = pair_rows(run.path / "look_alikes.parquet")
    if pairs is not None:
        _cosines(run, config, pool, protected, scored, shielded, pairs, teacher)
    _on_main_rank(run, write_outcome, selection)

    images = Images(scored, pool.shards, pool.source)
    if config.materialise:
        materialise(run, images)
        from_main_rank(None)
    if run.main:
        outcome = outcome_of(run.path)
        assert outcome is not None
        for line in outcome["lines"]:
            run.log(line)
        written = [run.path / "selected.parquet", run.path / "classes.csv"]
        pictures = draw(run.path, outcome, images, Images(shielded, protected.shards, protected.source), config)
        run.finish(outcome["metrics"], [*written, *pictures])
        (run.path / "kept.npy").unlink()


def _on_main_rank(run: RunDir, write: Callable[[Path, Selection], list[str]], selection: Selection) -> None:
    """One part of the selection, while the other ranks wait. Raises Stopped after it when asked to by a signal."""
    if run.main:
        with StopRequest() as stop:
            for line in write(run.path, selection):
                run.log(line)
            if stop.requested:
                raise Stopped("the selection is not finished")
    from_main_rank(None)


def _open(config: CurateConfig) -> tuple[Shards, Shards, int]:
    """(the pool, the protected images, validation before training, and the number of validation shards)."""
    paths = [source.path for source in config.pool]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"pool: {path} is given twice; give every source once")
    pool = _shards(config.pool, "pool", config.streaming)
    val = _shards(config.val, "val", config.streaming)
    train = _shards(config.train, "train", config.streaming)
    images = pool.images()
    if images is not None and config.keep > images:
        raise _keeps_too_many(config, images)
    return pool, Shards(val.shards + train.shards, val.source + train.source), len(val.shards)


def _shards(configs: Sequence[SourceConfig], key: str, streaming: bool) -> Shards:
    found = Shards([], [])
    for number, config in enumerate(configs):
        try:
            shards = source_shards(config, number, streaming=streaming or is_remote(config.path))
        except UserError as error:
            raise UserError(f"{key}.{number}: {error}") from None
        found.shards.extend(shards)
        found.source.extend([config] * len(shards))
    return found


def _keeps_too_many(config: CurateConfig, images: int) -> UserError:
    return UserError(
        f"keep: {config.keep} images a class are more than the {images} of the whole pool; give a smaller keep"
    )


def _compare_pool(run: RunDir, pool: Shards, protected: Shards) -> None:
    """Refuse to go on where other shards are found than at the start of the run."""
    if run.main:
        file = run.path / "pool.json"
        now = {"pool": pool.names(), "protected": protected.names()}
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != now:
            raise UserError(
                f"{run.path}: the files of the pool have changed since this run began; give another --output"
            )
        write_atomically(file, json.dumps(now, indent=1) + "\n")
    from_main_rank(None)


class _Teacher:
    """The teacher as a curation uses it: first class and its probability of a piece, and embeddings."""

    def __init__(self, config: CurateConfig, device: torch.device) -> None:
        self._reference, self._device = config.teacher.model, device
        self._teacher = make_teacher(
            config.teacher, precision=config.precision, device=device, channels_last=config.channels_last
        )
        self.classes, self.names = self._teacher.num_classes, self._teacher.class_names

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return self._teacher.facts()

    def scores(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """(class_N, score_N) of the readable images of a piece."""
        if piece.pixels_BCHW is None:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        with self._teacher.running_statistics():
            logits = self._teacher(to_device(piece.pixels_BCHW, self._device))
        score, best = logits.softmax(-1).max(-1)
        if not bool(torch.isfinite(score).all()):
            raise UserError(
                f"teacher.model: {self._reference}: answers {piece.keys[0]} or one of the next {len(piece.keys)} images "
                "with NaN; try precision: fp32"
            )
        return best.cpu().numpy().astype(np.int32), score.cpu().numpy()

    def embeddings(self, piece: Piece) -> np.ndarray:
        """Embeddings of a piece, all of whose images were readable before."""
        if piece.unreadable:
            raise UserError(f"{piece.unreadable[0]}: cannot be read any more; it could when this run began")
        assert piece.pixels_BCHW is not None
        with self._teacher.running_statistics():
            return self._teacher.embed(to_device(piece.pixels_BCHW, self._device)).cpu().numpy()


def _work(
    run: RunDir,
    name: str,
    shards: Shards,
    config: CurateConfig,
    reading: Reading,
    use: Callable[[Piece], Any],
    write: Callable[[Path, list[Piece], list[Any]], None],
    rows: dict[int, np.ndarray] | None = None,
    suffix: str = ".parquet",
) -> None:
    """Do what is missing of one folder of shard files, all ranks together; only the shards in `rows`, where it is given."""
    folder = run.path / name
    if run.main:
        folder.mkdir(exist_ok=True)
    wanted = range(len(shards.shards)) if rows is None else sorted(rows)
    missing = from_main_rank([n for n in wanted if not shard_file(folder, n).with_suffix(suffix).exists()])
    if not missing:
        return
    jobs = [Job(n, shards.shards[n], None if rows is None else rows[n]) for n in missing[rank() :: world_size()]]
    run.log(f"{name}: {len(missing)} of {len(wanted)} shards to do")
    clock = Clock()

    def told(done: int, read: int) -> None:
        clock.done = read
        if done == len(jobs) or clock.due():
            run.log(f"{name}: {done} of {len(jobs)} shards of this process, {clock.rate:.0f} images/s")

    over_shards(
        jobs,
        reading,
        use,
        lambda number, pieces, kept: write(shard_file(folder, number).with_suffix(suffix), pieces, kept),
        batch_size=config.batch_size,
        workers=config.workers,
        told=told,
    )
    from_main_rank(None)


def _nothing(piece: Piece) -> None:
    return None


def _columns(pieces: list[Piece]) -> dict[str, Any]:
    """`key` and hash columns of a shard."""
    columns: dict[str, Any] = {"key": [key for piece in pieces for key in piece.keys]}
    for name, attribute in (("hash", "hashes"), ("mirrored", "mirrored")):
        columns[name] = np.array([bits for piece in pieces for bits in getattr(piece, attribute)], np.uint64)
    return columns


def _write_scored(path: Path, pieces: list[Piece], scores: list[tuple[np.ndarray, np.ndarray]]) -> None:
    readable = np.array([flag for piece in pieces for flag in piece.readable], bool)
    class_N, score_N = np.full(len(readable), UNREADABLE, np.int32), np.zeros(len(readable), np.float32)
    class_N[readable] = np.concatenate([classes for classes, _ in scores])
    score_N[readable] = np.concatenate([score for _, score in scores])
    columns = {**_columns(pieces), "class": class_N, "score": score_N}
    write_shard(path, columns, SCORED, [location for piece in pieces for location in piece.unreadable])


def _write_protected(path: Path, pieces: list[Piece], _: list[None]) -> None:
    readable = np.array([flag for piece in pieces for flag in piece.readable], bool)
    columns = {**_columns(pieces), "class": np.where(readable, 0, UNREADABLE).astype(np.int32)}
    write_shard(path, columns, PROTECTED, [location for piece in pieces for location in piece.unreadable])


def _cosines(
    run: RunDir,
    config: CurateConfig,
    pool: Shards,
    protected: Shards,
    scored: ScoreFiles,
    shielded: ScoreFiles,
    pairs: PairRows,
    teacher: _Teacher,
) -> None:
    """Write the cosines of all pairs, by embeddings that are written for this alone."""
    inside = pairs.left_P[~pairs.protected_P], pairs.right_P[~pairs.protected_P]
    outside = pairs.left_P[pairs.protected_P], pairs.right_P[pairs.protected_P]
    ids = np.unique(np.concatenate([*inside, outside[0]])), np.unique(outside[1])
    reading = Reading(False, config.image_size, config.val_crop)
    names, embedded = ("embeddings_pool", "embeddings_protected"), []
    for name, shards, files, wanted in zip(names, (pool, protected), (scored, shielded), ids, strict=True):
        rows = dict(files.shard_rows(wanted))
        _work(run, name, shards, config, reading, teacher.embeddings, _write_embeddings, rows, ".npy")
        paths = [shard_file(run.path / name, number).with_suffix(".npy") for number in sorted(rows)]
        if run.main:
            embedded.append(Embeddings(wanted, paths, run.path / name / "joined"))
    if run.main:
        among, between = (cosines(*inside, embedded[0], embedded[0]), cosines(*outside, embedded[0], embedded[1]))
        add_cosines(run.path / "look_alikes.parquet", np.concatenate([among, between]))
        embedded.clear()
        for name in names:
            shutil.rmtree(run.path / name, ignore_errors=True)
    from_main_rank(None)


def _write_embeddings(path: Path, pieces: list[Piece], embeddings: list[np.ndarray]) -> None:
    save_embeddings(path, np.concatenate(embeddings))
