"""Targets of a mask head: the object's shape inside a RoI, on a small grid.

As in PaddleDetection@666f597f (ppdet/modeling/proposal_generator/target.py), the object's polygons are moved and scaled so that the RoI becomes the
grid, and rasterized by pycocotools. In addition, run-length encoded shapes are supported: each cell of the grid takes the pixel under its center.

Shapes stay on the CPU in coordinates of the image, together with the transform to the network's input. So only shapes that a RoI needs are
rasterized, and every augmentation that moves boxes moves them too.

Shapes: P RoIs of a batch, S side of the grid, N objects of an image.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_codec

_SMALLEST_SIDE = 0.1  # smallest side of a RoI in pixels, as in the reference


@dataclass(frozen=True)
class ImageMasks:
    """Shapes of the objects of one image, and their transform to the network's input."""

    segmentations: tuple[Any, ...]
    """Shapes of N objects in the order of the targets: lists of polygons, or RLE, as in COCO; checked on loading."""
    height: int
    """Height of the image, in pixels."""
    width: int
    """Width of the image, in pixels."""
    scale: float = 1.0
    """A point (x, y) of the image is at (x * scale - left, y * scale - top) of the network's input."""
    left: float = 0.0
    top: float = 0.0
    mirror: float | None = None
    """Width of the network's input if it is mirrored: x becomes mirror - x. None: not mirrored."""


def rasterize(
    images: Sequence[ImageMasks], image_P: np.ndarray, object_P: np.ndarray, rois_P4: np.ndarray, size: int
) -> np.ndarray:
    """Rasterize the shape of object `object_P` of image `image_P` inside each RoI: bool [P, S, S].

    Args:
        rois_P4: float xyxy in coordinates of the network's input.
        size: S.
    """
    grids = np.zeros((len(rois_P4), size, size), dtype=bool)
    polygons: list[list[float]] = []
    owners: list[int] = []
    for row, (image, index, roi_4) in enumerate(zip(image_P, object_P, rois_P4.astype(np.float64), strict=True)):
        masks = images[image]
        segmentation = masks.segmentations[index]
        if isinstance(segmentation, dict):
            grids[row] = _sample(decode_rle(segmentation), masks, roi_4, size)
            continue
        for polygon in segmentation:
            points_V2 = _to_network(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), masks)
            sides_2 = np.maximum(roi_4[2:] - roi_4[:2], _SMALLEST_SIDE)
            polygons.append(((points_V2 - roi_4[:2]) * (size / sides_2)).ravel().tolist())
            owners.append(row)
    if polygons:
        # One call for all polygons; an object of several polygons is their union.
        filled_SSN = decode(mask_codec.frPyObjects(polygons, size, size))
        np.logical_or.at(grids, np.array(owners), np.moveaxis(filled_SSN, 2, 0).astype(bool))
    return grids


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """Decode a compressed or uncompressed RLE to uint8 [height, width]."""
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    code = mask_codec.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
    return decode([code])[:, :, 0]


def decode(codes: Sequence[Any]) -> np.ndarray:
    """Decode N compressed RLEs of one size to uint8 [height, width, N]."""
    with warnings.catch_warnings():
        # pycocotools 2.0.11 under NumPy 2: __array__ without `copy`
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: np.ndarray = mask_codec.decode(list(codes))
    return decoded


def _to_network(points_V2: np.ndarray, masks: ImageMasks) -> np.ndarray:
    """Transform points of the image to the network's input."""
    x_V, y_V = points_V2[:, 0] * masks.scale - masks.left, points_V2[:, 1] * masks.scale - masks.top
    return np.stack((x_V if masks.mirror is None else masks.mirror - x_V, y_V), axis=1)


def _sample(bitmap_HW: np.ndarray, masks: ImageMasks, roi_4: np.ndarray, size: int) -> np.ndarray:
    """Sample the pixels under the centers of the RoI's grid; False beyond the image."""
    steps_S = (np.arange(size) + 0.5) / size
    x_S, y_S = (roi_4[axis] + steps_S * (roi_4[axis + 2] - roi_4[axis]) for axis in (0, 1))
    if masks.mirror is not None:
        x_S = masks.mirror - x_S
    column_S = np.floor((x_S + masks.left) / masks.scale).astype(np.int64)
    row_S = np.floor((y_S + masks.top) / masks.scale).astype(np.int64)
    height, width = bitmap_HW.shape
    inside_SS = ((row_S >= 0) & (row_S < height))[:, None] & ((column_S >= 0) & (column_S < width))
    picked_SS = bitmap_HW[row_S.clip(0, height - 1)[:, None], column_S.clip(0, width - 1)]
    return picked_SS.astype(bool) & inside_SS
