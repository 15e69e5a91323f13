"""Views against closed forms: sizes, boxes that follow the pixels, reproducible draws."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig, TrainConfig
from ssld.stage2_detect.data.loaders import eval_loader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.data.training_data import read_training_data, training_loader
from ssld.stage2_detect.data.views import TrainingViews, View, draw_view, fit_view, view_boxes, view_image
from ssld.stage2_detect.models.batch import ImageBatch

SHORT_SIDES = [640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize(
    ("height", "width", "short_side", "long_side", "new_height", "new_width"),
    [
        (480, 640, 800, 1333, 800, 1067),  # 640 * 800/480 = 1066.67
        (480, 640, 640, 1333, 640, 853),  # 853.33
        (427, 640, 800, 1333, 800, 1199),  # 640 * 800/427 = 1199.06
        (640, 480, 800, 1333, 1067, 800),
        (300, 900, 800, 1333, 444, 1333),  # the long side binds: 300 * 1333/900 = 444.33
        (500, 1000, 667, 1333, 667, 1333),  # 0.5 * 1333 = 666.5 is rounded up
        (480, 640, 640, 640, 480, 640),  # a square to fit into
        (1, 1, 64, 64, 64, 64),
        (1, 5000, 64, 100, 1, 100),  # never less than one pixel
    ],
)
def test_size_formula(
    height: int, width: int, short_side: int, long_side: int, new_height: int, new_width: int
) -> None:
    view = fit_view(height, width, short_side=short_side, long_side=long_side)
    assert (view.height, view.width) == (new_height, new_width)
    assert view.scale == min(short_side / min(height, width), long_side / max(height, width))
    assert not view.flip


def test_unchanged_size_keeps_the_pixels() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(view_image(image, fit_view(20, 30, short_side=20, long_side=99)), image)
    flipped = View(1.0, 20, 30, flip=True)
    assert torch.equal(view_image(view_image(image, flipped), flipped), image)
    assert torch.equal(view_image(image, flipped), image.flip(-1))


def test_flip_twice_is_the_identity_for_boxes() -> None:
    boxes = np.array([[0, 0, 30, 20], [1, 2, 3, 4], [29, 19, 30, 20]], dtype=np.float32)
    flipped = View(1.0, 20, 30, flip=True)
    once = view_boxes(boxes, flipped)
    assert once.tolist() == [[0, 0, 30, 20], [27, 2, 29, 4], [0, 19, 1, 20]]
    assert np.array_equal(view_boxes(once, flipped), boxes)
    assert once.dtype == np.float32


def test_area_grows_with_the_square_of_the_scale() -> None:
    boxes = np.array([[3, 4, 50, 60], [10.5, 1.25, 90, 33]], dtype=np.float32)
    for flip in (False, True):
        view = View(1.7, 170, 340, flip)
        scaled = view_boxes(boxes, view)

        def area(b: np.ndarray) -> np.ndarray:
            return (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])

        assert np.allclose(area(scaled), area(boxes) * 1.7**2, rtol=1e-5)
        assert (scaled[:, :2] < scaled[:, 2:]).all()


def test_boxes_stay_inside_after_rounding_of_the_size() -> None:
    view = fit_view(427, 613, short_side=640, long_side=1333)
    boxes = view_boxes(np.array([[0, 0, 613, 427]], dtype=np.float32), view)
    assert (boxes <= [view.width, view.height] * 2).all()
    assert abs(boxes[0, 2] - view.width) <= 0.5
    assert view_boxes(np.zeros((0, 4), dtype=np.float32), View(2, 9, 9, flip=True)).shape == (0, 4)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("flip", [False, True])
def test_boxes_follow_the_pixels(interpolation: str, flip: bool) -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 6:36] = 255
    view = View(2.5, 100, 150, flip)
    out = view_image(image, view, interpolation)
    assert out.dtype == torch.uint8
    assert out.shape == (3, 100, 150)
    rows, columns = torch.nonzero(out[0] > 127, as_tuple=True)
    extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    expected = view_boxes(np.array([[6, 10, 36, 20]], dtype=np.float32), view)[0]
    assert np.abs(np.array(extent) - expected).max() <= 1


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75 (OpenCV's), IEEE TASSP 1981, equation 4."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_bicubic_is_opencvs_closed_form() -> None:
    """Half-pixel centers by the exact scale, four taps, border replicated, no antialiasing; rounded and clamped."""
    row = np.random.default_rng(0).integers(0, 256, 23)
    for short_side in (9, 17, 31):
        view = fit_view(5, 23, short_side=short_side, long_side=10**6)
        image = torch.from_numpy(row.astype(np.uint8)).expand(3, 5, 23)
        out = view_image(image, view, "bicubic")[0, view.height // 2].numpy()
        for column in range(view.width):
            center = (column + 0.5) / view.scale - 0.5
            first = int(np.floor(center)) - 1
            value = sum(cubic(center - tap) * row[np.clip(tap, 0, 22)] for tap in range(first, first + 4))
            assert abs(out[column] - np.clip(np.round(value), 0, 255)) <= 1


def test_draws_depend_on_seed_image_and_view_only() -> None:
    def draw(seed: int = 0, image_id: int | str = 5, view: int = 0, flip: float = 0.5) -> View:
        return draw_view(
            480,
            640,
            seed=seed,
            image_id=image_id,
            view=view,
            train_short_sides=SHORT_SIDES,
            train_long_side=1333,
            flip=flip,
        )

    assert draw() == draw()
    views = [draw(image_id=i, view=v) for i in range(100) for v in range(6)]
    counts = {side: sum(view.height == side for view in views) for side in SHORT_SIDES}
    assert min(counts.values()) > 60
    assert 240 < sum(view.flip for view in views) < 360
    assert [draw(view=v) for v in range(20)] != [draw(seed=1, view=v) for v in range(20)]
    assert [draw(view=v) for v in range(20)] != [draw(image_id="5", view=v) for v in range(20)]
    assert not any(draw(view=v, flip=0).flip for v in range(20))
    assert all(draw(view=v, flip=1).flip for v in range(20))


def test_draws_have_not_changed() -> None:
    """A run that is resumed with a newer version of the code has the same views (regression values)."""
    draws = [
        draw_view(480, 640, seed=3, image_id=i, view=1, train_short_sides=SHORT_SIDES, train_long_side=1333, flip=0.5)
        for i in (7, 8, "a", "b", 9, 10)
    ]
    assert [(view.height, view.flip) for view in draws] == [
        (672, True), (736, False), (800, True), (800, False), (736, True), (672, True),
    ]  # fmt: skip


def inverse(points_N2: np.ndarray, view: View) -> np.ndarray:
    """Map points of a view back to the image, by the formula in the docstring of `View`."""
    x, y = points_N2.T
    return np.stack([((view.width - x if view.flip else x) + view.left) / view.scale, (y + view.top) / view.scale], 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "fast"])
def test_window_is_cut_from_the_resized_image_and_boxes_follow(flip: bool, kernel: str) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8))
    whole = view_image(image, View(2.5, 100, 150), kernel=kernel)
    view = View(2.5, 30, 70, flip, top=20, left=35)
    cut = whole[:, 20:50, 35:105]
    assert torch.equal(view_image(image, view, kernel=kernel), cut.flip(2) if flip else cut)
    inside = np.array([[15, 9, 40, 19], [20.5, 8.5, 33.25, 12]], dtype=np.float32)
    boxes = view_boxes(inside, view)
    x1, x2 = 15 * 2.5 - 35, 40 * 2.5 - 35
    assert boxes[0].tolist() == [70 - x2 if flip else x1, 9 * 2.5 - 20, 70 - x1 if flip else x2, 19 * 2.5 - 20]
    corners = inverse(boxes.reshape(-1, 2), view).reshape(-1, 4)
    assert np.allclose(corners[:, [2, 1, 0, 3]] if flip else corners, inside, atol=1e-5)
    outside = view_boxes(np.array([[0, 0, 60, 40], [0, 0, 13.9, 40], [50, 0, 60, 7]], dtype=np.float32), view)
    assert outside[0].tolist() == [0, 0, 70, 30]
    assert ((outside[1:, 2:] - outside[1:, :2]).min(1) == 0).all()


def test_jitter_draws_scales_and_windows_uniformly() -> None:
    def draw(image_id: int, flip: float = 0.5) -> View:
        return draw_view(
            300,
            400,
            seed=0,
            image_id=image_id,
            view=2,
            train_short_sides=[],
            train_long_side=200,
            flip=flip,
            large_scale_jitter=(0.1, 2.0),
        )

    assert draw(3) == draw(3)
    views = [draw(i) for i in range(2000)]
    factors = np.array([view.scale * 400 / 200 for view in views])
    assert 0.1 <= factors.min() < 0.11
    assert 1.99 < factors.max() <= 2.0
    counts = np.histogram(factors, 10, (0.1, 2.0))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    for view, factor in zip(views, factors, strict=True):
        full = [int(300 * view.scale + 0.5), int(400 * view.scale + 0.5)]
        assert [view.height, view.width] == [min(side, 200) for side in full]
        assert 0 <= view.top <= full[0] - view.height
        assert 0 <= view.left <= full[1] - view.width
        assert factor > 0.99 or (view.top, view.left) == (0, 0)
    places = np.array([v.left / (int(400 * v.scale + 0.5) - 200) for v in views if v.scale > 0.6])
    assert abs(places.mean() - 0.5) < 4 * 12**-0.5 / len(places) ** 0.5
    assert {0.0, 1.0} < {round(place, 2) for place in places}
    assert 900 < sum(view.flip for view in views) < 1100
    assert not any(draw(i, flip=0).flip for i in range(50))


def test_training_view_keeps_visible_objects() -> None:
    """Labels are selected by the previous positions of the boxes; the pixels under a box are those of its object."""
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    boxes = np.array([[x, y, x + 16, y + 16] for x in range(4, 150, 30) for y in range(4, 110, 30)], dtype=np.float32)
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[:, y1:y2, x1:x2] = 5 + 12 * number
    views = TrainingViews(
        0,
        ResizeConfig(train_long_side=100, interpolation="bilinear", kernel="fast"),
        AugmentConfig(large_scale_jitter=(1.0, 2.0)),
    )
    cut_off = 0
    for number in range(40):
        viewed = views.of(image, boxes, image_id=1, number=number)
        assert max(viewed.pixels_CHW.shape[1:]) <= 100
        assert viewed.boxes_M4.shape == (len(viewed.kept_M), 4)
        cut_off += len(boxes) - len(viewed.kept_M)
        for (x1, y1, x2, y2), before in zip(viewed.boxes_M4, viewed.kept_M, strict=True):
            if min(x2 - x1, y2 - y1) > 4:
                assert viewed.pixels_CHW[0, int(y1 + y2) // 2, int(x1 + x2) // 2] == 5 + 12 * before
    assert cut_off > 40


def smooth_image() -> torch.Tensor:
    """Like a photograph: shapes and gradients without single-pixel contrast at the ends of the range."""
    y, x = np.mgrid[0:120, 0:160] / 20
    waves = [128 + 50 * np.sin(x * a + y * b) + 45 * np.cos(x * b - 2 * y) for a, b in ((1, 2), (2, 0.5), (3, 1))]
    return torch.from_numpy(np.stack(waves).round().astype(np.uint8))


@pytest.mark.parametrize("scale", [0.3, 0.83, 5 / 3, 2.6])
def test_fast_kernel_is_close_to_the_reference(scale: float) -> None:
    def errors(image: torch.Tensor, interpolation: str) -> torch.Tensor:
        view = View(scale, int(scale * image.shape[1] + 0.5), int(scale * image.shape[2] + 0.5))
        slow, fast = (view_image(image, view, interpolation, kernel) for kernel in ("reference", "fast"))
        assert fast.dtype == torch.uint8
        assert fast.shape == slow.shape
        return (slow.int() - fast.int()).abs()

    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 120, 160), dtype=np.uint8))
    extreme = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (3, 120, 160), dtype=np.uint8) * 255)
    for image in (smooth_image(), noise, extreme):
        assert errors(image, "bilinear").max() <= 1
    assert errors(smooth_image(), "bicubic").max() <= 1
    assert errors(noise, "bicubic").float().mean() < 1
    assert errors(noise, "bicubic").max() <= 67
    assert errors(extreme, "bicubic").max() <= 67


def test_fast_kernel_does_not_depend_on_the_layout() -> None:
    """A decoded image has channels-last memory, an image of a batch has channels-first memory."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).permute(2, 0, 1)
    view = fit_view(50, 70, short_side=83, long_side=1000)
    for interpolation in ("bicubic", "bilinear"):
        decoded, planes = (view_image(i, view, interpolation, "fast") for i in (image, image.contiguous()))
        assert torch.equal(decoded, planes)


