"""Augmented training images against drawn scenes: every object is a rectangle of its own grey level, so the pixels tell where it went."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as kernels

from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import train
from ssld.stage2_detect.augment_config import PRESETS, AugmentConfig
from ssld.stage2_detect.config import ResizeConfig, TrainConfig
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.colors import erase, recolor, shift_hue
from ssld.stage2_detect.data.composites import TrainingImage, compose
from ssld.stage2_detect.data.loaders import TrainBatch, TrainLoader, load_record
from ssld.stage2_detect.data.views import TrainingViews, View, ViewedImage, view_boxes, view_image, view_matrix
from ssld.stage2_detect.models.mask_targets import rasterize

HEIGHT, WIDTH, OBJECTS = 48, 64, 6
RESIZE = ResizeConfig(train_short_sides=[48], train_long_side=64, interpolation="bilinear", kernel="fast")
NUMBERS = [pytest.param(masks, id="masks" if masks else "boxes") for masks in (False, True)]


@pytest.fixture(params=NUMBERS)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> CocoData:
    """Five images of six triangles or rectangles; object i of image k has the grey level 40 * k + 6 * i + 20 on black. Half of the shapes are RLE."""
    return drawn(tmp_path, masks=request.param)


def drawn(folder: Path, *, masks: bool) -> CocoData:
    draw = np.random.default_rng(0)
    raw: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}  # fmt: skip
    for k in range(5):
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        for i in range(OBJECTS):
            x, y = 20 * (i % 3) + int(draw.integers(0, 8)), 24 * (i // 3) + int(draw.integers(0, 8))
            w, h = (int(side) for side in draw.integers(8, 15, 2))
            pixels[y : y + h, x : x + w] = 40 * k + 6 * i + 20
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            bitmap[y : y + h, x : x + w] = 1
            flat = bitmap.ravel(order="F").astype(int)
            changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [-1]])))
            counts = np.diff(np.concatenate([[0], changes])).tolist()
            shape = {"size": [HEIGHT, WIDTH], "counts": counts} if i % 2 else [polygon]
            row = {"id": 100 * k + i + 1, "image_id": k, "category_id": 1 + i % 2, "bbox": [x, y, w, h]}
            raw["annotations"].append(row | ({"segmentation": shape} if masks else {}))
        Image.fromarray(pixels).save(folder / f"{k}.png")
        raw["images"].append({"id": k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT})
    (folder / "data.json").write_text(json.dumps(raw))
    return read_coco(folder / "data.json", folder, training=True, segmentations=masks)


def level(image: int, position: int) -> int:
    return 40 * image + 6 * int(position) + 20


def images(data: CocoData, count: int = 40, **augment: Any) -> list[TrainingImage]:
    """Training images of the first record, one per pass."""
    config = AugmentConfig(**augment)
    views = TrainingViews(7, RESIZE, config)

    def make(number: int) -> TrainingImage:
        def view_of(index: int, zoom: float) -> tuple[int, ViewedImage]:
            record = data.images[index]
            return index, views.of(
                load_record(record), record.boxes_N4, image_id=record.image_id, number=number, zoom=zoom
            )

        return compose(
            0,
            view_of,
            len(data.images),
            seed=7,
            number=number,
            record_of=data.images.__getitem__,
            augment=config,
            compositions=True,
        )

    return [make(number) for number in range(count)]


def objects_of(image: TrainingImage) -> list[tuple[int, int]]:
    """(position of the source image, position of the object in it) of each object."""
    return [(part.index, int(position)) for part in image.sources.parts for position in part.kept_N]


# Geometry


@pytest.mark.parametrize(("flip", "vertical", "turns"), list(itertools.product((False, True), (False, True), range(4))))
def test_boxes_and_points_follow_the_pixels(flip: bool, vertical: bool, turns: int) -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[:, 4:9, 10:22] = 255
    box = np.array([[10, 4, 22, 9]], dtype=np.float32)
    view = View(2.0, 36, 50, flip, 2, 6, vertical, turns)
    seen = view_image(image, view, "bilinear", "fast")
    assert tuple(seen.shape[1:]) == ((50, 36) if turns % 2 else (36, 50))
    rows, columns = torch.nonzero(seen[0] > 127, as_tuple=True)
    extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    (moved,) = view_boxes(box, view)
    assert [int(one) for one in extent] == moved.tolist()
    corners = box.reshape(2, 2).astype(float) @ view_matrix(view)[:, :2].T + view_matrix(view)[:, 2]
    assert [*corners.min(0), *corners.max(0)] == moved.tolist()


def test_turns_and_flips_have_their_inverses() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[1, 2, 3, 4], [29, 19, 30, 20]], dtype=np.float32)
    for turns in (1, 2, 3):
        sides = (30, 20) if turns % 2 else (20, 30)
        there, back = View(1.0, 20, 30, turns=turns), View(1.0, *sides, turns=4 - turns)
        assert not torch.equal(view_image(image, there), image)
        assert torch.equal(view_image(view_image(image, there), back), image)
        assert np.array_equal(view_boxes(view_boxes(boxes, there), back), boxes)
    mirrored = View(1.0, 20, 30, vertical=True)
    assert torch.equal(view_image(image, mirrored), image.flip(1))
    assert np.array_equal(view_boxes(view_boxes(boxes, mirrored), mirrored), boxes)


@pytest.mark.parametrize("data", [False], indirect=True)
def test_a_crop_keeps_objects_and_drops_what_it_cuts_off(data: CocoData) -> None:
    dropped = zoomed = 0
    for made in images(data, crop=1.0, vertical_flip=0.5, quarter_turns=0.5):
        scale = made.scale
        assert max(made.pixels_CHW.shape[1:]) <= 64
        assert len(made.boxes_M4)
        dropped += OBJECTS - len(made.boxes_M4)
        zoomed += scale > 1.05
        for (x1, y1, x2, y2), (image, position) in zip(made.boxes_M4, objects_of(made), strict=True):
            original = data.images[image].boxes_N4[position]
            whole = (original[2:] - original[:2]).prod() * scale**2
            assert 0.3 * whole <= (x2 - x1) * (y2 - y1) <= whole * 1.001
            middle = made.pixels_CHW[0, int(y1 + y2) // 2, int(x1 + x2) // 2]
            assert middle == level(image, position)
    assert dropped > 20
    assert zoomed > 20


# Colors


def test_boxes_and_masks_follow_the_pixels_of_a_jittered_image(data: CocoData) -> None:
    """Scales of 0.3 to 2 in a square of 64 pixels: cut where they are above 1, smaller than the square below."""
    scales, cut, compared, masked = [], 0, 0, 0
    for made in images(data, 60, large_scale_jitter=(0.3, 2.0)):
        height, width = made.pixels_CHW.shape[1:]
        assert max(height, width) <= 64
        scales.append(made.scale)
        cut += OBJECTS - len(made.boxes_M4)
        of = objects_of(made)
        has_masks = data.images[0].segmentations is not None
        grids = shown_by_masks(made, data) if has_masks and of else None
        shown = made.pixels_CHW[0].numpy().astype(int)
        for row, ((x1, y1, x2, y2), (_, position)) in enumerate(zip(made.boxes_M4, of, strict=True)):
            if min(x2 - x1, y2 - y1) < 6:  # its edges are interpolated
                continue
            near = np.abs(shown - level(0, position)) <= 2
            inside = np.zeros_like(near)
            inside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
            rows, columns = np.nonzero(near & inside)
            extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(extent - [x1, y1, x2, y2]).max() < 2.5
            compared += 1
            if grids is not None:
                assert (grids[row] & near & inside).sum() > 0.5 * (grids[row] | (near & inside)).sum()
                masked += 1
    assert min(scales) < 0.5
    assert max(scales) > 1.7
    assert cut > 15
    assert compared > 60
    assert (masked > 60) == (data.images[0].segmentations is not None)


def test_colors_change_as_their_definitions_say() -> None:
    draw = np.random.default_rng(0)
    image = torch.from_numpy(draw.integers(0, 256, (3, 12, 10), dtype=np.uint8))
    pixels = image.double()
    grey = 0.2989 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]

    def factor(limit: float) -> float:
        return random.Random(3).uniform(1 - limit, 1 + limit)

    def changed(**settings: float) -> torch.Tensor:
        return recolor(image, AugmentConfig(**settings), random.Random(3)).double()

    def blended(other: torch.Tensor | float, f: float) -> torch.Tensor:
        return (f * pixels + (1 - f) * other).clamp(0, 255)

    assert torch.equal(changed(), pixels)
    f = factor(0.4)
    assert (changed(brightness=0.4) - blended(0.0, f)).abs().max() <= 1
    assert (changed(contrast=0.4) - blended(grey.floor().mean().item(), f)).abs().max() <= 1
    assert (changed(saturation=0.4) - blended(grey.floor(), f)).abs().max() <= 1.5
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    shift = random.Random(5).uniform(-0.5, 0.5)
    hue = recolor(red, AugmentConfig(hue=0.5), random.Random(5))[:, 0, 0].tolist()
    sector, part = divmod((shift % 1) * 6, 1)
    closed = {
        0: (1, part, 0),
        1: (1 - part, 1, 0),
        2: (0, 1, part),
        3: (0, 1 - part, 1),
        4: (part, 0, 1),
        5: (1, 0, 1 - part),
    }
    assert np.allclose(hue, 255 * np.array(closed[int(sector)]), atol=2)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (3, 20_000), (130, 300)])
def test_the_shift_of_the_hue_is_torchvisions(size: tuple[int, int]) -> None:
    """To one level; grey pixels and the largest and least channel stay, and so does everything without a shift."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image[:, :1] = image[:1, :1]  # a row of greys
    for shift in (-0.5, -0.3, -0.02, 0.01, 1 / 3, 0.5):
        shifted = shift_hue(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), shift)
        apart = (shifted.int() - kernels.adjust_hue(image, shift).int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < 0.01
        assert torch.equal(shifted[:, :1], image[:, :1])
        for least_or_most in (torch.amin, torch.amax):
            assert (least_or_most(shifted, 0).int() - least_or_most(image, 0).int()).abs().max() <= 1
    assert size == (1, 1) or not torch.equal(shifted, image)
    assert torch.equal(shift_hue(image, 0.0), image)
    thirds = shift_hue(image, 1 / 3).int() - image[[2, 0, 1]].int()  # red becomes green, green blue, blue red
    assert thirds.abs().max() <= 1


def test_blur_is_a_gaussian_of_the_drawn_width() -> None:
    image = torch.zeros(3, 31, 31, dtype=torch.uint8)
    image[:, 15, 15] = 255
    draw = random.Random(0)
    draw.random()
    sigma = draw.uniform(0.1, 2.0)
    x = np.arange(31) - 15
    weights = np.exp(-(x**2) / (2 * sigma**2)) * (np.abs(x) <= np.ceil(3 * sigma))
    expected = 255 * np.outer(weights / weights.sum(), weights / weights.sum())
    blurred = recolor(image, AugmentConfig(blur=1.0), random.Random(0))
    assert np.abs(blurred[0].numpy() - expected).max() <= 0.51
    line = torch.full((3, 1, 9), 7, dtype=torch.uint8)
    assert torch.equal(recolor(line, AugmentConfig(blur=1.0), random.Random(0)), line)


def test_erasing_hides_at_most_half_of_a_box() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 80), dtype=np.uint8))
    boxes = np.array([[5, 5, 25, 30], [50, 20, 70, 55], [30, 40, 34, 44]], dtype=np.float32)
    mean = image.numpy().reshape(3, -1).mean(1).astype(int)
    found = 0
    for number in range(60):
        erased = erase(image, boxes, random.Random(number)).numpy()
        changed = (erased != image.numpy()).any(0)
        found += bool(changed.any())
        if changed.any():
            rows, columns = np.nonzero(changed)
            top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            assert np.abs(erased[:, top:bottom, left:right].reshape(3, -1).T - mean).max() <= 1
            assert (bottom - top) * (right - left) <= 0.16 * 60 * 80
        for x1, y1, x2, y2 in boxes.astype(int):
            assert changed[y1:y2, x1:x2].mean() <= 0.5
    assert found > 30


