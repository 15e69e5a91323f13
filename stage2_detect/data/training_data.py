"""What a training run reads: labelled images, pictures without annotations, evaluation images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.batch_order import repeat_factors
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco, require_masks
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.unlabeled import labelled_images, list_pictures, read_pseudo_labels


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        train: labelled images.
        val: evaluation images as the scorer wants them, if there are any.
        val_objects: the same as training wants them, for the loss on them, where that is asked for.
        unlabelled: pictures without annotations, or with pseudo-labels for such.
        unreadable: names of those among them that cannot be read.
        pseudo: what is known of the pseudo-labels, for the log; None where there are none.
        repeats: how often each labelled image is shown, where that differs.
    """

    train: CocoData
    val: CocoData | None = None
    val_objects: CocoData | None = None
    unlabelled: list[CocoImage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pseudo: str | None = None
    repeats: np.ndarray | None = None

    @property
    def images(self) -> int:
        """Distinct training images."""
        return len(self.train.images) + len(self.unlabelled)

    def steps_per_epoch(self, config: TrainConfig) -> int:
        """Steps that show the labelled images once; what is left of them is dropped."""
        ratio = config.labeled_ratio if self.unlabelled else 1.0
        return len(self.train.images) // max(1, labelled_images(config.batch_size, ratio))

    def describe(self, config: TrainConfig) -> Iterator[str]:
        """Lines for the log."""
        yield self.train.describe()
        if self.repeats is not None:
            often = int((self.repeats > 1).sum())
            yield f"repeat factors: {often} images are shown more often than the others, up to {self.repeats.max():.2f} times"
        if self.pseudo:
            yield self.pseudo
        elif self.unlabelled:
            bad = f"; {len(self.unreadable)} unreadable, first {self.unreadable[0]}" if self.unreadable else ""
            yield f"{len(self.unlabelled)} pictures without annotations{bad}"
        if self.unlabelled and config.labeled_ratio < 1:
            labelled = labelled_images(config.batch_size, config.labeled_ratio)
            split = f"{labelled} labelled + {config.batch_size - labelled} unlabelled images a batch"
            share = labelled / config.batch_size
            yield (
                split
                if share == config.labeled_ratio
                else f"{split}: labeled_ratio is {share:.3g}, not {config.labeled_ratio:g}"
            )


def read_training_data(config: TrainConfig) -> TrainingData:
    """Read what `config` names; raises UserError for any fault of the files."""
    files = config.data
    options: dict[str, Any] = {"segmentations": config.model.has_masks, "cache": config.cache_annotations}
    train = read_coco(
        files.train_annotations, files.train_images, training=True, keep_empty=files.keep_empty, **options
    )
    val = val_objects = None
    if files.val_annotations and files.val_images:
        val, val_objects = (
            read_coco(
                files.val_annotations,
                files.val_images,
                training=training,
                class_names=train.class_names,
                **options,
            )
            if wanted
            else None
            for training, wanted in ((False, True), (True, config.val_loss))
        )
    if config.model.has_masks:
        for part in (train, val, val_objects):
            if part:
                require_masks(part)
    unlabelled, unreadable, pseudo = _unlabelled(config, train.class_names)
    threshold = files.repeat_threshold
    repeats = repeat_factors(train.images, len(train.class_names), threshold) if threshold is not None else None
    return TrainingData(train, val, val_objects, unlabelled, unreadable, pseudo, repeats)


def _unlabelled(config: TrainConfig, class_names: Sequence[str]) -> tuple[list[CocoImage], list[str], str | None]:
    """(records, names of what cannot be read, a line on the pseudo-labels if there are any)."""
    folder, file = config.unlabeled, config.pseudo
    if folder is None:
        return [], [], None
    if file is None:
        return *list_pictures(folder), None
    data, total = read_pseudo_labels(
        file, folder, class_names, segmentations=config.model.has_masks, cache=config.cache_annotations
    )
    boxes, pictures = data.counts["boxes"], len(data.images)
    return data.images, [], f"{file}: {boxes} pseudo-boxes in {pictures} of the {total} pictures in {folder}"


def images_to_try_a_teacher_on(config: TrainConfig, data: TrainingData) -> CocoData:
    """The evaluation images, or the training images where there are none."""
    files = config.data
    return data.val or read_coco(
        files.train_annotations,
        files.train_images,
        training=False,
        class_names=data.train.class_names,
        cache=config.cache_annotations,
    )


def training_loader(
    config: TrainConfig, data: TrainingData, *, start: int, stop: int, rank: int, ranks: int
) -> TrainLoader:
    """This rank's micro-batches from step `start` to `stop`. Raises UserError where the batch does not fit data or ranks."""
    return TrainLoader(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=stop,
        short_sides=config.resize.train_short_sides,
        max_long=config.resize.train_long_side,
        flip=config.resize.flip,
        interpolation=config.resize.interpolation,
        kernel=config.resize.kernel,
        auto_augment=config.augment.auto_augment,
        jitter=config.augment.large_scale_jitter,
        rank=rank,
        ranks=ranks,
        accumulate=config.accumulate,
        workers=config.workers,
        unlabelled=data.unlabelled,
        labeled_ratio=config.labeled_ratio,
        pseudo=data.pseudo is not None,
        auto_augment_unlabelled=config.augment.auto_augment_unlabeled,
        repeats=data.repeats,
    )
