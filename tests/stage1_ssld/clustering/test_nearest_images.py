"""The images in `prototypes.png`."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from ssld.stage1_ssld.clustering import steps
from ssld.stage1_ssld.clustering.centers import Clusters


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_a_prototype_shows_the_nearest_of_its_own_images(offset: float) -> None:
    """Images of others that are nearer to a center, as beside a wide prototype, take no place of its own. With an offset, its border moves."""
    draw = np.random.default_rng(4)
    point_ND = np.concatenate([draw.normal(0, 3, (40, 2)), draw.normal([6, 0], 0.5, (40, 2))])
    center_KD, offset_K = np.array([[0.0, 0.0], [6.0, 0.0]]), np.array([0.0, offset])
    # softmax(-|x - c|^2 / 2 + offset), written out
    square_NK = ((point_ND[:, None] - center_KD) ** 2).sum(2)
    share_NK = np.exp(-square_NK / 2 + offset_K)
    share_NK /= share_NK.sum(1, keepdims=True)
    label_N = share_NK.argmax(1)

    class Points:
        def blocks(self, columns: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            assert columns == 2
            yield np.arange(35), point_ND[:35]
            yield np.arange(35, 80), point_ND[35:]

    clusters = Clusters(center_KD, offset_K, np.bincount(label_N, minlength=2), 0)
    rows = steps._nearest(cast("Any", Points()), cast("Any", lambda z_BD: z_BD), clusters, 1.0, 30)
    for k in range(2):
        own = np.flatnonzero(label_N == k)
        expected = own[np.argsort(square_NK[own, k])][:30]
        assert [row for row, _ in rows[k]] == expected.tolist()
        np.testing.assert_allclose([share for _, share in rows[k]], share_NK[expected, k], rtol=1e-9)
    first = np.argsort(square_NK[:, 0])[:30]
    assert (label_N[first] == 1).any()
