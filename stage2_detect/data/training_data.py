"""Data of a training run: labeled images, unlabeled images with or without pseudo-labels, evaluation images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.config.training import in_steps
from ssld.shared.errors import UserError
from ssld.shared.files import require_images
from ssld.shared.tally import Tally
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.batch_order import labeled_images, repeat_factors
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco, require_boxes, require_format, require_masks
from ssld.stage2_detect.data.convert.parts import DataSet, find_data
from ssld.stage2_detect.data.image_files import ImageFiles, records_of
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.unlabeled_images import UnlabeledImages, check_unreadable, unlabeled_images


@dataclass(frozen=True)
class TrainingData:
    """Images of a training run.

    Attributes:
        train: labeled images.
        val: evaluation images as the scorer needs them, if given.
        val_objects: evaluation images as training reads them, for the validation loss, if requested.
        unlabeled: unlabeled images, with pseudo-labels if given.
        unreadable: names of unreadable unlabeled images.
        pseudo: line for the log on the pseudo-labels; None without.
        moving: the unlabeled images of a moving teacher; None without.
        repeats: repeat factor of each labeled image; None without.
        files: files that the labeled and the evaluation images come from.
    """

    train: CocoData
    val: CocoData | None = None
    val_objects: CocoData | None = None
    unlabeled: list[CocoImage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pseudo: str | None = None
    moving: UnlabeledImages | None = None
    repeats: np.ndarray | None = None
    files: DataSet | None = None

    @property
    def images(self) -> int:
        """Number of distinct training images."""
        return len(self.train.images) + len(self.unlabeled)

    def orientations(self) -> dict[str, Any]:
        """Return the orientation in which the images of each source are read, for result.json."""
        parts = {"train": self.train, "val": self.val}
        return {name: part.orientation.record() for name, part in parts.items() if part}

    def steps_per_epoch(self, config: TrainConfig) -> int:
        """Return the number of steps in a pass over the labeled images; an incomplete batch at the end is dropped."""
        ratio = config.labeled_share if self.unlabeled else 1.0
        return len(self.train.images) // max(1, labeled_images(config.batch_size, ratio))

    def tallies(self) -> Iterator[tuple[str, str, Tally]]:
        """Yield (setting, its value, counts) of each source that counts what it leaves out."""
        yield "data.train_annotations", self.train.file, self.train.tally
        if self.val:
            yield "data.val_annotations", self.val.file, self.val.tally
        if self.moving:
            yield "moving_teacher.unlabeled", self.moving.sources, self.moving.tally

    def describe(self, config: TrainConfig) -> Iterator[str]:
        """Yield lines for the log."""
        yield from self.files.notes if self.files else ()
        yield self.train.describe()
        if self.val:
            yield self.val.describe()
        if self.repeats is not None:
            repeated = int((self.repeats > 1).sum())
            yield f"repeat factors: {repeated} images are repeated, up to {self.repeats.max():.2f} times per pass"
        if self.pseudo:
            yield self.pseudo
        elif self.moving:
            yield from self.moving.lines
        elif self.unlabeled:
            bad = f"; {len(self.unreadable)} unreadable, first {self.unreadable[0]}" if self.unreadable else ""
            yield f"{len(self.unlabeled)} unlabeled images{bad}"
        if self.unlabeled and config.labeled_share < 1:
            labeled = labeled_images(config.batch_size, config.labeled_share)
            unlabeled = config.batch_size - labeled
            split = f"{labeled} labeled + {unlabeled} unlabeled images per batch"
            name, given, share = "labeled_ratio", config.labeled_ratio, labeled / config.batch_size
            if config.moving_teacher:
                split += f", {labeled} labeled ones in the burn-in"
                name, given, share = "ratio", config.moving_teacher.ratio, unlabeled / config.batch_size
            yield split if share == given else f"{split}: {name} is {share:.3g}, not {given:g}"


def read_training_data(config: TrainConfig) -> TrainingData:
    """Read the data that `config` names. Raises UserError for any fault of the files."""
    settings, files = config.data, find_data(config.data)
    if files.val is None and (config.val_loss or config.patience is not None):
        what = "val_loss" if config.val_loss else "patience"
        raise UserError(
            f"{what}: {settings.source}: has no part to evaluate on; leave {what} out, or add a part called val"
        )
    options: dict[str, Any] = {"segmentations": config.model.has_masks, "cache_annotations": config.cache_annotations}
    train = read_coco(
        files.train.annotations, files.train.images, training=True, keep_empty=settings.keep_empty, **options
    )
    require_boxes(train, allow_loss=settings.allow_loss)
    val = val_objects = None
    if files.val:
        val, val_objects = (
            read_coco(
                files.val.annotations,
                files.val.images,
                training=training,
                class_names=train.class_names,
                **options,
            )
            if needed
            else None
            for training, needed in ((False, True), (True, config.val_loss))
        )
    if val:
        require_format(val, allow_loss=settings.allow_loss)
    if config.model.has_masks:
        for part in (train, val, val_objects):
            if part:
                require_masks(part)
    unlabeled, unreadable, pseudo = _unlabeled(config, train.class_names)
    moving = None
    if config.moving_teacher:
        moving = unlabeled_images(config.moving_teacher, train.images, val.images if val else [])
        unlabeled, unreadable = moving.records, moving.unreadable
    threshold = settings.repeat_threshold
    repeats = repeat_factors(train.images, len(train.class_names), threshold) if threshold is not None else None
    return TrainingData(train, val, val_objects, unlabeled, unreadable, pseudo, moving, repeats, files)


def _unlabeled(config: TrainConfig, class_names: Sequence[str]) -> tuple[list[CocoImage], list[str], str | None]:
    """Return (records, names of unreadable images, line for the log on the pseudo-labels or None)."""
    folder, file = config.unlabeled, config.pseudo
    if folder is None:
        return [], [], None
    if file is None:
        return *list_unlabeled(folder), None
    data, total = read_pseudo_labels(
        file,
        folder,
        class_names,
        segmentations=config.model.has_masks,
        cache_annotations=config.cache_annotations,
        allow_loss=config.data.allow_loss,
    )
    boxes, images = data.counts["boxes"], len(data.images)
    return data.images, [], f"{file}: {boxes} pseudo-boxes in {images} of the {total} images in {folder}"


def list_unlabeled(folder: Path) -> tuple[list[CocoImage], list[str]]:
    """Return (a record without objects for each image in the folder and its subfolders, by sorted relative path; names of unreadable images).

    Reads only headers. Raises UserError for a folder that is missing or without images, and if more than one image and more than 1 % of
    them cannot be read.
    """
    try:
        names = require_images(folder)
    except UserError as error:
        raise UserError(f"unlabeled: {error}") from None
    records, unreadable = records_of(ImageFiles(str(folder), names), [f"unlabeled/{name}" for name in names])
    check_unreadable("unlabeled", str(folder), len(names), unreadable)
    return records, unreadable


def read_pseudo_labels(
    file: Path,
    folder: Path,
    class_names: Sequence[str],
    *,
    segmentations: bool,
    cache_annotations: bool,
    allow_loss: bool = False,
) -> tuple[CocoData, int]:
    """Return (the images of `folder` that have boxes in a COCO file, with these boxes; number of images in the folder).

    Raises UserError for an empty folder, for a file with other images or classes or without boxes, and for the faults of `read_coco`,
    `require_boxes` and, with `segmentations`, `require_masks`.
    """
    try:
        total = len(require_images(folder))
    except UserError as error:
        raise UserError(f"unlabeled: {error}") from None
    try:
        data = read_coco(
            file,
            folder,
            training=True,
            keep_empty=False,
            segmentations=segmentations,
            class_names=class_names,
            cache_annotations=cache_annotations,
        )
        require_boxes(data, allow_loss=allow_loss)
        if segmentations:
            require_masks(data)
    except UserError as error:
        raise UserError(f"pseudo: {error}") from None
    # Random draws depend on the image id: equal with and without boxes, and different from those of labeled images.
    images = [replace(one, image_id=f"unlabeled/{os.path.relpath(one.path, folder)}") for one in data.images]
    return replace(data, images=images), total


def teacher_check_images(config: TrainConfig, data: TrainingData) -> CocoData:
    """Return the images for the check of a teacher: the evaluation images, or the training images if there are none."""
    if data.val:
        return data.val
    part = (data.files or find_data(config.data)).train
    return read_coco(
        part.annotations,
        part.images,
        training=False,
        class_names=data.train.class_names,
        cache_annotations=config.cache_annotations,
    )


def training_loader(
    config: TrainConfig, data: TrainingData, *, start: int, stop: int, rank: int, ranks: int, steps: int | None = None
) -> TrainLoader:
    """Return this rank's micro-batches from step `start` to `stop` of a run of `steps` steps (default: `stop`). Raises UserError if the batch
    does not fit the data or the ranks, and for a burn-in as long as the run."""
    total = stop if steps is None else steps
    moving = config.moving_teacher
    burn_in = in_steps(moving.burn_in, total) if moving else 0
    loader = TrainLoader(
        data.train,
        config.resize,
        config.augment,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=stop,
        rank=rank,
        ranks=ranks,
        accumulate=config.accumulate,
        workers=config.workers,
        unlabeled=data.unlabeled,
        labeled_ratio=config.labeled_share,
        pseudo=data.pseudo is not None,
        strong=moving.strong if moving else None,
        burn_in=burn_in,
        repeats=data.repeats,
        compose_steps=round(config.augment.compose_until * total),
    )
    if moving and burn_in >= total:
        raise UserError(
            f"moving_teacher.burn_in: {burn_in} of {total} steps, so no unlabeled image is used; give fewer, or train longer"
        )
    return loader
