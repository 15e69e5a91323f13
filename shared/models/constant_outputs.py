"""Networks whose outputs are the same whatever image they see: their soft labels and features would teach nothing, and look like any other."""

import torch
from torch import Tensor

from ssld.shared.errors import UserError

_SAME = 2e-7  # relative difference of two outputs that rounding to float32 explains; of a new RetinaNet with 16 channels it is 4e-7
_BLOCK = 8  # pixels


def two_images(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Two images that no network confuses, blocks of random colors and black: uint8 [2, 3, height, width]."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    blocks = torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8, generator=generator)
    colors = blocks.repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)[:, :height, :width]
    return torch.stack([colors, torch.zeros_like(colors)]).to(device)


def refuse_constant(outputs_2D: Tensor, name: object) -> None:
    """Raise UserError, with `name` in front, where the outputs [2, ...] for `two_images` are equal, or none of them is finite."""
    first, second = outputs_2D.float().flatten(1)
    if not bool(torch.isfinite(outputs_2D).any()):
        what = "its outputs are NaN or infinite for every image"
    elif bool((first - second).abs().max() <= _SAME * torch.maximum(first.abs(), second.abs()).max()):
        what = "its outputs are the same for every image"
    else:
        return
    raise UserError(f"{name}: {what}: its weights are zero or damaged, or of another arch; give another file")
