"""Loaders of image batches for training, evaluation, prediction, videos and calls from Python.

Every loader makes its batches through one `BatchLoader`, which handles workers, errors and pinned memory. A training
batch is a pure function of (seed, step): the global batch is drawn once for all ranks from (seed, epoch) and cut
contiguously, first over ranks, then over accumulation, so that every split gets the same images with the same
augmentation. A run can stop anywhere and resume at `start_step` (`batch_order.py`); there is no state to save.

Legend: B images of a micro-batch, C channels, H height, W width, G objects (padded to the largest number in the batch).
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
from ssld.stage2_detect.augment_config import AugmentConfig, StrongViewConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.batch_order import BatchOrder, MixedOrder, eval_batches, training_order
from ssld.stage2_detect.data.coco import CocoData, CocoImage
from ssld.stage2_detect.data.composites import Sources, TrainingImage, compose
from ssld.stage2_detect.data.orientation import fit_of, is_upright, misfit
from ssld.stage2_detect.data.padding import pad_images, pad_targets
from ssld.stage2_detect.data.sizing import MultiScaleBatch, Sizing
from ssld.stage2_detect.data.views import TrainingViews, View, ViewedImage, strong_view, view_matrix
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.mask_targets import ImageMasks

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Iterate over `make(request)` for each request, in order.

    Args:
        make: builds a batch; runs in a worker process if `workers` is above 0. Its `UserError` is raised in the calling process.
        requests: arguments of `make`. Requests, batches and `make` itself are pickled for the workers.
        workers: number of worker processes; 0: the calling process.

    Batches are in pinned memory if the process uses a CUDA device (`pins_memory`).
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
            generator=torch.Generator(),  # otherwise drawing the base seed would advance torch's global generator
        )

    def __iter__(self) -> Iterator[Batch]:
        for made in self._loader:
            if isinstance(made, _Error):
                raise UserError(made.line)
            yield made


class ImageLoader(Generic[Item]):
    """Iterate over (batch, its items): images resized by `sizing`; a `MultiScaleBatch` with test-time augmentation.

    Args:
        batches: the items of each batch. A sequence is distributed over the workers; an iterator, such as the frames of
            a video, is read in a thread, one batch ahead.
        load: reads an item's pixels, uint8 [3, H, W]; raises `UnreadableImage` or `UserError`.
        sizing: sizes of the images.
        workers: number of worker processes for a sequence; 0: the calling process.
        skip_unreadable: leave out images that cannot be decoded, and append them to `unreadable` with their batch.
            Otherwise such an image is a `UserError`.
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
        """Number of items, for a sequence of batches."""
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
    """Return this rank's evaluation batches; over all ranks every image occurs once.

    Batches do not depend on the number of ranks, since padding affects the features near a border; rank r gets batches
    r, r + ranks, ... An image that cannot be decoded is a `UserError`.
    """
    batches = [[data.images[index] for index in batch] for batch in eval_batches(data.images, batch_size)[rank::ranks]]
    return ImageLoader(batches, load_record, sizing, workers=workers)


class TrainBatch(NamedTuple):
    """One micro-batch of one rank."""

    images: ImageBatch
    targets: Targets
    records: list[CocoImage]
    unreadable: list[UnreadableImage]
    """files that could not be decoded and were replaced by the next image; the training loop records them"""
    weak: ImageBatch | None = None
    """under a moving teacher, the unlabeled images as the teacher sees them: the pixels of `images` before the strong changes of colors"""


