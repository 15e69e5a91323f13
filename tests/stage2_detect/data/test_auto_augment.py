"""AutoAugment on drawn rectangles: boxes follow the pixels; colors against closed forms."""

import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.auto_augment import (
    FILL,
    POLICY_V1,
    Operation,
    apply_operation,
    auto_augment,
    draw_sub_policy,
)
from ssld.stage2_detect.data.coco import CocoData, CocoImage
from ssld.stage2_detect.data.loaders import TrainBatch, TrainLoader

WIDTH, HEIGHT = 640, 480
NONE = np.zeros((0, 4), dtype=np.float32)
OPERATIONS = {name for pair in POLICY_V1 for name, _, _ in pair}
TABLE = """
    TranslateX_BBox .6 4 + Equalize .8 10
    TranslateY_Only_BBoxes .2 2 + Cutout .8 8
    Sharpness 0 8 + ShearX_BBox .4 0
    ShearY_BBox 1 2 + TranslateY_Only_BBoxes .6 6
    Rotate_BBox .6 10 + Color 1 6
    Color 0 0 + ShearX_Only_BBoxes .8 4
    ShearY_Only_BBoxes .8 2 + Flip_Only_BBoxes 0 10
    Equalize .6 10 + TranslateX_BBox .2 2
    Color 1 10 + TranslateY_Only_BBoxes .4 6
    Rotate_BBox .8 10 + Contrast 0 10
    Cutout .2 2 + Brightness .8 10
    Color 1 6 + Equalize 1 2
    Cutout_Only_BBoxes .4 6 + TranslateY_Only_BBoxes .8 2
    Color .2 8 + Rotate_BBox .8 10
    Sharpness .4 4 + TranslateY_Only_BBoxes 0 4
    Sharpness 1 4 + SolarizeAdd .4 4
    Rotate_BBox 1 8 + Sharpness .2 8
    ShearY_BBox .6 10 + Equalize_Only_BBoxes .6 8
    ShearX_BBox .2 6 + TranslateY_Only_BBoxes .2 10
    SolarizeAdd .6 8 + Brightness .8 10
"""
"""operation, probability, magnitude"""
RECTANGLE = np.array([[200, 150, 420, 330]], dtype=np.float32)


