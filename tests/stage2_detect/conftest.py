"""Drawn scenes and settings of a small detector."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.register_assert_rewrite("golden")


@dataclass(frozen=True)
class TinyCoco:
    """Drawn scenes of 64 x 64 pixels: 12 for training (one without objects), 5 for evaluation; category ids with holes."""

    train_annotations: Path
    train_images: Path
    val_annotations: Path
    val_images: Path


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> TinyCoco:
    folder = tmp_path_factory.mktemp("coco")
    draw = np.random.default_rng(3)
    for part, count in (("train", 12), ("val", 5)):
        (folder / part).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            pixels = draw.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            images.append({"id": f"{part}-{number}", "file_name": f"{number}.png", "height": 64, "width": 64})
            for _ in range(0 if number == 1 else 1 + number % 2):
                left, top = (int(v) for v in draw.integers(0, 30, 2))
                width, height = (int(v) for v in draw.integers(14, 32, 2))
                category = 3 if width > height else 7
                pixels[top : top + height, left : left + width] = (250, 90, 40) if category == 3 else (40, 120, 250)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": f"{part}-{number}",
                        "category_id": category,
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
        categories = [{"id": 3, "name": "wide"}, {"id": 7, "name": "tall"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
    return TinyCoco(folder / "train.json", folder / "train", folder / "val.json", folder / "val")


@pytest.fixture
def train_settings(tiny_coco: TinyCoco) -> dict[str, Any]:
    """Settings of a small detector without `output`: 6 steps of 4 images."""
    return {
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "steps": 6,
        "batch_size": 4,
        "save_every": 4,
        "log_every": 1,
        "backbone": "random:test_resnet",
        "data": {key: str(value) for key, value in vars(tiny_coco).items()} | {"keep_empty": True},
        "resize": {"train_short_sides": [64], "train_long_side": 64, "val_short_side": 64, "val_long_side": 64},
        "model": {
            "fpn_channels": 16,
            "rpn": {"anchor_sizes": [8, 16, 32, 64, 128], "samples": 32, "train_post_nms": 40, "val_post_nms": 30},
            "roi": {"hidden": 32, "samples": 24},
        },
        "optim": {"lr": 0.01, "reference_batch": 4, "warmup_steps": 2, "milestones_steps": [4]},
    }
