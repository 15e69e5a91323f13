"""Images on their way into a detector: in training, evaluation, prediction, on videos and in a call from Python.

Every loader makes its batches through one `BatchLoader`: workers, errors and pinned memory are its job. A training
batch is a pure function of (seed, step), split over ranks and micro-batches: the global batch is drawn once for all
ranks from (seed, epoch) and cut contiguously, first over ranks, then over accumulation, so that any split sees the same
images under the same augmentation; a run may stop anywhere and start again at `start_step` (`batch_order.py`).
Deliberately absent: any state to save.

Legend: B images of a micro-batch, C channels, H height, W width, G objects (padded to the batch's most).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssld.shared.distributed.processes import pins_memory, start_worker
from ssld.shared.errors import UserError
from ssld.shared.images import ImageHeader, UnreadableImage, decode_image, stable_seed
from ssld.stage2_detect.config import AugmentConfig, ResizeConfig
from ssld.stage2_detect.data.batch_order import BatchOrder, MixedOrder, eval_batches, training_order
from ssld.stage2_detect.data.coco import CocoData, CocoImage
from ssld.stage2_detect.data.orientation import fit_of, is_upright, misfit
from ssld.stage2_detect.data.padding import pad_images, pad_targets
from ssld.stage2_detect.data.sizing import MultiScaleBatch, Sizing
from ssld.stage2_detect.data.views import SeenImage, TrainingViews, View
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.mask_targets import ImageMasks

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Iterates over what `make` makes of each of `requests`, in their order: in `workers` processes, or in the calling one if there are none.

    A `UserError` of `make` is raised in the calling process, as one line. Requests, what is made, and `make` itself
    cross the process border; what is made lies in pinned memory where there is a GPU.
    """

    def __init__(self, make: Callable[[Any], Batch], requests: Iterable[Any], workers: int = 0) -> None:
        self._loader = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=requests,
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pins_memory(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own: the base seed would otherwise advance torch's global generator
        )

    def __iter__(self) -> Iterator[Batch]:
        for made in self._loader:
            if isinstance(made, _Error):
                raise UserError(made.line)
            yield made


