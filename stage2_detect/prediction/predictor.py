"""A detector for other programs: images in, objects out.

Legend: N objects of an image.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, decode_image
from ssld.stage2_detect.data.image_files import images_of_any_size
from ssld.stage2_detect.data.loaders import ImageLoader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.evaluation.scoring import detections
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.prediction.tiles import ImageWindow, merged_windows, pixels_of_window, window_batches

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

GivenImage = str | Path | Image.Image | np.ndarray
"""A file, turned upright by its EXIF; an image of PIL's, whose pixels are taken as they are, whatever its EXIF says (`PIL.ImageOps.exif_transpose`
turns it); or uint8 [height, width, 3], RGB."""


@dataclass(frozen=True)
class ImageDetections:
    """The objects of one image, best first. Iterating gives (class name, score, box) of each."""

    boxes_N4: np.ndarray
    """float32 (x1, y1, x2, y2) in pixels"""
    scores_N: np.ndarray
    """float32 in 0..1"""
    labels_N: np.ndarray
    """int64: positions in the detector's `class_names`"""
    names: list[str]
    masks: list[Any] | None = None
    """COCO RLE of each, from a detector with masks"""

    class_names: tuple[str, ...] = ()
    """all that the detector knows"""

    def draw(self, image: GivenImage) -> Image.Image:
        """The image with these objects, names and scores; `image` is what they were found in, or its pixels in another form."""
        labels_N = torch.from_numpy(self.labels_N)
        found = Detections(torch.from_numpy(self.boxes_N4), torch.from_numpy(self.scores_N), labels_N, self.masks)
        drawn_on = Image.fromarray(np.ascontiguousarray(_pixels(image).permute(1, 2, 0).numpy()))
        return draw_objects(drawn_on, found, self.class_names, legend=True)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, float, list[float]]]:
        return iter(zip(self.names, self.scores_N.tolist(), self.boxes_N4.tolist(), strict=True))


def found_in_images(
    fast: Detector,
    loader: ImageLoader[ImageWindow],
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float,
    keep_K: torch.Tensor | None = None,
) -> Iterator[tuple[Any, Detections, float]]:
    """(record, its objects from `threshold` on, best score of any) of each image of a loader, its windows merged, in the loader's order.

    `fast` is a detector of `for_inference`; with `keep_K` (bool) other classes do not count.
    """
    seen = detections(fast, loader, device=device, dtype=dtype)
    for record, views in itertools.groupby(seen, key=lambda pair: pair[0].record):
        parts, best = [], 0.0
        for shown, found in views:
            if keep_K is not None:
                found = found.where(keep_K[found.labels_N])
            best = max([best, *found.scores_N.tolist()])
            parts.append((shown.window, found.where(found.scores_N >= threshold)))
        yield record, merged_windows(parts, record.width, record.height), best


def predict(
    loaded: "LoadedDetector",
    images: Sequence[GivenImage],
    *,
    threshold: float = 0.5,
    batch_size: int = 4,
    tile: int | None = None,
    overlap: float = 0.2,
) -> list[ImageDetections]:
    """What each image shows, with scores from `threshold` on, in the sizes that the detector's recipe evaluates at.

    With `tile`, squares of so many pixels, which overlap by so large a share, are looked at beside the whole image (see `tiles.py`). Runs where the
    detector's weights are: `loaded.model.to("cuda")` before the first call moves it. Raises UserError for a file that cannot be read,
    ValueError for sizes that make no sense.
    """
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("predict takes a list of images")
    if batch_size < 1 or (tile is not None and tile < 1) or not 0 <= overlap < 1:
        raise ValueError(
            f"batch_size {batch_size}, tile {tile}, overlap {overlap}: at least 1, at least 1 pixel, and from 0 to below 1"
        )
    device = next(loaded.fast.parameters()).device
    decoded = (_Decoded(_pixels(image)) for image in images)
    loader = ImageLoader(window_batches(decoded, batch_size, tile, overlap), pixels_of_window, Sizing.of(loaded.resize))
    found = found_in_images(loaded.fast, loader, device=device, dtype=torch.float32, threshold=threshold)
    with images_of_any_size(tile is not None):
        return [_objects(loaded, objects) for _, objects, _ in found]


@dataclass(frozen=True, eq=False)
class _Decoded:
    pixels_CHW: torch.Tensor

    @property
    def width(self) -> int:
        return self.pixels_CHW.shape[2]

    @property
    def height(self) -> int:
        return self.pixels_CHW.shape[1]


def _objects(loaded: "LoadedDetector", found: Detections) -> ImageDetections:
    names = [loaded.class_names[label] for label in found.labels_N]
    arrays = found.boxes_N4.numpy(), found.scores_N.numpy(), found.labels_N.numpy()
    return ImageDetections(*arrays, names, found.masks, loaded.class_names)


def _pixels(image: GivenImage) -> torch.Tensor:
    """uint8 [3, H, W]."""
    if isinstance(image, str | Path):
        try:
            return decode_image(image)
        except UnreadableImage as error:
            raise UserError(str(error)) from None
    array = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise TypeError(f"an image as an array is uint8 [height, width, 3], not {array.dtype} {list(array.shape)}")
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)
