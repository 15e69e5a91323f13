"""Draw cells.jpg: a photo that the detector of cells.yaml was not trained on, with its annotations and with the detections.

    python docs/images/draw_cells.py DIR

DIR is the folder that cells.yaml names; its run has to be finished.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import ssld
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections

PHOTO = "BloodImage_00068.jpg"
WIDTH, STRIP = 440, 26


def main(data: Path) -> None:
    file = data / "bccd" / "images" / PHOTO
    content = json.loads((data / "bccd" / "annotations" / "instances_test.json").read_text(encoding="utf-8"))
    detector = ssld.load_detector("runs/cells/detector/detector.safetensors")
    (detections,) = detector.predict([file], score_threshold=0.6)
    panels = {"annotations": annotated(file, content), "detections and their scores": detections.draw(file)}
    height = max((WIDTH - 4) * panel.height // panel.width for panel in panels.values())
    sheet = Image.new("RGB", (len(panels) * WIDTH, STRIP + height), "white")
    for column, (title, panel) in enumerate(panels.items()):
        ImageDraw.Draw(sheet).text((column * WIDTH + 4, 3), title, "black", ImageFont.load_default(16))
        resized = panel.resize((WIDTH - 4, (WIDTH - 4) * panel.height // panel.width), Image.Resampling.LANCZOS)
        sheet.paste(resized, (column * WIDTH, STRIP))
    sheet.save(Path(__file__).with_name("cells.jpg"), quality=88)


def annotated(file: Path, content: dict[str, list[dict[str, Any]]]) -> Image.Image:
    """Return a photo with its annotations; a score of NaN is not written."""
    (image_id,) = (image["id"] for image in content["images"] if image["file_name"] == file.name)
    rows = [row for row in content["annotations"] if row["image_id"] == image_id]
    ids = [category["id"] for category in content["categories"]]
    boxes = np.array([row["bbox"] for row in rows], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([ids.index(row["category_id"]) for row in rows])
    objects = Detections(torch.from_numpy(boxes), torch.full((len(rows),), float("nan")), labels)
    with Image.open(file) as photo:
        return draw_objects(
            photo.convert("RGB"), objects, [category["name"] for category in content["categories"]], legend=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