class TrainLoader:
    """Iterate over this rank's micro-batches from `start_step` to `stop_step`, `accumulate` per step, in order.

    An image that cannot be decoded is replaced by the next one of the file and reported with the batch.

    Args:
        data: labeled training images.
        resize, augment: the whole augmentation, see `views.TrainingViews` and `composites.py`. The view number of an image is the epoch. With
            `large_scale_jitter` every batch is padded to the square of side `train_long_side`.
        batch_size, seed, rank, ranks, accumulate: see `batch_order.BatchOrder`.
        start_step, stop_step: range of optimizer steps.
        workers: number of worker processes; 0: the calling process.
        unlabeled: unlabeled images; the batches are then those of `batch_order.MixedOrder`. They have no targets.
        labeled_ratio: share of labeled images per batch, if there are unlabeled ones.
        pseudo: the unlabeled images have pseudo-labels, used as targets like those of labeled images.
        repeats: repeat factors of the labeled images; the view number is then the step.
        compose_steps: number of steps, from the start of the run, in which labeled images may be composed with each other
            (`composites.py`); None: all.
        strong: under a moving teacher, the changes of colors in the strong view of an unlabeled image; its weak view has none. The view number of
            unlabeled images is then the step. None: unlabeled images have one view.
        burn_in: number of steps, from the start of the run, whose batches have the labeled images alone.

    Raises:
        UserError: a batch does not fit the data or the ranks; while iterating: the size of an image differs from the file's.
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
        compose_steps: int | None = None,
        strong: StrongViewConfig | None = None,
        burn_in: int = 0,
    ) -> None:
        wide, more = ([record.width > record.height for record in records] for records in (data.images, unlabeled))
        options = {"batch_size": batch_size, "seed": seed, "ranks": ranks, "accumulate": accumulate}
        ratio = "moving_teacher.ratio" if strong else "labeled_ratio"
        self.order = training_order(wide, more, labeled_ratio, ratio=ratio, repeats=repeats, **options)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._records, self._labeled = [*data.images, *unlabeled], len(data.images)
        self._has_unlabeled = bool(unlabeled) and not pseudo
        steps = range(start_step, max(stop_step, start_step))
        fresh = self._labeled if strong else len(self._records)
        self._requests = _TrainSampler(self.order, rank, steps, fresh=fresh, labeled=self._labeled, burn_in=burn_in)
        make = _TrainImagesOf(self._records, self._labeled, TrainingViews(seed, resize, augment), compose_steps, strong)
        self._loader = BatchLoader(make, self._requests, workers)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[TrainBatch]:
        for made in self._loader:
            indices = [sources.index for sources in made.sources]
            flags = torch.tensor([index < self._labeled for index in indices])
            labeled_B = flags if self._has_unlabeled else None
            targets = replace(made.targets, labeled_B=labeled_B, masks=self._masks(made))
            yield TrainBatch(made.images, targets, [self._records[i] for i in indices], made.unreadable, made.weak)

    def _masks(self, made: "_TrainImages") -> tuple[ImageMasks, ...] | None:
        """Return the masks of a batch. They are looked up in this process by the kept positions, so workers need not pickle them."""
        if self._records[0].segmentations is None:
            return None
        return tuple(sources.masks(self._records) for sources in made.sources)


def load_record(record: CocoImage) -> Tensor:
    """Decode an image to uint8 [3, height, width] of the record's size: upright or as stored, as decided in `orientation.py`.

    Raises `UnreadableImage`, or `UserError` if neither form has that size.
    """

    def upright(header: ImageHeader) -> bool:
        fit = fit_of(header, record.width, record.height)
        if fit == "neither":
            message = misfit(record.path, header, record.width, record.height)
            raise UserError(f"{message} (id {record.image_id!r})")
        return is_upright(fit, record.convention)

    return decode_image(record.path, exif=upright)


def masks_of(record: CocoImage, view: View, kept_N: np.ndarray | None = None) -> ImageMasks:
    """Return the masks of an image's objects in a view; `kept_N` selects and orders them."""
    shapes = () if record.segmentations is None else record.segmentations
    picked = tuple(shapes[index] for index in (range(len(shapes)) if kept_N is None else kept_N)) if len(shapes) else ()
    return ImageMasks(picked, np.broadcast_to(view_matrix(view), (len(picked), 2, 3)))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Iterate over `items`, fetching the next one in a thread while the current one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class _Error(NamedTuple):
    """A `UserError` as a value, since a `DataLoader` would wrap a raised one in a traceback."""

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
    """A batch, the positions of its decoded images, and the unreadable ones."""

    batch: ImageBatch | MultiScaleBatch | None
    positions: list[int]
    unreadable: list[UnreadableImage]


@dataclass(frozen=True)
class _ImagesOf:
    """Make a batch from its items."""

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
    """Make batch `index`, so that a number is pickled for the worker instead of the records."""

    make: _ImagesOf
    batches: Sequence[Sequence[Any]]

    def __call__(self, index: int) -> _Images:
        return self.make(self.batches[index])


class _Request(NamedTuple):
    image: int
    view: int
    step: int


class _TrainSampler(Sampler[list[_Request]]):
    """Requests of the images of each micro-batch; images from `fresh` on have another view in every step, and those from `labeled` on are left out
    in the first `burn_in` steps."""

    def __init__(
        self, order: BatchOrder | MixedOrder, rank: int, steps: range, *, fresh: int, labeled: int, burn_in: int
    ) -> None:
        self.order, self.rank, self.steps = order, rank, steps
        self.fresh, self.labeled, self.burn_in = fresh, labeled, burn_in

    def __len__(self) -> int:
        return len(self.steps) * self.order.accumulate

    def __iter__(self) -> Iterator[list[_Request]]:
        for step in self.steps:
            # With repeat factors an image occurs several times per epoch; the epoch as view number would repeat its view.
            view = step // self.order.steps_per_epoch if self.order.repeats is None else step
            for part in range(self.order.accumulate):
                images = self.order.micro_batch(step, self.rank, part)
                yield [
                    _Request(index, step if index >= self.fresh else view, step)
                    for index in images
                    if index < self.labeled or step >= self.burn_in
                ]


