"""Data of a training run: labeled images, unlabeled images with or without pseudo-labels, evaluation images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssld.shared.config.training import in_steps
from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.batch_order import labeled_images, repeat_factors
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco, require_boxes, require_format, require_masks
from ssld.stage2_detect.data.convert.parts import DataSet, find_data
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.unlabeled_images import (
    LabeledImages,
    UnlabeledImages,
    pseudo_labeled_images,
    real_paths,
    unlabeled_images,
)
from ssld.stage2_detect.data_config import as_list


@dataclass(frozen=True)
class TrainingData:
    """Images of a training run.

    Attributes:
        train: labeled images.
        val: evaluation images as the scorer needs them, if given.
        val_objects: evaluation images as training reads them, for the validation loss, if requested.
        more: unlabeled images, with pseudo-labels if given; None without.
        repeats: repeat factor of each labeled image; None without.
        files: files that the labeled and the evaluation images come from.
    """

    train: CocoData
    val: CocoData | None = None
    val_objects: CocoData | None = None
    more: UnlabeledImages | None = None
    repeats: np.ndarray | None = None
    files: DataSet | None = None

    @property
    def unlabeled(self) -> list[CocoImage]:
        """Records of the unlabeled images."""
        return self.more.records if self.more else []

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
        if self.more:
            yield self.more.setting, self.more.sources, self.more.tally

    def describe(self, config: TrainConfig) -> Iterator[str]:
        """Yield lines for the log."""
        yield from self.files.notes if self.files else ()
        yield self.train.describe()
        if self.val:
            yield self.val.describe()
            if also := self._trained_on(self.val):
                which = (
                    f"{len(also):,} of {count(len(self.val.images), 'evaluation image')} (first: {printable(also[0])})"
                )
                yield (
                    f"warning: the scores are too good, since the training images contain {which}; "
                    "`ssld doctor --fix DIR` removes these from a copy of the training annotations"
                )
        if self.repeats is not None:
            repeated = int((self.repeats > 1).sum())
            yield f"repeat factors: {repeated} images are repeated, up to {self.repeats.max():.2f} times per pass"
        yield from self.more.lines if self.more else ()
        if self.unlabeled and config.labeled_share < 1:
            labeled = labeled_images(config.batch_size, config.labeled_share)
            unlabeled = config.batch_size - labeled
            split = f"{labeled} labeled + {unlabeled} unlabeled images per batch"
            name, given, share = "labeled_ratio", config.labeled_ratio, labeled / config.batch_size
            if config.moving_teacher:
                split += f", {labeled} labeled ones in the burn-in"
                name, given, share = "ratio", config.moving_teacher.ratio, unlabeled / config.batch_size
            yield split if share == given else f"{split}: {name} is {share:.3g}, not {given:g}"

    def _trained_on(self, val: CocoData) -> list[str]:
        """Return the paths of evaluation images that are training images too; copies under other names are for the data check."""
        real = real_paths()
        trained = {real(record.path) for record in self.train.images}
        return [record.path for record in val.images if real(record.path) in trained]


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
    more = _unlabeled(config, train, val)
    threshold = settings.repeat_threshold
    repeats = repeat_factors(train.images, len(train.class_names), threshold) if threshold is not None else None
    return TrainingData(train, val, val_objects, more, repeats, files)


def _unlabeled(config: TrainConfig, train: CocoData, val: CocoData | None) -> UnlabeledImages | None:
    """List the unlabeled images that `config` names; None: there are none."""
    known = LabeledImages(train.images, val.images if val else [])
    if moving := config.moving_teacher:
        return unlabeled_images(
            "moving_teacher.unlabeled",
            moving.sources,
            known,
            images=moving.images,
            images_setting="moving_teacher.images",
        )
    if config.unlabeled is None:
        return None
    if config.pseudo is None or isinstance(config.unlabeled, list):
        return unlabeled_images("unlabeled", as_list(config.unlabeled), known)
    return pseudo_labeled_images(
        config.pseudo,
        config.unlabeled,
        train.class_names,
        known,
        segmentations=config.model.has_masks,
        cache_annotations=config.cache_annotations,
        allow_loss=config.data.allow_loss,
    )


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
        pseudo=config.pseudo is not None,
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