def test_settings_reach_the_loaders(tmp_path: Path) -> None:
    """The batches follow the settings of `resize` and `augment`, in training and in evaluation."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    raw = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 30, 20]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(raw))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    resize = {"train_short_sides": [64], "train_long_side": 96, "short_side": 48, "long_side": 96}
    for kernel, auto, jitter in itertools.product(("reference", "fast"), (False, True), (None, (0.5, 1.5))):
        settings = {
            "backbone": "random:test_resnet",
            "output": tmp_path / "run",
            "steps": 9,
            "batch_size": 1,
            "data": {"train_annotations": tmp_path / "data.json", "train_images": tmp_path},
            "resize": resize | {"kernel": kernel},
            "augment": {"auto_augment": auto, "large_scale_jitter": jitter},
            "optim": {"lr": 0.1, "reference_batch": 1},
        }
        config = TrainConfig.model_validate(settings)
        data = read_training_data(config)
        views = TrainingViews(config.seed, config.resize, config.augment)
        loader = training_loader(config, data, start=0, stop=9, rank=0, ranks=1)
        for number, batch in enumerate(loader):
            viewed = views.of(image, data.train.images[0].boxes_N4, image_id=1, number=number)
            height, width = viewed.pixels_CHW.shape[1:]
            assert batch.images.sizes_B2.tolist() == [[height, width]]
            assert torch.equal(batch.images.pixels_BCHW[0, :, :height, :width], viewed.pixels_CHW)
            assert np.array_equal(batch.targets.boxes_BG4[0], viewed.boxes_M4)
        ((images, _),) = eval_loader(data.train, Sizing.of(config.resize), batch_size=1)
        expected = view_image(image, fit_view(40, 60, short_side=48, long_side=96), kernel=kernel)
        assert isinstance(images, ImageBatch)
        assert torch.equal(images.pixels_BCHW[0, :, :48, :72], expected)
    fast, reference = (view_image(image, View(1.2, 48, 72), kernel=kernel) for kernel in ("fast", "reference"))
    assert not torch.equal(fast, reference)  # else nothing above would show which kernel ran
