"""Training batches from streams: shards read in order, shuffled in blocks, without an index.

What a step holds is a pure function of (seed, step), so a checkpoint needs no position and a run resumes at the same sample:

- the shards of all sources (or of each weighted source) are dealt to R readers, R the largest divisor of the global batch up to 64 and the number of
  shards; a reader reads its own in a seeded order, pass after pass, and shuffles within blocks;
- every reader gives B / R samples a step, so after s steps it stands at sample s * B / R;
- ranks and accumulation cut a step's samples into contiguous pieces, loader workers own whole readers: no split changes what is read.

Deliberately absent: labels. Where lengths are known, readers own equally many rows, and a pass is every image once (but for N modulo R).
"""

import heapq
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shared.errors import UserError
from shared.images import UnreadableImage, stable_seed
from shared.workers import start_worker
from stage1_ssld.batch import NO_LABEL, Batch, View, collate
from stage1_ssld.data_config import DataConfig
from stage1_ssld.shards import Sample, Shard, TarShard, source_shards
from stage1_ssld.sources import decode
from stage1_ssld.views import training_view

READERS = 64
BUFFERED = 8192
"""Samples that all readers together shuffle among."""


class Part(NamedTuple):
    """What a reader owns of a shard: samples `first` to `last` (exclusive; None: to the end) of it."""

    source: int
    shard: Shard
    first: int
    last: int | None


@dataclass(frozen=True)
class Reader:
    """An endless, seeded sequence of the samples of its parts. `number` tells readers apart."""

    number: int
    parts: Sequence[Part]
    block: int
    seed: int

    def blocks(self, position: int) -> Generator[tuple[int, int, list[tuple[int, Sample]]]]:
        """(pass, first sample to take, block of (source, sample)) from the `position`-th sample on."""
        done, pass_number = 0, 0
        if position:
            length = self._length()
            pass_number, done = divmod(position, length)
        while True:
            order = np.random.default_rng(stable_seed(self.seed, "stream", self.number, pass_number)).permutation(
                len(self.parts)
            )
            block_number, empty = done // self.block, done == 0
            with closing(self._samples([self.parts[index] for index in order], block_number * self.block)) as samples:
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

    def _samples(self, parts: Sequence[Part], skip: int) -> Generator[tuple[int, Sample]]:
        for part in parts:
            length = None if part.last is None else part.last - part.first
            if length is not None and skip >= length:
                skip -= length
                continue
            number = part.first + skip
            with closing(part.shard.samples(number)) as samples:
                started = False
                for sample in samples:
                    if part.last is not None and number >= part.last:
                        break
                    started, number = True, number + 1
                    yield part.source, sample
            if length is None and not started and skip:
                skip -= _count(part.shard)
            else:
                skip = 0

    def _length(self) -> int:
        return sum(_count(part.shard) if part.last is None else part.last - part.first for part in self.parts)


def _count(shard: Shard) -> int:
    assert isinstance(shard, TarShard)
    return shard.count()


@dataclass(frozen=True)
class StreamPlan:
    """Which reader each sample of a step comes from.

    Attributes:
        readers: all of the run.
        given: samples that each reader gives a step.
        slots: of each sample of a step, in order: (reader, which of the samples it gives).
        images: in all sources; None where only reading tells.
    """

    readers: list[Reader]
    given: list[int]
    slots: list[tuple[int, int]]
    images: int | None