def photo(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Noise over a gradient, uint8 [height, width, 3]; no pixel has the fill's color."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 90, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    pixels = (pixels + rng.integers(0, 60, (height, width, 3))).astype(np.uint8)
    return np.where(pixels == 128, 129, pixels).astype(np.uint8)


def drawn(boxes_N4: np.ndarray) -> Image.Image:
    """Box i has the red value 255 - i on blue."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    for number, (x1, y1, x2, y2) in enumerate(boxes_N4.astype(int)):
        pixels[y1:y2, x1:x2] = 255 - number, 0, 0
    return Image.fromarray(pixels)


def extent(image: Image.Image, red: int = 255) -> list[int]:
    """xyxy around the pixels of a drawn box."""
    rows, columns = np.nonzero((np.array(image) == (red, 0, 0)).all(2))
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def run(
    operation: Operation, image: Image.Image, boxes_N4: np.ndarray = NONE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    moved, boxes, kept = apply_operation(operation, image, boxes_N4, random.Random(seed))
    assert moved.size == image.size
    assert moved.mode == "RGB"
    assert boxes.dtype == np.float32
    return np.array(moved), boxes, kept.tolist()


def test_policy_is_the_published_one() -> None:
    pairs = [[part.split() for part in line.split(" + ")] for line in TABLE.strip().splitlines()]
    assert [[(name, float(p), int(m)) for name, p, m in pair] for pair in pairs] == [list(pair) for pair in POLICY_V1]
    assert len(POLICY_V1) == 20
    assert len(OPERATIONS) == 17


@pytest.mark.parametrize("magnitude", [2, 5, 10])
@pytest.mark.parametrize("kind", ["TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate"])
def test_boxes_are_tight_around_the_moved_pixels(kind: str, magnitude: int) -> None:
    """To a pixel at any angle, where nothing is cut off; in both directions."""
    boxes = np.array([[250, 180, 420, 290], [300, 310, 330, 325], [150, 200, 170, 280]], dtype=np.float32)
    placements = set()
    for seed in range(8):
        moved, after, kept = apply_operation((f"{kind}_BBox", 1.0, magnitude), drawn(boxes), boxes, random.Random(seed))
        placements.add(tuple(after[0].tolist()))
        for box, number in zip(after, kept, strict=True):
            inside = np.array([2, 2, WIDTH - 2, HEIGHT - 2])
            if (box[:2] > inside[:2]).all() and (box[2:] < inside[2:]).all():
                assert np.abs(box - extent(moved, 255 - number)).max() <= 1.01
    assert len(placements) == 2


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (("TranslateX_BBox", 1.0, 4), [[100, 150, 320, 330], [300, 150, 520, 330]]),  # 4/10 * 250
        (("TranslateY_BBox", 1.0, 2), [[200, 100, 420, 280], [200, 200, 420, 380]]),  # 2/10 * 250
        (("ShearX_BBox", 1.0, 10), [[101, 150, 375, 330], [245, 150, 519, 330]]),  # x +- 0.3 y
        (("ShearY_BBox", 1.0, 10), [[200, 24, 420, 270], [200, 210, 420, 456]]),  # y +- 0.3 x
    ],
)
def test_magnitudes_in_closed_form(operation: Operation, expected: list[list[float]]) -> None:
    actual = {tuple(run(operation, drawn(RECTANGLE), RECTANGLE, seed)[1][0].round(3).tolist()) for seed in range(10)}
    assert actual == {tuple(map(float, box)) for box in expected}


def test_rotation_in_closed_form() -> None:
    """30 degrees about the center of the image, in both directions."""
    angle, corners = np.pi / 6, np.array([[200, 150], [420, 150], [420, 330], [200, 330]]) - [320, 240]
    expected = set()
    for sign in (-1, 1):
        cos, sin = np.cos(angle), sign * np.sin(angle)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + [320, 240]
        expected.add(tuple(np.concatenate([turned.min(0), turned.max(0)]).round(2).tolist()))
    results = [run(("Rotate_BBox", 1.0, 10), drawn(RECTANGLE), RECTANGLE, seed)[1][0] for seed in range(10)]
    assert {tuple(box.astype(float).round(2).tolist()) for box in results} == expected


def test_boxes_outside_the_image_are_dropped_and_others_clipped() -> None:
    boxes = np.array([[10, 10, 90, 100], [30, 20, 200, 90], [600, 20, 640, 90]], dtype=np.float32)
    results = {}
    for seed in range(10):
        moved, after, kept = run(("TranslateX_BBox", 1.0, 4), drawn(boxes), boxes, seed)
        results[tuple(kept)] = after.tolist()
        uncovered = moved[:, -100:] if kept == [1, 2] else moved[:, :100]
        assert (uncovered == FILL).all()
    assert results == {
        (1, 2): [[0, 20, 100, 90], [500, 20, 540, 90]],
        (0, 1): [[110, 10, 190, 100], [130, 20, 300, 90]],
    }


@pytest.mark.parametrize("name", sorted(name for name in OPERATIONS if name.endswith("_Only_BBoxes")))
def test_box_only_operations_touch_nothing_outside(name: str) -> None:
    """Boxes stay; pixels outside stay; pixels inside are some of the box's own, or the fill."""
    before = photo()
    boxes = np.array([[200.4, 150.2, 420.6, 330.9], [10, 20, 90, 60]], dtype=np.float32)
    changed = 0
    for seed in range(6):
        after, boxes_after, kept = run((name, 3.0, 8), Image.fromarray(before), boxes, seed)
        assert np.array_equal(boxes_after, boxes)
        assert kept == [0, 1]
        outside = np.ones((HEIGHT, WIDTH), dtype=bool)
        outside[150:331, 200:421] = outside[20:60, 10:90] = False
        assert np.array_equal(after[outside], before[outside])
        for rows, columns in ((slice(150, 331), slice(200, 421)), (slice(20, 60), slice(10, 90))):
            changed += int((after[rows, columns] != before[rows, columns]).any())
            if not name.startswith("Equalize"):
                own, actual = (pixels[rows, columns].reshape(-1, 3) @ [1, 256, 65536] for pixels in (before, after))
                assert np.isin(actual, [*own, np.dot(FILL, [1, 256, 65536])]).all()
    assert changed >= 10


def test_inside_a_box_magnitudes_are_smaller() -> None:
    """120 px instead of 250, a hole of 2 * 50 px instead of 2 * 100; `Flip` mirrors the content."""
    before = photo()
    boxes = np.array([[100, 100, 500, 420]], dtype=np.float32)
    content, grey = before[100:420, 100:500], np.full((48, 400, 3), 128)
    up, down = np.concatenate([content[48:], grey]), np.concatenate([grey, content[:-48]])
    for seed in range(6):
        moved = run(("TranslateY_Only_BBoxes", 3.0, 4), Image.fromarray(before), boxes, seed)[0][100:420, 100:500]
        assert np.array_equal(moved, up) or np.array_equal(moved, down)
        holes = {}
        for name in ("Cutout_Only_BBoxes", "Cutout"):
            after = run((name, 3.0, 6), Image.fromarray(before), boxes, seed)[0]
            rows, columns = np.nonzero((after == FILL).all(2))
            holes[name] = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == holes[name][0] * holes[name][1]
        assert max(holes["Cutout_Only_BBoxes"]) <= 60 < max(holes["Cutout"]) <= 120
    flipped = run(("Flip_Only_BBoxes", 3.0, 0), Image.fromarray(before), boxes)[0]
    assert np.array_equal(flipped[100:420, 100:500], content[:, ::-1])


def test_box_only_probability_is_a_third_for_each_box() -> None:
    boxes = np.array([[x, y, x + 10, y + 10] for x in range(0, 630, 10) for y in range(0, 470, 10)], dtype=np.float32)
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, ::10] = 255
    after = run(("Flip_Only_BBoxes", 0.6, 5), Image.fromarray(pixels), boxes)[0]
    share = (after[5:470:10, 9:630:10, 0] == 255).mean()
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / len(boxes)) ** 0.5


