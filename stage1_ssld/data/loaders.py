"""Batches of stage 1 from image sources.

Batches are a pure function of (seed, step, rank), views of (seed, image key, pass), so checkpoints hold no state of the loaders.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ssld.shared.distributed.processes import start_worker
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, require_decoder, stable_seed
from ssld.shared.tally import Tally
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch, View, collate
from ssld.stage1_ssld.data.soft_labels import StoredSoftLabels
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data.streams import StreamPlan, StreamViews, shares, stream_batches
from ssld.stage1_ssld.data.views import augmentation, training_view, val_view
from ssld.stage1_ssld.data_config import DataConfig

Labels = Sequence[int] | None


class TrainViews(Dataset[View]):
    """(index over all sources, pass) -> View.

    An unreadable image is replaced by the next one; the view has no pixels if 100 images in a row are unreadable. With a store, the view is the one
    that the stored soft label belongs to.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        labels: Sequence[Labels],
        config: DataConfig,
        seed: int,
        store: StoredSoftLabels | None = None,
    ) -> None:
        self.sources, self.labels, self.config, self.seed, self.store = sources, labels, config, seed, store
        self._ends = torch.tensor([len(source) for source in sources]).cumsum(0).tolist()
        if config.augment is not None:
            augmentation(config.augment, config.image_size, config.interpolation)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: tuple[int, int]) -> View:
        index, view = item
        unreadable: list[str] = []
        while len(unreadable) < min(len(self), 100):
            number = next(n for n, end in enumerate(self._ends) if index < end)
            source, row = self.sources[number], index - (self._ends[number] - len(self.sources[number]))
            try:
                return self._view(source, row, view, self.labels[number], unreadable)
            except UnreadableImage:
                unreadable.append(source.location(row))
                index = (index + 1) % len(self)
        # The training loop raises the error: one raised in a worker would print the worker's traceback.
        return View(None, NO_LABEL, "", unreadable)

    def _view(self, source: ImageSource, row: int, view: int, labels: Labels, unreadable: list[str]) -> View:
        key, label, seed, soft = source.key(row), NO_LABEL if labels is None else labels[row], self.seed, None
        if self.store:
            view, seed = view % self.store.views, self.store.seed
            soft = self.store.record(source.number, row, view)
        pixels = training_view(source.open(row, self.config.decoder), key, view, self.config, seed)
        return View(pixels, label, key, unreadable, soft)


