"""Inputs and outputs of a detector: images, targets, detections.

Files, category ids and names are absent on purpose: `data/` makes `ImageBatch` and `Targets`, and models see nothing else of it.

Shapes: B images, G objects (padded to the most of the batch, may be 0), C channels, H height, W width, N detections or boxes, K classes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssld.stage2_detect.models.mask_targets import ImageMasks


@dataclass(frozen=True)
class ImageBatch:
    """Images of unequal size in one padded tensor."""

    pixels_BCHW: Tensor
    """uint8 RGB, padded with zeros at the bottom and the right to a multiple of 32."""
    sizes_B2: Tensor
    """int64 true (height, width) of each image inside the padded one."""
    scales_B: Tensor
    """float32 network size / original size."""
    originals_B2: Tensor | None = None
    """int64 (height, width) of the originals, on the CPU, which boxes and masks end at; None: see `original_sizes`."""
    host: tuple[Tensor, Tensor] | None = None
    """`sizes_B2` and `scales_B` on the CPU, kept by `to`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageBatch":
        """Copy to `device`."""
        return replace(
            self,
            pixels_BCHW=self.pixels_BCHW.to(device, non_blocking=non_blocking),
            sizes_B2=self.sizes_B2.to(device, non_blocking=non_blocking),
            scales_B=self.scales_B.to(device, non_blocking=non_blocking),
            host=(self.sizes_B2, self.scales_B) if self.sizes_B2.device.type == "cpu" else self.host,
        )

    def on_host(self) -> tuple[Tensor, Tensor]:
        """Sizes int64 [B, 2] and scales float32 [B] on the CPU, without waiting for a GPU if the batch came there by `to`."""
        return self.host or (self.sizes_B2.cpu(), self.scales_B.cpu())

    def original_sizes(self) -> Tensor:
        """(height, width) of the originals, int64 [B, 2] on the CPU.

        Without `originals_B2` they follow from size and scale as in PaddleDetection (ppdet/modeling/post_process.py@666f597f), floor(size / scale +
        0.5), which may be a pixel off: sizes of the network's input are rounded.
        """
        if self.originals_B2 is not None:
            return self.originals_B2
        sizes_B2, scales_B = self.on_host()
        return (sizes_B2 / scales_B[:, None] + 0.5).floor().long()

    def pin_memory(self) -> "ImageBatch":
        """Copy to pinned memory; called by `DataLoader`."""
        return replace(
            self,
            pixels_BCHW=self.pixels_BCHW.pin_memory(),
            sizes_B2=self.sizes_B2.pin_memory(),
            scales_B=self.scales_B.pin_memory(),
        )


@dataclass(frozen=True)
class Targets:
    """Objects of each image, in coordinates of the network's input."""

    boxes_BG4: Tensor
    """float32 (x1, y1, x2, y2) in pixels; zeros where there is no object."""
    labels_BG: Tensor
    """int64 in 0..K-1; -1 where there is no object."""
    seeds_B: Tensor
    """int64 hash of (seed, step, image id), from which this image's samples at this step are drawn."""
    labeled_B: Tensor | None = None
    """bool, on the CPU: False is an image without annotations, used for distillation only; None: all images have annotations."""
    masks: tuple[ImageMasks, ...] | None = None
    """Shapes of the objects of each image, for a mask head; always on the CPU."""
    regressed_BG: Tensor | None = None
    """bool: False is an object whose sides are uncertain, which R-CNN detectors learn to find and to classify, but not to fit; None: fit all."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Copy to `device`."""
        return replace(
            self,
            boxes_BG4=self.boxes_BG4.to(device, non_blocking=non_blocking),
            labels_BG=self.labels_BG.to(device, non_blocking=non_blocking),
            seeds_B=self.seeds_B.to(device, non_blocking=non_blocking),
            regressed_BG=None if self.regressed_BG is None else self.regressed_BG.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Targets":
        """Copy to pinned memory; called by `DataLoader`."""
        return replace(
            self,
            boxes_BG4=self.boxes_BG4.pin_memory(),
            labels_BG=self.labels_BG.pin_memory(),
            seeds_B=self.seeds_B.pin_memory(),
        )

    def labels_of(self, objects_BN: Tensor) -> Tensor:
        """Return the classes of the objects at these indices: int64 [B, N] in 0..K-1; -1 for padding, so everywhere in a batch without objects."""
        if not self.labels_BG.shape[1]:
            return torch.full_like(objects_BN, -1)
        return self.labels_BG.gather(1, objects_BN)

    def fits(self, positive_BN: Tensor, objects_BN: Tensor) -> Tensor:
        """Mark the boxes whose sides are learned: bool [B, N], those of `positive_BN` whose object, at index `objects_BN`, is to be fitted."""
        if self.regressed_BG is None or not self.regressed_BG.shape[1]:
            return positive_BN
        return positive_BN & self.regressed_BG.gather(1, objects_BN)

    def first(self, count: int) -> "Targets":
        """Return the targets of the first `count` images."""
        parts = {name: value[:count] for name, value in vars(self).items() if value is not None}
        return Targets(**parts)


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first, on the CPU."""

    boxes_N4: Tensor
    """float32 (x1, y1, x2, y2) in pixels of the original image."""
    scores_N: Tensor
    """float32 in 0..1."""
    labels_N: Tensor
    """int64 in 0..K-1."""
    masks: list[Any] | None = None
    """COCO RLE of each, of the original image's size; None from a detector without masks."""

    def where(self, keep_N: Tensor) -> "Detections":
        """Return the detections for which `keep_N` (bool) is True."""
        masks = (
            None
            if self.masks is None
            else [mask for mask, keep in zip(self.masks, keep_N.tolist(), strict=True) if keep]
        )
        return Detections(self.boxes_N4[keep_N], self.scores_N[keep_N], self.labels_N[keep_N], masks)
