"""Settings of the augmentation of training images, and its named sets. Does not import torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ssld.shared.config.settings import Config

Probability = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=100)]

_LIGHT = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
_ANY_SIDE_UP = {"vertical_flip": 0.5, "quarter_turns": 0.5}
PRESETS: dict[str, dict[str, float]] = {
    "light": _LIGHT,
    "strong": {
        **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.05, "blur": 0.1},
        **{"crop": 0.5, "erasing": 0.2, "copy_paste": 0.3, "mosaic": 0.3, "mixup": 0.1},
    },
    "aerial": {**_LIGHT, **_ANY_SIDE_UP, "crop": 0.5, "copy_paste": 0.2, "mosaic": 0.3},
    "cells": {**_ANY_SIDE_UP, "brightness": 0.3, "contrast": 0.3, "saturation": 0.2, "blur": 0.1, "crop": 0.3},
}
"""values of the named sets; all other settings keep their defaults. `strong`: photos with a natural top, such as of animals or traffic. `aerial` and
`cells`: images from above or through a microscope, which can be mirrored and turned; colors of stains mean something, so `cells` keeps the hue."""


class StrongViewConfig(Config):
    """Changes of the colors of unlabeled images in the view that a detector under a moving teacher learns from; the teacher sees none of them."""

    brightness: float = Field(0.4, ge=0, le=1)
    """largest relative change of the brightness, 0 to 1"""
    contrast: float = Field(0.4, ge=0, le=1)
    """largest relative change of the contrast, 0 to 1"""
    saturation: float = Field(0.4, ge=0, le=1)
    """largest relative change of the saturation, 0 to 1"""
    hue: float = Field(0.1, ge=0, le=0.5)
    """largest shift of the hue, as a fraction of the color circle, 0 to 0.5"""
    blur: Probability = 0.5
    """probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels, 0 to 1"""
    erasing: Probability = 0.5
    """probability that a rectangle of 2 to 15 % of the area is filled with the mean color, 0 to 1; it may hide an object"""


class AugmentConfig(Config):
    """Augmentation of training images beyond size and horizontal flip; the name of a set stands for all of its values."""

    preset: Literal["light", "strong", "aerial", "cells"] | None = None
    """named set of values for the settings below that are not given: light, strong, aerial or cells; null: none"""
    vertical_flip: Probability = 0.0
    """probability of a vertical flip, 0 to 1"""
    quarter_turns: Probability = 0.0
    """probability of a rotation by 90, 180 or 270 degrees, 0 to 1"""
    crop: Probability = 0.0
    """probability of a crop of 30 to 100 % of the area that keeps at least one object, 0 to 1; objects of which less than 30 % remain are dropped"""
    brightness: float = Field(0.0, ge=0, le=1)
    """largest relative change of the brightness, 0 to 1"""
    contrast: float = Field(0.0, ge=0, le=1)
    """largest relative change of the contrast, 0 to 1"""
    saturation: float = Field(0.0, ge=0, le=1)
    """largest relative change of the saturation, 0 to 1"""
    hue: float = Field(0.0, ge=0, le=0.5)
    """largest shift of the hue, as a fraction of the color circle, 0 to 0.5"""
    blur: Probability = 0.0
    """probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels, 0 to 1"""
    erasing: Probability = 0.0
    """probability that a rectangle of 2 to 15 % of the area is filled with the mean color, 0 to 1; it hides at most half of any box"""
    copy_paste: Probability = 0.0
    """probability that objects of another image are pasted, by their masks or else their boxes (arXiv 2012.07177), 0 to 1"""
    mosaic: Probability = 0.0
    """probability of a mosaic of four images (arXiv 2004.10934), 0 to 1"""
    mixup: Probability = 0.0
    """probability that another image is blended in, with the objects of both (arXiv 1902.04103), 0 to 1"""
    compose_until: Probability = 0.9
    """fraction of the run after which no image is composed of several any more (copy_paste, mosaic, mixup), 0 to 1"""
    auto_augment: bool = False
    """AutoAugment for detection, policy v1 (arXiv 1906.11172), applied to the image before resizing"""
    auto_augment_unlabeled: bool | None = None
    """AutoAugment on the unlabeled images; null: the value of auto_augment"""
    large_scale_jitter: tuple[Scale, Scale] | None = None
    """smallest and largest scale of the image relative to a square of train_long_side, to which it is cropped or padded (arXiv
    2012.07177); replaces train_short_sides; null: off"""

    @model_validator(mode="before")
    @classmethod
    def _named_set(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if isinstance(values, dict):
            values = {**PRESETS.get(str(values.get("preset")), {}), **values}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "AugmentConfig":
        if self.large_scale_jitter and self.large_scale_jitter[0] > self.large_scale_jitter[1]:
            raise ValueError("large_scale_jitter: the smallest scale comes first")
        if self.large_scale_jitter and self.crop:
            raise ValueError("large_scale_jitter crops already: set crop to 0")
        if (total := self.copy_paste + self.mosaic + self.mixup) > 1:
            raise ValueError(
                f"copy_paste, mosaic and mixup: an image is composed in one of these ways, so their probabilities "
                f"add up to at most 1, not {total:g}"
            )
        return self
