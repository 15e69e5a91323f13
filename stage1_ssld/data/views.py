"""Views of an image for student and teacher: a decoded image in, uint8 [3,S,S] out, to keep copies to the device small.

From decoder to batch, pixels are stored in channels-last layout (a [3,S,S] view of [S,S,3] memory), in which torch's resize takes half the time. Of a
PIL image only the crop becomes a tensor.

Augmentations are timm's. They work on PIL images and draw from the global generators, which `seeded_view` seeds for one view and restores.
TrivialAugment (Müller and Hutter 2021, arXiv 2103.10158) is one operation of RandAugment, always applied, at a uniformly drawn magnitude.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssld.shared.errors import UserError
from ssld.shared.images import DecodedImage, crop_of, pixels_of, seeded_torch, seeded_view
from ssld.stage1_ssld.data_config import DataConfig

_MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
_PIL_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TRIVIAL = "rand-n1-p1-m10-mstd101-inc1"  # mstd above 100: magnitudes uniform between 0 and m
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 3.3)  # Zhong et al. 2020, arXiv 1708.04896


def training_view(image: DecodedImage, key: str, view: int, config: DataConfig, seed: int) -> Tensor:
    """Make view number `view` of the image `key`, a function of these, the settings and the seed alone: uint8 [3,S,S].

    Raises UserError for an augmentation that timm does not know.
    """
    if config.train_view == "center":
        whole_CHW = pixels_of(image)
        return val_view(
            whole_CHW, image_size=config.image_size, val_crop=config.val_crop, interpolation=config.interpolation
        )
    # Only timm's augmentations draw from the generators of Python and NumPy.
    seeded = seeded_torch if config.augment is None else seeded_view
    with seeded(key, view, seed):
        pixels = _crop_and_flip(image, config)
        if config.augment is not None and torch.rand(()) < config.augment_probability:
            augmented = augmentation(config.augment, config.image_size, config.interpolation)(
                Image.fromarray(pixels.permute(1, 2, 0).numpy())
            )
            pixels = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
        return _erased(pixels) if config.erase and torch.rand(()) < config.erase else pixels


def val_view(image_CHW: Tensor, *, image_size: int, val_crop: float, interpolation: str = "bilinear") -> Tensor:
    """Resize the short side to image_size / val_crop and cut out the central square of `image_size` pixels: uint8 [3,S,S]."""
    height, width = image_CHW.shape[-2:]
    short = max(image_size, round(image_size / val_crop))
    scale = short / min(height, width)
    resized = F.resize(
        image_CHW,
        [max(short, round(height * scale)), max(short, round(width * scale))],
        _MODES[interpolation],
        antialias=True,
    )
    return F.center_crop(resized, [image_size, image_size])


@functools.cache
def augmentation(
    augment: str, image_size: int, interpolation: str = "bilinear"
) -> Callable[[Image.Image], Image.Image]:
    """Create timm's augmentation for PIL images of `image_size` pixels. Raises UserError for a policy that timm does not know."""
    settings = {
        "translate_const": int(image_size * 0.45),
        "img_mean": (124, 116, 104),
        "interpolation": _PIL_MODES[interpolation],
    }
    try:
        for section in augment.split("-")[1:]:
            if not section.startswith("t") and not any(letter.isdigit() for letter in section):
                raise ValueError(f"no number in {section!r}")  # timm would ignore the section silently
        policy = _TRIVIAL if augment == "trivial" else augment
        if policy.startswith("rand"):
            transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, settings)
        elif policy.startswith("augmix"):
            transform = augment_and_mix_transform(policy, settings)
        else:
            transform = auto_augment_transform(policy, settings)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"data.augment: {augment}: not one of timm's policies ({type(error).__name__} {error}); "
            "use rand-m9-mstd0.5-inc1, original, v0, augmix-m3-w3 or trivial"
        ) from None
    return transform


def _crop_and_flip(image: DecodedImage, config: DataConfig) -> Tensor:
    top, left, height, width = RandomResizedCrop.get_params(image, list(config.crop_area), list(config.crop_ratio))
    crop_CHW = crop_of(image, top, left, height, width)
    # torch detects channels-last from the stride of the batch dimension too, so it has to be right even for one image
    crop_1CHW = crop_CHW.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    size = [config.image_size, config.image_size]
    view = interpolate(crop_1CHW, size, mode=config.interpolation, align_corners=False, antialias=True)[0]
    return view.flip(-1) if torch.rand(()) < config.flip else view


def _erased(pixels_CHW: Tensor) -> Tensor:
    top, left, height, width, _ = RandomErasing.get_params(pixels_CHW, _ERASED_AREA, _ERASED_RATIO, [0.0])
    pixels_CHW = pixels_CHW.clone()
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    pixels_CHW[:, top : top + height, left : left + width] = noise
    return pixels_CHW
