"""One pass over shards of images: the ranks share the shards, loader workers read them, and the results of a shard are written when it is complete.

A batch holds images of one shard only, so that results do not depend on the number of ranks or workers. A killed pass loses its unfinished shards;
the next start processes the shards whose files are missing.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssld.shared.checksums import is_sound, made_again, write_with_sum
from ssld.shared.distributed.processes import pins_memory, start_worker
from ssld.shared.distributed.ranks import on_main_rank, rank, wait_for_all, world_size
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.images import UnreadableImage, pixels_of
from ssld.shared.run_dir import RunDir
from ssld.shared.tally import Tally
from ssld.shared.training.progress import Clock
from ssld.shared.wording import count, duration
from ssld.stage1_ssld.config import ForwardConfig
from ssld.stage1_ssld.curation.perceptual_hash import perceptual_hash
from ssld.stage1_ssld.curation.score_files import shard_file
from ssld.stage1_ssld.data.shards import RowShard, Sample, Shard, source_shards
from ssld.stage1_ssld.data.sources import decode
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.data_config import SourceConfig, is_remote

_JUDGED_AFTER, _TOO_MANY = 1000, 0.01
_DIVISION, _FEWEST_ROWS = 16, 256  # shards of a small source of rows, and their fewest images


class Shards(NamedTuple):
    """Shards of several sources in order, the source of each shard, and (setting, path, tally) of each source."""

    shards: list[Shard]
    source: list[SourceConfig]
    tallies: list[tuple[str, str, Tally]]

    def images(self) -> int | None:
        """Number of images; None where unknown before reading."""
        lengths = [shard.length for shard in self.shards]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def names(self) -> list[str]:
        """Names and lengths of the shards, for pool.json."""
        return [f"{shard.name} ({'?' if shard.length is None else shard.length})" for shard in self.shards]


def open_pool(configs: Sequence[SourceConfig], streaming: bool, *, allow_loss: bool) -> Shards:
    """Open the shards of `pool`. Raises UserError for a source given twice, and as `open_shards`."""
    paths = [source.path for source in configs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"pool: {path} is given twice; give every source once")
    return open_shards(configs, "pool", streaming, allow_loss=allow_loss)


def open_shards(configs: Sequence[SourceConfig], key: str, streaming: bool, *, allow_loss: bool) -> Shards:
    """Open the shards of several sources of the setting `key`.

    Raises UserError if a source cannot be read in shards, or if images are lost in bulk, unless `allow_loss`.
    """
    result = Shards([], [], [])
    for number, config in enumerate(configs):
        try:
            tally = Tally()
            shards = _divided(source_shards(config, number, streaming=streaming or is_remote(config.path), tally=tally))
            tally.check(
                config.path,
                allow_loss=allow_loss,
                otherwise="set allow_loss: true to continue with the remaining images",
            )
        except UserError as error:
            raise UserError(f"{key}.{number}: {error}") from None
        result.shards.extend(shards)
        result.source.extend([config] * len(shards))
        result.tallies.append((f"{key}.{number}", config.path, tally))
    return result


def _divided(shards: list[Shard]) -> list[Shard]:
    """Divide rows of a small source further, into 16 shards of at least 256 rows: a killed pass keeps most of its work, all workers have some."""
    rows = sum(shard.length for shard in shards if isinstance(shard, RowShard))
    most = max(_FEWEST_ROWS, -(-rows // _DIVISION))
    return [
        part
        for shard in shards
        for part in (
            [
                replace(shard, first=first, last=min(first + most, shard.last))
                for first in range(shard.first, shard.last, most)
            ]
            if isinstance(shard, RowShard)
            else [shard]
        )
    ]


def compare_shards(run: RunDir, **shards: Shards) -> None:
    """Record the shards, and raise UserError if a resumed run began with others; all ranks call it."""
    for place, path, tally in itertools.chain(*(some.tallies for some in shards.values())):
        run.tell(place, path, tally)

    def compare() -> None:
        file = run.path / "pool.json"
        now = {name: some.names() for name, some in shards.items()}
        record = json.dumps(now, indent=1) + "\n"
        if is_sound(file) and file.read_text(encoding="utf-8") != record:
            raise UserError(
                f"{run.path}: the files of the pool have changed since this run began; give another --output"
            )
        if file.exists() and not is_sound(file):
            raise UserError(
                f"{file}: is damaged, so the files that this run began with are unknown; give another --output or delete the folder"
            )
        write_with_sum(file, record)

    on_main_rank(compare)


@dataclass(frozen=True)
class Job:
    """A shard to process: its number, and ascending rows of it; None: all rows."""

    number: int
    shard: Shard
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """Processing of an image: whether to hash it, and a view of `image_size` pixels that keeps `val_crop` of the short side; no view for 0."""

    hashes: bool
    image_size: int = 0
    val_crop: float = 1.0


@dataclass
class Piece:
    """Consecutive images of a shard.

    Attributes:
        keys: names of all images.
        hashes, mirrored: perceptual hashes of images and of their mirror images; 0 for an unreadable image.
        readable: whether each image could be read.
        unreadable: locations of the others.
        pixels_BCHW: views of the readable images; None without views.
        error: message of an error that ends the pass.
    """

    keys: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    mirrored: list[int] = field(default_factory=list)
    readable: list[bool] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pixels_BCHW: Tensor | None = None
    error: str | None = None

    def pin_memory(self) -> "Piece":
        """Move the views to pinned memory; called by the loader."""
        if self.pixels_BCHW is not None:
            self.pixels_BCHW = self.pixels_BCHW.pin_memory()
        return self


class ShardViews(IterableDataset[Any]):
    """(number of the shard, whether this is its last piece, piece), for the shards of this worker in turn."""

    def __init__(self, jobs: Sequence[Job], reading: Reading, batch_size: int) -> None:
        self._jobs, self._reading, self._batch_size = jobs, reading, batch_size

    def __iter__(self) -> Iterator[tuple[int, bool, Piece]]:
        worker = get_worker_info()
        jobs = self._jobs[worker.id :: worker.num_workers] if worker else self._jobs
        for job in jobs:
            try:
                yield from self._pieces(job)
            except (UserError, OSError) as error:  # raised in a worker, it would print the worker's traceback
                what = str(error) if isinstance(error, UserError) else f"{job.shard.name}: cannot be read ({error})"
                yield job.number, True, Piece(error=what)
                return

    def _pieces(self, job: Job) -> Iterator[tuple[int, bool, Piece]]:
        piece, views = Piece(), list[Tensor]()
        with closing(picked(job.shard, job.rows)) as samples:  # type: ignore[type-var]
            for sample in samples:
                if len(piece.keys) == self._batch_size:
                    yield job.number, False, _filled(piece, views)
                    piece, views = Piece(), []
                self._add(sample, piece, views)
        yield job.number, True, _filled(piece, views)

    def _add(self, sample: Sample, piece: Piece, views: list[Tensor]) -> None:
        piece.keys.append(sample.name)
        hashes = (0, 0)
        try:
            image = pixels_of(decode(sample.encoded, sample.location))
            piece.readable.append(True)
            if self._reading.hashes:
                hashes = perceptual_hash(image)
            if self._reading.image_size:
                views.append(val_view(image, image_size=self._reading.image_size, val_crop=self._reading.val_crop))
        except UnreadableImage:
            piece.readable.append(False)
            piece.unreadable.append(sample.location)
        piece.hashes.append(hashes[0])
        piece.mirrored.append(hashes[1])


def picked(shard: Shard, rows: np.ndarray | None) -> Iterator[Sample]:
    """Samples of a shard, or of some ascending rows of it."""
    if rows is None:
        yield from shard.samples()
    elif isinstance(shard, RowShard):
        for row in rows.tolist():
            yield next(shard.samples(row))
    elif len(rows):
        chosen, last = set(rows.tolist()), int(rows[-1])
        with closing(shard.samples(int(rows[0]))) as samples:
            for row, sample in enumerate(samples, int(rows[0])):
                if row in chosen:
                    yield sample
                if row == last:
                    break


def over_missing_shards(
    run: RunDir,
    name: str,
    shards: Shards,
    config: ForwardConfig,
    reading: Reading,
    use: Callable[[Piece], Any],
    write: Callable[[Path, list[Piece], list[Any]], None],
    *,
    rows: dict[int, np.ndarray] | None = None,
    suffixes: Sequence[str] = (".parquet",),
) -> None:
    """Create missing and damaged files in the folder `name` of the run; all ranks call it.

    Args:
        use: maps a piece to its result.
        write: called with the path of a shard's file, its pieces without pixels, and their results.
        rows: rows to process by shard; None: all rows of all shards.
        suffixes: suffixes of a shard's files; `write` gets the path with the last one, which it writes last.

    Raises:
        UserError, Stopped: see `over_shards`.
    """
    folder = run.path / name
    chosen = range(len(shards.shards)) if rows is None else sorted(rows)
    files = {number: [shard_file(folder, number).with_suffix(suffix) for suffix in suffixes] for number in chosen}

    def find_missing() -> list[int]:
        folder.mkdir(exist_ok=True)
        return [n for n in chosen if not all(map(is_sound, files[n]))]

    missing = on_main_rank(find_missing, name)
    if not missing:
        return
    run.log(*made_again(file for number in missing for file in files[number]) if run.main else [])
    jobs = [Job(n, shards.shards[n], None if rows is None else rows[n]) for n in missing[rank() :: world_size()]]
    run.log(f"{name}: {len(missing)} of {len(chosen)} shards to do")
    lengths = [job.shard.length if job.rows is None else len(job.rows) for job in jobs]
    clock = Clock(0 if None in lengths else sum(length or 0 for length in lengths))

    def report(done: int, read: int) -> None:
        clock.done = read
        if done == len(jobs) or clock.due():
            left = f", {duration(clock.left)} to go" if clock.left else ""
            run.log(
                f"{name}: {count(read, 'image')}, {done} of {len(jobs)} shards of this process, {clock.rate:.3g} images/s{left}"
            )

    over_shards(
        jobs,
        reading,
        use,
        lambda number, pieces, results: write(files[number][-1], pieces, results),
        batch_size=config.batch_size,
        workers=config.workers,
        report=report,
    )
    wait_for_all()


def over_shards(
    jobs: Sequence[Job],
    reading: Reading,
    use: Callable[[Piece], Any],
    write: Callable[[int, list[Piece], list[Any]], None],
    *,
    batch_size: int,
    workers: int,
    report: Callable[[int, int], None],
) -> None:
    """Read shards, process every piece and write every shard.

    Args:
        use: maps a piece to its result.
        write: called with the number of the shard, its pieces without pixels, and their results.
        report: called after each piece with the shards done and the images read.

    Raises:
        UserError: more than one and more than 1 % of at least 1,000 images cannot be read, or a shard cannot.
        Stopped: after a signal; complete shards are written.
    """
    if not jobs:
        return
    loader = DataLoader(
        ShardViews(jobs, reading, batch_size),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        collate_fn=_unchanged,
        pin_memory=pins_memory(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    open_shards: dict[int, tuple[list[Piece], list[Any]]] = {}
    done, read, unreadable = 0, 0, list[str]()
    with StopRequest() as stop:
        for number, last, piece in loader:
            if piece.error:
                raise UserError(piece.error)
            pieces, results = open_shards.setdefault(number, ([], []))
            results.append(use(piece))
            piece.pixels_BCHW = None
            pieces.append(piece)
            read += len(piece.keys)
            unreadable += piece.unreadable
            if last:
                write(number, *open_shards.pop(number))
                done += 1
            report(done, read)
            if read >= _JUDGED_AFTER and len(unreadable) > max(1, _TOO_MANY * read):
                raise UserError(
                    f"{len(unreadable)} of {read} images cannot be read; fix or remove them (first: {min(unreadable)})"
                )
            if stop.requested and done < len(jobs):
                raise Stopped(f"{done} of {len(jobs)} shards of this process are done")


def _filled(piece: Piece, views: list[Tensor]) -> Piece:
    piece.pixels_BCHW = torch.stack(views) if views else None
    return piece


def _unchanged(item: Any) -> Any:
    return item
