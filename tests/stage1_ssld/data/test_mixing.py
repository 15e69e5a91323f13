"""Mixup and cutmix: the pixels follow from partners and shares, shares follow their distribution, all of it from the seed alone."""

from typing import Any

import numpy as np
import pytest
import torch

from ssld.stage1_ssld.data.mixing import Mixed, mix_batch
from ssld.stage1_ssld.data_config import DataConfig

IMAGES, SIZE = 6, (20, 28)


def config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"train": ["images"], **settings})


def images_of(images: int = IMAGES, size: tuple[int, int] = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8, generator=generator)


def mixed(pixels: torch.Tensor, settings: DataConfig, seed: int) -> Mixed:
    result = mix_batch(pixels, settings, seed)
    assert result is not None
    assert result.pixels_BCHW.dtype == result.shares_B.dtype == torch.float32
    assert result.pixels_BCHW.shape == pixels.shape
    assert sorted(result.partners_B.tolist()) == list(range(len(pixels)))
    return result


@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_a_weighted_mean_of_two_images(seed: int) -> None:
    pixels = images_of()
    result = mixed(pixels, config(mixup=1.0), seed)
    images = pixels.double().numpy()
    for image, (partner, share) in enumerate(zip(result.partners_B.tolist(), result.shares_B.tolist(), strict=True)):
        expected = share * images[image] + (1 - share) * images[partner]
        np.testing.assert_allclose(result.pixels_BCHW[image].numpy(), expected, atol=1e-3)
    assert len(set(result.shares_B.tolist())) == IMAGES  # one share an image, not one a batch


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_a_rectangle_and_counts_its_pixels(seed: int) -> None:
    # Each image has one value of its own, which identifies the origin of every pixel.
    pixels = (torch.arange(IMAGES, dtype=torch.uint8) * 40)[:, None, None, None].expand(-1, 3, *SIZE).contiguous()
    result = mixed(pixels, config(cutmix=1.0), seed)
    for image, (partner, share) in enumerate(zip(result.partners_B.tolist(), result.shares_B.tolist(), strict=True)):
        values = result.pixels_BCHW[image].numpy()
        assert (values == values[0]).all()  # the same place in every channel
        if partner == image:
            continue
        pasted = values[0] == 40 * partner
        assert (pasted | (values[0] == 40 * image)).all()
        assert share == pytest.approx(1 - pasted.mean(), abs=1e-6)
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)
        for line in (rows, columns):
            assert (np.diff(line) == 1).all()


def test_cutmix_pastes_the_partners_own_pixels() -> None:
    pixels = images_of()
    result = mixed(pixels, config(cutmix=1.0), 1)
    own, partner = pixels.float(), pixels.float()[result.partners_B]
    assert ((result.pixels_BCHW == own) | (result.pixels_BCHW == partner)).all()
    assert 0 < (result.pixels_BCHW != own).float().mean() < 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    shares = mixed(images_of(4000, (1, 1)), config(mixup=alpha), 7).shares_B.double().numpy()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); limits of four standard errors or more
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean() == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)
    assert shares.var() == pytest.approx(variance, rel=0.1)
    assert 0 <= shares.min() < shares.max() <= 1


def test_area_of_cutmix_before_the_border_cuts_it() -> None:
    """Boxes cover 1 - share of a Beta(1, 1); half their sides fall outside now and then, so less is pasted than the half."""
    shares = mixed(images_of(2000, (32, 32)), config(cutmix=1.0), 3).shares_B
    assert 0.5 < shares.mean().item() < 0.75
    assert shares.min().item() < 0.2
    assert shares.max().item() == 1


def test_all_of_it_follows_from_the_seed() -> None:
    pixels, settings = images_of(), config(mixup=0.8, cutmix=1.0)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    one = mixed(pixels, settings, 11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = mixed(pixels, settings, 11), mixed(pixels, settings, 12)
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.shares_B, other.shares_B)


def test_one_kind_a_batch_and_both_in_turn() -> None:
    pixels, settings = images_of(), config(mixup=1.0, cutmix=1.0)
    kinds = []
    for seed in range(60):
        result = mixed(pixels, settings, seed)
        pasted = (result.pixels_BCHW == pixels) | (result.pixels_BCHW == pixels.float()[result.partners_B])
        kinds.append(bool(pasted.all()))
    assert 15 < sum(kinds) < 45


def test_share_of_the_batches() -> None:
    pixels = images_of(2, (4, 4))
    some = [mix_batch(pixels, config(mixup=1.0, mix_probability=0.3), seed) is not None for seed in range(300)]
    assert 60 < sum(some) < 120  # 90, four standard deviations either way
    assert mix_batch(pixels, config(mixup=1.0, mix_probability=0.0), 1) is None
    assert mix_batch(pixels, config(), 1) is None
