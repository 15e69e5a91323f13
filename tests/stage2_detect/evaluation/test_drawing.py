"""Drawn images: pixels of boxes, shapes and names where they belong."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec

from ssld.stage2_detect.evaluation.drawing import Area, Tags, class_color, draw_objects
from ssld.stage2_detect.models.batch import Detections

GREY = (90, 90, 90)


def detected(
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


def is_tag(pixels: np.ndarray, label: int) -> np.ndarray:
    """The background of a name: four fifths of the class's color over the grey."""
    tag_3 = np.round(0.8 * np.array(class_color(label)) + 0.2 * np.array(GREY))
    mask: np.ndarray = np.asarray((np.abs(pixels - tag_3) <= 1).all(-1))
    return mask


def tags(boxes: list[tuple[float, float, float, float]], height: int = 13) -> tuple[list[bool], list[Area]]:
    """(whether each box's name is written, where those stand)."""
    image = Image.new("RGB", (640, 500), GREY)
    names = Tags(image, np.array(boxes))
    written = [names.add(number, "cat 0.90", class_color(0), height) for number in range(len(boxes))]
    pixels_HW3 = np.array(image)
    for x1, y1, x2, y2 in names.areas:
        assert is_tag(pixels_HW3[y1:y2, x1:x2], 0).mean() > 0.4
        pixels_HW3[y1:y2, x1:x2] = GREY
    assert (pixels_HW3 == GREY).all()
    return written, names.areas


def test_the_outline_is_the_outer_edge_of_the_box() -> None:
    pixels_HW3 = drawn(detected((100, 200, 300, 420)))
    line_HW = is_color(pixels_HW3, 0)
    box_HW = np.zeros((500, 640), dtype=bool)
    box_HW[200:420, 100:300] = True
    inner_HW = np.zeros_like(box_HW)
    inner_HW[202:418, 102:298] = True
    assert (line_HW[200:] == (box_HW & ~inner_HW)[200:]).all()
    assert (pixels_HW3[inner_HW] == GREY).all()
    # Above it stands the name, on the box's color, and nothing else.
    rows, columns = np.nonzero((pixels_HW3 != GREY).any(-1))
    assert 170 < rows.min() < 199
    assert rows.max() == 419
    assert columns.min() == 100
    assert columns.max() == 299
    name_HW3 = pixels_HW3[rows.min() : 200, 100:300]
    assert is_tag(name_HW3, 0).sum() > 0.5 * (name_HW3 != GREY).any(-1).sum()


@pytest.mark.parametrize(("side", "zoom"), [(64, 8), (240, 2), (480, 1), (3000, 1)])
def test_small_pictures_are_enlarged_with_their_boxes(side: int, zoom: int) -> None:
    box = (side * 0.25, side * 0.5, side * 0.75, side)
    pixels_HW3 = drawn(detected(box), (side, side))
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
    pixels_HW3 = drawn(detected(box, box, labels=(0, 1)))
    assert is_color(pixels_HW3, 0)[150, 100]  # the better one's outline
    for label in (0, 1):
        rows, _ = np.nonzero(is_tag(pixels_HW3, label)[:100])
        other, _ = np.nonzero(is_tag(pixels_HW3, label)[300:])
        assert (len(rows) > 100) != (len(other) > 100)  # one name above, one below


def test_names_stay_in_the_picture() -> None:
    for box in ((0, 0, 20, 20), (620, 0, 640, 20), (600, 480, 640, 500), (0, 0, 640, 500)):
        pixels_HW3 = drawn(detected(tuple(map(float, box))))  # type: ignore[arg-type]
        assert is_tag(pixels_HW3, 0).sum() > 300
        assert pixels_HW3.shape == (500, 640, 3)


def grid(columns: int, rows: int, side: float, step: float) -> list[tuple[float, float, float, float]]:
    """Boxes in rows and columns."""
    places = [(40 + step * x, 40 + step * y) for y in range(rows) for x in range(columns)]
    return [(x, y, x + side, y + side) for x, y in places]


