"""Sampling: exact counts, a hash that is what it says, and draws that depend on nothing but the seed and the index."""

import math

import pytest
import torch
from torch import Tensor

from stage2_detect.models.sampling import hash_priority, index_priority, sample


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_equals_unsigned_integer_arithmetic() -> None:
    mask = 2**64 - 1
    seeds = [0, 1, 12345678901234567, -3]
    ours = hash_priority(torch.tensor(seeds), 5, stream=2)
    for row, seed in zip(ours.tolist(), seeds, strict=True):
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
    ours = sample(labels, hash_priority(torch.tensor([3]), labels.shape[1], 0), count=64, positive_fraction=0.25)
    assert ours.index_BS.shape[1] == min(64, labels.shape[1])
    picked = labels.gather(1, ours.index_BS)[ours.valid_BS]
    assert (picked == 1).sum() == chosen_positives
    assert (picked == 0).sum() == chosen_negatives
    assert torch.equal(ours.positive_BS[ours.valid_BS], picked == 1)
    assert not (ours.positive_BS & ~ours.valid_BS).any()
    chosen = ours.index_BS[ours.valid_BS]
    assert chosen.unique().numel() == chosen.numel()


def test_index_order_takes_the_first() -> None:
    labels = torch.tensor([[0, 1, -1, 1, 0, 1, 0, 0]])
    ours = sample(labels, index_priority(torch.zeros(1), 8), count=4, positive_fraction=0.5)
    assert ours.index_BS.tolist() == [[1, 3, 0, 4]]


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
    ours = sample(labels, hash_priority(torch.arange(draws), places, 0), count=10, positive_fraction=0.5)
    times = ours.index_BS.flatten().bincount(minlength=places).float()
    expected = draws * 5 / 20
    assert (times - expected).abs().max() < 5 * math.sqrt(expected * 0.75)
