"""Steps of a curation in order; each writes files to the run directory, from which a killed run continues.

scores/, held_out/    one file per shard: the teacher's class and score of each image, perceptual hashes   (all ranks)
candidates.parquet    the best images of each class                                                       (main rank)
near_duplicates.parquet   pairs of candidates, and of candidates and held-out images, with close hashes        (main rank), and cosines (all ranks)
selected.parquet      the manifest (main rank); selected/ copies of the images, on request                 (all ranks)

The memory of the main rank's steps grows with classes x `keep`, not with the size of the pool: see selection_files.py.
"""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssld.shared.distributed.processes import describe_processes, start_processes, to_device
from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, rank, wait_for_all
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.models.backbones import check_networks
from ssld.shared.run_dir import RunDir
from ssld.shared.training.quarantine import Quarantine
from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.output import Images, draw, materialise
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
from ssld.stage1_ssld.curation.selection import PairRows, add_cosines, pair_rows
from ssld.stage1_ssld.curation.selection_files import (
    Selection,
    outcome_of,
    write_candidates,
    write_close_pairs,
    write_outcome,
)
from ssld.stage1_ssld.curation.shard_pass import (
    Piece,
    Reading,
    Shards,
    compare_shards,
    open_pool,
    open_shards,
    over_missing_shards,
)
from ssld.stage1_ssld.distillation.teacher import compare_teacher, make_teacher

_EMBEDDINGS = ("embeddings_pool", "embeddings_held_out")  # folders; removed after the cosines are written


def curate(config: CurateConfig) -> None:
    """Select images and write the manifest, plots and result.json."""
    check_networks(config.networks(), config.hub_data())
    accelerator, config = start_processes(config)
    scratch = ("kept.npy", *_EMBEDDINGS)
    with closing(RunDir(config, "curate", main=rank() == 0, scratch=scratch)) as run:
        if not run.finished_earlier(from_main_rank(run.status)):
            run.log(*describe_processes(accelerator, config, config.workers))
            _curate(config, run, accelerator.device)
    accelerator.end_training()


def _curate(config: CurateConfig, run: RunDir, device: torch.device) -> None:
    pool, held_out, val_shards = _open(config)
    teacher = _Teacher(config, device)
    compare_teacher(run, teacher.network, config.teacher, config.image_size)
    compare_shards(run, pool=pool, held_out=held_out)
    run.log(*teacher.network.loaded)

    # ---- scores of the pool, hashes of the held-out images: shared among the ranks
    view = Reading(True, config.image_size, config.val_crop)
    over_missing_shards(run, "scores", pool, config, view, teacher.scores, _write_scored)
    over_missing_shards(run, "held_out", held_out, config, Reading(True), _nothing, _write_held_out)
    scored = ScoreFiles(run.path / "scores", len(pool.shards))
    held_out_files = ScoreFiles(run.path / "held_out", len(held_out.shards))
    quarantine = Quarantine(run, len(scored) + len(held_out_files))
    quarantine.add([*scored.unreadable, *held_out_files.unreadable] if run.main else [])
    quarantine.judge(len(scored) + len(held_out_files))
    if config.keep > len(scored):
        raise _keeps_too_many(config, len(scored))

    # ---- the best of each class; pairs with close hashes; cosines of these pairs, by embeddings shared among the ranks; the selection
    selection = Selection(
        config,
        classes=teacher.classes,
        class_names=teacher.names,
        teacher=teacher.facts(),
        scored=scored,
        shard_sources=[source.path for source in pool.source],
        held_out=held_out_files,
        val_images=int(held_out_files.starts[val_shards]),
    )
    _step_of_selection(run, write_candidates, selection)
    _step_of_selection(run, write_close_pairs, selection)
    pairs = pair_rows(run.path / "near_duplicates.parquet")
    if pairs is not None:
        _cosines(run, config, pool, held_out, scored, held_out_files, pairs, teacher)
    _step_of_selection(run, write_outcome, selection)

    images = Images(scored, pool.shards, pool.source)
    if config.materialise:
        materialise(run, images)
        wait_for_all()
    if run.main:
        outcome = outcome_of(run.path)
        assert outcome is not None
        run.log(*outcome["lines"])
        written = [run.path / "selected.parquet", run.path / "classes.csv"]
        plots = draw(run.path, outcome, images, Images(held_out_files, held_out.shards, held_out.source), config)
        run.finish(outcome["metrics"], [*written, *plots])


def _step_of_selection(run: RunDir, write: Callable[[Path, Selection], list[str]], selection: Selection) -> None:
    """Run a step of the selection on the main rank. Raises Stopped after it if a signal arrived."""

    def step() -> None:
        with StopRequest() as stop:
            run.log(*write(run.path, selection))
            if stop.requested:
                raise Stopped("the selection is not finished")

    on_main_rank(step, "selection")