def test_names_of_a_crowd_are_small_and_apart() -> None:
    crowd_HW3, alone_HW3 = drawn(detected(*grid(5, 3, 40, 110))), drawn(detected((40, 40, 400, 400)))
    assert is_tag(crowd_HW3[:40, 40:50], 0).any(1).sum() < is_tag(alone_HW3[:40, 40:50], 0).any(1).sum()
    boxes = grid(6, 8, 40, 56)
    written, areas = tags(boxes)
    assert sum(written) == len(areas) > 40
    covered_HW = np.zeros((500, 640), dtype=int)
    for x1, y1, x2, y2 in areas:
        covered_HW[y1:y2, x1:x2] += 1
    assert covered_HW.max() == 1
    for left, top, right, bottom in boxes:
        assert covered_HW[int(top) : int(bottom), int(left) : int(right)].mean() < 0.7


def test_names_do_not_hide_small_objects() -> None:
    """Above a large box, where its name would stand first, lie small objects."""
    large = (100.0, 100.0, 300.0, 300.0)
    assert tags([large])[1][0][3] == 100
    small = [(100.0 + 20 * i, 84.0, 112.0 + 20 * i, 96.0) for i in range(10)]
    _, (area, *_) = tags([large, *small])
    assert area[1] >= 280
    assert tags([(0, 0, 640, 500)])[1][0][:2] == (0, 0)  # inside, where there is no other place


def test_without_room_the_worse_name_goes_and_a_legend_says_the_class() -> None:
    boxes = grid(20, 15, 24, 26)
    assert 0 < sum(tags(boxes, 10)[0]) < len(boxes)
    assert tags(boxes, 10)[0][0]  # the best chooses first
    detections = detected(*boxes, labels=tuple(i % 2 for i in range(len(boxes))))
    image = Image.new("RGB", (640, 500), GREY)
    plain_HW3 = drawn(detections)
    legend_HW3 = np.array(draw_objects(image, detections, ["cat", "dog"], legend=True))
    assert plain_HW3.shape == (500, 640, 3)
    assert legend_HW3.shape[0] > 500
    np.testing.assert_array_equal(legend_HW3[:500], plain_HW3)
    for label in (0, 1):
        assert is_color(legend_HW3[500:], label).sum() > 50
        x1, y1, x2, y2 = map(int, boxes[label])
        assert is_color(plain_HW3[y1:y2, x1:x2], label).any()  # the outline is always there
    # Where all names have their place, nothing is added.
    alone = draw_objects(image, detected((100, 100, 300, 300)), ["cat", "dog"], legend=True)
    assert alone.size == (640, 500)


def test_long_legends_take_several_lines() -> None:
    names = [f"a class with a long name {number}" for number in range(12)]
    boxes = grid(20, 15, 24, 26)
    detections = detected(*boxes, labels=tuple(i % 12 for i in range(len(boxes))))
    pixels_HW3 = np.array(draw_objects(Image.new("RGB", (640, 500), GREY), detections, names, legend=True))
    assert pixels_HW3.shape[1] == 640
    for label in range(12):
        rows, columns = np.nonzero(is_color(pixels_HW3[500:], label))
        assert len(rows) > 50
        assert columns.max() < 640


def test_shapes_are_tinted_and_edged() -> None:
    shape_HW = np.zeros((500, 640), dtype=np.uint8)
    shape_HW[250:300, 150:250] = 1
    code = mask_codec.encode(np.asfortranarray(shape_HW))
    pixels_HW3 = drawn(detected((100, 200, 300, 420), masks=[code]))
    expected = [round(0.6 * 90 + 0.4 * c) for c in class_color(0)]
    np.testing.assert_allclose(pixels_HW3[275, 200], expected, atol=1)
    assert is_color(pixels_HW3, 0)[250, 150:250].all()
    assert is_color(pixels_HW3, 0)[250:300, 249].all()
    assert (pixels_HW3[275, 251] == GREY).all()


def test_an_image_without_detections_is_unchanged() -> None:
    assert (drawn(detected()) == GREY).all()


def test_colors_of_classes_differ() -> None:
    colors = {class_color(label) for label in range(80)}
    assert len(colors) == 80
    near = [np.abs(np.subtract(class_color(a), class_color(a + 1))).sum() for a in range(20)]
    assert min(near) > 150


def test_drawn_names_have_one_line() -> None:
    actual = Detections(torch.tensor([[9.0, 9, 90, 90]] * 9), torch.full((9,), 0.5), torch.zeros(9, dtype=torch.int64))
    blank = Image.new("RGB", (99, 99))
    drawn = [draw_objects(blank, actual, [name], legend=True).tobytes() for name in ("hel met", "hel\r\nmet\x00")]
    assert drawn[0] == drawn[1]
