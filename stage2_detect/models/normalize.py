"""Normalization of a uint8 batch, on the device: uint8 is a quarter of the bytes to copy.

The padding is zeroed *after* normalizing, as in the references: the other order changes features by 14-22 %.

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssld.stage2_detect.models.batch import ImageBatch


class Normalize(nn.Module):
    """Normalizes the pixels of a batch to float32 [B, C, H, W], with zeros in the padding.

    Args:
        mean, std: mean and standard deviation of the backbone's input, for red, green, blue in units of 0..1.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not in the state dict: they are part of the backbone's description, which is stored beside the weights.
        self.register_buffer("mean_C11", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        """Normalize a batch; memory format and device stay."""
        H, W = images.pixels_BCHW.shape[-2:]
        device = images.pixels_BCHW.device
        rows_BH = torch.arange(H, device=device) < images.sizes_B2[:, :1]
        columns_BW = torch.arange(W, device=device) < images.sizes_B2[:, 1:]
        outside_B1HW = ~(rows_BH[:, :, None] & columns_BW[:, None, :])[:, None]
        # In place: on a CPU, new memory for each step takes four times as long.
        pixels_BCHW = images.pixels_BCHW.to(torch.float32, copy=True)
        return pixels_BCHW.sub_(self.mean_C11).div_(self.std_C11).masked_fill_(outside_B1HW, 0.0)