def _open(config: CurateConfig) -> tuple[Shards, Shards, int]:
    """Open the pool and the held-out images, validation before training; returns both and the number of validation shards."""
    pool = open_pool(config.pool, config.streaming, allow_loss=config.allow_loss)
    val = open_shards(config.val, "val", config.streaming, allow_loss=config.allow_loss)
    train = open_shards(config.train, "train", config.streaming, allow_loss=config.allow_loss)
    images = pool.images()
    if images is not None and config.keep > images:
        raise _keeps_too_many(config, images)
    return (
        pool,
        Shards(val.shards + train.shards, val.source + train.source, val.tallies + train.tallies),
        len(val.shards),
    )


def _keeps_too_many(config: CurateConfig, images: int) -> UserError:
    return UserError(
        f"keep: {config.keep} images per class are more than the {images} of the whole pool; give a smaller keep"
    )


class _Teacher:
    """Teacher of a curation: most likely class and its probability for each image of a piece, and embeddings."""

    def __init__(self, config: CurateConfig, device: torch.device) -> None:
        self._reference, self._device = config.teacher.model, device
        self.network = make_teacher(
            config.teacher, precision=config.precision, device=device, channels_last=config.channels_last
        )
        self.classes, self.names = self.network.num_classes, self.network.class_names

    def facts(self) -> dict[str, Any]:
        """Teacher metadata for the manifest."""
        return self.network.facts()

    def scores(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """(class_N, score_N) of the readable images of a piece."""
        if piece.pixels_BCHW is None:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        with self.network.running_statistics():
            logits = self.network(to_device(piece.pixels_BCHW, self._device))
        score_B, class_B = logits.float().softmax(-1).max(-1)
        # Both in one copy, the scores as the bits of their float32.
        class_N, bits_N = torch.stack((class_B.int(), score_B.view(torch.int32))).cpu().numpy()
        score_N = bits_N.view(np.float32)
        if not np.isfinite(score_N).all():
            raise UserError(
                f"teacher.model: {self._reference}: gives NaN for {piece.keys[0]} or one of the next {len(piece.keys)} images; "
                "try precision: fp32"
            )
        return class_N, score_N

    def embeddings(self, piece: Piece) -> np.ndarray:
        """Embeddings of a piece, whose images were all readable in the first pass."""
        if piece.unreadable:
            raise UserError(
                f"{piece.unreadable[0]}: cannot be read any more, but could when this run began; put it back, or give another --output"
            )
        assert piece.pixels_BCHW is not None
        with self.network.running_statistics():
            return self.network.embed(to_device(piece.pixels_BCHW, self._device)).cpu().numpy()


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


def _write_held_out(path: Path, pieces: list[Piece], _: list[None]) -> None:
    readable = np.array([flag for piece in pieces for flag in piece.readable], bool)
    columns = {**_columns(pieces), "class": np.where(readable, 0, UNREADABLE).astype(np.int32)}
    write_shard(path, columns, HELD_OUT, [location for piece in pieces for location in piece.unreadable])


def _cosines(
    run: RunDir,
    config: CurateConfig,
    pool: Shards,
    held_out: Shards,
    scored: ScoreFiles,
    held_out_files: ScoreFiles,
    pairs: PairRows,
    teacher: _Teacher,
) -> None:
    """Write the cosines of all pairs, from embeddings that are written for this step alone."""
    inside = pairs.left_P[~pairs.held_out_P], pairs.right_P[~pairs.held_out_P]
    outside = pairs.left_P[pairs.held_out_P], pairs.right_P[pairs.held_out_P]
    ids = np.unique(np.concatenate([*inside, outside[0]])), np.unique(outside[1])
    reading = Reading(False, config.image_size, config.val_crop)
    paths: list[list[Path]] = []
    for name, shards, files, chosen in zip(_EMBEDDINGS, (pool, held_out), (scored, held_out_files), ids, strict=True):
        rows = dict(files.shard_rows(chosen))
        over_missing_shards(
            run, name, shards, config, reading, teacher.embeddings, _write_embeddings, rows=rows, suffixes=(".npy",)
        )
        paths.append([shard_file(run.path / name, number).with_suffix(".npy") for number in sorted(rows)])

    def write() -> None:
        of_pool, of_held_out = (
            UnitEmbeddings(chosen, files, run.path / name / "joined")
            for name, chosen, files in zip(_EMBEDDINGS, ids, paths, strict=True)
        )
        among, between = cosines(*inside, of_pool, of_pool), cosines(*outside, of_pool, of_held_out)
        add_cosines(run.path / "near_duplicates.parquet", np.concatenate([among, between]))

    on_main_rank(write, "cosines of near-duplicates")
    if run.main:
        for name in _EMBEDDINGS:
            shutil.rmtree(run.path / name, ignore_errors=True)


def _write_embeddings(path: Path, pieces: list[Piece], embeddings: list[np.ndarray]) -> None:
    save_unit_embeddings(path, np.concatenate(embeddings))
