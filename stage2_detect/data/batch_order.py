"""Order of images in batches: a pure function of (seed, epoch), equal for any number of ranks and workers.

A training batch holds either images that are wider than high or the others, to limit padding; the remainders of both
groups fill the last batches of an epoch. Evaluation batches are fixed by index and distributed whole over the ranks.
Images of rare classes can be repeated: repeat factors of LVIS (arXiv 1908.03195, appendix B). Unlabeled images fill a
share of each batch, drawn independently per step. There is no state to save: a run can resume at any step.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoImage

_REPEATS, _UNLABELED = 0x726570, 0x756E6C  # keep these draws apart from other draws from (seed, number)


class BatchOrder:
    """Order of training images in global batches.

    Args:
        wide: whether each image is wider than high.
        batch_size: images per global batch.
        seed: determines the order together with the epoch.
        ranks, accumulate: a global batch is cut into ranks * accumulate micro-batches.
        repeats: float64, repeat factor of each image: an image occurs floor(factor) times in an epoch, and once more with
            probability factor - floor(factor), drawn from (seed, epoch). The number of steps per epoch stays the same; images
            beyond it are left out at random.

    Raises:
        UserError: `batch_size` exceeds the number of images or does not divide over `ranks * accumulate` micro-batches.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        *,
        batch_size: int,
        seed: int,
        ranks: int = 1,
        accumulate: int = 1,
        repeats: np.ndarray | None = None,
    ) -> None:
        if batch_size < 1 or batch_size > len(wide):
            raise UserError(f"batch_size {batch_size} does not fit the data set of {len(wide)} training images")
        if batch_size % (ranks * accumulate):
            raise UserError(
                f"batch_size {batch_size} does not divide over {ranks} processes x {accumulate} accumulation steps"
            )
        self.wide = np.asarray(wide, dtype=bool)
        self.batch_size, self.seed, self.ranks, self.accumulate = batch_size, seed, ranks, accumulate
        self.repeats = repeats
        self.steps_per_epoch = len(wide) // batch_size
        """constant: the remainder of an epoch is dropped, whatever the sizes of the two groups"""
        self._epoch_batches = lru_cache(maxsize=2)(self._draw_epoch)

    def step(self, step: int) -> list[int]:
        """Return the image indices of the global batch of a step (from 0)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch_batches(epoch)[number].tolist()

    def micro_batch(self, step: int, rank: int, part: int) -> list[int]:
        """Return the image indices of one micro-batch: accumulation part `part` of a step on `rank`."""
        size = self.batch_size // (self.ranks * self.accumulate)
        start = (rank * self.accumulate + part) * size
        return self.step(step)[start : start + size]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """Draw the image indices of an epoch, [steps_per_epoch, batch_size]."""
        draw = np.random.default_rng([self.seed, epoch])
        images = self._images_of_epoch(epoch)
        order = images[draw.permutation(len(images))]
        groups = [order[self.wide[order]], order[~self.wide[order]]]
        full = [len(group) // self.batch_size * self.batch_size for group in groups]
        rest = np.concatenate([group[cut:] for group, cut in zip(groups, full, strict=True)])
        kept = [group[:cut] for group, cut in zip(groups, full, strict=True)]
        kept.append(draw.permutation(rest)[: len(rest) // self.batch_size * self.batch_size])
        return draw.permutation(np.concatenate(kept).reshape(-1, self.batch_size), axis=0)[: self.steps_per_epoch]

    def _images_of_epoch(self, epoch: int) -> np.ndarray:
        """Return the image indices of an epoch in file order, repeated by the repeat factors."""
        images = np.arange(len(self.wide))
        if self.repeats is None:
            return images
        whole = np.floor(self.repeats)
        more = np.random.default_rng([self.seed, epoch, _REPEATS]).random(len(images)) < self.repeats - whole
        return images.repeat(whole.astype(np.int64) + more)


class MixedOrder:
    """Order of labeled and unlabeled training images in global batches: labeled images as in `BatchOrder`, then unlabeled ones.

    A batch of `batch_size` holds `labeled_images(batch_size, labeled_ratio)` labeled images. Its unlabeled images are drawn independently per
    step, without repetition, preferably among images of the same aspect group (wide or not) as the labeled ones, to limit padding. Each
    micro-batch has an equal share of both kinds, labeled images first. Indices from `len(wide)` on refer to unlabeled images. `ratio` is the
    setting that errors name.

    Raises:
        UserError: one of the two parts is empty or does not divide over `ranks * accumulate` micro-batches, a batch needs more unlabeled
            images than there are, or for the reasons of `BatchOrder`.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        unlabeled_wide: Sequence[bool],
        *,
        batch_size: int,
        labeled_ratio: float,
        seed: int,
        ranks: int = 1,
        accumulate: int = 1,
        repeats: np.ndarray | None = None,
        ratio: str = "labeled_ratio",
    ) -> None:
        labeled = labeled_images(batch_size, labeled_ratio)
        self.labeled, self.unlabeled = labeled, batch_size - labeled
        micro = ranks * accumulate
        split = f"{labeled} labeled and {self.unlabeled} unlabeled images of a batch of {batch_size}"
        if not labeled or not self.unlabeled or labeled % micro or self.unlabeled % micro:
            raise UserError(
                f"{ratio}: {split} do not divide over {ranks} processes x {accumulate} accumulation steps; "
                f"change batch_size or {ratio}"
            )
        if self.unlabeled > len(unlabeled_wide):
            raise UserError(
                f"{ratio}: {split}, but only {len(unlabeled_wide)} unlabeled images are left; give more, or change batch_size or {ratio}"
            )
        self._order = BatchOrder(
            wide, batch_size=labeled, seed=seed, ranks=ranks, accumulate=accumulate, repeats=repeats
        )
        self.repeats = repeats
        self._wide, self._seed = np.asarray(wide, dtype=bool), seed
        positions = np.arange(len(wide), len(wide) + len(unlabeled_wide))
        flags = np.asarray(unlabeled_wide, dtype=bool)
        self._groups = {True: positions[flags], False: positions[~flags]}
        self.batch_size, self.ranks, self.accumulate = batch_size, ranks, accumulate
        self.steps_per_epoch = self._order.steps_per_epoch
        """steps per pass over the labeled images"""

    def step(self, step: int) -> list[int]:
        """Return the indices of the global batch of a step (from 0): the labeled images, then the unlabeled ones."""
        labeled = self._order.step(step)
        return labeled + self._draw(step, labeled)

    def micro_batch(self, step: int, rank: int, part: int) -> list[int]:
        """Return the indices of one micro-batch: accumulation part `part` of a step on `rank`."""
        both = self.step(step)
        number, micro = rank * self.accumulate + part, self.ranks * self.accumulate
        chosen: list[int] = []
        for images in (both[: self.labeled], both[self.labeled :]):
            size = len(images) // micro
            chosen += images[number * size : (number + 1) * size]
        return chosen

    def _draw(self, step: int, labeled: list[int]) -> list[int]:
        draw = np.random.default_rng([self._seed, step, _UNLABELED])
        wide = bool(2 * self._wide[labeled].sum() > len(labeled))
        preferred, others = self._groups[wide], self._groups[not wide]
        first = draw.choice(preferred, min(self.unlabeled, len(preferred)), replace=False)
        rest = draw.choice(others, self.unlabeled - len(first), replace=False)
        return [*first.tolist(), *rest.tolist()]


