"""AutoAugment for detection, policy v1: random distortions of the decoded image or of the content of its boxes, as a
function of (seed, image id, view).

Source: Zoph, Cubuk, Ghiasi, Lin, Shlens, Le, "Learning Data Augmentation Strategies for Object Detection", arXiv
1906.11172, and the policy table `v1` and magnitudes of its authors' TensorFlow TPU models (Apache-2.0), which
PaddleDetection@666f597f `AutoAugment` contains too. Only the policy is taken from there, no code. One sub-policy is drawn
uniformly; its two operations are applied in order, each with its own probability. Suffixes of the names: `_BBox` moves
the image and its boxes; `_Only_BBoxes` changes the pixels inside a box and leaves the box in place, drawn independently
per box with a third of the probability. Color operations are PIL's, which the authors' code reimplements.

Two differences from the source: a box that leaves the image is dropped instead of kept as a sliver at the border, and
the pixel region of a box ends at the box instead of one pixel further.

Legend: C channels, H height, W width, N objects before, M after.
"""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ssld.shared.images import stable_seed

Operation = tuple[str, float, int]
"""name, probability, magnitude 0 to 10"""

POLICY_V1: tuple[tuple[Operation, Operation], ...] = (
    (("TranslateX_BBox", 0.6, 4), ("Equalize", 0.8, 10)),
    (("TranslateY_Only_BBoxes", 0.2, 2), ("Cutout", 0.8, 8)),
    (("Sharpness", 0.0, 8), ("ShearX_BBox", 0.4, 0)),
    (("ShearY_BBox", 1.0, 2), ("TranslateY_Only_BBoxes", 0.6, 6)),
    (("Rotate_BBox", 0.6, 10), ("Color", 1.0, 6)),
    (("Color", 0.0, 0), ("ShearX_Only_BBoxes", 0.8, 4)),
    (("ShearY_Only_BBoxes", 0.8, 2), ("Flip_Only_BBoxes", 0.0, 10)),
    (("Equalize", 0.6, 10), ("TranslateX_BBox", 0.2, 2)),
    (("Color", 1.0, 10), ("TranslateY_Only_BBoxes", 0.4, 6)),
    (("Rotate_BBox", 0.8, 10), ("Contrast", 0.0, 10)),
    (("Cutout", 0.2, 2), ("Brightness", 0.8, 10)),
    (("Color", 1.0, 6), ("Equalize", 1.0, 2)),
    (("Cutout_Only_BBoxes", 0.4, 6), ("TranslateY_Only_BBoxes", 0.8, 2)),
    (("Color", 0.2, 8), ("Rotate_BBox", 0.8, 10)),
    (("Sharpness", 0.4, 4), ("TranslateY_Only_BBoxes", 0.0, 4)),
    (("Sharpness", 1.0, 4), ("SolarizeAdd", 0.4, 4)),
    (("Rotate_BBox", 1.0, 8), ("Sharpness", 0.2, 8)),
    (("ShearY_BBox", 0.6, 10), ("Equalize_Only_BBoxes", 0.6, 8)),
    (("ShearX_BBox", 0.2, 6), ("TranslateY_Only_BBoxes", 0.2, 10)),
    (("SolarizeAdd", 0.6, 8), ("Brightness", 0.8, 10)),
)
FILL = (128, 128, 128)
SMALLEST = 1.0
"""shortest side of a moved box in pixels; smaller boxes are dropped"""

# Meaning of magnitude 10, for a whole image and for the inside of a box: degrees, shear factor, added grey levels, pixels.
_DEGREES, _SHEAR, _SOLARIZE = 30.0, 0.3, 110
_TRANSLATE, _TRANSLATE_BOX = 250.0, 120.0
_CUTOUT, _CUTOUT_BOX = 100, 50  # half a side of the hole
_BOX_SHARE = 1 / 3
_MOVES = ("TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate")


