"""Steps that turn an encoder into a teacher, in order; each writes files to the run directory, from which a killed run continues.

embeddings/           one file per shard: pooled features of each image                                (all ranks)
centres.npz           their mean and scale, and the centers of k-means                                 (main rank)
teacher.safetensors   the encoder with one more linear layer; prototypes.png, the images nearest to some centers   (main rank)

The memory of the main rank's steps grows with prototypes x features, for balanced prototypes with the square of their number, not with the size
of the pool.
"""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssld.shared.checksums import atomically_with_sum, is_sound, made_again
from ssld.shared.distributed.processes import describe_processes, start_processes, to_device
from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, rank
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.files import spread
from ssld.shared.models.backbones import check_networks
from ssld.shared.run_dir import RunDir
from ssld.shared.training.quarantine import Quarantine
from ssld.shared.wording import count
from ssld.stage1_ssld.clustering.centers import Clusters, find_clusters, require_scikit_learn
from ssld.stage1_ssld.clustering.embedding_files import Embeddings, Standard, save_embeddings, standard_of
from ssld.stage1_ssld.clustering.encoder import Encoder
from ssld.stage1_ssld.clustering.prototype_layer import linear_layer, perplexities, scores, softmax, temperature_for
from ssld.stage1_ssld.config import PrototypesConfig
from ssld.stage1_ssld.curation.output import Example, Images, Row, draw_examples, small_views
from ssld.stage1_ssld.curation.score_files import EMBEDDED, UNREADABLE, ScoreFiles, write_shard
from ssld.stage1_ssld.curation.shard_pass import Piece, Reading, Shards, compare_shards, open_pool, over_missing_shards

_IMAGES_OF_EACH, _FEWEST, _MOST = 40, 16, 4096  # default number of prototypes: images per prototype, and bounds
_SAMPLE = 1 << 23  # values (images x prototypes) that the temperature is estimated on
_DRAWN = 20  # prototypes in prototypes.png
_FEW = 10  # images per prototype below which a warning says that centers are accidental
_ALONE = 4  # images below which a prototype is no group yet
_SMALL = 0.2  # share of such prototypes above which a warning counts them
_UNEQUAL = 0.2  # relative deviation of a balanced prototype's size from the mean that a warning names


def make_prototypes(config: PrototypesConfig) -> None:
    """Write the teacher file, prototypes.png and result.json."""
    require_scikit_learn()
    check_networks(config.networks(), config.hub_data())
    accelerator, config = start_processes(config)
    with closing(RunDir(config, "prototypes", main=rank() == 0, scratch=("centres.npz", "embeddings"))) as run:
        if not run.finished_earlier(from_main_rank(run.status)):
            run.log(*describe_processes(accelerator, config, config.workers))
            _make(config, run, accelerator.device)
    accelerator.end_training()


def prototypes_for(images: int) -> int:
    """Default number of prototypes for a pool: the power of two nearest to a fortieth of the images (by ratio), from 16 to 4,096.

    With fewer images per prototype, centers are accidental; with more, they miss differences that the encoder resolves. Above 4,096 the layer and a
    store of soft labels grow with little new information.
    """
    number = min(max(images / _IMAGES_OF_EACH, _FEWEST), _MOST)
    return int(2 ** round(math.log2(number)))


def _make(config: PrototypesConfig, run: RunDir, device: torch.device) -> None:
    pool = open_pool(config.pool, config.streaming, allow_loss=config.allow_loss)
    if (images := pool.images()) is not None:
        _count(config, images)
    encoder = Encoder(config, device)
    run.compare_network("encoder", encoder.settings())
    compare_shards(run, pool=pool)
    left_out = f"; its {encoder.facts['classes']} classes are left out" if encoder.facts["classes"] else ""
    run.log(encoder.loaded, f"encoder {encoder.facts['reference']} at {encoder.size} px{left_out}")

    # ---- embeddings of the pool, shared among the ranks
    def embedded(piece: Piece) -> np.ndarray:
        if piece.pixels_BCHW is None:
            return np.empty((0, encoder.width), np.float32)
        return encoder.embed(to_device(piece.pixels_BCHW, device))

    reading = Reading(False, encoder.size, config.val_crop)
    over_missing_shards(
        run, "embeddings", pool, config, reading, embedded, _write_embeddings, suffixes=(".parquet", ".npy")
    )
    files = ScoreFiles(run.path / "embeddings", len(pool.shards))
    quarantine = Quarantine(run, len(files))
    quarantine.add(files.unreadable if run.main else [])
    quarantine.judge(len(files))

    on_main_rank(lambda: _finish(config, run, encoder, files, pool), "prototypes")


