"""Large images in tiles: windows, merging of what they show, and prediction with them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled_shapes import filled
from PIL import Image
from pycocotools import mask as mask_codec

from ssld.shared.errors import UserError
from ssld.stage2_detect import predict
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.boxes import pairwise_intersection
from ssld.stage2_detect.prediction import tiles
from ssld.stage2_detect.prediction.tiles import SAME, Window, merged_windows, windows_of

Box = tuple[float, float, float, float]
WHOLE = Window(0, 0, 200, 100)
LEFT, RIGHT = Window(0, 0, 120, 100), Window(80, 0, 120, 100)


def outputs(*objects: tuple[Box, float], labels: tuple[int, ...] = (), masks: list | None = None) -> Detections:
    boxes_N4 = torch.tensor([box for box, _ in objects], dtype=torch.float32).view(-1, 4)
    scores_N = torch.tensor([score for _, score in objects])
    return Detections(boxes_N4, scores_N, torch.tensor(labels or [0] * len(objects), dtype=torch.int64), masks)


def listed(detections: Detections) -> list[tuple[list[float], float]]:
    return [
        (box, round(score, 4))
        for box, score in zip(detections.boxes_N4.tolist(), detections.scores_N.tolist(), strict=True)
    ]


# ---- windows


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((1000, 700), 300, 0.2), ((301, 100), 300, 0.0), ((640, 480), 100, 0.5)]
)
def test_tiles_cover_the_picture_and_overlap(size: tuple[int, int], tile: int, overlap: float) -> None:
    width, height = size
    whole, *tiles = windows_of(width, height, tile, overlap)
    assert whole == (0, 0, width, height)
    covered_HW = np.zeros((height, width), dtype=int)
    for window in tiles:
        assert (window.width, window.height) == (min(tile, width), min(tile, height))
        covered_HW[window.top : window.top + window.height, window.left : window.left + window.width] += 1
    assert covered_HW.shape == (height, width)
    assert covered_HW.min() >= 1
    for starts, side in ((sorted({w.left for w in tiles}), width), (sorted({w.top for w in tiles}), height)):
        steps = np.diff(starts)
        assert (steps <= tile * (1 - overlap)).all()
        # One tile fewer would not do.
        assert len(starts) == 1 or (len(starts) - 2) * tile * (1 - overlap) + tile < side


def test_a_picture_that_fits_is_looked_at_once() -> None:
    assert windows_of(300, 200, 300, 0.5) == windows_of(300, 200, None) == [(0, 0, 300, 200)]


# ---- merging


def test_one_tile_as_large_as_the_picture_changes_nothing() -> None:
    detections = outputs(((0, 0, 50, 50), 0.9), ((2, 2, 50, 50), 0.8), ((120, 10, 200, 100), 0.7), labels=(0, 0, 1))
    assert merged_windows([(WHOLE, detections)], 200, 100) is detections
    twice = merged_windows([(WHOLE, detections), (Window(*WHOLE), detections)], 200, 100)
    assert listed(twice) == listed(detections)
    assert twice.labels_N.tolist() == [0, 0, 1]


def test_what_two_tiles_show_whole_is_one_object_with_the_better_score() -> None:
    parts = [(LEFT, outputs(((85, 20, 110, 50), 0.6))), (RIGHT, outputs(((6, 21, 30, 50), 0.8)))]
    assert listed(merged_windows(parts, 200, 100)) == [([86, 21, 110, 50], 0.8)]
    # Another class is another object.
    parts[1] = (RIGHT, outputs(((6, 21, 30, 50), 0.8), labels=(1,)))
    assert len(merged_windows(parts, 200, 100).scores_N) == 2


def test_a_piece_goes_where_the_object_is_seen_whole() -> None:
    """However sure the detector is of the piece."""
    parts = [(LEFT, outputs(((100, 20, 120, 50), 0.95))), (RIGHT, outputs(((20, 20, 70, 50), 0.6)))]
    assert listed(merged_windows(parts, 200, 100)) == [([100, 20, 150, 50], 0.6)]
    parts = [(WHOLE, outputs(((10, 10, 190, 90), 0.7))), (LEFT, outputs(((10, 10, 120, 90), 0.9)))]
    assert listed(merged_windows(parts, 200, 100)) == [([10, 10, 190, 90], 0.7)]


def test_pieces_alone_become_one_object() -> None:
    parts = [(LEFT, outputs(((60, 20, 120, 50), 0.5))), (RIGHT, outputs(((0, 20, 90, 52), 0.7)))]
    assert listed(merged_windows(parts, 200, 100)) == [([60, 20, 170, 52], 0.7)]


def test_an_object_in_a_row_of_tiles() -> None:
    windows = [Window(left, 0, 100, 100) for left in (0, 80, 160, 240)]
    parts = [(window, outputs(((0, 30, 100, 60), 0.5 + 0.1 * n))) for n, window in enumerate(windows)]
    assert listed(merged_windows(parts, 340, 100)) == [([0, 30, 340, 60], 0.8)]


def test_a_small_object_in_front_of_a_large_one_stays() -> None:
    """Intersection over the smaller area would take it for a piece of the large one."""
    parts = [(WHOLE, outputs(((0, 0, 200, 100), 0.9))), (LEFT, outputs(((40, 40, 60, 60), 0.8)))]
    assert len(merged_windows(parts, 200, 100).scores_N) == 2


def test_boxes_of_one_window_do_not_compete() -> None:
    parts = [(WHOLE, outputs()), (LEFT, outputs(((10, 10, 50, 50), 0.9), ((11, 10, 51, 50), 0.8)))]
    assert len(merged_windows(parts, 200, 100).scores_N) == 2


def test_masks_are_placed_and_joined() -> None:
    def code(left: int, right: int) -> dict[str, Any]:
        shape_HW = np.zeros((100, 120), dtype=np.uint8)
        shape_HW[20:50, left:right] = 1
        return mask_codec.encode(np.asfortranarray(shape_HW))

    parts = [
        (LEFT, outputs(((60, 20, 120, 50), 0.5), masks=[code(60, 120)])),
        (RIGHT, outputs(((0, 20, 90, 50), 0.7), masks=[code(0, 90)])),
    ]
    detections = merged_windows(parts, 200, 100)
    assert detections.masks is not None
    expected_HW = np.zeros((100, 200), dtype=bool)
    expected_HW[20:50, 60:170] = True
    np.testing.assert_array_equal(filled(detections.masks[0], 100, 200), expected_HW)


@pytest.mark.parametrize("with_whole", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_what_a_perfect_detector_sees_in_tiles_comes_back_exactly(seed: int, with_whole: bool) -> None:
    """Objects that lie apart, of all sizes; each window shows its part of each, in its own score."""
    draw = np.random.default_rng(seed)
    width, height = 900, 600
    objects: list[np.ndarray] = []
    while len(objects) < 25:
        sides = draw.integers(20, 260, 2)
        x, y = draw.integers(0, width - sides[0]), draw.integers(0, height - sides[1])
        box = np.array([x, y, x + sides[0], y + sides[1]])
        if all((np.minimum(box[2:], o[2:]) <= np.maximum(box[:2], o[:2])).any() for o in objects):
            objects.append(box)
    parts = []
    for window in windows_of(width, height, 250, 0.3)[0 if with_whole else 1 :]:
        corner = np.array([window.left, window.top] * 2)
        limits = np.array([window.width, window.height] * 2)
        clipped = [(box - corner).clip(0, limits) for box in objects]
        visible = [box for box in clipped if (box[2:] > box[:2]).all()]
        scores = np.sort(draw.random(len(visible)))[::-1]
        parts.append(
            (window, outputs(*((tuple(b.tolist()), s) for b, s in zip(visible, scores.tolist(), strict=True))))
        )
    detections = merged_windows(parts, width, height)
    assert sorted(detections.boxes_N4.tolist()) == sorted(box.astype(float).tolist() for box in objects)
    assert (detections.scores_N[:-1] >= detections.scores_N[1:]).all()


def test_boxes_are_compared_in_blocks_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the whole matrix of overlaps, whatever the block; and many boxes take no memory of their number's square."""
    draw = np.random.default_rng(3)
    windows = windows_of(900, 600, 250, 0.3)
    windows_W4 = torch.tensor([(w.left, w.top, w.left + w.width, w.top + w.height) for w in windows]).double()
    window_N = torch.from_numpy(np.sort(draw.integers(0, len(windows), 300)))
    shares_N4 = torch.from_numpy(np.sort(draw.random((300, 2, 2)), axis=1).reshape(300, 4))
    corner_N4, side_N4 = (
        windows_W4[window_N][:, [0, 1, 0, 1]],
        (windows_W4[:, 2:] - windows_W4[:, :2])[window_N].repeat(1, 2),
    )
    boxes_N4 = corner_N4 + shares_N4 * side_N4
    both_NN = pairwise_intersection(boxes_N4, boxes_N4)
    shown_NN = pairwise_intersection(boxes_N4, windows_W4)[:, window_N]
    same_NN = (both_NN / (shown_NN + shown_NN.T - both_NN) > SAME) & (window_N[:, None] != window_N)
    assert same_NN.sum() > 50
    for block in (1, 1000, 10**6):
        monkeypatch.setattr(tiles, "_BLOCK", block)
        detections = tiles._same(boxes_N4, window_N, windows_W4)
        assert [sorted(row.tolist()) for row in detections] == [row.nonzero()[:, 0].tolist() for row in same_NN]


