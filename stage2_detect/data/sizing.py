"""Image sizes outside training: one, or several views for test-time augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssld.stage2_detect.config import ResizeConfig, TTAConfig
from ssld.stage2_detect.data.padding import pad_images
from ssld.stage2_detect.data.views import View, fit_view, view_image
from ssld.stage2_detect.models.batch import ImageBatch


@dataclass(frozen=True)
class MultiScaleBatch:
    """Equal images in several sizes, for test-time augmentation."""

    batches: tuple[ImageBatch, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MultiScaleBatch":
        """Return a copy on `device`."""
        return MultiScaleBatch(tuple(batch.to(device, non_blocking=non_blocking) for batch in self.batches))

    def pin_memory(self) -> "MultiScaleBatch":
        """Return a copy in pinned memory; called by `DataLoader`."""
        return MultiScaleBatch(tuple(batch.pin_memory() for batch in self.batches))


@dataclass(frozen=True)
class Sizing:
    """Resizing of images for a detector; names as in the settings.

    Attributes:
        short_side, long_side: see `views.fit_view`.
        interpolation, kernel: see `views.view_image`.
        tta: views of test-time augmentation; None: one view.
    """

    short_side: int
    long_side: int
    interpolation: str = "bicubic"
    kernel: str = "reference"
    tta: TTAConfig | None = None

    @classmethod
    def of(
        cls,
        resize: ResizeConfig,
        *,
        short_side: int | None = None,
        long_side: int | None = None,
        tta: TTAConfig | None = None,
    ) -> "Sizing":
        """Return the evaluation sizes of a recipe, unless others are given."""
        short, long = short_side or resize.short_side, long_side or resize.long_side
        return cls(short, long, resize.interpolation, resize.kernel, tta)

    def view(self, height: int, width: int) -> View:
        """Return the view of an image of [height, width] without test-time augmentation."""
        return fit_view(height, width, short_side=self.short_side, long_side=self.long_side)

    def batch(self, images: Sequence[Tensor]) -> ImageBatch | MultiScaleBatch:
        """Resize and pad uint8 [3, H, W] images, at least one; returns a `MultiScaleBatch` if `tta` is set.

        The largest long side grows in proportion to the short side of a view.
        """
        if self.tta is None:
            return self._batch(images, self.short_side, self.long_side)
        sides = self.tta.short_sides or [self.short_side]
        longs = [round(self.long_side * side / self.short_side) for side in sides]
        return MultiScaleBatch(
            tuple(self._batch(images, short, long) for short, long in zip(sides, longs, strict=True))
        )

    def _batch(self, images: Sequence[Tensor], short_side: int, long_side: int) -> ImageBatch:
        originals = [(image.shape[1], image.shape[2]) for image in images]
        views = [fit_view(*size, short_side=short_side, long_side=long_side) for size in originals]
        resized = [
            view_image(image, view, self.interpolation, self.kernel) for image, view in zip(images, views, strict=True)
        ]
        return pad_images(resized, [view.scale for view in views], originals=originals)
