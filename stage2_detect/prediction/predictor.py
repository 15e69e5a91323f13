"""A detector for other programs: pictures in, objects out.

Legend: N objects of a picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, decode_image
from ssld.stage2_detect.data.image_files import pictures_of_any_size
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.prediction.loaders import Sizing, ahead
from ssld.stage2_detect.prediction.tiles import Window, merged_windows, windows_of

Picture = str | Path | Image.Image | np.ndarray
"""A file, turned upright by its EXIF; a picture of PIL's; or uint8 [height, width, 3], RGB."""


@dataclass(frozen=True)
class FoundObjects:
    """The objects of one picture, best first. Iterating gives (class name, score, box) of each."""

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

    def draw(self, image: Picture) -> Image.Image:
        """The picture with these objects, names and scores; `image` is what they were found in, or the same in another form."""
        labels_N = torch.from_numpy(self.labels_N)
        found = Detections(torch.from_numpy(self.boxes_N4), torch.from_numpy(self.scores_N), labels_N, self.masks)
        picture = Image.fromarray(np.ascontiguousarray(_pixels(image).permute(1, 2, 0).numpy()))
        return draw_objects(picture, found, self.class_names, legend=True)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, float, list[float]]]:
        return iter(zip(self.names, self.scores_N.tolist(), self.boxes_N4.tolist(), strict=True))


@torch.no_grad()
def predict(
    loaded: LoadedDetector,
    images: Sequence[Picture],
    *,
    threshold: float = 0.5,
    batch_size: int = 4,
    tile: int | None = None,
    overlap: float = 0.2,
) -> list[FoundObjects]:
    """What each picture shows, with scores from `threshold` on, in the sizes that the detector's recipe evaluates at.

    With `tile`, squares of so many pixels, which overlap by so large a share, are looked at beside the whole picture (see `tiles.py`). Runs where the
    detector's weights are: `loaded.model.to("cuda")` before the first call moves it. Raises UserError for a file that cannot be read.
    """
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("predict takes a list of pictures")
    fast = loaded.fast
    device = next(fast.parameters()).device
    sizing = Sizing.of(loaded.resize)

    def batches() -> Iterator[tuple[ImageBatch, list[tuple[int, Window]]]]:
        waiting: list[tuple[torch.Tensor, int, Window]] = []
        for number, image in enumerate(images):
            pixels = _pixels(image)
            height, width = pixels.shape[1:]
            sizes.append((width, height))
            for window in windows_of(width, height, tile, overlap):
                waiting.append((window.of(pixels), number, window))
                if len(waiting) == batch_size:
                    yield together(waiting)
                    waiting = []
        if waiting:
            yield together(waiting)

    def together(shown: list[tuple[torch.Tensor, int, Window]]) -> tuple[ImageBatch, list[tuple[int, Window]]]:
        batch = sizing.batch([pixels for pixels, _, _ in shown])
        assert isinstance(batch, ImageBatch)
        return batch, [(number, window) for _, number, window in shown]

    sizes: list[tuple[int, int]] = []
    parts: list[list[tuple[Window, Detections]]] = [[] for _ in images]
    with pictures_of_any_size(tile is not None):
        for batch, places in ahead(batches()):
            for (number, window), found in zip(places, fast(batch.to(device)), strict=True):
                found = found.where(found.scores_N >= threshold)
                on_cpu = Detections(found.boxes_N4.cpu(), found.scores_N.cpu(), found.labels_N.cpu(), found.masks)
                parts[number].append((window, on_cpu))
    return [_objects(loaded, merged_windows(seen, *size)) for seen, size in zip(parts, sizes, strict=True)]


def _objects(loaded: LoadedDetector, found: Detections) -> FoundObjects:
    names = [loaded.class_names[label] for label in found.labels_N]
    arrays = found.boxes_N4.numpy(), found.scores_N.numpy(), found.labels_N.numpy()
    return FoundObjects(*arrays, names, found.masks, loaded.class_names)


def _pixels(image: Picture) -> torch.Tensor:
    """uint8 [3, H, W]."""
    if isinstance(image, str | Path):
        try:
            return decode_image(image)
        except UnreadableImage as error:
            raise UserError(str(error)) from None
    array = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(f"a picture as an array is uint8 [height, width, 3], not {array.dtype} {list(array.shape)}")
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)