class ImageLoader(Generic[Item]):
    """Iterates over (batch, its items): images in the sizes of `sizing`, a `MultiScaleBatch` with test-time augmentation.

    Args:
        batches: the items of each batch. A sequence is shared out to the workers; what comes one after the other, as
            frames of a video do, is made in a thread, one batch ahead of its use.
        load: an item's pixels, uint8 [3, H, W]; raises `UnreadableImage` or `UserError`.
        workers: processes, for a sequence; 0 decodes in the calling one.
        skip_unreadable: leave out images that cannot be decoded, and note them in `unreadable` when their batch has
            come. Otherwise one is a `UserError`.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Item]] | Iterator[Sequence[Item]],
        load: Callable[[Item], Tensor],
        sizing: Sizing,
        *,
        workers: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        self.sizing = sizing
        self.unreadable: list[UnreadableImage] = []
        self._batches = batches
        self._make = _ImagesOf(load, sizing, skip_unreadable)
        self._workers = workers

    @property
    def images(self) -> int:
        """How many items there are, of a sequence of batches."""
        assert isinstance(self._batches, Sequence)
        return sum(len(batch) for batch in self._batches)

    def __iter__(self) -> Iterator[tuple[ImageBatch | MultiScaleBatch, list[Item]]]:
        for made, items in self._made():
            self.unreadable += made.unreadable
            if made.batch is not None:
                yield made.batch, [items[position] for position in made.positions]

    def _made(self) -> "Iterator[tuple[_Images, Sequence[Item]]]":
        if isinstance(self._batches, Sequence):
            batches = self._batches
            workers = self._workers if len(batches) > 1 else 0
            loader = BatchLoader(_Indexed(self._make, batches), range(len(batches)), workers)
            return zip(loader, batches, strict=True)
        requests, items = itertools.tee(self._batches)
        return ahead(zip(BatchLoader(self._make, requests), items, strict=True))


def eval_loader(
    data: CocoData,
    sizing: Sizing,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> ImageLoader[CocoImage]:
    """This rank's batches of an evaluation; every image of the data comes once over all ranks.

    Batches are the same whatever the number of ranks, since padding touches the features near a border; rank r takes
    batches r, r + ranks, ... An image that cannot be decoded is a `UserError`.
    """
    batches = [[data.images[index] for index in batch] for batch in eval_batches(data.images, batch_size)[rank::ranks]]
    return ImageLoader(batches, load_record, sizing, workers=workers)


class TrainBatch(NamedTuple):
    """One micro-batch of one rank."""

    images: ImageBatch
    targets: Targets
    records: list[CocoImage]
    unreadable: list[UnreadableImage]
    """files that could not be decoded and were replaced by the next image; the training loop counts and lists them"""


class TrainLoader:
    """Iterates over this rank's micro-batches from `start_step` to `stop_step`: `accumulate` of them a step, in order.

    `resize` and `augment` are the whole augmentation (see `views.TrainingViews`); an image's view number is the epoch.
    With `large_scale_jitter` every batch is padded to the square of side `train_long_side`. With `repeats`, images are
    shown more or less often (`batch_order.BatchOrder`), and the view number is the step. With `unlabeled` images the
    batches are those of `MixedOrder`; they have no targets, unless `pseudo`: then their boxes count as those of the
    others. `workers=0` decodes in the calling process. An image that cannot be decoded is replaced by the next of the
    file and reported with the batch; an image whose size differs from the file's raises `UserError`.
    """

    def __init__(
        self,
        data: CocoData,
        resize: ResizeConfig,
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        unlabeled: Sequence[CocoImage] = (),
        labeled_ratio: float = 0.5,
        pseudo: bool = False,
        repeats: np.ndarray | None = None,
    ) -> None:
        wide, more = ([record.width > record.height for record in records] for records in (data.images, unlabeled))
        options = {"batch_size": batch_size, "seed": seed, "ranks": ranks, "accumulate": accumulate}
        self.order = training_order(wide, more, labeled_ratio, repeats=repeats, **options)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._records, self._labeled = [*data.images, *unlabeled], len(data.images)
        self._has_unlabeled = bool(unlabeled) and not pseudo
        self._requests = _TrainSampler(self.order, rank, range(start_step, max(stop_step, start_step)))
        make = _TrainImagesOf(self._records, self._labeled, TrainingViews(seed, resize, augment))
        self._loader = BatchLoader(make, self._requests, workers)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[TrainBatch]:
        for made in self._loader:
            flags = torch.tensor([index < self._labeled for index in made.indices])
            labeled_B = flags if self._has_unlabeled else None
            targets = replace(made.targets, labeled_B=labeled_B, masks=self._masks(made))
            yield TrainBatch(made.images, targets, [self._records[i] for i in made.indices], made.unreadable)

    def _masks(self, made: "_TrainImages") -> tuple[ImageMasks, ...] | None:
        """Shapes never cross the process border: they are looked up here, by what a worker kept."""
        if self._records[0].segmentations is None:
            return None
        parts = zip(made.indices, made.views, made.kept, strict=True)
        return tuple(masks_of(self._records[index], view, kept) for index, view, kept in parts)


def load_record(record: CocoImage) -> Tensor:
    """uint8 [3, height, width] in the size of the record: upright or as stored, as `orientation.py` decides.

    Raises `UnreadableImage`, or `UserError` where neither has that size.
    """

    def upright(header: ImageHeader) -> bool:
        fit = fit_of(header, record.width, record.height)
        if fit == "neither":
            said = misfit(record.path, header, record.width, record.height)
            raise UserError(f"{said} (id {record.image_id!r})")
        return is_upright(fit, record.convention)

    return decode_image(record.path, exif=upright)


def masks_of(record: CocoImage, view: View, kept_N: np.ndarray | None = None) -> ImageMasks:
    """Shapes of an image's objects where a view shows them; `kept_N` picks and orders them."""
    shapes = () if record.segmentations is None else record.segmentations
    picked = tuple(shapes[index] for index in (range(len(shapes)) if kept_N is None else kept_N)) if len(shapes) else ()
    mirror = view.width if view.flip else None
    return ImageMasks(picked, record.height, record.width, view.scale, left=view.left, top=view.top, mirror=mirror)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each is made in a thread while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class _Error(NamedTuple):
    """A `UserError` as a value: a `DataLoader` would wrap a raised one in a traceback."""

    line: str


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.make(request)
        except UserError as error:
            return _Error(str(error))


def _unchanged(made: Any) -> Any:
    return made


