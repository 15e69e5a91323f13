"""One pass over shards of images: the ranks share the shards, loader workers read them, and what becomes of a shard is written when it is whole.

Batches are cut from one shard at a time, so that what a network answers does not depend on the number of ranks or workers. A killed pass loses the
shards in hand; the next start does those whose files are missing.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssld.shared.checksums import is_sound, made_again, write_with_sum
from ssld.shared.distributed.processes import pins_memory, start_worker
from ssld.shared.distributed.ranks import from_main_rank, rank, world_size
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.images import UnreadableImage, pixels_of
from ssld.shared.run_dir import RunDir
from ssld.shared.tally import Tally
from ssld.shared.training.progress import Clock
from ssld.stage1_ssld.config import ForwardConfig
from ssld.stage1_ssld.curation.perceptual_hash import perceptual_hash
from ssld.stage1_ssld.curation.score_files import shard_file
from ssld.stage1_ssld.data.shards import RowShard, Sample, Shard, source_shards
from ssld.stage1_ssld.data.sources import decode
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.data_config import SourceConfig, is_remote

_JUDGED_AFTER, _TOO_MANY = 1000, 0.01


class Shards(NamedTuple):
    """The shards of some sources, one after the other, and the source of each; setting, path and tally of the sources."""

    shards: list[Shard]
    source: list[SourceConfig]
    told: list[tuple[str, str, Tally]]

    def images(self) -> int | None:
        """How many there are, None where only reading tells."""
        lengths = [shard.length for shard in self.shards]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def names(self) -> list[str]:
        """What the shards are, for the record."""
        return [f"{shard.name} ({'?' if shard.length is None else shard.length})" for shard in self.shards]


def open_pool(configs: Sequence[SourceConfig], streaming: bool, *, allow_loss: bool) -> Shards:
    """The shards of the sources `pool`. Raises UserError for a source that is given twice, and as `open_shards`."""
    paths = [source.path for source in configs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"pool: {path} is given twice; give every source once")
    return open_shards(configs, "pool", streaming, allow_loss=allow_loss)


def open_shards(configs: Sequence[SourceConfig], key: str, streaming: bool, *, allow_loss: bool) -> Shards:
    """The shards of some sources; `key` names their setting. Raises UserError where one cannot be read in shards, or where images are lost in bulk
    and that is not allowed."""
    found = Shards([], [], [])
    for number, config in enumerate(configs):
        try:
            tally = Tally()
            shards = source_shards(config, number, streaming=streaming or is_remote(config.path), tally=tally)
            tally.check(config.path, allow_loss=allow_loss, otherwise="set allow_loss: true to go on with the rest")
        except UserError as error:
            raise UserError(f"{key}.{number}: {error}") from None
        found.shards.extend(shards)
        found.source.extend([config] * len(shards))
        found.told.append((f"{key}.{number}", config.path, tally))
    return found


def compare_shards(run: RunDir, **shards: Shards) -> None:
    """Record what was read, and refuse to go on where other shards are found than at the start of the run; all ranks together."""
    for place, path, tally in itertools.chain(*(found.told for found in shards.values())):
        run.tell(place, path, tally)
    if run.main:
        file = run.path / "pool.json"
        now = {name: found.names() for name, found in shards.items()}
        record = json.dumps(now, indent=1) + "\n"
        if is_sound(file) and file.read_text(encoding="utf-8") != record:
            raise UserError(
                f"{run.path}: the files of the pool have changed since this run began; give another --output"
            )
        if file.exists() and not is_sound(file):
            raise UserError(
                f"{file}: is damaged, so that nobody knows which files this run began with; give another --output or delete the folder"
            )
        write_with_sum(file, record)
    from_main_rank(None)


@dataclass(frozen=True)
class Job:
    """A shard to work on: its number, and the ascending rows that are wanted; None: all."""

    number: int
    shard: Shard
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """What is made of an image: hashes or not, and a view of `image_size` pixels that keeps `val_crop` of the short side, or none for 0."""

    hashes: bool
    image_size: int = 0
    val_crop: float = 1.0


@dataclass
class Piece:
    """Some images of a shard: names of all of them; hashes and mirrored ones (0 where unreadable), readable_N and the views of those."""

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
    """(number of the shard, whether this is its last piece, piece), one shard of this worker after the other."""

    def __init__(self, jobs: Sequence[Job], reading: Reading, batch_size: int) -> None:
        self._jobs, self._reading, self._batch_size = jobs, reading, batch_size

    def __iter__(self) -> Iterator[tuple[int, bool, Piece]]:
        worker = get_worker_info()
        jobs = self._jobs[worker.id :: worker.num_workers] if worker else self._jobs
        for job in jobs:
            try:
                yield from self._pieces(job)
            except (UserError, OSError) as error:  # raised in a worker, it would arrive with the worker's traceback
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
                self._take(sample, piece, views)
        yield job.number, True, _filled(piece, views)

    def _take(self, sample: Sample, piece: Piece, views: list[Tensor]) -> None:
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
    """The samples of a shard, or those of some ascending rows."""
    if rows is None:
        yield from shard.samples()
    elif isinstance(shard, RowShard):
        for row in rows.tolist():
            yield next(shard.samples(row))
    elif len(rows):
        wanted, last = set(rows.tolist()), int(rows[-1])
        with closing(shard.samples(int(rows[0]))) as samples:
            for row, sample in enumerate(samples, int(rows[0])):
                if row in wanted:
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
    """Make what is missing of the folder `name` of the run, or damaged, all ranks together.

    Args:
        use: a piece -> what is kept of it.
        write: path of a shard's file, its pieces without pixels, and what was kept of them.
        rows: the shards and rows that are wanted; None: all.
        suffixes: of a shard's files; `write` is given the path of the last, which it writes last.

    Raises:
        UserError, Stopped: see `over_shards`.
    """
    folder = run.path / name
    if run.main:
        folder.mkdir(exist_ok=True)
    wanted = range(len(shards.shards)) if rows is None else sorted(rows)
    files = {number: [shard_file(folder, number).with_suffix(suffix) for suffix in suffixes] for number in wanted}
    missing = from_main_rank([n for n in wanted if not all(map(is_sound, files[n]))] if run.main else [])
    if not missing:
        return
    for line in made_again(file for number in missing for file in files[number]) if run.main else []:
        run.log(line)
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
        lambda number, pieces, kept: write(files[number][-1], pieces, kept),
        batch_size=config.batch_size,
        workers=config.workers,
        told=told,
    )
    from_main_rank(None)


def over_shards(
    jobs: Sequence[Job],
    reading: Reading,
    use: Callable[[Piece], Any],
    write: Callable[[int, list[Piece], list[Any]], None],
    *,
    batch_size: int,
    workers: int,
    told: Callable[[int, int], None],
) -> None:
    """Read shards, use every piece and write every shard.

    Args:
        use: a piece -> what is kept of it.
        write: number of the shard, its pieces without pixels, and what was kept of them.
        told: shards done and images read, after each shard.

    Raises:
        UserError: more than one and more than 1 % of at least 1,000 images cannot be read, or a shard cannot.
        Stopped: asked to by a signal; whole shards are written.
    """
    if not jobs:
        return
    loader = DataLoader(
        ShardViews(jobs, reading, batch_size),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        collate_fn=_as_it_is,
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
            pieces, kept = open_shards.setdefault(number, ([], []))
            kept.append(use(piece))
            piece.pixels_BCHW = None
            pieces.append(piece)
            read += len(piece.keys)
            unreadable += piece.unreadable
            if last:
                write(number, *open_shards.pop(number))
                done += 1
                told(done, read)
            if read >= _JUDGED_AFTER and len(unreadable) > max(1, _TOO_MANY * read):
                raise UserError(
                    f"{len(unreadable)} of {read} images cannot be read; mend or remove them (first: {min(unreadable)})"
                )
            if stop.requested and done < len(jobs):
                raise Stopped(f"{done} of {len(jobs)} shards of this process are done")


def _filled(piece: Piece, views: list[Tensor]) -> Piece:
    piece.pixels_BCHW = torch.stack(views) if views else None
    return piece


def _as_it_is(item: Any) -> Any:
    return item
