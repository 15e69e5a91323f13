"""Python call of a detector: images in, detections out.

Legend: N detections of an image.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, as_rgb, decode_image
from ssld.stage2_detect.data.image_files import images_of_any_size
from ssld.stage2_detect.data.loaders import ImageLoader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.evaluation.scoring import detections
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.mask_targets import decode_rle
from ssld.stage2_detect.prediction.tiles import ImageWindow, merged_windows, pixels_of_window, window_batches

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

GivenImage = str | Path | Image.Image | np.ndarray
"""A file, turned upright by its EXIF; a PIL image, whose EXIF is ignored (`PIL.ImageOps.exif_transpose` turns it); or uint8 [height, width, 3],
RGB."""


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """Detections of one image, best first: a sequence of (class name, score, box), whose NumPy arrays have the same order.

    best = detections[0]  # ("cat", 0.97, [x1, y1, x2, y2])
    sure = detections[detections.scores_N > 0.8]
    cats = detections[[name == "cat" for name in detections.names]]
    """

    boxes_N4: np.ndarray
    """float32 (x1, y1, x2, y2) in pixels"""
    scores_N: np.ndarray
    """float32 in 0..1"""
    labels_N: np.ndarray
    """int64: indices in the detector's `class_names`"""
    names: list[str]
    masks: list[Any] | None = None
    """COCO RLE of each, from a detector with masks; else None"""

    class_names: tuple[str, ...] = ()
    """all classes of the detector"""

    def draw(self, image: GivenImage) -> Image.Image:
        """Draw boxes, masks, names and scores on the image of these detections, given in any of the forms."""
        labels_N = torch.from_numpy(self.labels_N)
        detections = Detections(torch.from_numpy(self.boxes_N4), torch.from_numpy(self.scores_N), labels_N, self.masks)
        canvas = Image.fromarray(np.ascontiguousarray(_pixels(image).permute(1, 2, 0).numpy()))
        return draw_objects(canvas, detections, self.class_names, legend=True)

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`: boxes, scores, labels, `data["class_name"]`, and masks from a detector that has them.

        Raises UserError where supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision: supervision is not installed; pip install supervision") from None
        masks = None if self.masks is None else [decode_rle(code).astype(bool) for code in self.masks]
        return supervision.Detections(
            xyxy=self.boxes_N4.astype(np.float32).reshape(-1, 4),
            mask=np.stack(masks) if masks else None,
            confidence=self.scores_N.astype(np.float32),
            class_id=self.labels_N.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> tuple[str, float, list[float]]: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | torch.Tensor) -> "ImageDetections": ...

    def __getitem__(
        self, index: int | np.integer[Any] | slice | Sequence[int] | np.ndarray | torch.Tensor
    ) -> "tuple[str, float, list[float]] | ImageDetections":
        """Return one detection as (class name, score, box), or the chosen ones as `ImageDetections`.

        Args:
            index: a number; or a slice, or a list or array of bool, one for each detection, or of numbers.

        Raises:
            IndexError: a number beyond the last detection, or bools of another length.
            TypeError: an array of another shape.
        """
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            return self.names[index], float(self.scores_N[index]), self.boxes_N4[index].tolist()
        if not isinstance(index, slice):
            index = np.asarray(index)
            if index.ndim != 1:
                raise TypeError(f"detections[...] takes a number, a slice or a list, not an array {list(index.shape)}")
            index = index if index.size or index.dtype == bool else index.astype(np.int64)  # [] is one of floats
        chosen = np.arange(len(self))[index].tolist()
        masks = None if self.masks is None else [self.masks[number] for number in chosen]
        names = [self.names[number] for number in chosen]
        return replace(
            self,
            boxes_N4=self.boxes_N4[chosen],
            scores_N=self.scores_N[chosen],
            labels_N=self.labels_N[chosen],
            names=names,
            masks=masks,
        )

    def __iter__(self) -> Iterator[tuple[str, float, list[float]]]:
        return iter(zip(self.names, self.scores_N.tolist(), self.boxes_N4.tolist(), strict=True))


def detect_images(
    fast: Detector,
    loader: ImageLoader[ImageWindow],
    *,
    device: torch.device,
    dtype: torch.dtype,
    threshold: float,
    keep_K: torch.Tensor | None = None,
) -> Iterator[tuple[Any, Detections, float]]:
    """Yield each image of a loader with its detections, those of its windows merged, in the loader's order.

    Args:
        fast: a detector of `for_inference`.
        threshold: lowest score that is kept.
        keep_K: bool; False drops the class. None keeps all.

    Yields:
        The image's record, its detections, and the highest score of any kept class, below the threshold too.
    """
    windows = detections(fast, loader, device=device, dtype=dtype)
    for record, group in itertools.groupby(windows, key=lambda pair: pair[0].record):
        parts, best = [], 0.0
        for window, of_window in group:
            if keep_K is not None:
                of_window = of_window.where(keep_K[of_window.labels_N])
            best = max([best, *of_window.scores_N.tolist()])
            parts.append((window.window, of_window.where(of_window.scores_N >= threshold)))
        yield record, merged_windows(parts, record.width, record.height), best


def predict(
    loaded: "LoadedDetector",
    images: Sequence[GivenImage],
    *,
    score_threshold: float = 0.5,
    batch_size: int = 4,
    tile: int | None = None,
    overlap: float = 0.2,
) -> list[ImageDetections]:
    """Detect objects in images, resized as in the evaluation of the detector's recipe.

    Runs on the device of the detector's weights; `loaded.model.to("cuda")` before the first call moves it. Images are loaded into pinned memory
    there, and the host waits for the GPU once or twice per batch, three times with masks.

    Args:
        images: files, turned upright by their EXIF; PIL images, whose EXIF is ignored (`PIL.ImageOps.exif_transpose` turns them); or arrays, uint8
            [height, width, 3], RGB.
        score_threshold: lowest score.
        batch_size: images, or tiles, per forward pass.
        tile: side in pixels of square tiles in which to detect beside the whole image (see `tiles.py`); None: no tiles.
        overlap: of neighboring tiles, as a share of their side, from 0 to below 1.

    Raises:
        UserError: a file that cannot be read.
        ValueError: a `batch_size`, `tile` or `overlap` out of range.
        TypeError: `images` is not a list, or an array of another type or shape.
    """
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        raise TypeError("predict takes a list of images: predict([image])[0] are the detections of one")
    if batch_size < 1 or (tile is not None and tile < 1) or not 0 <= overlap < 1:
        raise ValueError(
            f"batch_size {batch_size}, tile {tile}, overlap {overlap}: at least 1, at least 1 pixel, and from 0 to below 1"
        )
    device = next(loaded.fast.parameters()).device
    decoded = (_Decoded(_pixels(image)) for image in images)
    loader = ImageLoader(window_batches(decoded, batch_size, tile, overlap), pixels_of_window, Sizing.of(loaded.resize))
    results = detect_images(loaded.fast, loader, device=device, dtype=torch.float32, threshold=score_threshold)
    with images_of_any_size(tile is not None):
        return [_as_arrays(loaded, of_image) for _, of_image, _ in results]


@dataclass(frozen=True, eq=False)
class _Decoded:
    pixels_CHW: torch.Tensor

    @property
    def width(self) -> int:
        return self.pixels_CHW.shape[2]

    @property
    def height(self) -> int:
        return self.pixels_CHW.shape[1]


def _as_arrays(loaded: "LoadedDetector", detections: Detections) -> ImageDetections:
    names = [loaded.class_names[label] for label in detections.labels_N]
    arrays = detections.boxes_N4.numpy(), detections.scores_N.numpy(), detections.labels_N.numpy()
    return ImageDetections(*arrays, names, detections.masks, loaded.class_names)


def _pixels(image: GivenImage) -> torch.Tensor:
    """Decode or convert an image to uint8 [3, H, W]."""
    if isinstance(image, str | Path):
        try:
            return decode_image(image)
        except UnreadableImage as error:
            raise UserError(str(error)) from None
    array = np.array(as_rgb(image)) if isinstance(image, Image.Image) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise TypeError(f"an image as an array is uint8 [height, width, 3], not {array.dtype} {list(array.shape)}")
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)