class ValViews(Dataset[View]):
    """Row of a source -> View with the evaluation view; without pixels for an unreadable image."""

    def __init__(
        self, source: ImageSource, labels: Labels, *, image_size: int, val_crop: float, interpolation: str = "bilinear"
    ) -> None:
        self.source, self.labels = source, labels
        self.image_size, self.val_crop, self.interpolation = image_size, val_crop, interpolation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> View:
        label = NO_LABEL if self.labels is None else self.labels[row]
        try:
            image = self.source.read(row)
        except UnreadableImage:
            return View(None, label, self.source.key(row), [self.source.location(row)])
        pixels = val_view(image, image_size=self.image_size, val_crop=self.val_crop, interpolation=self.interpolation)
        return View(pixels, label, self.source.key(row), [])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, pass) of one rank, from `start_step` to `steps`.

    Sample n of the run is place n % N in the permutation of pass n // N. A step uses the next `batch_size` samples; ranks and accumulation split them
    into contiguous parts, so that a global batch holds the same images for any number of ranks and passes.

    Args:
        images: number N of images, or the size of each source. With `weights`, source i gets its share of the N places of every pass and iterates
            over its own images in its own permutations and passes.
    """

    def __init__(
        self,
        images: int | Sequence[int],
        *,
        batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        rank: int,
        ranks: int,
        accumulate: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        check_batch(batch_size, ranks, accumulate)
        self.sizes = [images] if isinstance(images, int) else list(images)
        self.images = sum(self.sizes)
        self.batch_size, self.steps, self.start_step = batch_size, steps, start_step
        self.seed, self.rank, self.ranks, self.accumulate = seed, rank, ranks, accumulate
        self.quotas = shares(weights, self.images) if weights else None
        if self.quotas and 0 in self.quotas:
            raise UserError(
                f"data.train.{self.quotas.index(0)}.weight: too small: less than one image per pass of {self.images}; raise it"
            )

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.ranks * self.accumulate)
        epoch, places = -1, np.empty((0, 2), np.int64)
        for step in range(self.start_step, self.steps):
            for micro in range(self.accumulate):
                first = step * self.batch_size + (self.rank * self.accumulate + micro) * size
                batch = []
                for number in range(first, first + size):
                    if number // self.images != epoch:
                        epoch = number // self.images
                        places = self._places(epoch)
                    index, view = places[number % self.images]
                    batch.append((int(index), int(view)))
                yield batch

    def _places(self, epoch: int) -> np.ndarray:
        """(index, pass) of every place in a pass over all sources: [N,2]."""
        order = _permutation(self.images, stable_seed(self.seed, epoch))
        if self.quotas is None:
            return np.stack([order, np.full_like(order, epoch)], axis=1)
        items, first = [], 0
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            numbers = np.arange(epoch * quota, (epoch + 1) * quota)
            rows = np.empty_like(numbers)
            for own_pass in np.unique(numbers // size):
                mask = numbers // size == own_pass
                rows[mask] = _permutation(size, stable_seed(self.seed, source, int(own_pass)))[numbers[mask] % size]
            items.append(np.stack([first + rows, numbers // size], axis=1))
            first += size
        places: np.ndarray = np.concatenate(items)[order]
        return places


def _permutation(count: int, seed: int) -> np.ndarray:
    order: np.ndarray = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def check_batch(batch_size: int, ranks: int, accumulate: int) -> None:
    """Raise UserError if a global batch cannot be split evenly over processes and passes."""
    if batch_size % (ranks * accumulate):
        raise UserError(f"batch_size: {batch_size} is not a multiple of {ranks} processes x accumulate {accumulate}")


def described(
    sources: Sequence[ImageSource], plan: StreamPlan | None, val: ImageSource | None
) -> Iterator[tuple[str, str, Tally]]:
    """(setting, path, tally) of each source of a run, for its log and result."""
    for number, source in enumerate(sources):
        yield f"data.train.{number}", source.path, source.tally
    for number, (path, tally) in enumerate(plan.tallies if plan else []):
        yield f"data.train.{number}", path, tally
    if val:
        yield "data.val", val.path, val.tally


class TrainingData:
    """Training images of a run, by rows or, with a plan, streamed.

    Attributes:
        images: images per pass; None for a stream of unknown length.
    """

    def __init__(
        self,
        config: DistillConfig | TeachConfig,
        sources: Sequence[ImageSource],
        labels: Sequence[Labels],
        store: StoredSoftLabels | None = None,
        plan: StreamPlan | None = None,
    ) -> None:
        self._config, self._sources, self._plan = config, sources, plan
        data = config.data
        require_decoder(data.decoder, "data.decoder")
        self._views = None if plan else TrainViews(sources, labels, data, config.seed, store)
        if data.augment is not None:
            augmentation(data.augment, data.image_size, data.interpolation)
        self.images = len(self._views) if self._views is not None else plan.images if plan else None

    def batches(self, start_step: int, steps: int, *, rank: int, ranks: int, pin_memory: bool) -> Generator[Batch]:
        """Micro-batches of one rank from `start_step` on. Close the generator to end its loader processes and close its files."""
        config = self._config
        check_batch(config.batch_size, ranks, config.accumulate)
        if self._plan is not None:
            views = StreamViews(
                self._plan,
                config.data,
                seed=config.seed,
                steps=range(start_step, steps),
                rank=rank,
                ranks=ranks,
                accumulate=config.accumulate,
            )
            return stream_batches(views, workers=config.workers, pin_memory=pin_memory)
        weights = [source.config.weight for source in self._sources if source.config.weight is not None]
        order = StepSampler(
            [len(source) for source in self._sources],
            batch_size=config.batch_size,
            steps=steps,
            start_step=start_step,
            seed=config.seed,
            rank=rank,
            ranks=ranks,
            accumulate=config.accumulate,
            weights=weights or None,
        )
        assert self._views is not None
        return _of_loader(make_loader(self._views, order, workers=config.workers, pin_memory=pin_memory))


def _of_loader(loader: DataLoader[Any]) -> Generator[Batch]:
    yield from loader


def make_loader(dataset: Dataset[Any], batches: Any, *, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Make a data loader over lists of items, which `workers` processes decode; 0 decodes in this process."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: the loader's base seed would otherwise advance torch's global generator
    )


def val_batches(rows: Sequence[int], batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Split `rows` into batches and assign them to the ranks in turn; the batches do not depend on the number of ranks."""
    starts = range(rank * batch_size, len(rows), batch_size * ranks)
    return [list(rows[start : start + batch_size]) for start in starts]
