"""Doubts about an image: closed-form values of both parts, what does not change them, and the boxes of two views."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.data.loaders import ImageLoader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.prediction.doubt import Doubt, boxes_alone, disagreement, doubt_of, margin, two_views

Box = list[float]
A: Box = [0, 0, 10, 10]
B: Box = [50, 0, 60, 20]


def found(*rows: tuple[Box, float] | tuple[Box, float, int]) -> Detections:
    """Detections of (box, score, class 0 by default)."""
    labels = [row[2] if len(row) == 3 else 0 for row in rows]
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    return Detections(boxes, scores, torch.tensor(labels, dtype=torch.int64))


def drawn(seed: int, number: int = 12) -> Detections:
    """Random boxes that overlap, of two classes."""
    draw = np.random.default_rng(seed)
    corners = draw.uniform(0, 40, (number, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(5, 40, (number, 2))], 1)
    scores, labels = draw.uniform(0.05, 1, number), draw.integers(0, 2, number)
    return Detections(torch.from_numpy(boxes).float(), torch.from_numpy(scores), torch.from_numpy(labels))


# ---- margin


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([], 0), ([0.5], 1), ([1.0], 0), ([0.75], 0.25), ([0.25], 0.25), ([0.99], 0.0004), ([0.5, 0.5, 0.9, 0.1], 2.04)],
)
def test_margin(scores: Sequence[float], expected: float) -> None:
    """(2 min(s, 1 - s))^2 summed; 0.1 is below the threshold."""
    assert margin(np.array(scores), 0.2) == pytest.approx(expected, abs=1e-12)


def test_a_score_of_one_half_is_more_doubtful_than_any_other() -> None:
    assert margin(np.array([0.5]), 0.2) > margin(np.array([0.99]), 0.2)
    scores = np.linspace(0, 1, 101)
    values = [margin(np.array([score]), 0.0) for score in scores]
    assert int(np.argmax(values)) == 50
    assert values == sorted(values[:51]) + sorted(values[51:], reverse=True)


# ---- disagreement


def test_equal_views_agree_in_any_order() -> None:
    for seed in range(5):
        one = drawn(seed)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(one.scores_N)))
        other = Detections(one.boxes_N4[order], one.scores_N[order], one.labels_N[order])
        assert disagreement(one, other, 0.2) == pytest.approx(0, abs=1e-9)
    assert disagreement(found(), found(), 0.2) == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (found((A, 0.8)), found(), 0.4),  # half of what one view has alone
        (found((A, 0.8)), found((B, 0.6)), 0.7),
        (found((A, 0.8, 0)), found((A, 0.6, 1)), 0.7),  # other class
        (found((A, 0.8)), found((A, 0.6)), 0.1),  # the scores alone differ
        (found((A, 0.8)), found(([5.0, 0, 15, 10], 0.6)), 0.7 - 0.6 / 3),  # IoU of a third
        (found((A, 0.8), (B, 0.9)), found((B, 0.9), (A, 0.8)), 0),
        (found((A, 0.8), (A, 0.5)), found((A, 0.8)), 0.25),  # the better pair first; the other box is alone
        (found((A, 0.15)), found((A, 0.1)), 0),  # below the threshold
        (found((A, 0.15)), found(), 0),
        (found((A, 0.21)), found((A, 0.19)), 0.01),  # one of the pair is above it: no jump
    ],
)
def test_disagreement(first: Detections, second: Detections, expected: float) -> None:
    assert disagreement(first, second, 0.2) == pytest.approx(expected, abs=1e-9)
    assert disagreement(second, first, 0.2) == pytest.approx(expected, abs=1e-9)


def test_disagreement_grows_as_a_box_moves_away_and_does_not_jump() -> None:
    still = found((A, 0.9))
    values = [disagreement(still, found(([x / 10, 0.0, x / 10 + 10, 10.0], 0.7)), 0.2) for x in range(121)]
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.8)
    assert values == sorted(values)
    assert max(np.diff(values)) < 0.02


def test_disagreement_is_symmetric_and_has_the_bounds_of_no_pair_and_of_all() -> None:
    for seed in range(10):
        first, second = drawn(seed), drawn(seed + 100, 7)
        value = disagreement(first, second, 0.0)
        assert value == pytest.approx(disagreement(second, first, 0.0), abs=1e-9)
        assert 0 < value < float(first.scores_N.sum() + second.scores_N.sum()) / 2
        many = disagreement(first, second, 0.2)
        assert many <= value


def test_both_parts_are_added() -> None:
    doubt = doubt_of(found((A, 0.5), (B, 0.1)), found((A, 0.5)), 0.2)
    assert doubt.margin == 1
    assert doubt.disagreement == pytest.approx(0, abs=1e-12)
    assert Doubt(1.25, 0.5).total == 1.75
    # Of two photos on which the views agree, the one with scores of one half comes first.
    sure, unsure = (doubt_of(found((A, score)), found((A, score)), 0.2).total for score in (0.99, 0.5))
    assert unsure > sure


# ---- two views


class Bright:
    """Finds the box around all bright pixels, in pixels of the original; or with `always` a box at the left, whatever the image."""

    def __init__(self, *, always: bool = False) -> None:
        self.always = always

    def __call__(self, images: ImageBatch) -> list[Detections]:
        results = []
        for pixels, scale in zip(images.pixels_BCHW, images.scales_B.tolist(), strict=True):
            rows, columns = torch.nonzero(pixels[0] > 250, as_tuple=True)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            edges = A if self.always else [float(edge) / scale for edge in box]
            results.append(found((edges, 0.9)))
        return results


def bright_images() -> list[Tensor]:
    images = []
    for width, left in ((64, 4), (48, 30), (33, 10)):
        image = torch.zeros(3, 40, width, dtype=torch.uint8)
        image[:, 8:20, left : left + 9] = 255
        images.append(image)
    return images


@pytest.mark.parametrize("always", [False, True])
def test_the_boxes_of_the_mirror_image_come_back_mirrored(always: bool) -> None:
    images = bright_images()
    loader = ImageLoader([[0, 1], [2]], images.__getitem__, Sizing(40, 64))
    detector: Any = Bright(always=always)
    device = torch.device("cpu")
    views = list(two_views(detector, loader, device=device, dtype=torch.float32))
    assert [number for number, _, _ in views] == [0, 1, 2]
    for number, first, second in views:
        width = images[number].shape[2]
        value = disagreement(first, second, 0.2)
        if always:
            assert second.boxes_N4.tolist() == [[width - 10, 0, width, 10]]
            assert value == pytest.approx(0.9, abs=1e-6)
        else:
            assert value == pytest.approx(0, abs=1e-6)


def test_masks_are_left_out(mask_file: Path) -> None:
    fast = load_detector(mask_file).fast
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
                        torch.tensor([[64, 64]]), torch.ones(1))  # fmt: skip
    with torch.no_grad():
        (alone,), (whole,) = boxes_alone(fast)(images), fast(images)
    assert whole.masks is not None
    assert alone.masks is None
    assert torch.equal(alone.boxes_N4, whole.boxes_N4)
    assert torch.equal(alone.scores_N, whole.scores_N)
