"""Boxes on `batches.jpg` lie on the objects of the training images, whatever the augmentation; the loader's draws stay what they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.shared.training.batch_sheet import sheet_of, write_sheet
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.training_data import TrainingData, read_training_data, training_loader
from ssld.stage2_detect.evaluation.drawing import class_color
from ssld.stage2_detect.training.batch_images import drawn_images, first_images

GREEN = (0, 255, 0)


def scenes(folder: Path, count: int) -> Path:
    """Black images of several sizes, each with one filled green rectangle, whose box is annotated."""
    rng = np.random.default_rng(0)
    raw: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(count):
        width, height = (int(side) for side in rng.integers(300, 900, 2))
        w, h = int(rng.integers(100, width // 2)), int(rng.integers(100, height // 2))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y : y + h, x : x + w] = GREEN
        Image.fromarray(pixels).save(folder / f"{number}.png")
        raw["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        raw["annotations"].append({"id": number, "image_id": number, "bbox": [x, y, w, h], "category_id": 1})
    (folder / "train.json").write_text(json.dumps(raw))
    return folder / "train.json"


def opened(folder: Path, count: int = 6, **more: Any) -> tuple[TrainConfig, TrainingData]:
    settings: dict[str, Any] = {
        "output": folder / "run",
        "backbone": "random:test_resnet",
        "data": {"train_annotations": scenes(folder, count), "train_images": folder},
        "resize": {"train_short_sides": [160, 320, 640], "train_long_side": 900},
        "batch_size": 2,
        "steps": 20,
        "optim": {"name": "sgd", "lr": 0.01, "reference_batch": 2},
    }
    config = TrainConfig.model_validate(settings | more)
    return config, read_training_data(config)


def extent(mask_HW: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("augment", [{}, {"large_scale_jitter": [0.5, 1.5]}], ids=["flip and resize", "jitter"])
def test_a_box_is_drawn_around_its_object(tmp_path: Path, augment: dict[str, Any]) -> None:
    config, data = opened(tmp_path, augment=augment)
    outline = np.array(class_color(0))
    compared = 0
    for batch in training_loader(config, data, start=0, stop=6, rank=0, ranks=1):
        for image, _ in drawn_images(batch, data.train.class_names, {}):
            pixels_HWC = np.asarray(image).astype(int)
            drawn_HW = (pixels_HWC == outline).all(-1)
            green_HW = (pixels_HWC[..., 1] > 128) & (pixels_HWC[..., 0] < 64)
            if not green_HW.any() or not drawn_HW.any():  # cut away by the jitter
                continue
            # The line is drawn on the object's own pixels: what is left of the object ends inside it, within the width of a line.
            line = 3 + 2 * (image.width // 480)
            inner, outer = extent(green_HW), extent(drawn_HW)
            assert (inner[:2] - outer[:2] >= -1).all()
            assert (outer[2:] - inner[2:] >= -1).all()
            assert (abs(inner - outer) <= line + 2).all(), (inner, outer)
            compared += 1
    assert compared >= 8


def test_eight_to_sixteen_images_with_their_names_and_the_draws_of_the_training(tmp_path: Path) -> None:
    config, data = opened(tmp_path, count=20)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    expected = list(training_loader(config, data, start=0, stop=4, rank=0, ranks=1))
    images = first_images(config, data, steps=20, ranks=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for _, name in images] == [Path(r.path).name for batch in expected for r in batch.records]
    assert len(images) == 8
    after = list(training_loader(config, data, start=0, stop=4, rank=0, ranks=1))
    assert all(torch.equal(a.images.pixels_BCHW, b.images.pixels_BCHW) for a, b in zip(expected, after, strict=True))
    large = config.model_copy(update={"batch_size": 20})
    assert len(first_images(large, data, steps=20, ranks=1)) == 16
    assert len(first_images(config, data, steps=3, ranks=1)) == 6  # a run of three steps of two images


def test_images_of_one_name_have_their_folder_in_the_caption(tmp_path: Path) -> None:
    config, data = opened(tmp_path, count=2)
    first, second = data.train.images
    one, other = ((tmp_path / part / Path(first.path).name) for part in ("a", "b"))
    for record, path in ((first, one), (second, other)):
        path.parent.mkdir()
        Path(record.path).rename(path)
    images = [replace(record, path=str(path)) for record, path in ((first, one), (second, other))]
    data.train.images[:] = images
    captions = {name for _, name in first_images(config, data, steps=1, ranks=1)}
    assert captions == {f"a/{one.name}", f"b/{one.name}"}


def test_the_sheet_has_every_image_at_its_place(tmp_path: Path) -> None:
    colors = [(20 * n, 255 - 20 * n, 30) for n in range(6)]
    images = [(Image.new("RGB", (200, 100 + 10 * n), color), f"image {n}") for n, color in enumerate(colors)]
    sheet = sheet_of(images)
    cell = (200 + 6, 150 + 18 + 6)  # the largest image, its caption and a gap
    assert sheet.size == (4 * cell[0] - 6, 2 * cell[1] - 6)
    for number, color in enumerate(colors):
        left, top = number % 4 * cell[0], number // 4 * cell[1]
        assert sheet.getpixel((left, top)) == sheet.getpixel((left + 199, top + 99)) == color
        strip = sheet.crop((left, top + 100 + 10 * number, left + 200, top + 100 + 10 * number + 18))
        assert strip.getextrema() == ((0, 255),) * 3  # black letters on white
    file = write_sheet(tmp_path, images)
    with Image.open(file) as written:
        assert (written.format, written.size) == ("JPEG", sheet.size)
