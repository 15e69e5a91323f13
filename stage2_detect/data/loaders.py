"""Detection batches: what the network sees at a step is a pure function of (seed, step), split over ranks and
micro-batches.

The global batch is the knob. It is drawn once for all ranks from (seed, epoch) and cut contiguously, first over ranks,
then over accumulation, so that any split sees the same images under the same augmentation; a run may stop anywhere and
start again at `start_step` (`batch_order.py`). Deliberately absent: any state to save.

Legend: B images of a micro-batch, C channels, H height, W width, G objects (padded to the batch's most).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssld.shared.distributed.processes import start_worker
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, decode_image, stable_seed
from ssld.stage2_detect.data.batch_order import BatchOrder, eval_batches
from ssld.stage2_detect.data.coco import CocoData, CocoImage
from ssld.stage2_detect.data.unlabeled import MixedOrder, training_order
from ssld.stage2_detect.data.views import TrainingViews, View, fit_view, view_image
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.mask_targets import ImageMasks

PAD_MULTIPLE = 32


class TrainBatch(NamedTuple):
    """One micro-batch of one rank."""

    images: ImageBatch
    targets: Targets
    records: list[CocoImage]
    unreadable: list[UnreadableImage]
    """files that could not be decoded and were replaced by the next image; the training loop counts and lists them"""


class TrainLoader:
    """Iterates over this rank's micro-batches from `start_step` to `stop_step`: `accumulate` of them a step, in order.

    `short_sides`, `max_long`, `flip`, `interpolation`, `kernel`, `auto_augment` and `jitter` are the whole augmentation
    (see `augment.TrainingViews`); an image's view number is the epoch. With `jitter` every batch is padded to the square
    of side `max_long`. With `repeats`, images are shown more or less often (`batch_order.BatchOrder`), and the view
    number is the step. With `unlabelled` pictures the batches are those of `MixedOrder`; they have no targets, unless
    `pseudo`: then their boxes count as those of the others. `auto_augment_unlabelled` is for them, None as for the
    others. `workers=0` decodes in the calling process. An image that cannot be decoded is replaced by the next of the
    file and reported with the batch; a picture whose size differs from the file's raises `UserError`.
    """

    def __init__(
        self,
        data: CocoData,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        short_sides: Sequence[int],
        max_long: int,
        flip: float = 0.5,
        interpolation: str = "bicubic",
        kernel: str = "reference",
        auto_augment: bool = False,
        jitter: tuple[float, float] | None = None,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        unlabelled: Sequence[CocoImage] = (),
        labeled_ratio: float = 0.5,
        pseudo: bool = False,
        auto_augment_unlabelled: bool | None = None,
        repeats: np.ndarray | None = None,
    ) -> None:
        wide, more = ([record.width > record.height for record in records] for records in (data.images, unlabelled))
        options = {"batch_size": batch_size, "seed": seed, "ranks": ranks, "accumulate": accumulate}
        self.order = training_order(wide, more, labeled_ratio, repeats=repeats, **options)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._records, self._labelled = [*data.images, *unlabelled], len(data.images)
        self._has_unlabelled = bool(unlabelled) and not pseudo
        views = TrainingViews(
            seed, tuple(short_sides), max_long, flip, interpolation, kernel, auto_augment=auto_augment, jitter=jitter
        )
        strong = auto_augment if auto_augment_unlabelled is None else auto_augment_unlabelled
        samples = _TrainSamples(self._records, self._labelled, views, replace(views, auto_augment=strong))
        steps = range(start_step, max(stop_step, start_step))
        collate = partial(_collate_training, least=max_long if jitter else 1)
        self._loader = _data_loader(samples, _TrainSampler(self.order, rank, steps), collate, workers)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[TrainBatch]:
        for batch in self._loader:
            _raise_error(batch)
            flags = torch.tensor([index < self._labelled for index in batch["indices"]])
            labelled_B = flags if self._has_unlabelled else None
            masks = self._masks(batch)
            targets = Targets(batch["boxes"], batch["labels"], batch["seeds"], labelled_B=labelled_B, masks=masks)
            unreadable = [UnreadableImage(*parts) for parts in batch["unreadable"]]
            yield TrainBatch(_image_batch(batch), targets, [self._records[i] for i in batch["indices"]], unreadable)

    def _masks(self, batch: dict[str, Any]) -> tuple[ImageMasks, ...] | None:
        """Shapes never cross the process border: they are looked up here, by what a worker kept."""
        if self._records[0].segmentations is None:
            return None
        parts = zip(batch["indices"], batch["views"], batch["kept"], strict=True)
        return tuple(masks_of(self._records[index], view, kept) for index, view, kept in parts)


class EvalLoader:
    """Iterates over this rank's (ImageBatch, records); every image of the data comes once over all ranks.

    Batches are the same whatever the number of ranks, since padding touches the features near a border; rank r takes
    batches r, r + ranks, ... An image that cannot be decoded is a `UserError`, or with `skip_unreadable` left out and
    noted in `unreadable` when its batch has come.
    """

    def __init__(
        self,
        data: CocoData,
        *,
        batch_size: int,
        short_side: int,
        max_long: int,
        interpolation: str = "bicubic",
        kernel: str = "reference",
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        self._records = data.images
        self.unreadable: list[UnreadableImage] = []
        batches = eval_batches(data.images, batch_size)[rank::ranks]
        self.images = sum(len(batch) for batch in batches)
        samples = _EvalSamples(data.images, short_side, max_long, interpolation, kernel, skip_unreadable)
        self._loader = _data_loader(samples, batches, _collate_images, workers)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[CocoImage]]]:
        for batch in self._loader:
            _raise_error(batch)
            self.unreadable += [UnreadableImage(*parts) for parts in batch["unreadable"]]
            if not batch["indices"]:
                continue
            records = [self._records[index] for index in batch["indices"]]
            originals_B2 = torch.tensor([(record.height, record.width) for record in records])
            yield replace(_image_batch(batch), originals_B2=originals_B2), records


def load_record(record: CocoImage) -> Tensor:
    """uint8 [3, height, width] in the size the JSON gives.

    Boxes are drawn on the stored or on the upright picture, depending on the tool: EXIF rotation is applied only if it
    makes the size fit. Raises `UnreadableImage`, or `UserError` when neither fits.
    """
    expected = (record.height, record.width)
    for exif in (False, True):
        image = decode_image(record.path, exif=exif)
        if image.shape[1:] == expected:
            return image
    raise UserError(
        f"image {record.path} is {image.shape[2]}x{image.shape[1]}, "
        f"but its JSON entry (id {record.image_id!r}) says {record.width}x{record.height}"
    )


def masks_of(record: CocoImage, view: Mapping[str, Any], kept_N: np.ndarray | None = None) -> ImageMasks:
    """Shapes of an image's objects where a view (the fields of `augment.View`) shows them; `kept_N` picks and orders them."""
    shapes = () if record.segmentations is None else record.segmentations
    picked = tuple(shapes[index] for index in (range(len(shapes)) if kept_N is None else kept_N)) if len(shapes) else ()
    mirror = view["width"] if view["flip"] else None
    return ImageMasks(
        picked, record.height, record.width, view["scale"], left=view["left"], top=view["top"], mirror=mirror
    )


