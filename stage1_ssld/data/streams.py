"""Training batches from streams: shards read in order, shuffled in blocks, without an index.

The samples of a step are a pure function of (seed, step), so a checkpoint needs no position and a run resumes at the same sample:

- the shards of all sources (or of each weighted source) are assigned to R readers, R a divisor of the global batch B up to 64 and the number of
  shards, if there is one; a reader reads its shards in a seeded order, pass after pass, and shuffles within blocks;
- every reader gives B / R samples per step, so after s steps it is at sample s * B / R;
- ranks and accumulation split a step's samples into contiguous parts, loader workers own whole readers, so no such split changes what is read.

Deliberately absent: labels. If all lengths are known, readers own rows in proportion to the samples they give, so that all finish a pass within a few
samples of each other; shards of unknown length (tar files) are divided equally by number.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssld.shared.distributed.processes import start_worker
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, stable_seed
from ssld.shared.tally import Tally
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch, View, collate
from ssld.stage1_ssld.data.rows import Sample
from ssld.stage1_ssld.data.shards import RowShard, Shard, count_samples, source_shards
from ssld.stage1_ssld.data.sources import LOSS_SETTING, decode
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig

READERS = 64
BUFFERED = 8192
"""Samples in the shuffle buffers of all readers together."""


class Part(NamedTuple):
    """Samples `first` to `last` (exclusive; None: to the end) of a shard, owned by one reader."""

    source: int
    shard: Shard
    first: int
    last: int | None


@dataclass(frozen=True)
class Reader:
    """An endless, seeded sequence of the samples of its parts; `block` samples are shuffled together, `number` identifies the reader."""

    number: int
    parts: Sequence[Part]
    block: int
    seed: int

    def blocks(self, position: int) -> Generator[tuple[int, int, list[tuple[int, Sample]]]]:
        """(pass, index of the first sample to use, block of (source, sample)) from sample `position` on."""
        pass_number, done = self._place(position)
        while True:
            block_number, empty = done // self.block, done == 0
            with closing(self._samples(self._order(pass_number), block_number * self.block)) as samples:
                while block := [sample for _, sample in zip(range(self.block), samples, strict=False)]:
                    random = np.random.default_rng(
                        stable_seed(self.seed, "block", self.number, pass_number, block_number)
                    )
                    yield pass_number, done % self.block, [block[index] for index in random.permutation(len(block))]
                    done, block_number = 0, block_number + 1
                    empty = False
            if empty:
                raise UserError(f"{self.parts[0].shard.name}: holds no images")
            pass_number, done = pass_number + 1, 0

    def _order(self, pass_number: int) -> list[Part]:
        random = np.random.default_rng(stable_seed(self.seed, "stream", self.number, pass_number))
        return [self.parts[index] for index in random.permutation(len(self.parts))]

    def _place(self, position: int) -> tuple[int, int]:
        """(pass, sample in it) of a position. Shards of unknown length before it are read to count them."""
        before = 0
        for part in self._order(0):
            if before + (length := _length(part)) > position:
                return 0, position
            before += length
        return divmod(position, before) if before else (0, 0)

    def _samples(self, parts: Sequence[Part], skip: int) -> Generator[tuple[int, Sample]]:
        for part in parts:
            if skip and skip >= (length := _length(part)):
                skip -= length
                continue
            last = None if part.last is None else part.last - part.first - skip
            with closing(part.shard.samples(part.first + skip)) as samples:
                for sample in itertools.islice(samples, last):
                    yield part.source, sample
            skip = 0


def _length(part: Part) -> int:
    return count_samples(part.shard) if part.last is None else part.last - part.first


@dataclass(frozen=True)
class StreamPlan:
    """Assignment of the samples of a step to readers.

    Attributes:
        readers: all readers of the run.
        given: samples per step of each reader.
        slots: (reader, index among the samples it gives) of each sample of a step, in order.
        images: images in all sources; None where unknown before reading.
        tallies: path of each source, with counts known before reading.
    """

    readers: list[Reader]
    given: list[int]
    slots: list[tuple[int, int]]
    images: int | None
    tallies: list[tuple[str, Tally]]


def plan_streams(data: DataConfig, batch_size: int, seed: int) -> StreamPlan:
    """Assign the shards of the training sources to readers. Raises UserError as `source_shards`, and for a weight too small for the batch."""
    tallies = [Tally() for _ in data.train]
    shards = [
        source_shards(source, number, streaming=True, tally=tally)
        for number, (source, tally) in enumerate(zip(data.train, tallies, strict=True))
    ]
    by_path = [(source.path, tally) for source, tally in zip(data.train, tallies, strict=True)]
    for path, tally in by_path:
        tally.check(f"data.train: {path}", allow_loss=data.allow_loss, otherwise=LOSS_SETTING)
    numbered = [[(number, shard) for shard in part] for number, part in enumerate(shards)]
    weighted = data.train[0].weight is not None
    groups = numbered if weighted else [[pair for part in numbered for pair in part]]
    quotas = shares([source.weight or 0.0 for source in data.train], batch_size) if weighted else [batch_size]
    readers: list[Reader] = []
    given: list[int] = []
    slots: list[tuple[float, int, int]] = []
    for number, (group, quota) in enumerate(zip(groups, quotas, strict=True)):
        if quota == 0:
            raise UserError(
                f"data.train.{number}.weight: too small for a batch of {batch_size}: less than one image per step; raise it or batch_size"
            )
        gives = _gives(quota, _most_readers([shard for _, shard in group]))
        known = all(shard.length is not None for _, shard in group)
        block = max(1, BUFFERED // (len(gives) * len(groups)))
        places = itertools.count()
        for count, parts in zip(gives, _rows(group, gives) if known else _whole(group, gives), strict=True):
            # Sources are interleaved evenly, so that the part of every rank holds all of them in proportion.
            slots += [((next(places) + 0.5) / quota, len(readers), which) for which in range(count)]
            readers.append(Reader(len(readers), parts, block, seed))
            given.append(count)
    lengths = [shard.length for part in shards for shard in part]
    images = None if None in lengths else sum(length or 0 for length in lengths)
    return StreamPlan(readers, given, [(reader, which) for _, reader, which in sorted(slots)], images, by_path)


def _most_readers(shards: Sequence[Shard]) -> int:
    """Most readers for these shards: files are read from any row, row groups at some cost, tar files only from their beginning."""
    if all(isinstance(shard, RowShard) for shard in shards):
        most = READERS
    elif all(shard.length is not None for shard in shards):
        most = min(READERS, 4 * len(shards))
    else:
        return min(READERS, len(shards))
    return max(1, min(most, sum(shard.length or 0 for shard in shards) // 2))  # no reader without a row


def _gives(quota: int, most: int) -> list[int]:
    """Samples per step of each reader: equal numbers for up to `most` readers, nearly equal ones if `quota` has no suitable divisor."""
    count = next(divisor for divisor in range(min(quota, most), 0, -1) if quota % divisor == 0)
    uneven = min(most, quota // 4)
    if uneven >= 2 * count:
        count = uneven
    return [quota // count + (index < quota % count) for index in range(count)]


def _rows(group: Sequence[tuple[int, Shard]], gives: Sequence[int]) -> Iterator[list[Part]]:
    """Contiguous rows over all shards of known length, in proportion to the samples of each reader."""
    total, quota, before = sum(shard.length or 0 for _, shard in group), sum(gives), 0
    for count in gives:
        begin, end = before * total // quota, (before + count) * total // quota
        parts, first = [], 0
        for source, shard in group:
            length = shard.length or 0
            low, high = max(begin - first, 0), min(end - first, length)
            if low < high:
                parts.append(Part(source, shard, low, high))
            first += length
        yield parts
        before += count


def _whole(group: Sequence[tuple[int, Shard]], gives: Sequence[int]) -> Iterator[list[Part]]:
    """Whole shards, assigned in turn: first to every reader, then to those that give more samples."""
    turns = [reader for turn in range(max(gives)) for reader, count in enumerate(gives) if count > turn]
    for reader in range(len(gives)):
        yield [
            Part(source, shard, 0, shard.length)
            for number, (source, shard) in enumerate(group)
            if turns[number % len(turns)] == reader
        ]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Integers that sum to `total`, in proportion to the weights, by the largest-remainder method."""
    exact = [weight / sum(weights) * total for weight in weights]
    result = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (result[index] - exact[index], index))
    for index in by_remainder[: total - sum(result)]:
        result[index] += 1
    return result


