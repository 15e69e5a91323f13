"""The images in `prototypes.png`."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from ssld.stage1_ssld.clustering import steps
from ssld.stage1_ssld.clustering.centers import Clusters


def test_a_small_prototype_shows_no_images_of_others() -> None:
    """Three images far from five others: eight are asked for, and each prototype shows its own, the nearest first."""
    draw = np.random.default_rng(4)
    point_ND = np.concatenate([draw.normal(0, 0.1, (5, 2)), draw.normal(9, 0.1, (3, 2))])
    center_KD = np.stack([point_ND[:5].mean(0), point_ND[5:].mean(0)])
    offset_K = np.zeros(2)

    class Points:
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield np.arange(4), point_ND[:4]
            yield np.arange(4, 8), point_ND[4:]

        def rows(self, ids: np.ndarray) -> np.ndarray:
            return point_ND[ids]

    clusters = Clusters(center_KD, offset_K, np.array([5, 3]), 0)
    rows = steps._nearest(cast("Any", Points()), cast("Any", lambda z_BD: z_BD), clusters, 1.0, 8)
    for k, members in enumerate((range(5), range(5, 8))):
        ids = [row for row, _ in rows[k]]
        assert sorted(ids) == list(members)
        apart = ((point_ND[ids] - center_KD[k]) ** 2).sum(1)
        assert (np.diff(apart) >= 0).all()
        assert min(p for _, p in rows[k]) > 0.99