# Compositions


def shown_by_masks(made: TrainingImage, data: CocoData) -> np.ndarray:
    """Bool [M, H, W] of every object by its mask; the grid of a RoI is square."""
    height, width = made.pixels_CHW.shape[1:]
    side, count = max(height, width), len(made.boxes_M4)
    rois = np.tile(np.array([[0, 0, side, side]], dtype=np.float32), (count, 1))
    masks = made.sources.masks(data.images)
    return rasterize([masks], np.zeros(count, int), np.arange(count), rois, side)[:, :height, :width]


@pytest.mark.parametrize("kind", ["mosaic", "copy_paste"])
def test_boxes_and_masks_follow_the_pixels_of_a_composition(data: CocoData, kind: str) -> None:
    sources, objects, pasted, hidden = set(), 0, 0, 0
    settings: dict[str, Any] = {kind: 1.0, "vertical_flip": 0.5, "quarter_turns": 0.5}
    for made in images(data, **settings):
        height, width = made.pixels_CHW.shape[1:]
        assert made.boxes_M4.dtype == np.float32
        assert (made.boxes_M4 >= 0).all()
        assert (made.boxes_M4 <= [width, height, width, height]).all()
        sources |= {part.index for part in made.sources.parts}
        of = objects_of(made)
        objects += len(of)
        pasted += made.sources.pasted is not None
        hidden += OBJECTS - sum(image == 0 for image, _ in of)
        labels = made.sources.labels(data.images)
        assert labels.tolist() == [position % 2 for _, position in of]
        has_masks = data.images[0].segmentations is not None
        grids = shown_by_masks(made, data) if has_masks and of else None
        for row, ((x1, y1, x2, y2), (image, position)) in enumerate(zip(made.boxes_M4, of, strict=True)):
            inside = made.pixels_CHW[0, int(np.ceil(y1)) : int(y2), int(np.ceil(x1)) : int(x2)].numpy()
            own = np.abs(inside.astype(int) - level(image, position)) <= 2
            if kind == "mosaic":
                assert own.mean() > 0.6 or min(x2 - x1, y2 - y1) < 5
            elif has_masks:
                assert own.any()
            once = sum((i, int(p)) == (image, position) for i, p in of) == 1
            if grids is None or not once:
                continue
            shown = made.pixels_CHW[0].numpy().astype(int)
            if kind == "copy_paste":
                exact = shown == level(image, position)
                assert np.array_equal(grids[row], exact)
                rows, columns = np.nonzero(exact)
                assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x1, y1, x2, y2]
            elif abs(level(image, position) - 114) > 2:  # a mosaic interpolates the borders of objects
                near = np.abs(shown - level(image, position)) <= 2
                assert (grids[row] & near).sum() > 0.4 * (grids[row] | near).sum() or min(x2 - x1, y2 - y1) < 5
    assert len(sources) == 5
    assert objects > 200
    assert hidden > 3
    assert (pasted > 25) == (kind == "copy_paste")