def auto_augment(
    image_CHW: Tensor, boxes_N4: np.ndarray, *, seed: int, image_id: int | str, view: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Augment one view of an image.

    Args:
        image_CHW: uint8.
        boxes_N4: float32 xyxy boxes inside the image.
        seed, image_id, view: determine all random draws.

    Returns:
        image uint8 [C, H, W] in channels-last memory, as decoded; boxes_M4 float32 xyxy; kept_M int64, positions of these
        boxes in `boxes_N4`, to select their labels.
    """
    number, draw = draw_sub_policy(seed=seed, image_id=image_id, view=view)
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    boxes, kept = boxes_N4, np.arange(len(boxes_N4))
    for operation in POLICY_V1[number]:
        image, boxes, survivors = apply_operation(operation, image, boxes, draw)
        kept = kept[survivors]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), boxes, kept


def draw_sub_policy(*, seed: int, image_id: int | str, view: int) -> tuple[int, random.Random]:
    """Draw a sub-policy: (position in `POLICY_V1`, generator of all further draws). Equal in every process, independent of
    the draws of `views.draw_view`."""
    draw = random.Random(stable_seed(seed, image_id, view, "auto_augment"))
    return draw.randrange(len(POLICY_V1)), draw


def apply_operation(
    operation: Operation, image: Image.Image, boxes_N4: np.ndarray, draw: random.Random
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Apply one operation with its probability; returns (RGB image, boxes_M4, int64 kept_M)."""
    name, probability, magnitude = operation
    everything = np.arange(len(boxes_N4))
    if name.endswith("_Only_BBoxes"):
        kind = name.removesuffix("_Only_BBoxes")
        return _inside_boxes(kind, probability * _BOX_SHARE, magnitude, image, boxes_N4, draw), boxes_N4, everything
    if draw.random() >= probability:
        return image, boxes_N4, everything
    kind = name.removesuffix("_BBox")
    if kind not in _MOVES:
        return _recolor(kind, image, magnitude, draw, _CUTOUT), boxes_N4, everything
    matrix = _matrix(kind, image.size, magnitude, draw, _TRANSLATE)
    boxes = _moved_boxes(boxes_N4, matrix, image.size)
    kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1))
    return _moved(image, matrix), boxes[kept], kept


def _inside_boxes(
    kind: str, probability: float, magnitude: int, image: Image.Image, boxes_N4: np.ndarray, draw: random.Random
) -> Image.Image:
    """Distort the content of each box separately, in random order since boxes overlap; pixels moved out of a box are lost."""
    image = image.copy()
    for index in draw.sample(range(len(boxes_N4)), len(boxes_N4)):
        if draw.random() >= probability:
            continue
        x1, y1, x2, y2 = boxes_N4[index].tolist()
        box = (math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))
        content = image.crop(box)
        if kind in _MOVES:
            content = _moved(content, _matrix(kind, content.size, magnitude, draw, _TRANSLATE_BOX))
        else:
            content = _recolor(kind, content, magnitude, draw, _CUTOUT_BOX)
        image.paste(content, box)
    return image


def _matrix(kind: str, size: tuple[int, int], magnitude: int, draw: random.Random, translate: float) -> np.ndarray:
    """Return the affine map of points (x, y, 1) as float64 [2, 3]; its sign is drawn with equal probability."""
    amount = magnitude / 10 if draw.random() < 0.5 else -magnitude / 10
    matrix = np.eye(2, 3)
    if kind == "Rotate":
        angle, center = math.radians(amount * _DEGREES), np.array(size) / 2
        matrix[:, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[:, 2] = center - matrix[:, :2] @ center
    else:
        row = 0 if kind.endswith("X") else 1
        if kind.startswith("Shear"):
            matrix[row, 1 - row] = amount * _SHEAR
        else:
            matrix[row, 2] = amount * translate
    return matrix


def _moved(image: Image.Image, matrix_23: np.ndarray) -> Image.Image:
    """Apply an affine map to an image, at equal size, with nearest-neighbor interpolation as in the source."""
    inverse = np.linalg.inv(np.vstack([matrix_23, [0, 0, 1]]))[:2].ravel()  # PIL expects the inverse map
    return image.transform(
        image.size, Image.Transform.AFFINE, tuple(inverse), resample=Image.Resampling.NEAREST, fillcolor=FILL
    )


def _moved_boxes(boxes_N4: np.ndarray, matrix_23: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return axis-aligned boxes around the moved corners, clipped to the image."""
    corners_N42 = boxes_N4[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    moved_N42 = corners_N42 @ matrix_23[:, :2].T + matrix_23[:, 2]
    boxes = np.concatenate([moved_N42.min(1), moved_N42.max(1)], axis=1)
    return boxes.clip(0, [*size, *size]).astype(np.float32)


def _recolor(kind: str, image: Image.Image, magnitude: int, draw: random.Random, cutout: int) -> Image.Image:
    """Apply an operation that moves no box."""
    if kind == "Flip":
        return ImageOps.mirror(image)
    if kind == "Equalize":
        return ImageOps.equalize(image)
    if kind == "Cutout":
        return _cutout(image, int(magnitude / 10 * cutout), draw)
    if kind == "SolarizeAdd":
        addition = int(magnitude / 10 * _SOLARIZE)
        return image.point([min(value + addition, 255) if value < 128 else value for value in range(256)] * 3)
    factor = 0.1 + 1.8 * magnitude / 10
    enhancers = {
        "Color": ImageEnhance.Color,
        "Brightness": ImageEnhance.Brightness,
        "Contrast": ImageEnhance.Contrast,
        "Sharpness": ImageEnhance.Sharpness,
    }
    return enhancers[kind](image).enhance(factor)


def _cutout(image: Image.Image, half: int, draw: random.Random) -> Image.Image:
    """Paint a grey square of side 2 * `half` around a random pixel, clipped to the image."""
    x, y = draw.randrange(image.width), draw.randrange(image.height)
    image = image.copy()
    image.paste(FILL, (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height)))
    return image
