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

from shared.errors import UserError
from shared.images import UnreadableImage, decode_image
from stage2_detect.augment import fit_view, view_image
from stage2_detect.batches import PAD_MULTIPLE
from stage2_detect.detector_file import LoadedDetector
from stage2_detect.models.batch import ImageBatch

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

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, float, list[float]]]:
        return iter(zip(self.names, self.scores_N.tolist(), self.boxes_N4.tolist(), strict=True))


@torch.no_grad()
def predict(
    loaded: LoadedDetector, images: Sequence[Picture], *, threshold: float = 0.5, batch_size: int = 4
) -> list[FoundObjects]:
    """What each picture shows, with scores from `threshold` on, in the sizes that the detector's recipe evaluates at.

    Runs where the detector's weights are: `loaded.model.to("cuda")` before the first call moves it. Raises UserError for a file that cannot be read.
    """
    if isinstance(images, str | Path | Image.Image):
        raise TypeError("predict takes a list of pictures")
    fast = loaded.fast
    device = next(fast.parameters()).device
    results: list[FoundObjects] = []
    for start in range(0, len(images), batch_size):
        pixels = [_pixels(image) for image in images[start : start + batch_size]]
        views = [
            fit_view(*one.shape[1:], short_side=loaded.resize.val_short_side, max_long=loaded.resize.val_long_side)
            for one in pixels
        ]
        high, wide = (
            -(-max(sides) // PAD_MULTIPLE) * PAD_MULTIPLE
            for sides in zip(*((v.height, v.width) for v in views), strict=True)
        )
        pixels_BCHW = torch.zeros(len(views), 3, high, wide, dtype=torch.uint8)
        for canvas, one, view in zip(pixels_BCHW, pixels, views, strict=True):
            canvas[:, : view.height, : view.width] = view_image(
                one, view, loaded.resize.interpolation, loaded.resize.kernel
            )
        batch = ImageBatch(
            pixels_BCHW,
            torch.tensor([(view.height, view.width) for view in views]),
            torch.tensor([view.scale for view in views], dtype=torch.float32),
            torch.tensor([one.shape[1:] for one in pixels]),
        )
        for found in fast(batch.to(device)):
            found = found.where(found.scores_N >= threshold)
            boxes_N4, scores_N, labels_N = (
                part.cpu().numpy() for part in (found.boxes_N4, found.scores_N, found.labels_N)
            )
            names = [loaded.class_names[label] for label in labels_N]
            results.append(FoundObjects(boxes_N4, scores_N, labels_N, names, found.masks))
    return results


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