class _Request(NamedTuple):
    position: int
    view: int
    step: int


class _Sample(NamedTuple):
    """What a worker makes of one request; errors are values, since a `DataLoader` would wrap a raised one in a
    traceback."""

    position: int
    image_CHW: Tensor | None = None
    view: View | None = None
    boxes_N4: np.ndarray | None = None
    labels_N: np.ndarray | None = None
    kept_N: np.ndarray | None = None
    seed: int = 0
    unreadable: tuple[tuple[str, str], ...] = ()
    error: str = ""


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


class _TrainSamples(Dataset[_Sample]):
    def __init__(
        self, records: list[CocoImage], labelled: int, views: TrainingViews, unlabelled_views: TrainingViews
    ) -> None:
        self.records, self.labelled, self.views, self.unlabelled_views = records, labelled, views, unlabelled_views

    def __getitem__(self, request: _Request) -> _Sample:
        unreadable: list[tuple[str, str]] = []
        # The next image of the same part, labelled or not.
        labelled = request.position < self.labelled
        part = range(self.labelled) if labelled else range(self.labelled, len(self.records))
        views = self.views if labelled else self.unlabelled_views
        for offset in range(len(part)):
            index = part[(request.position - part[0] + offset) % len(part)]
            record = self.records[index]
            try:
                image = load_record(record)
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
                continue
            except UserError as error:
                return _Sample(index, error=str(error))
            seen = views.of(image, record.boxes_N4, image_id=record.image_id, number=request.view)
            labels = record.labels_N[seen.kept_M]
            seed = stable_seed(views.seed, request.step, record.image_id)
            parts = (seen.pixels_CHW, seen.view, seen.boxes_M4, labels, seen.kept_M)
            return _Sample(index, *parts, seed, tuple(unreadable))
        return _Sample(
            request.position,
            error=f"none of the {len(part)} training images can be read; the first: {': '.join(unreadable[0])}",
        )