@pytest.mark.parametrize("data", [False], indirect=True)
def test_mixup_blends_two_images_and_keeps_the_objects_of_both(data: CocoData) -> None:
    for made in images(data, 12, mixup=1.0):
        first, second = made.sources.parts
        assert first.index == 0
        views = TrainingViews(7, RESIZE, AugmentConfig(mixup=1.0))
        number = next(
            n for n, one in enumerate(images(data, 12, mixup=1.0)) if torch.equal(one.pixels_CHW, made.pixels_CHW)
        )
        one, two = (
            views.of(load_record(data.images[i]), data.images[i].boxes_N4, image_id=i, number=number)
            for i in (0, second.index)
        )
        a, b = one.pixels_CHW.double().flatten(), two.pixels_CHW.double().flatten()
        share = (made.pixels_CHW.double().flatten() - b).dot(a - b) / (a - b).dot(a - b).clamp(min=1)
        if second.index:
            assert 0.2 < share < 0.8
            assert (share * a + (1 - share) * b - made.pixels_CHW.double().flatten()).abs().max() < 1
        assert np.array_equal(made.boxes_M4, np.concatenate([one.boxes_M4, two.boxes_M4]))


# In a run


def loader(data: CocoData, *, stop: int = 20, **options: Any) -> TrainLoader:
    augment = AugmentConfig(**options.pop("augment", {"mosaic": 1.0}))
    settings: dict[str, Any] = {"batch_size": 2, "seed": 3, "start_step": 0, "stop_step": stop}
    return TrainLoader(data, RESIZE, augment, **settings | options)


