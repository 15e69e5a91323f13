"""Mixup and cutmix of a batch on the device. The live teacher sees the mixed image too, so no soft label is mixed (FunMatch, arXiv 2106.05237).

Mixup: Zhang et al. 2018, arXiv 1710.09412. Cutmix: Yun et al. 2019, arXiv 1905.04899. Shares are drawn per image on the host, from a generator that
depends on the seed alone, so nothing waits for the device. Deliberately absent: mixing across ranks or micro-batches.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssld.stage1_ssld.data_config import DataConfig


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        pixels_BCHW: float32, 0..255.
        partners_B: int64, index of the image that each image was mixed with.
        shares_B: float32, share of the image itself in the mixture, 0..1.
    """

    pixels_BCHW: Tensor
    partners_B: Tensor
    shares_B: Tensor


def mix_batch(pixels_BCHW: Tensor, config: DataConfig, seed: int) -> Mixed | None:
    """Mix every image of a batch with another image of it; None if this batch is not mixed.

    Args:
        pixels_BCHW: uint8 views.
        config: `mixup` and `cutmix` (alphas of the Beta distribution of the shares), `mix_probability`.
        seed: seed of all draws.
    """
    random = np.random.default_rng(seed)
    if random.random() >= config.mix_probability or not config.mixes:
        return None
    images, (height, width) = len(pixels_BCHW), pixels_BCHW.shape[-2:]
    by_area = config.cutmix > 0 and (config.mixup == 0 or random.random() < 0.5)
    alpha = config.cutmix if by_area else config.mixup
    shares = random.beta(alpha, alpha, images)
    partners = random.permutation(images)
    device = pixels_BCHW.device
    partners_B = torch.from_numpy(partners).to(device, non_blocking=True)
    pixels = pixels_BCHW.float()
    if not by_area:
        shares_B = torch.from_numpy(shares.astype(np.float32)).to(device, non_blocking=True)
        kept = shares_B[:, None, None, None]
        return Mixed(kept * pixels + (1 - kept) * pixels[partners_B], partners_B, shares_B)
    boxes = _boxes(shares, height, width, random)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    shares_B = torch.from_numpy((1 - areas / (height * width)).astype(np.float32)).to(device, non_blocking=True)
    top, left, bottom, right = torch.from_numpy(boxes).to(device, non_blocking=True).T[..., None, None]
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside_BHW = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return Mixed(torch.where(inside_BHW[:, None], pixels[partners_B], pixels), partners_B, shares_B)


def _boxes(shares: np.ndarray, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Rectangles (top, left, bottom, right) [B,4] of area 1 - share around uniformly drawn centers, clipped to the image."""
    side = np.sqrt(1 - shares)
    middle = np.stack([random.integers(0, height, len(shares)), random.integers(0, width, len(shares))], axis=1)
    half = np.stack([side * height, side * width], axis=1) / 2
    low = np.clip(np.round(middle - half), 0, [height, width])
    high = np.clip(np.round(middle + half), 0, [height, width])
    return np.concatenate([low, high], axis=1).astype(np.int64)