class _EvalSamples(Dataset[_Sample]):
    def __init__(
        self, records: list[CocoImage], short_side: int, max_long: int, interpolation: str, kernel: str, skip: bool
    ) -> None:
        self.records, self.short_side, self.max_long = records, short_side, max_long
        self.interpolation, self.kernel, self.skip = interpolation, kernel, skip

    def __getitem__(self, index: int) -> _Sample:
        record = self.records[index]
        try:
            image = load_record(record)
        except UnreadableImage as error:
            if self.skip:
                return _Sample(index, unreadable=((error.name, error.reason),))
            return _Sample(index, error=str(error))
        except UserError as error:
            return _Sample(index, error=str(error))
        view = fit_view(record.height, record.width, short_side=self.short_side, max_long=self.max_long)
        return _Sample(index, view_image(image, view, self.interpolation, self.kernel), view)


def _collate_images(samples: list[_Sample], least: int = 1) -> dict[str, Any]:
    """Plain tensors and lists: what crosses the process border can be pinned and stays small. Sides of the batch are
    `least` at least. Samples without an image are left out."""
    for sample in samples:
        if sample.error:
            return {"error": sample.error}
    unreadable = [list(parts) for sample in samples for parts in sample.unreadable]
    samples = [sample for sample in samples if sample.image_CHW is not None]
    images = [sample.image_CHW for sample in samples if sample.image_CHW is not None]
    sides = (max([least, *(image.shape[axis] for image in images)]) for axis in (1, 2))
    height, width = (-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in sides)
    pixels_BCHW = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for canvas, image in zip(pixels_BCHW, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return {
        "pixels": pixels_BCHW,
        "sizes": torch.tensor([image.shape[1:] for image in images]),
        "scales": torch.tensor(
            [sample.view.scale for sample in samples if sample.view is not None], dtype=torch.float32
        ),
        "indices": [sample.position for sample in samples],
        "unreadable": unreadable,
    }


def _collate_training(samples: list[_Sample], least: int) -> dict[str, Any]:
    batch = _collate_images(samples, least)
    if "error" in batch:
        return batch
    objects = [
        (sample.boxes_N4, sample.labels_N)
        for sample in samples
        if sample.boxes_N4 is not None and sample.labels_N is not None
    ]
    most = max(len(labels) for _, labels in objects)
    boxes_BG4 = torch.zeros(len(samples), most, 4)
    labels_BG = torch.full((len(samples), most), -1, dtype=torch.int64)
    for row, (boxes, labels) in enumerate(objects):
        boxes_BG4[row, : len(boxes)] = torch.from_numpy(boxes)
        labels_BG[row, : len(labels)] = torch.from_numpy(labels)
    seeds_B = torch.tensor([sample.seed for sample in samples], dtype=torch.int64)
    batch |= {"boxes": boxes_BG4, "labels": labels_BG, "seeds": seeds_B}
    views = [asdict(sample.view) for sample in samples if sample.view is not None]
    return batch | {"views": views, "kept": [sample.kept_N for sample in samples]}


def _image_batch(batch: dict[str, Any]) -> ImageBatch:
    return ImageBatch(pixels_BCHW=batch["pixels"], sizes_B2=batch["sizes"], scales_B=batch["scales"])


def _raise_error(batch: dict[str, Any]) -> None:
    if "error" in batch:
        raise UserError(batch["error"])


def _data_loader(dataset: Dataset, batches: Any, collate: Any, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: the loader's base seed would otherwise advance torch's global generator
    )