def _finish(config: PrototypesConfig, run: RunDir, encoder: Encoder, files: ScoreFiles, pool: Shards) -> None:
    """Find the prototypes and write all files of the run, on the main rank."""
    embeddings = Embeddings([path.with_suffix(".npy") for path in files.paths])
    number = _count(config, len(embeddings))
    standard, clusters = _clusters(config, run, embeddings, number)
    sample_BD = standard(embeddings.sample(max(1024, _SAMPLE // number))).astype(np.float64)
    score_BK = scores(sample_BD, clusters.center_KD, clusters.offset_K)
    temperature = temperature_for(score_BK, config.perplexity)
    perplexity = float(np.median(perplexities(score_BK / temperature)))
    metrics = _metrics(clusters, temperature, perplexity, len(embeddings))
    run.log(
        f"{number} prototypes of {len(embeddings)} images: sizes from {metrics['smallest']} to {metrics['largest']}, median "
        f"{metrics['median_size']:g}; {clusters.refilled} empty ones refilled"
    )
    run.log(f"soft labels: median perplexity {perplexity:.2f} at temperature {temperature:.4g}")
    run.log(*_doubts(clusters.size_K, balanced=config.balanced))
    teacher, plot = run.path / "teacher.safetensors", run.path / "prototypes.png"
    encoder.save(
        teacher,
        *linear_layer(standard, clusters.center_KD, clusters.offset_K, temperature),
        crop_pct=config.val_crop,
        encoder=encoder.facts,
        prototypes={**metrics, "balanced": config.balanced, "sources": [source.path for source in config.pool]},
    )
    rows = _nearest(embeddings, standard, clusters, temperature, config.examples)
    _draw(plot, rows, clusters, Images(files, pool.shards, pool.source), config.examples)
    run.finish(metrics, [teacher, plot])
    run.log(f"wrote {teacher} and {plot}")


def _count(config: PrototypesConfig, images: int) -> int:
    """Number of prototypes. Raises UserError if the images or the perplexity do not allow it."""
    number = config.prototypes or prototypes_for(images)
    if number > images:
        if config.prototypes is None or images < 2:
            fewer = f", or set prototypes to at most {images}" if images > 1 else ""
            raise UserError(
                f"pool: {count(images, 'image')} for {number} prototypes, which need an image each at least; give more images{fewer}"
            )
        raise UserError(
            f"prototypes: {number} are more than the {count(images, 'image')} of the pool; give fewer, or more images"
        )
    if config.perplexity >= number:
        raise UserError(
            f"perplexity: {config.perplexity:g} has to be less than the number of prototypes, {number}; lower it"
        )
    return number


def _doubts(size_K: np.ndarray, *, balanced: bool) -> Iterator[str]:
    """Warn of prototypes of few images, and of balanced ones that are not equally large."""
    share = size_K.mean()
    if share < _FEW:
        yield f"warning: {share:.1f} images per prototype are few, so their centers are accidental; give more images or fewer prototypes"
    elif not balanced and (small := int((size_K < _ALONE).sum())) > _SMALL * len(size_K):
        yield (
            f"warning: {small} of {len(size_K)} prototypes have fewer than {_ALONE} images: single photos, not kinds of things; look at "
            "prototypes.png, and give fewer prototypes, or balanced: true"
        )
    if balanced and abs(size_K - share).max() > max(_UNEQUAL * share, 2.0):
        yield (
            f"warning: balanced: the prototypes have {size_K.min()} to {size_K.max()} images, not about {share:.0f} each; images with nearly the "
            "same embedding cannot be divided: leave copies out of the pool (ssld curate)"
        )


def _write_embeddings(path: Path, pieces: list[Piece], embeddings: list[np.ndarray]) -> None:
    """Write the names, then the embeddings, which mark the shard as done; NaN for unreadable images."""
    readable = np.array([flag for piece in pieces for flag in piece.readable], bool)
    columns = {
        "key": [key for piece in pieces for key in piece.keys],
        "class": np.where(readable, 0, UNREADABLE).astype(np.int32),
    }
    unreadable = [location for piece in pieces for location in piece.unreadable]
    write_shard(path.with_suffix(".parquet"), columns, EMBEDDED, unreadable)
    values = np.concatenate(embeddings)
    table = np.full((len(readable), values.shape[1]), np.nan, np.float32)
    table[readable] = values
    save_embeddings(path, table)


def _clusters(config: PrototypesConfig, run: RunDir, embeddings: Embeddings, count: int) -> tuple[Standard, Clusters]:
    """Standardization and clusters, read from centres.npz if an earlier start of this run wrote it."""
    file = run.path / "centres.npz"
    if not is_sound(file):
        run.log(*made_again([file]))
        with StopRequest() as stop:

            def log(line: str) -> None:
                run.log(line)
                if stop.requested:
                    raise Stopped("the prototypes are not finished; all embeddings are kept")

            standard = standard_of(embeddings)
            clusters = find_clusters(
                embeddings,
                standard,
                count,
                seed=config.seed,
                balanced=config.balanced,
                threads=torch.get_num_threads(),
                log=log,
            )
        with atomically_with_sum(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **standard._asdict(), **clusters._asdict())
    with np.load(file) as saved:
        return (
            Standard(saved["mean_D"], saved["scale_D"]),
            Clusters(saved["center_KD"], saved["offset_K"], saved["size_K"], int(saved["refilled"])),
        )


def _metrics(clusters: Clusters, temperature: float, perplexity: float, images: int) -> dict[str, Any]:
    sizes = clusters.size_K
    return {
        "prototypes": len(sizes),
        "images": images,
        "smallest": int(sizes.min()),
        "median_size": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "refilled": clusters.refilled,
        "perplexity": round(perplexity, 4),
        "temperature": temperature,
    }


def _nearest(
    embeddings: Embeddings, standard: Standard, clusters: Clusters, temperature: float, most: int
) -> dict[int, list[tuple[int, float]]]:
    """Nearest images of some prototypes, from the largest to the smallest, as (row, probability of the prototype).

    Up to `most` images each, of its own: next to a small prototype those of others are the majority, and say nothing about it.
    """
    by_size = np.argsort(-clusters.size_K, kind="stable")
    drawn = by_size[spread(len(by_size), _DRAWN)].tolist()
    near = {k: (np.empty(0, np.int64), np.empty(0), np.empty(0)) for k in drawn}  # rows, distances, probabilities
    for ids_B, z_BD in embeddings.blocks(len(by_size)):
        x_BD = standard(z_BD)
        score_BK = scores(x_BD, clusters.center_KD, clusters.offset_K)
        label_B, square_B = score_BK.argmax(1), (x_BD.astype(np.float64) ** 2).sum(1)
        for k in drawn:
            own = np.flatnonzero(label_B == k)
            distances = square_B[own] - 2 * (score_BK[own, k] - clusters.offset_K[k])
            own_rows = ids_B[own], distances, softmax(score_BK[own] / temperature)[:, k]
            ids, distances, shares = (np.r_[before, now] for before, now in zip(near[k], own_rows, strict=True))
            first = np.argsort(distances, kind="stable")[:most]
            near[k] = ids[first], distances[first], shares[first]
    return {k: list(zip(ids.tolist(), shares.tolist(), strict=True)) for k, (ids, _, shares) in near.items()}


def _draw(
    path: Path, rows: dict[int, list[tuple[int, float]]], clusters: Clusters, images: Images, columns: int
) -> None:
    """Draw the nearest images of some prototypes, with the prototype's probability."""
    needed = np.unique([row for nearest in rows.values() for row, _ in nearest])
    views = small_views(images, needed)
    drawn = [
        Row(
            f"prototype {k}\n{count(int(clusters.size_K[k]), 'image')}",
            [Example(views[row], f"{p:.2f}") for row, p in nearest],
        )
        for k, nearest in rows.items()
    ]
    title = f"Images of {len(drawn)} of {len(clusters.size_K)} prototypes, the nearest first, with the prototype's probability (0 to 1)"
    draw_examples(path, drawn, columns, title)
