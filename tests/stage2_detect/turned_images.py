"""Images with equal content in each of EXIF's eight orientations, and data sets of them in three formats."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""map from the upright pixels of an image to the pixels stored in a file, by EXIF value"""
SHAPES = {"landscape": (48, 32), "portrait": (32, 48), "square": (40, 40)}


class Scene(NamedTuple):
    """An upright image, uint8 [height, width, 3], with boxes (x, y, width, height)."""

    name: str
    pixels: np.ndarray
    boxes: list[tuple[int, int, int, int]]


def scenes(shapes: Sequence[str], seed: int = 0) -> list[Scene]:
    draw = np.random.default_rng(seed)
    all_scenes = []
    for number, shape in enumerate(shapes):
        width, height = SHAPES[shape]
        boxes = []
        for _ in range(1 + number % 2):
            left, top, wide, high = (int(one) for one in draw.integers((0, 0, 6, 4), (16, 16, 16, 12)))
            boxes.append((left, top, wide, high))
        all_scenes.append(Scene(f"{number}.png", draw.integers(0, 256, (height, width, 3), dtype=np.uint8), boxes))
    return all_scenes


def save_as(path: Path, stored: np.ndarray, orientation: int) -> None:
    """Write a file with these stored pixels and this value of EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif if orientation != 1 else Image.Exif())


def save_turned(path: Path, upright: np.ndarray, orientation: int) -> None:
    """Write a file that is shown as `upright`, with the pixels stored for this value of EXIF."""
    save_as(path, STORED[orientation](upright), orientation)


def coco_content(some: Sequence[Scene]) -> dict[str, Any]:
    images = [
        {"id": number, "file_name": one.name, "width": one.pixels.shape[1], "height": one.pixels.shape[0]}
        for number, one in enumerate(some, 1)
    ]
    boxes = [(number, box) for number, one in enumerate(some, 1) for box in one.boxes]
    annotations = [
        {"id": place, "image_id": number, "category_id": 1, "bbox": list(box)}
        for place, (number, box) in enumerate(boxes, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def write_coco(folder: Path, some: Sequence[Scene]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(coco_content(some)))
    return folder / "images"


def write_yolo(folder: Path, some: Sequence[Scene]) -> Path:
    labels = folder / "labels" / "train"
    labels.mkdir(parents=True)
    for one in some:
        height, width = one.pixels.shape[:2]
        rows = [
            f"0 {(x + w / 2) / width:.9f} {(y + h / 2) / height:.9f} {w / width:.9f} {h / height:.9f}"
            for x, y, w, h in one.boxes
        ]
        (labels / one.name).with_suffix(".txt").write_text("\n".join(rows))
    (folder / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "names": ["thing"]}))
    return folder / "images" / "train"


def write_voc(folder: Path, some: Sequence[Scene], unsized: Sequence[str] = ()) -> Path:
    (folder / "Annotations").mkdir(parents=True)
    for one in some:
        height, width = one.pixels.shape[:2]
        size = "" if one.name in unsized else f"<size><width>{width}</width><height>{height}</height></size>"
        objects = "".join(
            f"<object><name>thing</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for x, y, w, h in one.boxes
        )
        text = f"<annotation><filename>{one.name}</filename>{size}{objects}</annotation>"
        (folder / "Annotations" / one.name).with_suffix(".xml").write_text(text)
    return folder / "JPEGImages"


WRITERS: dict[str, Callable[[Path, Sequence[Scene]], Path]] = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}
"""writers of the annotations by format; each returns the folder of the images"""
