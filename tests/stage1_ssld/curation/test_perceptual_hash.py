"""The perceptual hash against the cosine transform written out, and what it stands and does not stand."""

import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ssld.shared.images import decode_image
from ssld.stage1_ssld.curation.perceptual_hash import perceptual_hash

CLASSES = ("disc", "ring", "stripes")


def drawn(kind: str, seed: int, jpeg: Any) -> torch.Tensor:
    return decode_image(jpeg(kind, seed))


def written_out(image_CHW: torch.Tensor) -> int:
    """Sums over all pixels in numpy's float64, one frequency after the other."""
    small = F.resize(image_CHW, [32, 32], antialias=True).numpy().astype(np.float64)
    grey = 0.299 * small[0] + 0.587 * small[1] + 0.114 * small[2]
    low = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            for y in range(32):
                for x in range(32):
                    wave = math.cos(math.pi * u * (2 * y + 1) / 64) * math.cos(math.pi * v * (2 * x + 1) / 64)
                    low[u, v] += grey[y, x] * wave
    low = low.round(6)
    return sum(1 << (8 * u + v) for u in range(8) for v in range(8) if low[u, v] > np.median(low))


def test_is_the_low_end_of_the_cosine_transform(jpeg: Any) -> None:
    for number, kind in enumerate(CLASSES):
        image = drawn(kind, number, jpeg)
        assert perceptual_hash(image)[0] == written_out(image)


def test_the_mirrored_hash_is_the_mirror_images(jpeg: Any) -> None:
    for number in range(6):
        image = drawn(CLASSES[number % 3], number, jpeg)
        own, mirrored = perceptual_hash(image)
        assert perceptual_hash(image.flip(-1)) == (mirrored, own)
        assert (own ^ mirrored).bit_count() > 6


def test_copies_are_near_and_others_far() -> None:
    """Smooth random images: a copy that was resized, brightened and compressed differs in 6 bits, another image in many more."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(0, 256, (20, 3, 7, 9), generator=generator, dtype=torch.uint8)
    images = F.resize(seeds, [90, 120], antialias=True)
    copies = []
    for image in images:
        changed = Image.fromarray((image.permute(1, 2, 0).numpy() * 0.9 + 20).astype(np.uint8)).resize((200, 130))
        buffer = io.BytesIO()
        changed.save(buffer, "JPEG", quality=40)
        copies.append(decode_image(buffer.getvalue()))
    own, other = ([perceptual_hash(image)[0] for image in group] for group in (list(images), copies))
    far = np.array([[(a ^ b).bit_count() for b in other] for a in own])
    # Where torch resizes without AVX2, grey levels differ by one, and one copy of these by 8 bits.
    assert sum(far.diagonal() <= 6) >= 18
    assert far.diagonal().max() <= 10
    assert far[~np.eye(20, dtype=bool)].min() > 10


def test_blank_pictures_are_alike_whatever_their_color() -> None:
    """No structure, no bit but the mean's; black has not even that."""
    values = {perceptual_hash(torch.full((3, 50, 70), grey, dtype=torch.uint8)) for grey in (3, 90, 255)}
    assert values == {(1, 1)}
    assert perceptual_hash(torch.zeros(3, 50, 70, dtype=torch.uint8)) == (0, 0)
    assert perceptual_hash(torch.zeros(3, 1, 1, dtype=torch.uint8)) == (0, 0)