def plan_streams(data: DataConfig, batch_size: int, seed: int) -> StreamPlan:
    """Deal the shards of the training sources to readers. Raises UserError as `source_shards`, and for a weight too small for the batch."""
    shards = [source_shards(source, number, streaming=True) for number, source in enumerate(data.train)]
    lengths = [None if any(s.length is None for s in part) else sum(s.length or 0 for s in part) for part in shards]
    numbered = [[(number, shard) for shard in part] for number, part in enumerate(shards)]
    weighted = data.train[0].weight is not None
    groups = numbered if weighted else [[pair for part in numbered for pair in part]]
    quotas = shares([source.weight or 0.0 for source in data.train], batch_size) if weighted else [batch_size]
    readers: list[Reader] = []
    given: list[int] = []
    queue: list[tuple[float, int, int]] = []
    for number, (group, quota) in enumerate(zip(groups, quotas, strict=True)):
        if quota == 0:
            raise UserError(
                f"data.train.{number}.weight: too small for a batch of {batch_size}: not one image a step; raise it or batch_size"
            )
        known = all(shard.length is not None for _, shard in group)
        most = min(READERS, sum(shard.length or 0 for _, shard in group) if known else len(group))
        count = next(divisor for divisor in range(min(quota, most), 0, -1) if quota % divisor == 0)
        first = len(readers)
        for index in range(count):
            parts = _rows_of(group, index, count) if known else [Part(n, s, 0, None) for n, s in group[index::count]]
            readers.append(Reader(first + index, parts, max(1, BUFFERED // (count * len(groups))), seed))
            given.append(quota // count)
        # Sources are interleaved evenly, so that every rank's piece has its share of each.
        for place in range(quota):
            heapq.heappush(queue, ((place + 0.5) / quota, first + place // (quota // count), place % (quota // count)))
    slots = [(reader, which) for _, reader, which in (heapq.heappop(queue) for _ in range(len(queue)))]
    images = None if None in lengths else sum(length or 0 for length in lengths)
    return StreamPlan(readers, given, slots, images)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to the weights, by largest remainder."""
    exact = [weight / sum(weights) * total for weight in weights]
    result = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (result[index] - exact[index], index))
    for index in by_remainder[: total - sum(result)]:
        result[index] += 1
    return result


def _rows_of(group: Sequence[tuple[int, Shard]], index: int, count: int) -> list[Part]:
    """The index-th of `count` equal runs of rows over all shards of known length."""
    total = sum(shard.length or 0 for _, shard in group)
    begin, end = index * total // count, (index + 1) * total // count
    parts, first = [], 0
    for source, shard in group:
        length = shard.length or 0
        low, high = max(begin - first, 0), min(end - first, length)
        if low < high:
            parts.append(Part(source, shard, low, high))
        first += length
    return parts


class StreamViews(IterableDataset[Any]):
    """Pieces of batches: (slots of the step, their views), for the readers that this loader worker owns; one item a micro-batch."""

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

    def __iter__(self) -> Iterator[tuple[list[int], Batch]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self._plan
        needed = sorted({plan.slots[slot][0] for piece in self._pieces for slot in piece})
        own = set(needed[number * len(needed) // workers : (number + 1) * len(needed) // workers])
        sequences = {reader: self._sequence(reader) for reader in own}
        try:
            for _ in self._steps:
                taken = {
                    reader: [next(sequence) for _ in range(plan.given[reader])]
                    for reader, sequence in sequences.items()
                }
                for piece in self._pieces:
                    slots = [slot for slot in piece if plan.slots[slot][0] in own]
                    views = [
                        self._view(*taken[reader][which]) for reader, which in (plan.slots[slot] for slot in slots)
                    ]
                    kept = [slot for slot, view in zip(slots, views, strict=True) if view.pixels_CHW is not None]
                    yield kept, collate(views)
        finally:
            for sequence in sequences.values():
                sequence.close()

    def _sequence(self, reader: int) -> Any:
        """(block, index in it, pass) of one sample after the other."""
        with closing(self._plan.readers[reader].blocks(self._steps.start * self._plan.given[reader])) as blocks:
            for pass_number, first, block in blocks:
                for index in range(first, len(block)):
                    yield block, index, pass_number

    def _view(self, block: list[tuple[int, Sample]], index: int, pass_number: int) -> View:
        """An unreadable image is replaced by the next of its block."""
        unreadable: list[str] = []
        for offset in range(min(len(block), 100)):
            source, sample = block[(index + offset) % len(block)]
            try:
                image = decode(sample.encoded, sample.location)
            except UnreadableImage:
                unreadable.append(sample.location)
                continue
            key = f"{source}:{sample.name}"
            pixels = training_view(image, key, pass_number, self._data, self._seed)
            return View(pixels, NO_LABEL, key, unreadable)
        return View(None, NO_LABEL, "", unreadable)


def stream_batches(views: StreamViews, *, workers: int, pin_memory: bool) -> Generator[Batch]:
    """Micro-batches, joined from the pieces of all workers in the order of slots."""
    loader = DataLoader(
        views,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    pieces = iter(loader)
    try:
        while True:
            group = [piece for _, piece in zip(range(max(1, workers)), pieces, strict=False)]
            if not group:
                return
            batch = _join(group)
            yield batch.pin_memory() if pin_memory else batch
    finally:
        del pieces


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
