"""One tiny data set with training and evaluation parts, in each format that `data: PATH` takes."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from converted_data import voc_xml, write
from PIL import Image

SIZE = (40, 20)
NAMES = ["cat", "dog"]
BOXES = {"train": 4, "valid": 2, "test": 1}
"""number of images of each part; image i has one box of class i % 2, x 10, y 5, 20 wide, 10 high"""
BOX = [10.0, 5.0, 20.0, 10.0]


def picture(part: str, number: int) -> Image.Image:
    seed = 100 * list(BOXES).index(part) + number
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def _image(file: Path, part: str, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(part, number).save(file)


def coco(part: str, names: list[str] = NAMES, prefix: str = "") -> dict[str, object]:
    rows = [
        {"id": i + 5, "file_name": f"{prefix}{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in range(BOXES[part])
    ]
    boxes = [
        {"id": i + 1, "image_id": i + 5, "category_id": i % len(names), "bbox": BOX, "area": 200, "iscrowd": 0}
        for i in range(BOXES[part])
    ]
    return {"images": rows, "annotations": boxes, "categories": [{"id": i, "name": n} for i, n in enumerate(names)]}


def roboflow_coco(root: Path) -> Path:
    for part in BOXES:
        for number in range(BOXES[part]):
            _image(root / part / f"{number}.png", part, number)
        write(root / part / "_annotations.coco.json", json.dumps(coco(part)))
    return root


def coco_folders(root: Path) -> Path:
    for part, name in (("train", "train2017"), ("valid", "val2017")):
        for number in range(BOXES[part]):
            _image(root / name / f"{number}.png", part, number)
        write(root / "annotations" / f"instances_{name}.json", json.dumps(coco(part)))
        write(root / "annotations" / f"person_keypoints_{name}.json", json.dumps(coco(part)))
    return root


def yolo(root: Path) -> Path:
    for part in BOXES:
        for number in range(BOXES[part]):
            _image(root / part / "images" / f"{number}.png", part, number)
            write(root / part / "labels" / f"{number}.txt", f"{number % 2} 0.5 0.5 0.5 0.5\n")
    places = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    write(root / "data.yaml", f"{places}nc: 2\nnames: {NAMES}\n")
    return root


def yolo_file(root: Path) -> Path:
    return yolo(root) / "data.yaml"


def voc(root: Path) -> Path:
    for part, name in (("train", "train"), ("valid", "val")):
        stems = [f"{name}{number}" for number in range(BOXES[part])]
        write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{stem}\n" for stem in stems))
        for number, stem in enumerate(stems):
            _image(root / "JPEGImages" / f"{stem}.png", part, number)
            write(root / "Annotations" / f"{stem}.xml", voc_xml((NAMES[number % 2], 0, (11, 6, 30, 15))))
    return root


def parquet(root: Path) -> Path:
    for part, name in (("train", "train"), ("valid", "validation")):
        rows = []
        for number in range(BOXES[part]):
            buffer = io.BytesIO()
            picture(part, number).save(buffer, "PNG")
            objects = {"bbox": [BOX], "category": [NAMES[number % 2]]}
            rows.append({"image": {"bytes": buffer.getvalue(), "path": "x.png"}, "objects": objects})
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"{name}-00000-of-00001.parquet")
    return root


def labelme(root: Path) -> Path:
    for part, name in (("train", "train"), ("valid", "val")):
        for number in range(BOXES[part]):
            _image(root / name / f"{number}.png", part, number)
            shape = {"label": NAMES[number % 2], "points": [[30.0, 5.0], [10.0, 15.0]], "shape_type": "rectangle"}
            content = {"version": "5.5.0", "shapes": [shape], "imagePath": f"{number}.png", "imageData": None}
            sides = {"imageHeight": SIZE[1], "imageWidth": SIZE[0]}
            write(root / name / f"{number}.json", json.dumps(content | sides))
    return root


def imagefolder(root: Path) -> Path:
    for part, name in (("train", "train"), ("valid", "validation")):
        rows = []
        for number in range(BOXES[part]):
            _image(root / name / f"{number}.png", part, number)
            rows.append({"file_name": f"{number}.png", "objects": {"bbox": [BOX], "categories": [NAMES[number % 2]]}})
        write(root / name / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    return root


FORMATS = {
    function.__name__: function
    for function in (roboflow_coco, coco_folders, yolo, yolo_file, voc, parquet, labelme, imagefolder)
}
