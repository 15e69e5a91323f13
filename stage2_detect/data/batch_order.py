"""Which images form which batch: a pure function of (seed, epoch), the same for any number of ranks and workers.

A training batch holds either images that are wider than high or the others, to limit padding; what is left over of both
groups fills the last batches. Evaluation batches are fixed by index, and ranks share them out whole. Images of rare
classes can be shown more often: repeat factors of LVIS (arXiv 1908.03195, appendix B). Images without annotations fill
a share of each batch, drawn anew for every step. Nothing is saved, so a run may go on anywhere.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoImage

_REPEATS, _UNLABELED = 0x726570, 0x756E6C  # keep these draws apart from other draws from (seed, number)


class BatchOrder:
    """Which images form which global batch.

    With `repeats` an image is in the lot of an epoch floor(factor) times, and once more with the probability of the rest,
    drawn from (seed, epoch). An epoch has as many steps as without: what does not fit is left out, evenly over the lot.

    Raises `UserError` when `batch_size` exceeds the number of images or does not divide over `ranks * accumulate`
    micro-batches.
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
        """constant: the remainder of an epoch is dropped, however the two groups divide"""
        self._epoch_batches = lru_cache(maxsize=2)(self._draw_epoch)

    def step(self, step: int) -> list[int]:
        """Image indices of the global batch of a step (from 0)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch_batches(epoch)[number].tolist()

    def micro_batch(self, step: int, rank: int, part: int) -> list[int]:
        """Image indices of one rank's accumulation part of a step."""
        size = self.batch_size // (self.ranks * self.accumulate)
        start = (rank * self.accumulate + part) * size
        return self.step(step)[start : start + size]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch, batch_size] image indices."""
        draw = np.random.default_rng([self.seed, epoch])
        lot = self._draw_lot(epoch)
        order = lot[draw.permutation(len(lot))]
        groups = [order[self.wide[order]], order[~self.wide[order]]]
        full = [len(group) // self.batch_size * self.batch_size for group in groups]
        rest = np.concatenate([group[cut:] for group, cut in zip(groups, full, strict=True)])
        kept = [group[:cut] for group, cut in zip(groups, full, strict=True)]
        kept.append(draw.permutation(rest)[: len(rest) // self.batch_size * self.batch_size])
        return draw.permutation(np.concatenate(kept).reshape(-1, self.batch_size), axis=0)[: self.steps_per_epoch]

    def _draw_lot(self, epoch: int) -> np.ndarray:
        """The images of an epoch, each as often as it is to be seen."""
        images = np.arange(len(self.wide))
        if self.repeats is None:
            return images
        whole = np.floor(self.repeats)
        more = np.random.default_rng([self.seed, epoch, _REPEATS]).random(len(images)) < self.repeats - whole
        return images.repeat(whole.astype(np.int64) + more)


class MixedOrder:
    """Global batches of labeled images, as `BatchOrder` draws them, followed by unlabeled ones.

    A batch of `batch_size` holds `labeled_images(batch_size, labeled_ratio)` labeled ones. The others are drawn anew for every step, without
    repetition, among the images of the labeled ones' orientation as far as there are enough, to limit padding. Each micro-batch has its
    share of both, labeled first. Indices from `len(wide)` on are of unlabeled images.

    Raises:
        UserError: one of the two parts is empty, or does not divide over `ranks * accumulate` micro-batches; more unlabeled images a
            batch than there are; or what `BatchOrder` says.
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
    ) -> None:
        labeled = labeled_images(batch_size, labeled_ratio)
        self.labeled, self.unlabeled = labeled, batch_size - labeled
        micro = ranks * accumulate
        split = f"{labeled} labeled and {self.unlabeled} unlabeled images of a batch of {batch_size}"
        if not labeled or not self.unlabeled or labeled % micro or self.unlabeled % micro:
            raise UserError(
                f"labeled_ratio {labeled_ratio:g}: {split} do not divide over {ranks} processes x {accumulate} accumulation steps; "
                "change batch_size or labeled_ratio"
            )
        if self.unlabeled > len(unlabeled_wide):
            raise UserError(f"unlabeled: {split}, but the folder holds {len(unlabeled_wide)} images")
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
        """of the labeled images"""

    def step(self, step: int) -> list[int]:
        """Indices of the global batch of a step (from 0): the labeled images, then the unlabeled ones."""
        labeled = self._order.step(step)
        return labeled + self._draw(step, labeled)

    def micro_batch(self, step: int, rank: int, part: int) -> list[int]:
        """Indices of one rank's accumulation part of a step."""
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
        liked, others = self._groups[wide], self._groups[not wide]
        first = draw.choice(liked, min(self.unlabeled, len(liked)), replace=False)
        rest = draw.choice(others, self.unlabeled - len(first), replace=False)
        return [*first.tolist(), *rest.tolist()]


def training_order(
    wide: Sequence[bool], unlabeled_wide: Sequence[bool], labeled_ratio: float, **options: Any
) -> BatchOrder | MixedOrder:
    """The order of a training run: `MixedOrder` where there are unlabeled images and a batch is to hold some."""
    if unlabeled_wide and labeled_ratio < 1:
        return MixedOrder(wide, unlabeled_wide, labeled_ratio=labeled_ratio, **options)
    return BatchOrder(wide, **options)


def labeled_images(batch_size: int, labeled_ratio: float) -> int:
    """Labeled images of a batch: the whole number nearest to the ratio."""
    return round(batch_size * labeled_ratio)


def repeat_factors(records: Sequence[CocoImage], classes: int, repeat_threshold: float) -> np.ndarray:
    """float64, one factor an image, 1 or more: the largest max(1, sqrt(repeat_threshold / f(c))) of its classes c.

    f(c) is the share of the images that show c; an image without objects has 1. Source: arXiv 1908.03195, appendix B.
    """
    shown = np.zeros(classes)
    for record in records:
        shown[np.unique(record.labels_N)] += 1
    share = shown / max(1, len(records))
    factors = np.sqrt(repeat_threshold / np.where(shown > 0, share, 1.0)).clip(1.0)
    return np.array([factors[record.labels_N].max(initial=1.0) for record in records])


def eval_batches(records: Sequence[CocoImage], batch_size: int) -> list[list[int]]:
    """Image indices of each evaluation batch: sorted by aspect ratio, then by index, so that a batch needs little
    padding."""
    order = sorted(range(len(records)), key=lambda i: (records[i].width / records[i].height, i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
