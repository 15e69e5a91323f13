"""Repeat factors of images with rare classes, and the resulting frequencies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.batch_order import BatchOrder, MixedOrder, repeat_factors
from ssld.stage2_detect.data.coco import CocoImage, read_coco
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.train import main

LABELS = [[0], [0, 0, 1], [0], [0, 2], [], [0], [0, 1], [0], [0], [0]]


def records(labels: list[list[int]]) -> list[CocoImage]:
    empty = np.zeros((0, 4))
    return [
        CocoImage(i, f"{i}.png", 8, 8, empty, np.array(some, dtype=np.int64), empty, empty, empty, (), None)
        for i, some in enumerate(labels)
    ]


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.5, 1.0])
def test_factors(threshold: float) -> None:
    """Class 0 is in 9 of 10 images, class 1 in 2, class 2 in 1, class 3 in none; counted by images, not by objects."""
    share = {0: 0.9, 1: 0.2, 2: 0.1}
    expected = [max([1.0, *(max(1.0, (threshold / share[c]) ** 0.5) for c in some)]) for some in LABELS]
    actual = repeat_factors(records(LABELS), 4, threshold)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert repeat_factors(records(LABELS), 4, 1.0)[3] == pytest.approx(10**0.5)


def counts(order: BatchOrder, epochs: int, images: int) -> np.ndarray:
    steps = range(epochs * order.steps_per_epoch)
    return np.bincount([index for step in steps for index in order.step(step)], minlength=images)


def test_frequencies_follow_the_factors() -> None:
    """500 epochs of 40 images: each image's frequency is its share of the factors, within 5 standard deviations."""
    factors = np.random.default_rng(0).uniform(1, 3.5, 40)
    factors[:10] = 1
    wide = [i % 3 > 0 for i in range(40)]
    order = BatchOrder(wide, batch_size=4, seed=2, repeats=factors)
    assert order.steps_per_epoch == 10
    actual = counts(order, 500, 40)
    assert actual.sum() == 500 * 40
    expected = 500 * 40 * factors / factors.sum()
    assert np.abs(actual - expected).max() < 5 * expected.max() ** 0.5


def test_whole_factors_repeat_exactly() -> None:
    """With whole factors the images of an epoch are the same in every epoch; only the order is random."""
    order = BatchOrder([True] * 6, batch_size=2, seed=1, repeats=np.array([1, 1, 1, 1, 3, 2.0]))
    lot = np.sort(order._images_of_epoch(0))
    assert lot.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5]
    assert np.sort(order._images_of_epoch(7)).tolist() == lot.tolist()


def test_a_fraction_is_drawn_per_epoch() -> None:
    order = BatchOrder([True] * 2000, batch_size=8, seed=1, repeats=np.full(2000, 1.25))
    twice = [np.bincount(order._images_of_epoch(epoch)) == 2 for epoch in range(2)]
    for some in twice:
        assert abs(some.mean() - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert (twice[0] != twice[1]).any()
    again = BatchOrder([True] * 2000, batch_size=8, seed=1, repeats=np.full(2000, 1.25))
    assert again.step(333) == order.step(333)
    other = BatchOrder([True] * 2000, batch_size=8, seed=2, repeats=np.full(2000, 1.25))
    assert (np.bincount(other._images_of_epoch(0)) == 2).tolist() != twice[0].tolist()


def test_factors_of_one_change_nothing() -> None:
    wide = [i % 2 == 0 for i in range(30)]
    plain = BatchOrder(wide, batch_size=4, seed=3)
    ones = BatchOrder(wide, batch_size=4, seed=3, repeats=np.ones(30))
    assert [plain.step(i) for i in range(20)] == [ones.step(i) for i in range(20)]


def test_ranks_cut_the_same_batches() -> None:
    factors = np.linspace(1, 4, 30)
    whole = BatchOrder([True] * 30, batch_size=12, seed=5, repeats=factors)
    cut = BatchOrder([True] * 30, batch_size=12, seed=5, ranks=2, accumulate=3, repeats=factors)
    for step in range(5):
        parts = [cut.micro_batch(step, rank, part) for rank in range(2) for part in range(3)]
        assert [index for part in parts for index in part] == whole.step(step)


def test_the_labeled_part_of_a_mixed_batch_is_repeated_too() -> None:
    factors = np.linspace(1, 4, 30)
    options: dict[str, Any] = {"seed": 5, "repeats": factors}
    mixed = MixedOrder([True] * 30, [True] * 20, batch_size=8, labeled_ratio=0.5, **options)
    alone = BatchOrder([True] * 30, batch_size=4, **options)
    assert [mixed.step(i)[:4] for i in range(9)] == [alone.step(i) for i in range(9)]


def test_a_repeated_image_has_two_views_per_epoch(tiny_coco: Any) -> None:
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    repeats = np.ones(12)
    repeats[5] = 30
    options: dict[str, Any] = {"batch_size": 1, "seed": 1, "start_step": 0, "stop_step": 12, "repeats": repeats}
    resize = ResizeConfig(train_short_sides=list(range(32, 96)), train_long_side=4096)
    loader = TrainLoader(data, resize, AugmentConfig(), **options)
    sizes = [tuple(batch.images.sizes_B2[0].tolist()) for batch in loader if batch.records[0] is data.images[5]]
    assert len(sizes) >= 6
    assert len(set(sizes)) > len(sizes) // 2


def test_training_repeats(
    train_settings: dict[str, Any], arguments: Any, call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_settings["data"]["repeat_threshold"] = 1.0
    train_settings["steps"] = 1
    assert call(main, arguments(train_settings)) == 0
    assert "images are repeated, up to 1." in capsys.readouterr().out
