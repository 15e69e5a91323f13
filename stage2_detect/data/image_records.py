"""Records of images without annotations, for prediction and for training without labels; apart from `image_files.py`, which is used without torch."""

import os
from collections.abc import Sequence

import numpy as np

from ssld.shared.images import image_headers
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.image_files import ImageFiles


def records_of(files: ImageFiles, ids: Sequence[Id]) -> tuple[list[CocoImage], list[str]]:
    """Return (a record without objects for each image, with the size upright by EXIF; names of unreadable images). Reads only headers."""
    paths = [os.path.join(files.folder, name) for name in files.names]
    headers = image_headers(paths)
    no_objects = (
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, bool),
        np.zeros(0),
        np.zeros((0, 4)),
    )
    records = [
        CocoImage(image_id, path, *header.upright_size[::-1], *no_objects, (), ())
        for image_id, path, header in zip(ids, paths, headers, strict=True)
        if header is not None
    ]
    return records, [name for name, header in zip(files.names, headers, strict=True) if header is None]