def test_colors_in_closed_form() -> None:
    """Blend with factor 0.1 + 1.8 m / 10 between a degenerate image and the image; SolarizeAdd adds 11 m to dark pixels."""
    before = photo()
    image, values = Image.fromarray(before), before.astype(np.float64)
    grey = np.repeat((values @ [0.299, 0.587, 0.114])[..., None], 3, 2)
    flat = np.full_like(values, np.round(grey[..., 0]).mean())
    for kind, degenerate in (("Brightness", np.zeros_like(values)), ("Color", grey), ("Contrast", flat)):
        for magnitude in (0, 4, 10):
            factor = 0.1 + 0.18 * magnitude
            expected = (degenerate + factor * (values - degenerate)).clip(0, 255)
            actual = run((kind, 1.0, magnitude), image)[0]
            assert np.abs(actual - expected).max() <= 2
    for magnitude, addition in ((4, 44), (8, 88)):
        expected = np.where(before < 128, np.minimum(values + addition, 255), values)
        assert np.array_equal(run(("SolarizeAdd", 1.0, magnitude), image)[0], expected)
    blurred = values.copy()
    blurred[1:-1, 1:-1] = sum(
        (5 if (i, j) == (1, 1) else 1) * values[i : HEIGHT - 2 + i, j : WIDTH - 2 + j] for i in range(3) for j in range(3)
    ) / 13  # fmt: skip
    expected = (blurred + 1.54 * (values - blurred)).clip(0, 255)
    assert np.abs(run(("Sharpness", 1.0, 8), image)[0] - expected).max() <= 2


def test_equalize_spreads_the_values() -> None:
    after, _, _ = run(("Equalize", 1.0, 10), Image.fromarray(photo()))
    for channel in range(3):
        counts = np.bincount(after[..., channel].ravel(), minlength=256)
        distance = np.abs(np.cumsum(counts) / counts.sum() - np.arange(1, 257) / 256).max()
        assert distance < 0.02  # Kolmogorov's distance from the uniform distribution
        assert after[..., channel].min() == 0
        assert after[..., channel].max() == 255


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_probability_zero_does_nothing_and_one_something(name: str) -> None:
    image = drawn(RECTANGLE) if name.startswith("Equalize") else Image.fromarray(photo())
    image.putpixel((210, 160), (9, 77, 3))
    for seed in range(5):
        after, boxes, kept = run((name, 0.0, 8), image, RECTANGLE, seed)
        assert np.array_equal(after, np.array(image))
        assert np.array_equal(boxes, RECTANGLE)
        assert kept == [0]
    assert (run((name, 3.0, 8), image, RECTANGLE)[0] != np.array(image)).any()
    bare, boxes, kept = run((name, 3.0, 8), image)
    assert boxes.shape == (0, 4)
    assert kept == []
    if name.endswith("_Only_BBoxes"):
        assert np.array_equal(bare, np.array(image))


def test_sub_policies_are_drawn_uniformly() -> None:
    counts = Counter(draw_sub_policy(seed=1, image_id=i, view=v)[0] for i in range(1000) for v in range(4))
    assert sorted(counts) == list(range(20))
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 43.8  # 19 degrees of freedom, p = 0.001