class _Images(NamedTuple):
    """A batch, the positions of the images in it that could be decoded, and those that could not."""

    batch: ImageBatch | MultiScaleBatch | None
    positions: list[int]
    unreadable: list[UnreadableImage]


@dataclass(frozen=True)
class _ImagesOf:
    """Makes a batch of its items."""

    load: Callable[[Any], Tensor]
    sizing: Sizing
    skip_unreadable: bool

    def __call__(self, items: Sequence[Any]) -> _Images:
        images, positions, unreadable = [], [], []
        for position, item in enumerate(items):
            try:
                images.append(self.load(item))
                positions.append(position)
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise UserError(str(error)) from None
                unreadable.append(UnreadableImage(error.name, error.reason))
        return _Images(self.sizing.batch(images) if images else None, positions, unreadable)


@dataclass(frozen=True)
class _Indexed:
    """Makes batch `index`, so that a number crosses the process border instead of records."""

    make: _ImagesOf
    batches: Sequence[Sequence[Any]]

    def __call__(self, index: int) -> _Images:
        return self.make(self.batches[index])


class _Request(NamedTuple):
    image: int
    view: int
    step: int


class _TrainSampler(Sampler[list[_Request]]):
    def __init__(self, order: BatchOrder | MixedOrder, rank: int, steps: range) -> None:
        self.order, self.rank, self.steps = order, rank, steps

    def __len__(self) -> int:
        return len(self.steps) * self.order.accumulate

    def __iter__(self) -> Iterator[list[_Request]]:
        for step in self.steps:
            # With repeat factors an epoch holds an image several times: its number would show the same view again.
            view = step // self.order.steps_per_epoch if self.order.repeats is None else step
            for part in range(self.order.accumulate):
                yield [_Request(index, view, step) for index in self.order.micro_batch(step, self.rank, part)]


class _TrainImages(NamedTuple):
    """What a worker makes of a micro-batch; the rest is looked up by `indices`."""

    images: ImageBatch
    targets: Targets
    indices: list[int]
    views: list[View]
    kept: list[np.ndarray]
    unreadable: list[UnreadableImage]


class _TrainImagesOf:
    """Makes a micro-batch of its requests."""

    def __init__(self, records: list[CocoImage], labeled: int, views: TrainingViews) -> None:
        self.records, self.labeled = records, labeled
        augment = views.augment
        strong = augment.auto_augment if augment.auto_augment_unlabeled is None else augment.auto_augment_unlabeled
        self.views = views
        self.unlabeled_views = replace(views, augment=augment.model_copy(update={"auto_augment": strong}))
        self.least_side = views.resize.train_long_side if augment.large_scale_jitter else 1

    def __call__(self, requests: list[_Request]) -> _TrainImages:
        unreadable: list[UnreadableImage] = []
        indices, seen = zip(*(self._seen(request, unreadable) for request in requests), strict=True)
        objects = [
            (one.boxes_M4, self.records[index].labels_N[one.kept_M]) for index, one in zip(indices, seen, strict=True)
        ]
        ids = [self.records[index].image_id for index in indices]
        seeds = [stable_seed(self.views.seed, request.step, one) for request, one in zip(requests, ids, strict=True)]
        return _TrainImages(
            pad_images([one.pixels_CHW for one in seen], [one.view.scale for one in seen], least_side=self.least_side),
            pad_targets(objects, seeds),
            list(indices),
            [one.view for one in seen],
            [one.kept_M for one in seen],
            unreadable,
        )

    def _seen(self, request: _Request, unreadable: list[UnreadableImage]) -> tuple[int, SeenImage]:
        """(index, view) of the image that was asked for, or of the next of its part, labeled or not, that can be decoded."""
        labeled = request.image < self.labeled
        part = range(self.labeled) if labeled else range(self.labeled, len(self.records))
        views = self.views if labeled else self.unlabeled_views
        failed: list[UnreadableImage] = []
        for offset in range(len(part)):
            index = part[(request.image - part[0] + offset) % len(part)]
            record = self.records[index]
            try:
                image = load_record(record)
            except UnreadableImage as error:
                failed.append(UnreadableImage(error.name, error.reason))
                continue
            unreadable += failed
            return index, views.of(image, record.boxes_N4, image_id=record.image_id, number=request.view)
        first = failed[0]
        raise UserError(f"none of the {len(part)} training images can be read; the first: {first.name}, {first.reason}")
