"""Views against closed forms: sizes of the formula, boxes that follow the pixels, draws that repeat."""

import numpy as np
import pytest
import torch

from stage2_detect.augment import View, draw_view, fit_view, view_boxes, view_image

SHORT_SIDES = [640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize(
    ("height", "width", "short_side", "max_long", "new_height", "new_width"),
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
def test_size_formula(height: int, width: int, short_side: int, max_long: int, new_height: int, new_width: int) -> None:
    view = fit_view(height, width, short_side=short_side, max_long=max_long)
    assert (view.height, view.width) == (new_height, new_width)
    assert view.scale == min(short_side / min(height, width), max_long / max(height, width))
    assert not view.flip


def test_unchanged_size_keeps_the_pixels() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(view_image(image, fit_view(20, 30, short_side=20, max_long=99)), image)
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
    view = fit_view(427, 613, short_side=640, max_long=1333)
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
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    expected = view_boxes(np.array([[6, 10, 36, 20]], dtype=np.float32), view)[0]
    assert np.abs(np.array(found) - expected).max() <= 1


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75 (OpenCV's), IEEE TASSP 1981, equation 4."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_bicubic_is_opencvs_closed_form() -> None:
    """Half-pixel centres by the exact scale, four taps, border replicated, no antialiasing; rounded and clamped."""
    row = np.random.default_rng(0).integers(0, 256, 23)
    for short_side in (9, 17, 31):
        view = fit_view(5, 23, short_side=short_side, max_long=10**6)
        image = torch.from_numpy(row.astype(np.uint8)).expand(3, 5, 23)
        out = view_image(image, view, "bicubic")[0, view.height // 2].numpy()
        for column in range(view.width):
            centre = (column + 0.5) / view.scale - 0.5
            first = int(np.floor(centre)) - 1
            value = sum(cubic(centre - tap) * row[np.clip(tap, 0, 22)] for tap in range(first, first + 4))
            assert abs(out[column] - np.clip(np.round(value), 0, 255)) <= 1


def test_draws_depend_on_seed_image_and_view_only() -> None:
    def draw(seed: int = 0, image_id: int | str = 5, view: int = 0, flip: float = 0.5) -> View:
        return draw_view(
            480, 640, seed=seed, image_id=image_id, view=view, short_sides=SHORT_SIDES, max_long=1333, flip=flip
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
