"""Drawn scenes, settings and files of small detectors, and the command line of a prediction."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.register_assert_rewrite("golden", "converted_data")


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


def written_again(images: Path, folder: Path) -> Path:
    """Write the pixels of images to other files in a new folder, which training does not take for copies of these; return the folder."""
    folder.mkdir()
    for file in images.iterdir():
        with Image.open(file) as image:
            image.convert("RGB").save(folder / file.name, format="PNG", compress_level=1)
    return folder


@pytest.fixture
def train_settings(tiny_coco: TinyCoco) -> dict[str, Any]:
    """Settings of a small detector without `output`: 6 steps of 4 images."""
    return small_settings(tiny_coco)


def small_settings(tiny_coco: TinyCoco) -> dict[str, Any]:
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
        "resize": {"train_short_sides": [64], "train_long_side": 64, "short_side": 64, "long_side": 64},
        "model": {
            "fpn_channels": 16,
            "rpn": {
                "anchor_sizes": [8, 16, 32, 64, 128],
                "samples_per_image": 32,
                "post_nms_top_n_train": 40,
                "post_nms_top_n_test": 30,
            },
            "roi": {"hidden": 32, "samples_per_image": 24},
        },
        "optim": {"lr": 0.01, "reference_batch": 4, "warmup_steps": 2, "milestones_steps": [4]},
    }


@pytest.fixture
def training_files() -> Callable[..., set[str]]:
    """Files that a training of `train_settings` with evaluation images writes, but for drawn images: names of the tensor files in its checkpoints ->
    paths below its folder."""

    def files(*tensors: str) -> set[str]:
        checkpoint = (*(f"{name}.safetensors" for name in tensors), "state.json", "SHA256SUMS", "COMPLETE")
        return {
            ".lock",
            "analysis.json",
            "batches.jpg",
            "config.yaml",
            "environment.json",
            "log.txt",
            "metrics.jsonl",
            "result.json",
            "detector.safetensors",
            "checkpoints/step_00000006/evaluation.json",
            *(f"checkpoints/step_{step:08d}/{name}" for step in (4, 6) for name in checkpoint),
        }

    return files


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Networks that a training has compiled: they are traced, but run by torch itself, so that no C++ compiler is needed."""
    import torch

    from ssld.stage2_detect.models.pyramid import TimmPyramid

    networks: list[torch.nn.Module] = []

    def compile_traced(net: torch.nn.Module) -> None:
        networks.append(net)
        torch.nn.Module.compile(net, backend="eager")

    monkeypatch.setattr(TimmPyramid, "compile", compile_traced)
    return networks


@pytest.fixture
def learning_settings(train_settings: dict[str, Any]) -> dict[str, Any]:
    """`train_settings` with which the detector detects most of the drawn objects after 60 steps."""
    optim = {"name": "adamw", "lr": 0.003, "reference_batch": 4, "warmup_steps": 5, "milestones_steps": [50]}
    model = train_settings["model"] | {"freeze_norm": False}
    return train_settings | {"steps": 60, "log_every": 20, "save_every": 60, "optim": optim, "model": model}


@pytest.fixture(scope="session")
def detector_file(tmp_path_factory: pytest.TempPathFactory, tiny_coco: TinyCoco, call: Callable[..., int]) -> Path:
    """A small RetinaNet, trained on the drawn scenes for some seconds."""
    from ssld.stage2_detect.train import main

    folder = tmp_path_factory.mktemp("detector")
    settings = small_settings(tiny_coco) | {
        "steps": 120,
        "save_every": 200,
        "log_every": 60,
        "model": {"kind": "retinanet", "fpn_channels": 16, "freeze_stages": 0, "dense": {"convolutions": 1}},
        "optim": {"name": "adamw", "lr": 0.003, "reference_batch": 4, "warmup_steps": 10},
        "output": str(folder / "run"),
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert call(main, ["--config", str(folder / "train.yaml")]) == 0
    return folder / "run" / "detector.safetensors"


@pytest.fixture(scope="session")
def mask_file(tmp_path_factory: pytest.TempPathFactory, tiny_coco: TinyCoco) -> Path:
    """A Mask R-CNN with random weights, of the scenes' classes."""
    import timm
    import torch

    from ssld.shared.models.backbones import InputSettings
    from ssld.stage2_detect.config import ResizeConfig
    from ssld.stage2_detect.data.coco import read_coco
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.model_config import DetectorConfig
    from ssld.stage2_detect.models.build import build_detector

    torch.manual_seed(0)
    config = DetectorConfig(
        kind="mask_rcnn", fpn_channels=16, roi={"hidden": 16}, mask={"hidden": 8, "convolutions": 1}
    )
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    model = build_detector(config, classes=2, body=body, arch="test_resnet", inputs=inputs)
    path = tmp_path_factory.mktemp("mask_detector") / "detector.safetensors"
    data = read_coco(tiny_coco.val_annotations, None, training=False)
    sizes = ResizeConfig(train_short_sides=[64], train_long_side=64, short_side=64, long_side=64)
    save_detector(path, model, config=config, resize=sizes, arch="test_resnet", inputs=inputs, data=data)
    return path


@pytest.fixture
def photos(tiny_coco: TinyCoco, tmp_path: Path) -> Path:
    """Folder of the 12 training scenes, one of them in a subfolder."""
    folder_of_photos = tmp_path / "photos"
    shutil.copytree(tiny_coco.train_images, folder_of_photos)
    (folder_of_photos / "deep").mkdir()
    (folder_of_photos / "3.png").rename(folder_of_photos / "deep" / "3.png")
    return folder_of_photos


@pytest.fixture
def predict_line(detector_file: Path, photos: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a prediction; `images` and `output` may be others."""

    def flags(*more: str, images: Path | str = photos, output: str = "predicted") -> list[str]:
        arguments = ["--model", str(detector_file), "--images", str(images), "--output", str(tmp_path / output)]
        return [*arguments, "--threads", "1", "--workers", "0", "--device", "cpu", "--score_threshold", "0.3", *more]

    return flags