class _TrainImages(NamedTuple):
    """Micro-batch as a worker makes it; records are looked up by `sources` in the calling process."""

    images: ImageBatch
    targets: Targets
    sources: list[Sources]
    unreadable: list[UnreadableImage]
    weak: ImageBatch | None


class _TrainImagesOf:
    """Make a micro-batch from its requests."""

    def __init__(
        self,
        records: list[CocoImage],
        labeled: int,
        views: TrainingViews,
        compose_steps: int | None,
        strong: StrongViewConfig | None,
    ) -> None:
        self.records, self.labeled, self.compose_steps, self.strong = records, labeled, compose_steps, strong
        augment = views.augment
        auto = augment.auto_augment if augment.auto_augment_unlabeled is None else augment.auto_augment_unlabeled
        self.views = views
        # Of a moving teacher's images the weak view is made first, without any change of colors.
        without = dict.fromkeys(StrongViewConfig.model_fields, 0.0) if strong else {}
        self.unlabeled_views = replace(views, augment=augment.model_copy(update={"auto_augment": auto, **without}))
        self.least_side = views.resize.train_long_side if augment.large_scale_jitter else 1

    def __call__(self, requests: list[_Request]) -> _TrainImages:
        unreadable: list[UnreadableImage] = []
        made = [self._image(request, unreadable) for request in requests]
        weak: list[TrainingImage] = []
        if self.strong:
            places = [place for place, request in enumerate(requests) if request.image >= self.labeled]
            weak = [made[place] for place in places]
            for place in places:
                made[place] = self._strong(made[place], requests[place].view, self.strong)
        sources = [one.sources for one in made]
        ids = [self.records[one.index].image_id for one in sources]
        seeds = [stable_seed(self.views.seed, request.step, one) for request, one in zip(requests, ids, strict=True)]
        images = pad_images([one.pixels_CHW for one in made], [one.scale for one in made], least_side=self.least_side)
        # Padded alike, so that the cells of both views' feature maps correspond.
        canvas = (images.pixels_BCHW.shape[2], images.pixels_BCHW.shape[3])
        return _TrainImages(
            images,
            pad_targets([(one.boxes_M4, one.sources.labels(self.records)) for one in made], seeds),
            sources,
            unreadable,
            pad_images([one.pixels_CHW for one in weak], [one.scale for one in weak], canvas=canvas) if weak else None,
        )

    def _strong(self, weak: TrainingImage, number: int, strong: StrongViewConfig) -> TrainingImage:
        """Return the strong view of an unlabeled image from its weak one."""
        image_id = self.records[weak.sources.index].image_id
        pixels = strong_view(weak.pixels_CHW, strong, seed=self.views.seed, image_id=image_id, number=number)
        return weak._replace(pixels_CHW=pixels)

    def _image(self, request: _Request, unreadable: list[UnreadableImage]) -> TrainingImage:
        """Return the requested image, or the next decodable one of its part (labeled or unlabeled), composed with others as drawn."""
        labeled = request.image < self.labeled

        def view_of(index: int, zoom: float) -> tuple[int, ViewedImage]:
            return self._view(index, request.view, zoom, unreadable)

        return compose(
            request.image,
            view_of,
            self.labeled,
            seed=self.views.seed,
            number=request.view,
            record_of=self.records.__getitem__,
            augment=self.views.augment if labeled else self.unlabeled_views.augment,
            compositions=labeled and (self.compose_steps is None or request.step < self.compose_steps),
        )

    def _view(
        self, wanted: int, number: int, zoom: float, unreadable: list[UnreadableImage]
    ) -> tuple[int, ViewedImage]:
        """Return (index, view) of an image, or of the next decodable one of its part (labeled or unlabeled)."""
        labeled = wanted < self.labeled
        part = range(self.labeled) if labeled else range(self.labeled, len(self.records))
        views = self.views if labeled else self.unlabeled_views
        failed: list[UnreadableImage] = []
        for offset in range(len(part)):
            index = part[(wanted - part[0] + offset) % len(part)]
            record = self.records[index]
            try:
                image = load_record(record)
            except UnreadableImage as error:
                failed.append(UnreadableImage(error.name, error.reason))
                continue
            unreadable += failed
            return index, views.of(image, record.boxes_N4, image_id=record.image_id, number=number, zoom=zoom)
        first = failed[0]
        raise UserError(f"none of the {len(part)} training images can be read; the first: {first.name}, {first.reason}")
