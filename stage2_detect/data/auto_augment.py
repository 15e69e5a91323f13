"""AutoAugment for detection, policy v1: random distortions of the stored picture, whole or box by box, as a function of
(seed, image id, view).

Source: Zoph, Cubuk, Ghiasi, Lin, Shlens, Le, "Learning Data Augmentation Strategies for Object Detection", arXiv
1906.11172, and the policy table `v1` and magnitudes of its authors' TensorFlow TPU models (Apache-2.0), which
PaddleDetection@666f597f `AutoAugment` carries too. Credit for the policy is theirs; the code is not. One of the
sub-policies is drawn uniformly; its operations come one after the other, each with its probability. The names say what
moves: `_BBox` the picture and its boxes, `_Only_BBoxes` the pixels inside a box, which itself stays; every box draws
for itself, with a third of the probability. Colour operations are PIL's, which the authors' imitate.

Unlike there, a box that leaves the picture is dropped instead of kept as a sliver at the border, and the pixels of a box
end with it instead of one pixel later.

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
"""pixels: a box with a shorter side after it was moved is dropped"""

# What magnitude 10 means: pixels or degrees, for a whole picture and for the inside of a box.
_DEGREES, _SHEAR, _SOLARIZE = 30.0, 0.3, 110
_TRANSLATE, _TRANSLATE_BOX = 250.0, 120.0
_CUTOUT, _CUTOUT_BOX = 100, 50  # half a side of the hole
_BOX_SHARE = 1 / 3
_MOVES = ("TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate")


def auto_augment(
    image_CHW: Tensor, boxes_N4: np.ndarray, *, seed: int, image_id: int | str, view: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """(uint8 [C, H, W], float32 xyxy boxes_M4, int64 kept_M: where the boxes stood before) of one view of a picture.

    `boxes_N4` lie inside the picture; `kept_M` picks their labels. The memory lies as [H, W, C], as decoded.
    """
    number, draw = draw_sub_policy(seed=seed, image_id=image_id, view=view)
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    boxes, kept = boxes_N4, np.arange(len(boxes_N4))
    for operation in POLICY_V1[number]:
        image, boxes, survivors = apply_operation(operation, image, boxes, draw)
        kept = kept[survivors]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), boxes, kept


def draw_sub_policy(*, seed: int, image_id: int | str, view: int) -> tuple[int, random.Random]:
    """(position in `POLICY_V1`, generator of all further draws); the same in every process, and independent of those of
    `views.draw_view`."""
    draw = random.Random(stable_seed(seed, image_id, view, "auto_augment"))
    return draw.randrange(len(POLICY_V1)), draw


def apply_operation(
    operation: Operation, image: Image.Image, boxes_N4: np.ndarray, draw: random.Random
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """(RGB picture, boxes_M4, int64 kept_M) after one operation, done with its probability."""
    name, probability, magnitude = operation
    everything = np.arange(len(boxes_N4))
    if name.endswith("_Only_BBoxes"):
        kind = name.removesuffix("_Only_BBoxes")
        return _inside_boxes(kind, probability * _BOX_SHARE, magnitude, image, boxes_N4, draw), boxes_N4, everything
    if draw.random() >= probability:
        return image, boxes_N4, everything
    kind = name.removesuffix("_BBox")
    if kind not in _MOVES:
        return _recolour(kind, image, magnitude, draw, _CUTOUT), boxes_N4, everything
    matrix = _matrix(kind, image.size, magnitude, draw, _TRANSLATE)
    boxes = _moved_boxes(boxes_N4, matrix, image.size)
    kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1))
    return _moved(image, matrix), boxes[kept], kept


def _inside_boxes(
    kind: str, probability: float, magnitude: int, image: Image.Image, boxes_N4: np.ndarray, draw: random.Random
) -> Image.Image:
    """Distorts the content of each box by itself, in random order, since boxes overlap; what moves out of it is lost."""
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
            content = _recolour(kind, content, magnitude, draw, _CUTOUT_BOX)
        image.paste(content, box)
    return image


def _matrix(kind: str, size: tuple[int, int], magnitude: int, draw: random.Random, translate: float) -> np.ndarray:
    """float64 [2, 3]: where a point (x, y, 1) goes. In either direction, with equal probability."""
    amount = magnitude / 10 if draw.random() < 0.5 else -magnitude / 10
    matrix = np.eye(2, 3)
    if kind == "Rotate":
        angle, centre = math.radians(amount * _DEGREES), np.array(size) / 2
        matrix[:, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[:, 2] = centre - matrix[:, :2] @ centre
    else:
        row = 0 if kind.endswith("X") else 1
        if kind.startswith("Shear"):
            matrix[row, 1 - row] = amount * _SHEAR
        else:
            matrix[row, 2] = amount * translate
    return matrix


def _moved(image: Image.Image, matrix_23: np.ndarray) -> Image.Image:
    """The picture under a map of its points, same size, nearest pixel as the authors'; PIL wants the inverse map."""
    inverse = np.linalg.inv(np.vstack([matrix_23, [0, 0, 1]]))[:2].ravel()
    return image.transform(
        image.size, Image.Transform.AFFINE, tuple(inverse), resample=Image.Resampling.NEAREST, fillcolor=FILL
    )


def _moved_boxes(boxes_N4: np.ndarray, matrix_23: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Upright boxes around the moved corners, clipped to the picture."""
    corners_N42 = boxes_N4[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    moved_N42 = corners_N42 @ matrix_23[:, :2].T + matrix_23[:, 2]
    boxes = np.concatenate([moved_N42.min(1), moved_N42.max(1)], axis=1)
    return boxes.clip(0, [*size, *size]).astype(np.float32)


def _recolour(kind: str, image: Image.Image, magnitude: int, draw: random.Random, cutout: int) -> Image.Image:
    """Operations that move no box."""
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
    """A grey square of side 2 * `half` about a random pixel, cut at the border."""
    x, y = draw.randrange(image.width), draw.randrange(image.height)
    image = image.copy()
    image.paste(FILL, (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height)))
    return image
