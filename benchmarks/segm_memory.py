"""Greatest memory of an evaluation with masks, 100 per image, by evaluate.py itself in a process of its own.

    python benchmarks/segm_memory.py [--images 5000] [--backend hotcoco]

Drawn images of 640 x 480 with about seven polygons each, and a small Mask R-CNN at random, which keeps 100 detections of
every image whatever their scores. Decoding happens in the measured process. The shapes that such a network draws are
rougher than those of a trained one, so their run lengths take more memory, not less: the bytes of a mask are printed.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import timm
import torch
from PIL import Image

from benchmarks.annotation_cache import peak_megabytes
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect import evaluate
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.detector_file import save_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector

WIDTH, HEIGHT, CLASSES, PER_IMAGE, PICTURES = 640, 480, 80, 100, 16
SEED = 4  # of the network: one whose detections are of many classes


def main(argv: Sequence[str] | None = None) -> int:
    """Write data and detector, evaluate in another process, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--backend", choices=["hotcoco", "pycocotools"], default="hotcoco")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.evaluate:
        return measure(arguments.evaluate, arguments.backend)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = draw_data(folder, arguments.images)
        draw_detector(folder / "detector.safetensors")
        line = [sys.executable, __file__, "--evaluate", name, "--backend", arguments.backend]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        result = json.loads(done.stdout.splitlines()[-1])
        text = (folder / "run" / "detections.json").read_text(encoding="utf-8")
        masks = text.count('"counts"')
        assert masks == arguments.images * PER_IMAGE, "an image has fewer detections"
        length = sum(len(part.split('"', 1)[0]) for part in text.split('"counts": "')[1:]) / masks
        print(f"{arguments.images} images, {objects} objects, {masks} masks of {length:.0f} bytes, {arguments.backend}")
        print(
            f"greatest memory {result['megabytes']:.0f} MiB, {result['start']:.0f} MiB of it before the first image; {result['seconds']:.0f} s"
        )
    return 0


def measure(folder: Path, backend: str) -> int:
    """Run evaluate.py here; the last line holds the memory it took."""
    start, begun = peak_megabytes(), time.perf_counter()
    words = [f"--model={folder / 'detector.safetensors'}", f"--annotations={folder / 'data.json'}"]
    words += [f"--images={folder}", f"--output={folder / 'run'}", f"--backend={backend}"]
    code = evaluate.main(
        [*words, "--workers=0", "--threads=1", "--device=cpu", "--batch_size=2", "--cache_annotations=false"]
    )
    seconds = time.perf_counter() - begun
    print(json.dumps({"start": start, "megabytes": peak_megabytes(), "seconds": seconds}))
    return code


def draw_data(folder: Path, images: int) -> int:
    """Pictures, some of them many times over, and their annotations; returns the number of objects."""
    generator = np.random.default_rng(0)
    rows: list[dict] = []
    annotations: list[dict] = []
    for number in range(images):
        name = f"{number:06d}.jpg"
        if number < PICTURES:
            small = Image.fromarray(generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
            (folder / name).write_bytes(encoded.getvalue())
        else:
            os.link(folder / f"{number % PICTURES:06d}.jpg", folder / name)
        rows.append({"id": number + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for _ in range(int(generator.poisson(7.2))):
            annotations.append(draw_object(generator, len(annotations) + 1, number + 1))
    categories = [{"id": label + 1, "name": f"class {label}"} for label in range(CLASSES)]
    content = {"images": rows, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")
    return len(annotations)


def draw_object(generator: np.random.Generator, number: int, image: int) -> dict[str, Any]:
    """An uneven ellipse with 24 corners."""
    width, height = np.exp(generator.uniform(math.log(10), math.log(250), 2))
    center = generator.uniform((width / 2, height / 2), (WIDTH - width / 2, HEIGHT - height / 2))
    turns = np.arange(24) * (2 * math.pi / 24)
    spread = generator.uniform(0.6, 1, 24)[:, None] * np.stack((np.cos(turns) * width, np.sin(turns) * height), 1) / 2
    points = center + spread
    low, high = points.min(0), points.max(0)
    box = [*low, *(high - low)]
    row = {"id": number, "image_id": image, "category_id": int(generator.integers(1, CLASSES + 1)), "iscrowd": 0}
    shape = points.round(2).ravel().tolist()
    return row | {
        "bbox": [round(float(value), 2) for value in box],
        "area": float(box[2] * box[3] / 2),
        "segmentation": [shape],
    }


def draw_detector(path: Path) -> None:
    """A detector file at random that keeps `PER_IMAGE` detections."""
    settings = {
        "kind": "mask_rcnn",
        "fpn_channels": 16,
        "rpn": {"anchor_sizes": [8, 16, 32, 64, 128], "post_nms_top_n_test": 200},
        "roi": {"hidden": 32, "score_threshold": 0.0, "detections_per_image": PER_IMAGE, "nms": {"iou": 0.05}},
        "mask": {"hidden": 16},
    }
    config = DetectorConfig.model_validate(settings)
    inputs = InputSettings.of_detector((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    torch.manual_seed(SEED)
    body = timm.create_model("test_resnet", features_only=True, pretrained=False)
    model = build_detector(config, classes=CLASSES, body=body, arch="test_resnet", inputs=inputs)
    names, ids = tuple(f"class {label}" for label in range(CLASSES)), tuple(range(1, CLASSES + 1))
    data = CocoData("drawn", True, names, ids, [])
    resize = ResizeConfig(short_side=96, long_side=128, kernel="fast")
    save_detector(path, model, config=config, resize=resize, arch="test_resnet", inputs=inputs, data=data)


if __name__ == "__main__":
    sys.exit(main())
