"""Which images form which batch: a pure function of (seed, epoch), the same for any number of ranks and workers.

A training batch holds either images that are wider than high or the others, to limit padding; what is left over of both
groups fills the last batches. Evaluation batches are fixed by index, and ranks share them out whole.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from shared.errors import UserError
from stage2_detect.coco import CocoImage


class BatchOrder:
    """Which images form which global batch.

    Raises `UserError` when `batch_size` exceeds the number of images or does not divide over `ranks * accumulate`
    micro-batches.
    """

    def __init__(
        self, wide: Sequence[bool], *, batch_size: int, seed: int, ranks: int = 1, accumulate: int = 1
    ) -> None:
        if batch_size < 1 or batch_size > len(wide):
            raise UserError(f"batch_size {batch_size} does not fit the data set of {len(wide)} training images")
        if batch_size % (ranks * accumulate):
            raise UserError(
                f"batch_size {batch_size} does not divide over {ranks} processes x {accumulate} accumulation steps"
            )
        self.wide = np.asarray(wide, dtype=bool)
        self.batch_size, self.seed, self.ranks, self.accumulate = batch_size, seed, ranks, accumulate
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
        order = draw.permutation(len(self.wide))
        groups = [order[self.wide[order]], order[~self.wide[order]]]
        full = [len(group) // self.batch_size * self.batch_size for group in groups]
        rest = np.concatenate([group[cut:] for group, cut in zip(groups, full, strict=True)])
        kept = [group[:cut] for group, cut in zip(groups, full, strict=True)]
        kept.append(draw.permutation(rest)[: len(rest) // self.batch_size * self.batch_size])
        return draw.permutation(np.concatenate(kept).reshape(-1, self.batch_size), axis=0)


def eval_batches(records: Sequence[CocoImage], batch_size: int) -> list[list[int]]:
    """Image indices of each evaluation batch: sorted by aspect ratio, then by index, so that a batch needs little
    padding."""
    order = sorted(range(len(records)), key=lambda i: (records[i].width / records[i].height, i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
