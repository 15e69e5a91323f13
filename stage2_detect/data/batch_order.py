"""Which images form which batch: a pure function of (seed, epoch), the same for any number of ranks and workers.

A training batch holds either images that are wider than high or the others, to limit padding; what is left over of both
groups fills the last batches. Evaluation batches are fixed by index, and ranks share them out whole. Images of rare
classes can be shown more often: repeat factors of LVIS (arXiv 1908.03195, appendix B).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import CocoImage

_STREAM = 0x726570  # keeps these draws apart from other draws from (seed, epoch)


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
        more = np.random.default_rng([self.seed, epoch, _STREAM]).random(len(images)) < self.repeats - whole
        return images.repeat(whole.astype(np.int64) + more)


def repeat_factors(records: Sequence[CocoImage], classes: int, threshold: float) -> np.ndarray:
    """float64, one factor an image, 1 or more: the largest max(1, sqrt(threshold / f(c))) of its classes c.

    f(c) is the share of the images that show c; an image without objects has 1. Source: arXiv 1908.03195, appendix B.
    """
    shown = np.zeros(classes)
    for record in records:
        shown[np.unique(record.labels_N)] += 1
    share = shown / max(1, len(records))
    factors = np.sqrt(threshold / np.where(shown > 0, share, 1.0)).clip(1.0)
    return np.array([factors[record.labels_N].max(initial=1.0) for record in records])


def eval_batches(records: Sequence[CocoImage], batch_size: int) -> list[list[int]]:
    """Image indices of each evaluation batch: sorted by aspect ratio, then by index, so that a batch needs little
    padding."""
    order = sorted(range(len(records)), key=lambda i: (records[i].width / records[i].height, i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
