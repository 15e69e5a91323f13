"""What a mask head is to predict for a RoI: the object's shape inside it, on a small grid.

As PaddleDetection@666f597f (ppdet/modeling/proposal_generator/target.py): the object's polygons, moved and stretched so that the RoI becomes the
grid, filled in by pycocotools' rule. Unlike there, shapes that are run-length encoded count too: each place of the grid takes the pixel that lies
under its centre.

Shapes stay on the CPU, in the picture's own coordinates, beside the map that leads to the network's input; so nothing is filled in that no RoI asks
for, and every augmentation that moves boxes moves them.

Shapes: P RoIs of a batch, S side of the grid, N objects of an image.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_codec

_SMALLEST_SIDE = 0.1  # of a RoI, in pixels, as in the reference


@dataclass(frozen=True)
class ImageMasks:
    """Shapes of the objects of one image, and where the network sees them."""

    segmentations: tuple[Any, ...]
    """of N objects, in their order among the targets: lists of polygons, or RLE, as COCO has them; checked on loading"""
    height: int
    """of the picture, in pixels"""
    width: int
    scale: float = 1.0
    """a point (x, y) is seen at (x * scale - left, y * scale - top)"""
    left: float = 0.0
    top: float = 0.0
    mirror: float | None = None
    """width of the view if it is mirrored: x becomes mirror - x"""


def rasterise(
    images: Sequence[ImageMasks], image_P: np.ndarray, object_P: np.ndarray, rois_P4: np.ndarray, size: int
) -> np.ndarray:
    """bool [P, S, S]: the shape of object `object_P` of image `image_P` inside each RoI.

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
            points_V2 = _seen(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), masks)
            sides_2 = np.maximum(roi_4[2:] - roi_4[:2], _SMALLEST_SIDE)
            polygons.append(((points_V2 - roi_4[:2]) * (size / sides_2)).ravel().tolist())
            owners.append(row)
    if polygons:
        # One call for all of them; an object of several polygons is their union.
        filled_SSN = decode(mask_codec.frPyObjects(polygons, size, size))
        np.logical_or.at(grids, np.array(owners), np.moveaxis(filled_SSN, 2, 0).astype(bool))
    return grids


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """uint8 [height, width] of a compressed or uncompressed RLE."""
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    code = mask_codec.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
    return decode([code])[:, :, 0]


def decode(codes: Sequence[Any]) -> np.ndarray:
    """uint8 [height, width, N] of N compressed RLEs of one size."""
    with warnings.catch_warnings():
        # pycocotools 2.0.11 under NumPy 2: __array__ without `copy`
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: np.ndarray = mask_codec.decode(list(codes))
    return decoded


def _seen(points_V2: np.ndarray, masks: ImageMasks) -> np.ndarray:
    """Points of the picture in coordinates of the network's input."""
    x_V, y_V = points_V2[:, 0] * masks.scale - masks.left, points_V2[:, 1] * masks.scale - masks.top
    return np.stack((x_V if masks.mirror is None else masks.mirror - x_V, y_V), axis=1)


def _sample(bitmap_HW: np.ndarray, masks: ImageMasks, roi_4: np.ndarray, size: int) -> np.ndarray:
    """The pixels under the centres of the RoI's grid; nothing beyond the picture."""
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