def test_a_long_image_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 pixels in a row: 10 boxes in each of a thousand tiles, whose matrix would have 139 million entries."""
    largest = 0

    def watched(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(first) * len(second))
        return pairwise_intersection(first, second)

    monkeypatch.setattr(tiles, "pairwise_intersection", watched)
    boxes = [((2 * n, 0, 2 * n + 1, 1), 0.9 - n / 100) for n in range(10)]
    parts = [(window, outputs(*boxes)) for window in windows_of(60000, 1, 64, 0.2)]
    assert len(parts) == 1178
    assert len(merged_windows(parts, 60000, 1).scores_N) > 5000
    assert largest < 1_000_000


def test_more_tiles_than_anyone_waits_for_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"tile 32, overlap 0.9: make 1,752,976 tiles of an image of 4000 x 4000 pixels"
    ):
        windows_of(4000, 4000, 32, 0.9)


# ---- prediction


@pytest.fixture
def mosaic(tiny_coco: Any, tmp_path: Path) -> Path:
    """Six scenes of 64 pixels side by side."""
    image = Image.new("RGB", (192, 128))
    for number, (row, column) in enumerate(itertools.product(range(2), range(3))):
        image.paste(Image.open(tiny_coco.train_images / f"{number}.png"), (64 * column, 64 * row))
    (tmp_path / "large").mkdir()
    image.save(tmp_path / "large" / "mosaic.png")
    return tmp_path / "large"


@pytest.fixture
def boxes_of(detector_file: Path, tmp_path: Path, call: Callable[..., int]) -> Callable[..., list[dict[str, Any]]]:
    """The annotations that a prediction writes."""

    def run(images: Path, name: str, *more: str) -> list[dict[str, Any]]:
        line = ["--model", str(detector_file), "--images", str(images), "--output", str(tmp_path / name)]
        line += [
            "--threads",
            "1",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--score_threshold",
            "0.3",
            "--write",
            "json",
            *more,
        ]
        assert call(predict.main, line) == 0
        rows: list[dict[str, Any]] = json.loads((tmp_path / name / "predictions.json").read_text())["annotations"]
        return rows

    return run


def test_pictures_that_fit_into_a_tile_are_predicted_as_without(boxes_of: Any, tiny_coco: Any) -> None:
    plain = boxes_of(tiny_coco.val_images, "plain")
    assert plain
    assert boxes_of(tiny_coco.val_images, "tiled", "--tile", "64") == plain


def test_tiles_find_what_scenes_show_alone(
    boxes_of: Any, mosaic: Path, tiny_coco: Any, tmp_path: Path, detector_file: Path
) -> None:
    """Tiles that lie on the scenes see what a prediction of the scene sees."""
    (tmp_path / "scenes").mkdir()
    for number in range(6):
        (tmp_path / "scenes" / f"{number}.png").symlink_to(tiny_coco.train_images / f"{number}.png")
    inside = []
    for row in boxes_of(tmp_path / "scenes", "alone"):
        x, y, width, height = row["bbox"]
        if min(x, y) > 2 and max(x + width, y + height) < 62:
            number = row["image_id"] - 1
            shifted = [x + 64 * (number % 3), y + 64 * (number // 3), width, height]
            inside.append((row["category_id"], shifted))
    detections = boxes_of(mosaic, "tiled", "--tile", "64", "--overlap", "0")
    assert len(inside) >= 4
    for category_id, box in inside:
        same = [row["bbox"] for row in detections if row["category_id"] == category_id]
        assert mask_codec.iou([box], same, [0] * len(same)).max() > 0.5
    assert len(detections) > len(boxes_of(mosaic, "whole"))
    # The same in three lines.
    (objects,) = load_detector(detector_file).predict([mosaic / "mosaic.png"], score_threshold=0.3, tile=64, overlap=0)
    corners = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in detections)]
    np.testing.assert_allclose(objects.boxes_N4, corners, atol=2e-3)
    with_views = boxes_of(mosaic, "tta", "--tile", "64", "--overlap", "0", "--tta.flip", "true")
    assert with_views != detections


def test_tiles_are_for_pictures_of_any_size(
    boxes_of: Any, mosaic: Path, detector_file: Path, user_error: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    line = ["--model", str(detector_file), "--images", str(mosaic), "--output", str(tmp_path / "plain")]
    message = user_error(predict.main, [*line, "--device", "cpu", "--threads", "1", "--workers", "0"])
    assert "nothing can be read in 1 file" in message
    assert boxes_of(mosaic, "tiled", "--tile", "64")
    detector = load_detector(detector_file)
    assert len(detector.predict([mosaic / "mosaic.png"], score_threshold=0.3, tile=64)[0])
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(UserError, match="cannot read"):
        detector.predict([mosaic / "mosaic.png"])


def test_a_damaged_picture_is_named_once(boxes_of: Any, mosaic: Path, tmp_path: Path) -> None:
    data = (mosaic / "mosaic.png").read_bytes()
    (mosaic / "damaged.png").write_bytes(data[: len(data) // 2])  # its header is sound
    Image.new("RGB", (40, 40)).save(mosaic / "small.png")
    detections = boxes_of(mosaic, "tiled", "--tile", "64", "--overlap", "0", "--batch_size", "3")
    assert (tmp_path / "tiled" / "quarantine.txt").read_text() == "damaged.png\n"
    assert {row["image_id"] for row in detections} == {2} or {row["image_id"] for row in detections} == {2, 3}


def test_tiles_do_not_depend_on_batches_or_workers(boxes_of: Any, mosaic: Path) -> None:
    detections = boxes_of(mosaic, "one", "--tile", "80")
    other = boxes_of(mosaic, "other", "--tile", "80", "--batch_size", "2", "--workers", "1")
    assert [row["category_id"] for row in other] == [row["category_id"] for row in detections]
    np.testing.assert_allclose([row["score"] for row in other], [row["score"] for row in detections], atol=1e-3)
