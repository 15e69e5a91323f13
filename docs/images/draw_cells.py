"""Draw cells.jpg: photos that no detector was trained on, with the annotations and the detections of both detectors of cells.yaml.

python docs/images/draw_cells.py DIR
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import ssld
from ssld.shared.run_dir import read_result
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections

RUNS = Path("runs/cells")
PHOTOS = ("BloodImage_00007.jpg",)
THRESHOLD = 0.5
WIDTH, STRIP = 440, 26


def main(data: Path) -> None:
    annotations = data / "bccd" / "annotations" / "instances_test.json"
    content = json.loads(annotations.read_text(encoding="utf-8"))
    columns = [("annotated", [_annotated(data, content, name) for name in PHOTOS])]
    for run, title in (("ssld", "start from SSLD"), ("random", "start from random weights")):
        result = read_result(RUNS / f"ap_{run}")
        assert result, f"run docs/images/cells.yaml first: {RUNS / f'ap_{run}'} is not finished"
        detector = ssld.load_detector(RUNS / f"detector_{run}" / "detector.safetensors")
        files = [data / "bccd" / "images" / name for name in PHOTOS]
        predicted = detector.predict(files, threshold=THRESHOLD)
        drawn = [detections.draw(file) for file, detections in zip(files, predicted, strict=True)]
        columns.append((f"{title}: AP {100 * result['metrics']['AP']:.1f}", drawn))
    height = max(WIDTH * image.height // image.width for _, images in columns for image in images)
    sheet = Image.new("RGB", (len(columns) * WIDTH, STRIP + len(PHOTOS) * height), "white")
    for column, (title, images) in enumerate(columns):
        ImageDraw.Draw(sheet).text((column * WIDTH + 6, 4), title, "black", ImageFont.load_default(17))
        for row, image in enumerate(images):
            small = image.resize((WIDTH - 4, (WIDTH - 4) * image.height // image.width), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * WIDTH, STRIP + row * height))
    file = Path(__file__).with_name("cells.jpg")
    sheet.save(file, quality=85)
    print(f"wrote {file}")


def _annotated(data: Path, content: dict[str, list[dict[str, object]]], name: str) -> Image.Image:
    """Return a photo with its annotations; their scores are NaN, which is not written."""
    names = [str(category["name"]) for category in content["categories"]]
    ids = [category["id"] for category in content["categories"]]
    (image_id,) = (image["id"] for image in content["images"] if image["file_name"] == name)
    rows = [row for row in content["annotations"] if row["image_id"] == image_id]
    boxes = np.array([row["bbox"] for row in rows], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([ids.index(row["category_id"]) for row in rows])
    objects = Detections(torch.from_numpy(boxes), torch.full((len(rows),), float("nan")), labels)
    with Image.open(data / "bccd" / "images" / name) as photo:
        return draw_objects(photo.convert("RGB"), objects, names, legend=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