def tensors(batch: TrainBatch) -> list[torch.Tensor]:
    return [batch.images.pixels_BCHW, batch.images.sizes_B2, batch.targets.boxes_BG4, batch.targets.labels_BG]


@pytest.mark.parametrize("data", [True], indirect=True)
def test_batches_depend_on_seed_and_step_alone(data: CocoData) -> None:
    augment = {"preset": "strong", "vertical_flip": 0.5, "quarter_turns": 0.5}
    whole = list(loader(data, augment=augment, stop=8))
    rest = list(loader(data, augment=augment, start_step=5, stop=8))
    for one, other in zip(whole[5:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    ranks = [list(loader(data, augment=augment, stop=8, rank=rank, ranks=2)) for rank in (0, 1)]
    for step, one in enumerate(whole):
        for rank in (0, 1):
            height, width = one.images.sizes_B2[rank].tolist()
            parts = [one.images.pixels_BCHW[rank], ranks[rank][step].images.pixels_BCHW[0]]
            assert torch.equal(*(pixels[:, :height, :width] for pixels in parts))
    other_seed = list(loader(data, augment=augment, stop=8, seed=4))
    assert not torch.equal(whole[0].images.pixels_BCHW[:, :, :32, :32], other_seed[0].images.pixels_BCHW[:, :, :32, :32])  # fmt: skip


@pytest.mark.parametrize("data", [False], indirect=True)
def test_compositions_end_before_the_run(data: CocoData) -> None:
    batches = list(loader(data, compose_steps=18))
    grey = [(batch.images.pixels_BCHW == 114).all(1).any().item() for batch in batches]
    assert sum(grey[:18]) > 14
    assert not any(grey[18:])


def test_an_unreadable_image_of_a_mosaic_is_replaced_and_reported(tmp_path: Path) -> None:
    data = drawn(tmp_path, masks=False)
    (tmp_path / "3.png").write_bytes(b"no image")
    batches = list(loader(data))
    names = {Path(one.name).name for batch in batches for one in batch.unreadable}
    assert names == {"3.png"}
    assert all(len(batch.images.pixels_BCHW) == 2 for batch in batches)


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_training_with_every_kind_of_augmentation(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tmp_path, masks=True)
    settings = {
        "backbone": "random:test_resnet",
        "output": str(tmp_path / "run"),
        "data": {"train_annotations": str(tmp_path / "data.json"), "train_images": str(tmp_path)},
        "steps": 6,
        "batch_size": 2,
        "resize": {"train_short_sides": [48], "train_long_side": 64, "short_side": 48, "long_side": 64},
        "model": {"kind": kind, "fpn_channels": 16, "roi": {"hidden": 16, "samples_per_image": 16}},
        "augment": "strong",
        "optim": {"lr": 1e-3, "reference_batch": 2},
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert train.main(["--config", str(tmp_path / "run.yaml"), "--augment.mosaic", "0.4"]) == 0, capsys.readouterr()
    assert read_metadata(tmp_path / "run" / "detector.safetensors")["kind"] == "detector"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


# Settings


def parsed(augment: Any) -> AugmentConfig:
    settings = {
        "backbone": "random:test_resnet",
        "output": "run",
        "steps": 2,
        "batch_size": 2,
        "data": {"train_annotations": "a.json", "train_images": "."},
        "optim": {"lr": 0.1, "reference_batch": 1},
    }
    return TrainConfig.model_validate(settings | {"augment": augment}).augment


def test_a_named_set_stands_for_its_values() -> None:
    for name, values in PRESETS.items():
        config = parsed(name)
        assert config == parsed({"preset": name})
        assert all(getattr(config, key) == value for key, value in values.items())
        assert parsed(config.model_dump(mode="json")) == config  # as a resumed run reads it
    assert parsed({"preset": "strong", "mosaic": 0}).mosaic == 0
    assert parsed({}) == AugmentConfig()


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"mosaic": 0.6, "mixup": 0.5}, "add up to at most 1, not 1.1"),
        ({"crop": 0.5, "large_scale_jitter": [0.5, 2]}, "large_scale_jitter crops already: set crop to 0"),
        ("heavy", "heavy"),
    ],
)
def test_mistakes_are_named(augment: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    rest = {"data": {"train_annotations": "a", "train_images": "b"}, "optim": {"lr": 1, "reference_batch": 1}}
    settings = {"backbone": "random:test_resnet", "steps": 2, "batch_size": 2} | rest
    file.write_text(json.dumps(settings | {"augment": augment}))
    assert train.main(["--config", str(file), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