class StreamViews(IterableDataset[Any]):
    """Parts of batches, one per micro-batch: (slots of the step, their views), for the readers that this loader worker owns."""

    def __init__(
        self,
        plan: StreamPlan,
        data: DataConfig,
        *,
        seed: int,
        steps: range,
        rank: int,
        ranks: int,
        accumulate: int,
    ) -> None:
        size = len(plan.slots) // (ranks * accumulate)
        pieces = [
            range((rank * accumulate + micro) * size, (rank * accumulate + micro + 1) * size)
            for micro in range(accumulate)
        ]
        self._pieces, self._plan, self._data, self._seed, self._steps = pieces, plan, data, seed, steps

    def __iter__(self) -> Iterator[tuple[list[int], Batch] | str]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self._plan
        needed = sorted({plan.slots[slot][0] for piece in self._pieces for slot in piece})
        own = needed[number * len(needed) // workers : (number + 1) * len(needed) // workers]
        with ExitStack() as stack:
            sequences = {reader: stack.enter_context(closing(self._sequence(reader))) for reader in own}
            for _ in self._steps:
                try:
                    taken = {
                        reader: list(itertools.islice(sequence, plan.given[reader]))
                        for reader, sequence in sequences.items()
                    }
                except UserError as error:
                    yield str(error)  # raised in a worker, it would print the worker's traceback
                    return
                except OSError as error:
                    yield f"data.train: a stream ended early ({error}); run again to continue from the last checkpoint"
                    return
                for piece in self._pieces:
                    slots = [slot for slot in piece if plan.slots[slot][0] in sequences]
                    views = [
                        self._view(*taken[reader][which]) for reader, which in (plan.slots[slot] for slot in slots)
                    ]
                    kept = [slot for slot, view in zip(slots, views, strict=True) if view.pixels_CHW is not None]
                    yield kept, collate(views)

    def _sequence(self, reader: int) -> Generator[tuple[list[tuple[int, Sample]], int, int]]:
        """(block, index in it, pass) of each sample in order."""
        with closing(self._plan.readers[reader].blocks(self._steps.start * self._plan.given[reader])) as blocks:
            for pass_number, first, block in blocks:
                for index in range(first, len(block)):
                    yield block, index, pass_number

    def _view(self, block: list[tuple[int, Sample]], index: int, pass_number: int) -> View:
        """Make the view of a sample; an unreadable image is replaced by the next one of its block."""
        unreadable: list[str] = []
        for offset in range(min(len(block), 100)):
            source, sample = block[(index + offset) % len(block)]
            try:
                image = decode(sample.encoded, sample.location, self._data.decoder)
            except UnreadableImage:
                unreadable.append(sample.location)
                continue
            key = f"{source}:{sample.name}"
            pixels = training_view(image, key, pass_number, self._data, self._seed)
            return View(pixels, NO_LABEL, key, unreadable)
        return View(None, NO_LABEL, "", unreadable)


def stream_batches(views: StreamViews, *, workers: int, pin_memory: bool) -> Generator[Batch]:
    """Iterate over micro-batches, joined from the parts of all workers in the order of slots.

    Raises UserError for a source that is damaged, disappears or is empty.
    """
    loader = DataLoader(
        views,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: the loader's base seed would otherwise advance torch's global generator
    )
    pieces = iter(loader)
    try:
        while group := list(itertools.islice(pieces, max(1, workers))):
            errors = [piece for piece in group if isinstance(piece, str)]
            if errors:
                raise UserError(errors[0])
            batch = _join(group)
            yield batch.pin_memory() if pin_memory else batch
    finally:
        del pieces  # ends the workers now: the traceback of an error would keep them


def _unchanged(piece: Any) -> Any:
    return piece


def _join(group: Sequence[tuple[list[int], Batch]]) -> Batch:
    if len(group) == 1:
        return group[0][1]
    order = sorted((slot, which, row) for which, (slots, _) in enumerate(group) for row, slot in enumerate(slots))
    batches = [batch for _, batch in group]
    unreadable = [location for batch in batches for location in batch.unreadable]
    if not order:
        return Batch(batches[0].pixels_BCHW, batches[0].labels_B, [], unreadable)
    return Batch(
        torch.stack([batches[which].pixels_BCHW[row] for _, which, row in order]),
        torch.stack([batches[which].labels_B[row] for _, which, row in order]),
        [batches[which].keys[row] for _, which, row in order],
        unreadable,
    )
