"""Run an exported detector without torch: this one file, numpy, onnxruntime and Pillow are enough.

    python onnx_detector.py detector.onnx photo.jpg drawn.png

Shapes: H, W height and width of an image, N its detections, S side of a mask's map.
"""

import json
import os.path
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

Prepared = tuple[np.ndarray, tuple[int, int], float]
"""Padded pixels uint8 [3, height, width], height and width without the padding, and their factor over those of the image."""


class Detections(NamedTuple):
    """Detections of an image, best first: boxes [N, 4] as x1, y1, x2, y2 in pixels, labels as places in `class_names`, masks bool [N, H, W]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    masks: np.ndarray | None


class OnnxDetector:
    """A detector of `ssld export`. `threads`: 0 for all cores; `providers`: of ONNX Runtime, such as CUDAExecutionProvider."""

    def __init__(self, path: str, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        facts = self.session.get_modelmeta().custom_metadata_map
        self.class_names, self.resize = json.loads(facts["class_names"]), json.loads(facts["resize"])
        self.multiple, self.least = json.loads(facts["pad_multiple"]), json.loads(facts["least_side"])
        self.mask_threshold, sides = float(facts.get("mask_threshold", 0.5)), self.session.get_inputs()[0].shape[2:]
        self.canvas = None if any(isinstance(side, str) for side in sides) else sides

    def predict(self, images: Sequence[Any], score_threshold: float = 0.5) -> list[Detections]:
        """Detect in paths or open files, PIL images (whose EXIF is ignored) or uint8 RGB arrays [H, W, 3], one after the other."""
        return [self.run([self.prepare(one)], [one.shape], score_threshold)[0] for one in map(decode, images)]

    def prepare(self, pixels: np.ndarray) -> Prepared:
        """Resize uint8 [H, W, 3] as in the evaluation of the detector, and pad it."""
        sides = pixels.shape[:2]
        scale = min(self.resize["short_side"] / min(sides), self.resize["long_side"] / max(sides))
        if self.canvas:  # smaller where the rounded sides exceed it
            fits = [(most + 0.5) / side > scale for most, side in zip(self.canvas, sides, strict=True)]
            scale = scale if all(fits) else min(most / side for most, side in zip(self.canvas, sides, strict=True))
        high, wide = size = max(int(scale * sides[0] + 0.5), 1), max(int(scale * sides[1] + 0.5), 1)
        padded = [-(-max(side, self.least) // self.multiple) * self.multiple for side in size]
        canvas = np.zeros((3, *(self.canvas or padded)), np.uint8)
        pixels = pixels if scale == 1 else resized(pixels, size, scale, **self.resize)
        canvas[:, :high, :wide] = pixels.transpose(2, 0, 1)
        return canvas, size, scale

    def run(self, batch: Sequence[Prepared], shapes: Sequence[Any], score_threshold: float = 0.5) -> list[Detections]:
        """Detect in prepared images, padded to one shape; `shapes` begin with H and W of each image before `prepare`."""
        pixels, sizes, scales = zip(*batch, strict=True)
        outputs = self.session.run(None, {"pixels": np.stack(pixels), "sizes": np.array(sizes)})
        found = []
        rows = zip(*outputs, scales, shapes, strict=True)
        for boxes, scores, labels, count, *maps, scale, shape in rows:
            boxes = (boxes[:count] / np.float32(scale)).clip(0, np.array([shape[1], shape[0]] * 2, np.float32))
            kept = (scores[:count] >= score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
            boxes, scores, labels = boxes[kept], scores[:count][kept], labels[:count][kept]
            masks = pasted(maps[0][:count][kept], boxes, shape, self.mask_threshold) if maps else None
            found.append(Detections(boxes, scores, labels, [self.class_names[label] for label in labels], masks))
        return found


def decode(image: Any) -> np.ndarray:
    """Return uint8 RGB [H, W, 3] of an image, without alpha; of a file turned upright by its EXIF, unless that is broken."""
    if not isinstance(image, Image.Image | np.ndarray):
        with Image.open(image) as opened:
            opened.load()
            with suppress(Exception):
                return decode(ImageOps.exif_transpose(opened))
            return decode(opened)
    if isinstance(image, Image.Image) and image.mode[0] in "IF":
        raise ValueError(f"{image.mode}: more than 8 bits per channel; convert the image to 8 bits first")
    return image if isinstance(image, np.ndarray) else np.array(image.convert("RGB"))


def resized(pixels: Any, size: Sequence[int], scale: float, interpolation: str, kernel: str, **_: object) -> np.ndarray:
    """Resize uint8 [H, W, 3] as torch does without antialiasing, in float32 or, by the kernel `fast`, in integers."""
    fast = kernel == "fast"
    number: Any = np.float64 if fast else np.float32
    for axis in [axis for axis in (1, 0) if not fast or pixels.shape[axis] != size[axis]]:
        old, new = pixels.shape[axis], size[axis]
        at = number(1 / scale) * (np.arange(new, dtype=number) + number(0.5)) - number(0.5)
        low = np.minimum(np.floor(at), old - 1).clip(None if interpolation == "bicubic" else 0).astype(np.int64)
        t = (at - low).clip(0, 1)
        weights = [1 - t, t]
        if interpolation == "bicubic":  # a = -0.75
            far, near = (lambda x: ((-0.75 * x + 3.75) * x - 6) * x + 3), (lambda x: (1.25 * x - 2.25) * x * x + 1)
            low, weights = low - 1, [far(t + 1), near(t), near(1 - t), far(2 - t)]
        places = [(low + tap).clip(0, old - 1) for tap in range(len(weights))]
        total: Any = 0
        if fast:  # 16-bit weights; the weights of one border pixel are added; their largest sum sets the bits
            largest = weights[0].max()
            for tap in range(1, len(weights)):
                same = places[tap] == places[tap - 1]
                weights[tap - 1], weights[tap] = weights[tap - 1] * ~same, weights[tap] + same * weights[tap - 1]
                largest = max(largest, weights[tap].max())
            bits = next(n for n in range(23) if n == 22 or int(0.5 + largest * 2 ** (n + 1)) >= 2**15)
            weights = [np.trunc(one * 2**bits + np.copysign(0.5, one)).astype(np.int32) for one in weights]
            total = 2 ** (bits - 1)
        for weight, place in zip(weights, places, strict=True):
            total = total + pixels.take(place, axis) * (weight[:, None] if axis else weight[:, None, None])
        pixels = (total >> bits).clip(0, 255).astype(np.uint8) if fast else total
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def pasted(maps: np.ndarray, boxes: np.ndarray, shape: Sequence[int], threshold: float) -> np.ndarray:
    """Paste maps [N, S, S], stretched over their boxes and interpolated bilinearly: bool [N, H, W]."""
    masks = np.zeros((len(maps), *shape[:2]), bool)
    for mask, grid, corners in zip(masks, maps.astype(np.float64), boxes.astype(np.float64), strict=True):
        window, shares = [], []
        for start, end, side in zip(corners[1::-1], corners[:1:-1], shape[:2], strict=True):
            window.append(slice(int(start), min(int(np.ceil(end)), side)))
            centers = (np.arange(window[-1].start, window[-1].stop) + 0.5 - start) / (end - start) * len(grid) - 0.5
            shares.append(np.clip(1 - np.abs(centers[:, None] - np.arange(len(grid))), 0, None))
        mask[tuple(window)] = shares[0] @ grid @ shares[1].T >= threshold
    return masks


def draw(pixels: np.ndarray, found: Detections) -> Image.Image:
    """Draw masks, boxes, names and scores on uint8 [H, W, 3]."""
    colors = [tuple((140 + 110 * np.sin(2.4 * k + np.arange(3) * 2.1)).astype(int).tolist()) for k in found.labels]
    pixels = pixels.copy()
    for mask, color in zip(() if found.masks is None else found.masks, colors, strict=False):
        pixels[mask] = 0.6 * pixels[mask] + 0.4 * np.array(color)
    pen = ImageDraw.Draw(image := Image.fromarray(pixels))
    for box, score, name, color in zip(found.boxes.tolist(), found.scores, found.names, colors, strict=True):
        pen.rectangle(box, outline=color, width=2)
        pen.text(box[:2], f"{name} {score:.2f}", fill=color)
    return image


if __name__ == "__main__":
    if len(sys.argv) != 4 or os.path.exists(sys.argv[3]):  # two photos would overwrite the second
        sys.exit("usage: python onnx_detector.py detector.onnx photo.jpg drawn.png; drawn.png must not exist yet")
    photo = decode(sys.argv[2])
    draw(photo, OnnxDetector(sys.argv[1]).predict([photo])[0]).save(sys.argv[3])