def test_every_sub_policy_and_determinism() -> None:
    """Until each sub-policy was drawn: same draws, same result; no global generator is read or moved."""
    before = torch.from_numpy(photo(100, 80)).permute(2, 0, 1)
    boxes = np.array([[5, 6, 40, 70], [50.5, 10.25, 99.75, 60], [0, 0, 100, 80]], dtype=np.float32)
    original, original_boxes = before.clone(), boxes.copy()
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    drawn_policies, different = set(), 0
    for number in range(150):
        drawn_policies.add(draw_sub_policy(seed=0, image_id="a", view=number)[0])
        image, moved, kept = auto_augment(before, boxes, seed=0, image_id="a", view=number)
        again, moved_again, kept_again = auto_augment(before, boxes, seed=0, image_id="a", view=number)
        assert torch.equal(image, again)
        assert np.array_equal(moved, moved_again)
        assert np.array_equal(kept, kept_again)
        assert image.dtype == torch.uint8
        assert image.shape == before.shape
        assert moved.dtype == np.float32
        assert len(moved) == len(kept)
        assert (moved >= 0).all()
        assert (moved <= [100, 80, 100, 80]).all()
        assert ((moved[:, 2:] - moved[:, :2]) >= 1).all()
        other = auto_augment(before, boxes, seed=1, image_id="a", view=number)[0]
        different += not torch.equal(other, image)
        bare, none, kept = auto_augment(before, boxes[:0], seed=0, image_id="a", view=number)
        assert bare.shape == before.shape
        assert none.shape == (0, 4)
        assert len(kept) == 0
    assert drawn_policies == set(range(20))
    assert different > 100
    assert torch.equal(before, original)
    assert np.array_equal(boxes, original_boxes)
    assert states[0] == random.getstate()
    assert states[1] == repr(np.random.get_state())
    assert torch.equal(states[2], torch.get_rng_state())


def test_loader_distorts_before_it_resizes_and_labels_follow(tmp_path: Path) -> None:
    """Size and flip are drawn as without AutoAugment; the distorted image is resized; jitter pads to a square."""
    Image.fromarray(photo(100, 80)).save(tmp_path / "a.png")
    boxes = np.array([[5, 6, 40, 70], [50, 10, 98, 60], [1, 1, 9, 9]], dtype=np.float32)
    record = CocoImage(
        7, str(tmp_path / "a.png"), 100, 80, boxes, np.array([2, 0, 1]), np.zeros(3, dtype=bool),
        np.ones(3), boxes.astype(np.float64), (1, 2, 3), None,
    )  # fmt: skip
    data = CocoData("x.json", True, ("a", "b", "c"), (1, 2, 3), [record])

    def batches(kernel: Literal["reference", "fast"] = "reference", **augment: Any) -> list[TrainBatch]:
        resize = ResizeConfig(train_short_sides=[80], train_long_side=200, kernel=kernel)
        options: dict[str, Any] = {"batch_size": 1, "seed": 5, "start_step": 0, "stop_step": 30}
        return list(TrainLoader(data, resize, AugmentConfig(**augment), **options))

    dropped = 0
    for step, (batch, plain) in enumerate(zip(batches(auto_augment=True), batches(), strict=True)):
        image, moved, kept = auto_augment(
            torch.from_numpy(photo(100, 80)).permute(2, 0, 1), boxes, seed=5, image_id=7, view=step
        )
        original = torch.from_numpy(photo(100, 80)).permute(2, 0, 1)
        flip = torch.equal(plain.images.pixels_BCHW[0, :, :80, :100], original.flip(2))
        assert flip or torch.equal(plain.images.pixels_BCHW[0, :, :80, :100], original)
        assert torch.equal(batch.images.pixels_BCHW[0, :, :80, :100], image.flip(2) if flip else image)
        assert batch.targets.labels_BG[0].tolist() == np.array([2, 0, 1])[kept].tolist()
        expected = moved.copy()
        if flip:
            expected[:, [0, 2]] = 100 - moved[:, [2, 0]]
        assert np.allclose(batch.targets.boxes_BG4[0].numpy(), expected)
        dropped += 3 - len(kept)
    assert dropped > 0
    for batch in batches("fast", large_scale_jitter=(0.3, 2.5), auto_augment=True):
        assert batch.images.pixels_BCHW.shape == (1, 3, 224, 224)
        assert batch.images.sizes_B2.max() <= 200
        assert batch.images.scales_B.item() <= 5
        height, width = batch.images.sizes_B2[0].tolist()
        assert not batch.images.pixels_BCHW[0, :, height:].any()
        assert not batch.images.pixels_BCHW[0, :, :, width:].any()