def training_order(
    wide: Sequence[bool],
    unlabeled_wide: Sequence[bool],
    labeled_ratio: float,
    *,
    ratio: str = "labeled_ratio",
    **options: Any,
) -> BatchOrder | MixedOrder:
    """Return the batch order of a training run: `MixedOrder` if there are unlabeled images and labeled_ratio is below 1, else `BatchOrder`.

    `ratio` is the setting that errors name.
    """
    if unlabeled_wide and labeled_ratio < 1:
        return MixedOrder(wide, unlabeled_wide, labeled_ratio=labeled_ratio, ratio=ratio, **options)
    return BatchOrder(wide, **options)


def labeled_images(batch_size: int, labeled_ratio: float) -> int:
    """Return the number of labeled images per batch: the ratio rounded to whole images."""
    return round(batch_size * labeled_ratio)


def repeat_factors(records: Sequence[CocoImage], classes: int, repeat_threshold: float) -> np.ndarray:
    """Return one repeat factor per image, float64, at least 1: the largest max(1, sqrt(repeat_threshold / f(c))) over its classes c.

    f(c) is the share of images that contain class c; the factor of an image without objects is 1. Source: arXiv 1908.03195, appendix B.
    """
    images_K = np.zeros(classes)
    for record in records:
        images_K[np.unique(record.labels_N)] += 1
    share = images_K / max(1, len(records))
    factors = np.sqrt(repeat_threshold / np.where(images_K > 0, share, 1.0)).clip(1.0)
    return np.array([factors[record.labels_N].max(initial=1.0) for record in records])


def eval_batches(records: Sequence[CocoImage], batch_size: int) -> list[list[int]]:
    """Return the image indices of each evaluation batch: sorted by aspect ratio, then by index, to limit padding."""
    order = sorted(range(len(records)), key=lambda i: (records[i].width / records[i].height, i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
