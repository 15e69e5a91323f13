"""Filled COCO segmentations by pycocotools alone, as a reference for other code that fills them."""

import warnings
from typing import Any

import numpy as np
from pycocotools import mask as mask_codec


def filled(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Bool [height, width] of one object's polygons, uncompressed RLE or compressed RLE."""
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64).ravel().tolist() for polygon in segmentation]
        code = mask_codec.merge(mask_codec.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        code = mask_codec.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    with warnings.catch_warnings():
        # pycocotools 2.0.11 under NumPy 2: __array__ without `copy`
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(mask_codec.decode(code)).astype(bool)
