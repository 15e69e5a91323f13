"""Pictures without annotations, or with pseudo-labels: a folder as records, and batches that hold labelled and unlabelled images.

Which images a batch holds is a function of (seed, step), so nothing is saved and a run may go on anywhere.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.files import require_images
from ssld.stage2_detect.data.batch_order import BatchOrder
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco, require_masks
from ssld.stage2_detect.data.image_files import Pictures, records_of

_TOO_MANY = 0.01
_STREAM = 0x756E6C  # keeps these draws apart from other draws from (seed, number)


def list_pictures(folder: Path) -> tuple[list[CocoImage], list[str]]:
    """(a record without objects for each picture in the folder and below it, by sorted relative path; names of those that cannot be read).

    Only headers are read. Raises UserError for a folder that is missing or holds no images, and when more than one and more than 1 %
    cannot be read.
    """
    try:
        names = require_images(folder)
    except UserError as error:
        raise UserError(f"unlabeled: {error}") from None
    records, unreadable = records_of(Pictures(str(folder), names), [f"unlabeled/{name}" for name in names])
    if len(unreadable) > max(1, _TOO_MANY * len(names)):
        raise UserError(
            f"unlabeled: {len(unreadable)} of the {len(names)} pictures in {folder} cannot be read (first: {unreadable[0]}); mend or remove them"
        )
    if not records:
        raise UserError(f"unlabeled: {folder}: its only picture, {names[0]}, cannot be read")
    return records, unreadable


def read_pseudo_labels(
    file: Path, folder: Path, class_names: Sequence[str], *, segmentations: bool, cache: bool
) -> tuple[CocoData, int]:
    """(the pictures of `folder` that have boxes in a COCO file, with them; how many pictures are in the folder).

    Raises UserError for an empty folder, a file that names other pictures or classes or has no box, and whatever `read_coco` and, with
    `segmentations`, `require_masks` find.
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
            cache=cache,
        )
        if segmentations:
            require_masks(data)
    except UserError as error:
        raise UserError(f"pseudo: {error}") from None
    # Draws go by the image's id: the same with or without boxes, and never that of a labelled image.
    images = [replace(one, image_id=f"unlabeled/{os.path.relpath(one.path, folder)}") for one in data.images]
    return replace(data, images=images), total


def labelled_images(batch_size: int, labeled_ratio: float) -> int:
    """Labelled images of a batch: the whole number nearest to the ratio."""
    return round(batch_size * labeled_ratio)


class MixedOrder:
    """Global batches of labelled images, as `BatchOrder` draws them, followed by unlabelled ones.

    A batch of `batch_size` holds `labelled_images(batch_size, labeled_ratio)` labelled ones. The others are drawn anew for every step, without
    repetition, among the pictures of the labelled ones' orientation as far as there are enough, to limit padding. Each micro-batch has its
    share of both, labelled first. Indices from `len(wide)` on are of unlabelled images.

    Raises:
        UserError: one of the two parts is empty, or does not divide over `ranks * accumulate` micro-batches; more unlabelled images a
            batch than there are; or what `BatchOrder` says.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        unlabelled_wide: Sequence[bool],
        *,
        batch_size: int,
        labeled_ratio: float,
        seed: int,
        ranks: int = 1,
        accumulate: int = 1,
        repeats: np.ndarray | None = None,
    ) -> None:
        labelled = labelled_images(batch_size, labeled_ratio)
        self.labelled, self.unlabelled = labelled, batch_size - labelled
        micro = ranks * accumulate
        split = f"{labelled} labelled and {self.unlabelled} unlabelled images of a batch of {batch_size}"
        if not labelled or not self.unlabelled or labelled % micro or self.unlabelled % micro:
            raise UserError(
                f"labeled_ratio {labeled_ratio:g}: {split} do not divide over {ranks} processes x {accumulate} accumulation steps; "
                "change batch_size or labeled_ratio"
            )
        if self.unlabelled > len(unlabelled_wide):
            raise UserError(f"unlabeled: {split}, but the folder holds {len(unlabelled_wide)} pictures")
        self._order = BatchOrder(
            wide, batch_size=labelled, seed=seed, ranks=ranks, accumulate=accumulate, repeats=repeats
        )
        self.repeats = repeats
        self._wide, self._seed = np.asarray(wide, dtype=bool), seed
        positions = np.arange(len(wide), len(wide) + len(unlabelled_wide))
        flags = np.asarray(unlabelled_wide, dtype=bool)
        self._groups = {True: positions[flags], False: positions[~flags]}
        self.batch_size, self.ranks, self.accumulate = batch_size, ranks, accumulate
        self.steps_per_epoch = self._order.steps_per_epoch
        """of the labelled images"""

    def step(self, step: int) -> list[int]:
        """Indices of the global batch of a step (from 0): the labelled images, then the unlabelled ones."""
        labelled = self._order.step(step)
        return labelled + self._draw(step, labelled)

    def micro_batch(self, step: int, rank: int, part: int) -> list[int]:
        """Indices of one rank's accumulation part of a step."""
        both = self.step(step)
        number, micro = rank * self.accumulate + part, self.ranks * self.accumulate
        chosen: list[int] = []
        for images in (both[: self.labelled], both[self.labelled :]):
            size = len(images) // micro
            chosen += images[number * size : (number + 1) * size]
        return chosen

    def _draw(self, step: int, labelled: list[int]) -> list[int]:
        draw = np.random.default_rng([self._seed, step, _STREAM])
        wide = bool(2 * self._wide[labelled].sum() > len(labelled))
        liked, others = self._groups[wide], self._groups[not wide]
        first = draw.choice(liked, min(self.unlabelled, len(liked)), replace=False)
        rest = draw.choice(others, self.unlabelled - len(first), replace=False)
        return [*first.tolist(), *rest.tolist()]


def training_order(
    wide: Sequence[bool], unlabelled_wide: Sequence[bool], labeled_ratio: float, **options: Any
) -> BatchOrder | MixedOrder:
    """The order of a training run: `MixedOrder` where there are unlabelled images and a batch is to hold some."""
    if unlabelled_wide and labeled_ratio < 1:
        return MixedOrder(wide, unlabelled_wide, labeled_ratio=labeled_ratio, **options)
    return BatchOrder(wide, **options)
