"""Initial weights that suit the scale of a backbone's feature maps.

A pyramid and heads with Xavier weights expect inputs of about unit scale. The maps of some backbones are several times as large (7.7 for stride 4 of
EfficientNet-Lite0), and the first losses with them: at a usual learning rate the training diverges. Dividing the first convolutions by the scale
that the maps have on a batch (data-dependent initialization, arXiv 1511.06856) gives the heads maps of unit scale. The gradients of these weights are
still larger by the scale, and the weights smaller by it, so their learning rate is divided too: the training is then that of a body whose maps are
divided.
"""

import math
from collections.abc import Sequence

from ssld.shared.errors import UserError
from ssld.stage2_detect.config import AugmentConfig, ResizeConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import Detector

_IMAGES = 8
_LEAST = 1e-6  # a map below it is zero but for rounding


def sample_images(data: CocoData, resize: ResizeConfig, augment: AugmentConfig, seed: int) -> ImageBatch:
    """Return eight random training images with their augmentation; independent of the batch size and of the number of processes."""
    size = min(_IMAGES, len(data.images))
    return next(iter(TrainLoader(data, resize, augment, batch_size=size, seed=seed, start_step=0, stop_step=1))).images


def measure(detector: Detector, images: ImageBatch, arch: str) -> list[float]:
    """Return the scale (root mean square) of each of the backbone's maps, finest first. The detector is not changed.

    Raises UserError if a map is zero everywhere or not finite.
    """
    scales = detector.pyramid.feature_scales(detector.normalize(images))
    for stride, scale in zip(_strides(detector), scales, strict=True):
        if not _LEAST < scale < math.inf:
            raise UserError(
                f"backbone {arch} cannot be trained: its map of stride {stride} is {'zero' if scale <= _LEAST else scale} on "
                f"{len(images.sizes_B2)} training images; give other weights"
            )
    return scales


def lr_factors(detector: Detector, scales: Sequence[float], optimizer: str) -> dict[str, float]:
    """Return the learning-rate factor of each divided weight, by its name in the detector.

    With W = V / s on maps x, and V what a body of maps x / s would have, a step of SGD on V changes W by 1 / s^2 of a step on W, and a step of Adam,
    which does not depend on the gradient's scale, by 1 / s.
    """
    power = 1 if optimizer == "adamw" else 2
    return {f"pyramid.{name}": scale**-power for name, scale in detector.pyramid.input_scales(scales).items()}


def describe(detector: Detector, scales: Sequence[float]) -> str:
    """Return a line for the log on the measured scales."""
    parts = [f"{scale:.3g} (stride {stride})" for stride, scale in zip(_strides(detector), scales, strict=True)]
    return f"unit_scale: the FPN's lateral convolutions are divided by the root mean square of the backbone's maps: {', '.join(parts)}"


def _strides(detector: Detector) -> tuple[int, ...]:
    return detector.pyramid.strides[: len(detector.pyramid.fpn.inner_blocks)]
