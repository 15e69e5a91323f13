"""Sampling: exact counts, a hash equal to its definition, and draws that depend on nothing but the seed and the index."""

import math

import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.models.sampling import Sample, hash_priority, index_priority, sample, spread_priority


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_equals_unsigned_integer_arithmetic() -> None:
    mask = 2**64 - 1
    seeds = [0, 1, 12345678901234567, -3]
    actual = hash_priority(torch.tensor(seeds), 5, stream=2)
    for row, seed in zip(actual.tolist(), seeds, strict=True):
        state = _splitmix((_splitmix(seed & mask) + 2) & mask)
        assert row == [_splitmix((state + i * 0x9E3779B97F4A7C15) & mask) >> 2 for i in range(1, 6)]


def test_priorities_are_uniform_and_streams_and_seeds_unrelated() -> None:
    count = 64_000
    rows = torch.cat((hash_priority(torch.tensor([7, 8]), count, 0), hash_priority(torch.tensor([7]), count, 1)))
    assert rows.min() >= 0
    unit = rows.double() / 2**62
    for row in unit:
        observed = torch.histc(row, bins=64, min=0, max=1)
        chi_square = ((observed - count / 64) ** 2 / (count / 64)).sum().item()
        assert chi_square < 110  # 63 degrees of freedom: beyond it one time in 5,000
        assert row.unique().numel() == count
    correlation = torch.corrcoef(torch.cat((unit, unit[:1].roll(1, dims=1))))
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(count)


def _labels(positives: int, negatives: int, ignored: int) -> Tensor:
    labels = torch.cat((torch.ones(positives), torch.zeros(negatives), -torch.ones(ignored))).long()
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("positives", "negatives", "chosen_positives", "chosen_negatives"),
    [(100, 400, 16, 48), (5, 400, 5, 59), (0, 400, 0, 64), (400, 10, 16, 10), (3, 4, 3, 4), (0, 0, 0, 0)],
)
def test_counts(positives: int, negatives: int, chosen_positives: int, chosen_negatives: int) -> None:
    labels = _labels(positives, negatives, 20)[None]
    actual = sample(labels, hash_priority(torch.tensor([3]), labels.shape[1], 0), count=64, positive_fraction=0.25)
    assert actual.index_BS.shape[1] == min(64, labels.shape[1])
    picked = labels.gather(1, actual.index_BS)[actual.valid_BS]
    assert (picked == 1).sum() == chosen_positives
    assert (picked == 0).sum() == chosen_negatives
    assert torch.equal(actual.positive_BS[actual.valid_BS], picked == 1)
    assert not (actual.positive_BS & ~actual.valid_BS).any()
    chosen = actual.index_BS[actual.valid_BS]
    assert chosen.unique().numel() == chosen.numel()


def test_index_order_takes_the_first() -> None:
    labels = torch.tensor([[0, 1, -1, 1, 0, 1, 0, 0]])
    actual = sample(labels, index_priority(torch.zeros(1), 8), count=4, positive_fraction=0.5)
    assert actual.index_BS.tolist() == [[1, 3, 0, 4]]


def test_a_draw_does_not_depend_on_the_batch_or_the_generator() -> None:
    labels = torch.stack([_labels(100, 300, 0), _labels(30, 370, 0), _labels(200, 200, 0)])
    seeds = torch.tensor([5, 6, 7])
    together = sample(labels, hash_priority(seeds, 400, 1), count=50, positive_fraction=0.5)
    torch.manual_seed(99)
    alone = sample(labels[1:2], hash_priority(seeds[1:2], 400, 1), count=50, positive_fraction=0.5)
    assert torch.equal(together.index_BS[1:2], alone.index_BS)
    other = sample(labels[1:2], hash_priority(seeds[1:2] + 1, 400, 1), count=50, positive_fraction=0.5)
    assert not torch.equal(other.index_BS, alone.index_BS)


def test_every_box_is_drawn_equally_often() -> None:
    draws, places = 4000, 40
    labels = torch.tensor([1] * 20 + [0] * 20).expand(draws, places)
    actual = sample(labels, hash_priority(torch.arange(draws), places, 0), count=10, positive_fraction=0.5)
    times = actual.index_BS.flatten().bincount(minlength=places).float()
    expected = draws * 5 / 20
    assert (times - expected).abs().max() < 5 * math.sqrt(expected * 0.75)


# Negatives spread over bins of IoU


def _spread(ious: Tensor, *, count: int, seeds: Tensor | None = None, fraction: float = 0.25, bins: int = 3) -> Sample:
    """A sample of RoIs that are positive from an IoU of 0.5 on, and not valid where it is below -1."""
    seeds = torch.arange(len(ious)) if seeds is None else seeds
    labels = torch.where(ious < -1, -1, (ious >= 0.5).long())
    priority = hash_priority(seeds, ious.shape[1], 1)
    priority = spread_priority(labels, ious, priority, count=count, positive_fraction=fraction, bins=bins)
    return sample(labels, priority, count=count, positive_fraction=fraction)


