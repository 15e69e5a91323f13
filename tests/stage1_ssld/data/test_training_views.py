"""Batches as a function of the step, views of sources, and images that cannot be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage1_ssld.data.batch import NO_LABEL, collate
from ssld.stage1_ssld.data.loaders import StepSampler, TrainingData, TrainViews, ValViews, make_loader, val_batches
from ssld.stage1_ssld.data.soft_labels import record_layout
from ssld.stage1_ssld.data.sources import open_sources
from ssld.stage1_ssld.data.streams import plan_streams, shares
from ssld.stage1_ssld.data_config import DataConfig, SourceConfig

# ---- batches


def sampler(**changes: int) -> StepSampler:
    settings: dict[str, Any] = {
        "batch_size": 12,
        "steps": 9,
        "start_step": 0,
        "seed": 3,
        "rank": 0,
        "ranks": 1,
        "accumulate": 1,
    }
    return StepSampler(25, **(settings | changes))


def test_every_image_once_a_pass() -> None:
    numbers = [item for batch in sampler(steps=25) for item in batch]
    assert len(numbers) == 300
    for epoch in range(12):
        indices = [index for index, number in numbers[25 * epoch : 25 * epoch + 25] if number == epoch]
        assert sorted(indices) == list(range(25))
    orders = {tuple(index for index, _ in numbers[25 * epoch : 25 * epoch + 25]) for epoch in range(12)}
    assert len(orders) == 12
    assert list(sampler(seed=4)) != list(sampler())


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (2, 1), (2, 3), (3, 2)])
def test_ranks_and_accumulation_cut_the_same_batches(ranks: int, accumulate: int) -> None:
    parts = [list(sampler(rank=rank, ranks=ranks, accumulate=accumulate)) for rank in range(ranks)]
    assert len(sampler(ranks=ranks, accumulate=accumulate)) == len(parts[0]) == 9 * accumulate
    for step, whole in enumerate(sampler()):
        pieces = [part[step * accumulate + micro] for part in parts for micro in range(accumulate)]
        assert {len(piece) for piece in pieces} == {12 // (ranks * accumulate)}
        assert [item for piece in pieces for item in piece] == whole


def test_going_on_is_the_tail() -> None:
    for start in (1, 4, 8):
        assert list(sampler(start_step=start)) == list(sampler())[start:]
        assert (
            list(sampler(start_step=start, rank=1, ranks=2, accumulate=2))
            == list(sampler(rank=1, ranks=2, accumulate=2))[2 * start :]
        )
    assert list(sampler(start_step=9)) == []


def test_batch_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match="batch_size: 12 is not a multiple of 5 processes x accumulate 1"):
        sampler(ranks=5)


def test_validation_batches_do_not_depend_on_ranks() -> None:
    assert val_batches([7, 2, 5], 2, 0, 1) == [[7, 2], [5]]
    whole = val_batches(range(23), 4, 0, 1)
    assert [row for batch in whole for row in batch] == list(range(23))
    for ranks in (2, 3, 7):
        parts = [val_batches(range(23), 4, rank, ranks) for rank in range(ranks)]
        assert sorted(batch for part in parts for batch in part) == whole


# ---- weighted sources

BOUNDS = ((0, 5), (5, 20), (20, 30))


def weighted(**changes: Any) -> StepSampler:
    settings = {"batch_size": 10, "steps": 12, "start_step": 0, "seed": 3, "rank": 0, "ranks": 1, "accumulate": 1}
    return StepSampler([5, 15, 10], weights=[2, 1, 1], **(settings | changes))


def test_weights_are_the_shares_of_every_pass() -> None:
    numbers = [item for batch in weighted() for item in batch]
    assert len(numbers) == 120
    orders = set()
    for first in range(0, 120, 30):  # a pass is as long as all sources together
        drawn = [sum(low <= index < high for index, _ in numbers[first : first + 30]) for low, high in BOUNDS]
        assert drawn == [15, 8, 7]  # 2 : 1 : 1 of 30; the half that is left goes to the first
        orders.add(tuple(index < 5 for index, _ in numbers[first : first + 30]))
    assert len(orders) == 4  # sources are mixed, anew in every pass


def test_each_weighted_source_goes_through_its_own_images_in_turn() -> None:
    numbers = [item for batch in weighted() for item in batch]
    for low, high in BOUNDS:
        own = [(index, view) for index, view in numbers if low <= index < high]
        assert len(set(own)) == len(own)  # no view twice
        last = max(view for _, view in own)
        for view in range(last):
            assert sorted(index for index, number in own if number == view) == list(range(low, high))


def test_every_own_pass_has_an_order_of_its_own() -> None:
    """The last source begins its first and its eighth pass with places 0 and 70 of its own: other images come first."""
    numbers = [item for batch in weighted(steps=33) for item in batch]
    first, later = ({i for i, _ in numbers[30 * n : 30 * n + 30] if i >= 20} for n in (0, 10))
    assert len(first) == len(later) == 7
    assert first != later


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 5)])
def test_weighted_batches_do_not_depend_on_ranks_or_on_where_they_begin(ranks: int, accumulate: int) -> None:
    parts = [list(weighted(rank=rank, ranks=ranks, accumulate=accumulate)) for rank in range(ranks)]
    for step, whole in enumerate(weighted()):
        pieces = [part[step * accumulate + micro] for part in parts for micro in range(accumulate)]
        assert [item for piece in pieces for item in piece] == whole
    assert list(weighted(start_step=7)) == list(weighted())[7:]


def test_a_weight_too_small_for_one_image() -> None:
    with pytest.raises(UserError, match=r"data\.train\.1\.weight: too small: less than one image per pass of 30"):
        StepSampler(
            [10, 20], batch_size=2, steps=1, start_step=0, seed=0, rank=0, ranks=1, accumulate=1, weights=[1, 1e-3]
        )


def test_shares_by_largest_remainder() -> None:
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([5, 3, 2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert shares([0.1, 0.9], 1) == [0, 1]
    assert shares([3], 8) == [8]


# ---- views of a source


def views(*folders: Path, **changes: Any) -> TrainViews:
    config = DataConfig(train=[SourceConfig(path=folder) for folder in folders], image_size=16, **changes)
    sources = open_sources(config.train, "data.train")
    return TrainViews(sources, [opened.labels for opened in sources], config, seed=1)


def test_views_do_not_depend_on_order_or_workers(tiny: Any) -> None:
    data = views(tiny.train, tiny.unlabeled)
    order = [[(3, 0), (40, 0), (12, 1)], [(3, 1), (31, 0), (12, 0)]]
    loaded: dict[Any, list[torch.Tensor]] = {}
    for workers in (0, 2):
        for batch in make_loader(data, order, workers=workers, pin_memory=False):
            for pixels, label, key in zip(batch.pixels_BCHW, batch.labels_B.tolist(), batch.keys, strict=True):
                loaded.setdefault((key, label), []).append(pixels)
    (_, label_3, key_3, *_), (_, label_40, key_40, *_) = data[3, 0], data[40, 0]
    assert (label_3, label_40) == (0, NO_LABEL)
    assert key_3.startswith("0:disc/")
    assert key_40.startswith("1:")
    first, later, first_again, later_again = loaded[key_3, 0]
    assert torch.equal(first, first_again)
    assert torch.equal(later, later_again)
    assert not torch.equal(first, later)  # another pass, another view
    again = data[3, 0][0]
    assert again is not None
    assert torch.equal(again, first)


def test_an_unreadable_image_is_replaced_by_the_next(tmp_path: Path, jpeg: Any) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(seed=ord(name))[: 400 if name in "bd" else None])
    data = views(tmp_path)
    pixels, _, key, unreadable, _ = data[1, 0]
    assert key == "0:c.jpg"
    assert unreadable == [str(tmp_path / "b.jpg")]
    plain = data[2, 0][0]
    assert pixels is not None
    assert plain is not None
    assert torch.equal(pixels, plain)
    assert data[3, 0][2:4] == ("0:a.jpg", [str(tmp_path / "d.jpg")])
    batch = collate([data[1, 0], data[0, 0], data[3, 0]])
    assert batch.keys == ["0:c.jpg", "0:a.jpg", "0:a.jpg"]
    assert batch.unreadable == [str(tmp_path / "b.jpg"), str(tmp_path / "d.jpg")]
    evaluated = ValViews(data.sources[0], None, image_size=16, val_crop=1.0)
    batch = collate([evaluated[row] for row in range(4)])
    assert batch.keys == ["0:a.jpg", "0:c.jpg"]
    assert batch.unreadable == [str(tmp_path / "b.jpg"), str(tmp_path / "d.jpg")]
    assert collate([evaluated[1]]).pixels_BCHW.shape[0] == 0


# ---- a store of soft labels


class FakeStore:
    """Stands in for a store: 2 views of the seed 9; image 1 was unreadable when it was written."""

    views, seed = 2, 9

    def record(self, source: int, row: int, view: int) -> np.void:
        if row == 1:
            raise UnreadableImage("row 1", "was unreadable")
        stored: np.void = np.array([(-0.5, [source, row], [view, 0])], record_layout(2, 5, "fp16"))[0]
        return stored


def test_views_of_a_store_are_those_its_soft_labels_were_written_for(tiny: Any) -> None:
    live = views(tiny.train, tiny.unlabeled)
    live.seed = 9
    stored = TrainViews(live.sources, live.labels, live.config, seed=1, store=FakeStore())
    for view in (0, 1, 2, 3):  # pass 2 sees view 0 again
        actual, other = stored[32, view], live[32, view % 2]
        assert actual.pixels_CHW is not None
        assert other.pixels_CHW is not None
        assert torch.equal(actual.pixels_CHW, other.pixels_CHW)
        assert actual.key == other.key
        assert actual.soft is not None
        assert actual.soft["classes"].tolist() == [1, 2]  # row 2 of the second source
        assert actual.soft["log_probs"].tolist() == [view % 2, 0]
    replaced = stored[1, 0]
    assert replaced.key == stored[2, 0].key
    assert replaced.unreadable == [live.sources[0].location(1)]
    soft = collate([stored[0, 0], stored[1, 1]]).soft
    assert soft is not None
    assert soft.classes_Bm is not None
    assert soft.classes_Bm.tolist() == [[0, 0], [0, 2]]
    assert soft.logits_BM.tolist() == [[0, 0, -0.5], [1, 0, -0.5]]


# ---- what the loop is given


def training(tiny: Any, folders: list[Any], **changes: Any) -> TrainingData:
    settings = {"train": folders, "image_size": 16, **changes.pop("data", {})}
    config = DistillConfig.model_validate(
        {
            "output": "unused",
            "data": settings,
            "student": "random:test_convnext",
            "teacher": "random:test_resnet",
            "steps": 4,
            "batch_size": 6,
            "optim": {"lr": 0.1, "reference_batch": 6},
            "workers": 0,
            **changes,
        }
    )
    if config.data.streaming:
        return TrainingData(config, [], [], plan=plan_streams(config.data, config.batch_size, config.seed))
    sources = open_sources(config.data.train, "data.train")
    return TrainingData(config, sources, [None] * len(sources))


def test_training_batches_by_rows(tiny: Any) -> None:
    data = training(tiny, [tiny.train, tiny.unlabeled])
    assert data.images == 44
    batches = list(data.batches(0, 4, rank=0, ranks=1, pin_memory=False))
    assert [batch.pixels_BCHW.shape for batch in batches] == [(6, 3, 16, 16)] * 4
    again = list(data.batches(2, 4, rank=0, ranks=1, pin_memory=False))
    assert [batch.keys for batch in again] == [batch.keys for batch in batches[2:]]
    halves = [next(data.batches(0, 1, rank=rank, ranks=2, pin_memory=False)).keys for rank in range(2)]
    assert halves[0] + halves[1] == batches[0].keys


def test_training_batches_by_weight(tiny: Any) -> None:
    data = training(
        tiny, [{"path": tiny.train, "weight": 1}, {"path": tiny.unlabeled, "weight": 3}], steps=8, batch_size=11
    )
    assert data.images == 44
    keys = [key for batch in data.batches(0, 4, rank=0, ranks=1, pin_memory=False) for key in batch.keys]
    assert sum(key.startswith("1:") for key in keys) == 33


def test_an_unknown_augmentation_is_told_before_training(tiny: Any) -> None:
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"data\.augment: rand-x9: not one of timm's policies"):
            training(tiny, [tiny.train], data={"augment": "rand-x9", "streaming": streaming})


def test_a_batch_that_no_number_of_ranks_can_share(tiny: Any) -> None:
    for streaming in (False, True):
        data = training(tiny, [tiny.train], data={"streaming": streaming})
        with pytest.raises(UserError, match="batch_size: 6 is not a multiple of 4 processes x accumulate 1"):
            next(data.batches(0, 4, rank=0, ranks=4, pin_memory=False))
