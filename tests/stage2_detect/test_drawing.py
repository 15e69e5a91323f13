"""Drawn pictures: pixels of boxes, shapes and names where they belong."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec

from stage2_detect.drawing import class_color, draw_objects
from stage2_detect.models.batch import Detections

GREY = (90, 90, 90)


def found(
    *boxes: tuple[float, float, float, float], labels: tuple[int, ...] = (), masks: list | None = None
) -> Detections:
    boxes_N4 = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels_N = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    return Detections(boxes_N4, torch.linspace(0.9, 0.5, len(boxes)), labels_N, masks)


def drawn(detections: Detections, size: tuple[int, int] = (640, 500)) -> np.ndarray:
    return np.array(draw_objects(Image.new("RGB", size, GREY), detections, ["cat", "dog"]))


def is_color(pixels: np.ndarray, label: int) -> np.ndarray:
    mask: np.ndarray = (pixels == class_color(label)).all(-1)
    return mask


def test_the_outline_is_the_outer_edge_of_the_box() -> None:
    pixels_HW3 = drawn(found((100, 200, 300, 420)))
    line_HW = is_color(pixels_HW3, 0)
    box_HW = np.zeros((500, 640), dtype=bool)
    box_HW[200:420, 100:300] = True
    inner_HW = np.zeros_like(box_HW)
    inner_HW[202:418, 102:298] = True
    assert (line_HW[200:] == (box_HW & ~inner_HW)[200:]).all()
    assert (pixels_HW3[inner_HW] == GREY).all()
    # Above it stands the name, on the box's colour, and nothing else.
    rows, columns = np.nonzero((pixels_HW3 != GREY).any(-1))
    assert 170 < rows.min() < 199
    assert rows.max() == 419
    assert columns.min() == 100
    assert columns.max() == 299
    name_HW3 = pixels_HW3[rows.min() : 200, 100:300]
    assert is_color(name_HW3, 0).sum() > 0.5 * (name_HW3 != GREY).any(-1).sum()


@pytest.mark.parametrize(("side", "zoom"), [(64, 8), (240, 2), (480, 1), (3000, 1)])
def test_small_pictures_are_enlarged_with_their_boxes(side: int, zoom: int) -> None:
    box = (side * 0.25, side * 0.5, side * 0.75, side)
    pixels_HW3 = drawn(found(box), (side, side))
    assert pixels_HW3.shape == (side * zoom, side * zoom, 3)
    line_HW = is_color(pixels_HW3, 0)
    left, right = int(side * 0.25 * zoom), int(side * 0.75 * zoom) - 1
    middle = int(side * 0.75 * zoom)
    columns = np.flatnonzero(line_HW[middle])
    assert columns.min() == left
    assert columns.max() == right
    assert 4 <= len(columns) <= 2 * max(2, side // 200)


def test_the_best_is_on_top_and_names_do_not_cover_each_other() -> None:
    box = (100.0, 100.0, 300.0, 300.0)
    pixels_HW3 = drawn(found(box, box, labels=(0, 1)))
    assert is_color(pixels_HW3, 0)[150, 100]  # the better one's outline
    for label in (0, 1):
        rows, _ = np.nonzero(is_color(pixels_HW3, label)[:100])
        other, _ = np.nonzero(is_color(pixels_HW3, label)[300:])
        assert (len(rows) > 100) != (len(other) > 100)  # one name above, one below


def test_names_stay_in_the_picture() -> None:
    for box in ((0, 0, 20, 20), (620, 0, 640, 20), (600, 480, 640, 500), (0, 0, 640, 500)):
        pixels_HW3 = drawn(found(tuple(map(float, box))))  # type: ignore[arg-type]
        assert is_color(pixels_HW3, 0).sum() > 300
        assert pixels_HW3.shape == (500, 640, 3)


def test_shapes_are_tinted_and_edged() -> None:
    shape_HW = np.zeros((500, 640), dtype=np.uint8)
    shape_HW[250:300, 150:250] = 1
    code = mask_codec.encode(np.asfortranarray(shape_HW))
    pixels_HW3 = drawn(found((100, 200, 300, 420), masks=[code]))
    expected = [round(0.6 * 90 + 0.4 * c) for c in class_color(0)]
    np.testing.assert_allclose(pixels_HW3[275, 200], expected, atol=1)
    assert is_color(pixels_HW3, 0)[250, 150:250].all()
    assert is_color(pixels_HW3, 0)[250:300, 249].all()
    assert (pixels_HW3[275, 251] == GREY).all()


def test_nothing_found_leaves_the_picture() -> None:
    assert (drawn(found()) == GREY).all()


def test_colors_of_classes_differ() -> None:
    colors = {class_color(label) for label in range(80)}
    assert len(colors) == 80
    near = [np.abs(np.subtract(class_color(a), class_color(a + 1))).sum() for a in range(20)]
    assert min(near) > 150