def _ious(count: int, images: int = 1) -> Tensor:
    """Mostly low, as of proposals; the object itself among them."""
    ious = torch.rand(images, count, generator=torch.Generator().manual_seed(4)) ** 3
    ious[:, 0] = 1.0
    return ious


@pytest.mark.parametrize(("count", "size"), [(64, 400), (64, 120), (200, 400), (512, 300)])
def test_each_bin_gives_its_share_and_chance_the_rest(count: int, size: int) -> None:
    """Against a loop over images and bins."""
    ious = _ious(size, images=3)
    ious[:, -7:] = -2.0  # no RoIs
    seeds = torch.tensor([3, 4, 5])
    actual = _spread(ious, count=count, seeds=seeds)
    priority = hash_priority(seeds, size, 1)
    for image in range(3):
        row = ious[image].tolist()
        by_priority = sorted(range(size), key=lambda i, image=image: -int(priority[image, i]))  # type: ignore[misc]
        positives = [i for i in by_priority if row[i] >= 0.5][: count // 4]
        expected = count - len(positives)
        negatives = [i for i in by_priority if 0 <= row[i] < 0.5]
        chosen: list[int] = []
        for low in (0, 1 / 3, 2 / 3):  # bins of 0..1, the object's IoU with itself; the last has no negative
            chosen += [i for i in negatives if low <= row[i] < low + 1 / 3][: expected // 3]
        chosen += [i for i in negatives if i not in chosen][: expected - len(chosen)]
        assert sorted(actual.index_BS[image][actual.valid_BS[image]].tolist()) == sorted(positives + chosen)
        assert sorted(actual.index_BS[image][actual.positive_BS[image]].tolist()) == sorted(positives)


def test_hard_negatives_are_drawn_more_often_than_by_chance() -> None:
    draws, size = 2000, 300
    ious = _ious(size).expand(draws, size)
    hard = (ious[0] >= 1 / 3) & (ious[0] < 0.5)
    rare = int(hard.sum())
    spread = _spread(ious, count=60, seeds=torch.arange(draws))
    share = hard[spread.index_BS].float().sum(dim=1).mean().item()
    assert share == min(rare, 15)  # 45 negatives, 15 of each bin; the third has none, and chance rarely finds more here
    labels = (ious >= 0.5).long()
    chance = sample(labels, hash_priority(torch.arange(draws), size, 1), count=60, positive_fraction=0.25)
    assert hard[chance.index_BS].float().sum(dim=1).mean().item() < 0.6 * share


def test_an_image_without_objects_draws_by_chance() -> None:
    """IoU is -1 everywhere there."""
    draws, size = 3000, 40
    actual = _spread(torch.full((draws, size), -1.0), count=10, seeds=torch.arange(draws))
    assert actual.valid_BS.all()
    assert not actual.positive_BS.any()
    times = actual.index_BS.flatten().bincount(minlength=size).float()
    expected = draws * 10 / size
    assert (times - expected).abs().max() < 5 * math.sqrt(expected * 0.75)


def test_few_negatives_and_none() -> None:
    few = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.4, -2.0], [0.9, 0.8, 0.7, 0.6, 0.6, 0.9, -2.0]])
    actual = _spread(few, count=6, fraction=0.5)
    assert actual.valid_BS.sum(dim=1).tolist() == [5, 3]
    assert actual.positive_BS.sum(dim=1).tolist() == [3, 3]
    assert sorted(actual.index_BS[0][3:5].tolist()) == [4, 5]
    nothing = _spread(torch.full((2, 3), -2.0), count=6)
    assert not nothing.valid_BS.any()


def test_bins_reach_to_the_highest_iou_of_the_image() -> None:
    """With a best IoU of 0.3 there are negatives in all three bins, of which 0..0.1 has most."""
    ious = torch.cat((torch.linspace(0, 0.099, 90), torch.linspace(0.11, 0.19, 5), torch.linspace(0.21, 0.3, 5)))[None]
    actual = _spread(ious, count=15)
    assert (actual.index_BS >= 90).sum() == 10


def test_a_spread_draw_does_not_depend_on_the_batch() -> None:
    ious = _ious(200, images=3)
    ious[2] = -1.0
    seeds = torch.tensor([5, 6, 7])
    together = _spread(ious, count=50, seeds=seeds)
    for image in range(3):
        alone = _spread(ious[image : image + 1], count=50, seeds=seeds[image : image + 1])
        assert torch.equal(together.index_BS[image : image + 1], alone.index_BS)
    other = _spread(ious[:1], count=50, seeds=seeds[:1] + 1)
    assert not torch.equal(other.index_BS, together.index_BS[:1])
