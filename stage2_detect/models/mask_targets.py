"""Targets of a mask head: the object's shape inside a RoI, on a small grid.

As in PaddleDetection@666f597f (ppdet/modeling/proposal_generator/target.py), the object's polygons are moved and scaled so that the RoI becomes the
grid, and rasterized by pycocotools. In addition, run-length encoded shapes are supported: each cell of the grid takes the pixel under its center.

Shapes stay on the CPU in coordinates of their image, together with the map to the network's input. So only shapes that a RoI needs are
rasterized, and every augmentation that moves boxes moves them too. A training image can be composed of several images (`data/composites.py`).

Shapes: P RoIs of a batch, S side of the grid, N objects of an image.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_codec

_SMALLEST_SIDE = 0.1  # smallest side of a RoI in pixels, as in the reference
_IDENTITY = np.eye(2, 3)


@dataclass(frozen=True)
class ImageMasks:
    """Shapes of the objects of one training image, and their places in the network's input."""

    segmentations: tuple[Any, ...]
    """Shapes of N objects in the order of the targets: lists of polygons, or RLE, as in COCO; checked on loading."""
    matrices_N23: np.ndarray | None = None
    """float64 affine maps from the image of each object to the network's input: scales, translations, mirrors and quarter turns. None: the
    network sees the image as it is."""
    windows_N4: np.ndarray | None = None
    """xyxy parts of the network's input that show the image of each object; None: all of it."""
    pasted: int | None = None
    """Objects from this position on lie over those before it and hide them; None: no object hides another."""


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
        matrix_23 = _IDENTITY if masks.matrices_N23 is None else masks.matrices_N23[index]
        if isinstance(segmentation, dict):
            grids[row] = _sample(decode_rle(segmentation), matrix_23, roi_4, size)
            continue
        for polygon in segmentation:
            points_V2 = moved_points(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), matrix_23)
            sides_2 = np.maximum(roi_4[2:] - roi_4[:2], _SMALLEST_SIDE)
            polygons.append(((points_V2 - roi_4[:2]) * (size / sides_2)).ravel().tolist())
            owners.append(row)
    if polygons:
        # One call for all polygons; an object of several polygons is their union.
        filled_SSN = decode(mask_codec.frPyObjects(polygons, size, size))
        np.logical_or.at(grids, np.array(owners), np.moveaxis(filled_SSN, 2, 0).astype(bool))
    for row, (image, index) in enumerate(zip(image_P, object_P, strict=True)):
        windows_N4 = images[image].windows_N4
        if windows_N4 is not None:
            grids[row] &= _inside(windows_N4[index], rois_P4[row].astype(np.float64), size)
    _hide(grids, images, image_P, object_P, rois_P4)
    return grids


def _hide(
    grids_PSS: np.ndarray,
    images: Sequence[ImageMasks],
    image_P: np.ndarray,
    object_P: np.ndarray,
    rois_P4: np.ndarray,
) -> None:
    """Remove from each shape what pasted objects hide, in place."""
    rows: list[int] = []
    above: list[int] = []
    for row, (image, index) in enumerate(zip(image_P, object_P, strict=True)):
        first = images[image].pasted
        if first is not None and index < first:
            pasted = range(first, len(images[image].segmentations))
            rows += [row] * len(pasted)
            above += pasted
    if rows:
        hiding = rasterize(images, image_P[rows], np.array(above), rois_P4[rows], grids_PSS.shape[1])
        np.logical_and.at(grids_PSS, np.array(rows), ~hiding)


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


def moved_points(points_V2: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    """Map points (x, y) by an affine matrix."""
    moved_V2: np.ndarray = points_V2 @ matrix_23[:, :2].T + matrix_23[:, 2]
    return moved_V2


def _centers(roi_4: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the centers of a RoI's grid, [S] each."""
    steps_S = (np.arange(size) + 0.5) / size
    x_S, y_S = (roi_4[axis] + steps_S * (roi_4[axis + 2] - roi_4[axis]) for axis in (0, 1))
    return x_S, y_S


def _sample(bitmap_HW: np.ndarray, matrix_23: np.ndarray, roi_4: np.ndarray, size: int) -> np.ndarray:
    """Sample the pixels under the centers of the RoI's grid; False beyond the image."""
    x_S, y_S = _centers(roi_4, size)
    points_SS2 = np.stack(np.meshgrid(x_S, y_S), axis=2) - matrix_23[:, 2]
    pixels_SS2 = np.floor(points_SS2 @ np.linalg.inv(matrix_23[:, :2]).T).astype(np.int64)
    column_SS, row_SS = pixels_SS2[..., 0], pixels_SS2[..., 1]
    height, width = bitmap_HW.shape
    inside_SS = (row_SS >= 0) & (row_SS < height) & (column_SS >= 0) & (column_SS < width)
    picked_SS = bitmap_HW[row_SS.clip(0, height - 1), column_SS.clip(0, width - 1)]
    return picked_SS.astype(bool) & inside_SS


def _inside(window_4: np.ndarray, roi_4: np.ndarray, size: int) -> np.ndarray:
    """Return which centers of a RoI's grid are inside a window: bool [S, S]."""
    x_S, y_S = _centers(roi_4, size)
    inside_SS: np.ndarray = ((y_S >= window_4[1]) & (y_S < window_4[3]))[:, None] & (
        (x_S >= window_4[0]) & (x_S < window_4[2])
    )
    return inside_SS
