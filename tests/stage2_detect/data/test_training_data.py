"""Unlabeled images: records of a folder, and their order in batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld.shared.errors import UserError
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig, TrainConfig
from ssld.stage2_detect.data.batch_order import BatchOrder, MixedOrder, training_order
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.loaders import TrainLoader, load_record
from ssld.stage2_detect.data.training_data import TrainingData
from ssld.stage2_detect.data.unlabeled_images import LabeledImages, UnlabeledImages, unlabeled_images

WIDE = [number % 3 > 0 for number in range(20)]
MORE = [number % 4 > 0 for number in range(30)]


def order(**changes: float) -> MixedOrder:
    options: dict[str, Any] = {"batch_size": 8, "labeled_ratio": 0.25, "seed": 4}
    return MixedOrder(WIDE, MORE, **(options | changes))


def test_batches_hold_the_labeled_images_of_batch_order_and_distinct_others() -> None:
    mixed, plain = order(), BatchOrder(WIDE, batch_size=2, seed=4)
    assert mixed.steps_per_epoch == 10
    drawn = set()
    for step in range(40):
        images = mixed.step(step)
        assert images[:2] == plain.step(step)
        others = images[2:]
        assert len(set(others)) == 6
        assert all(20 <= index < 50 for index in others)
        drawn |= set(others)
        if all(WIDE[index] for index in images[:2]):
            assert all(MORE[index - 20] for index in others)
        elif not any(WIDE[index] for index in images[:2]):
            assert sum(not MORE[index - 20] for index in others) == 6
    assert drawn == set(range(20, 50))


def test_too_few_of_an_orientation_are_filled_up_with_the_other() -> None:
    mixed = MixedOrder([True] * 8, [False] * 5 + [True], batch_size=6, labeled_ratio=1 / 3, seed=0)
    others = mixed.step(0)[2:]
    assert 13 in others  # the only wide one
    assert len(set(others)) == 4


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    steps = [7, 3, 12]
    assert [order().step(step) for step in steps] == [order().step(step) for step in reversed(steps)][::-1]
    assert order().step(3)[2:] != order(seed=5).step(3)[2:]
    assert order().step(3)[2:] != order().step(13)[2:]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_micro_batches_share_both_parts_evenly(ranks: int, accumulate: int) -> None:
    mixed = order(batch_size=16, ranks=ranks, accumulate=accumulate)
    micro = ranks * accumulate
    for step in range(5):
        whole: list[int] = []
        for rank in range(ranks):
            for part in range(accumulate):
                images = mixed.micro_batch(step, rank, part)
                labeled = [index for index in images if index < 20]
                assert len(labeled) == 4 // micro
                assert images[: len(labeled)] == labeled, "labeled first"
                whole += images
        assert sorted(whole) == sorted(order(batch_size=16).step(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled_ratio": 0.01}, "0 labeled and 8 unlabeled images of a batch of 8 do not divide"),
        ({"labeled_ratio": 0.99}, "8 labeled and 0 unlabeled images of a batch of 8 do not divide"),
        ({"ranks": 2, "labeled_ratio": 0.4}, "3 labeled and 5 unlabeled images of a batch of 8 do not divide over 2"),
        ({"batch_size": 60}, "but only 30 unlabeled images are left"),
        ({"batch_size": 44, "labeled_ratio": 0.5}, "batch_size 22 does not fit the data set of 20"),
    ],
)
def test_invalid_batches_are_errors(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        order(**changes)
    assert message in str(caught.value)


def test_without_unlabeled_images_the_order_is_the_plain_one() -> None:
    assert isinstance(training_order(WIDE, [], 0.5, batch_size=4, seed=1), BatchOrder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nested images: 20 x 30 (height, width), one stored sideways, one text file."""
    draw = np.random.default_rng(0)
    for name in ("b/1.png", "a.png", "b/c/2.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "images" / "sideways.jpg", exif=exif
    )
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def listed(folder: Path) -> UnlabeledImages:
    return unlabeled_images("unlabeled", [folder], LabeledImages([], []))


def test_a_folder_as_records(folder: Path) -> None:
    found = listed(folder)
    records = found.records
    assert found.unreadable == []
    assert [record.image_id for record in records] == [
        "unlabeled/0/a.png",
        "unlabeled/0/b/1.png",
        "unlabeled/0/b/c/2.jpg",
        "unlabeled/0/sideways.jpg",
    ]
    assert [(record.width, record.height) for record in records] == [(30, 20)] * 3 + [(20, 30)]
    for record in records:
        assert load_record(record).shape == (3, record.height, record.width)
        assert record.boxes_N4.shape == (0, 4)
        assert len(record.labels_N) == 0


def test_unreadable_images(folder: Path) -> None:
    (folder / "b" / "1.png").write_bytes(b"nothing")
    found = listed(folder)
    assert found.unreadable == ["b/1.png"]
    assert len(found.records) == 3
    assert found.tally.describe() == "1 image dropped: 1 unreadable (first: b/1.png)"
    (folder / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"2 of the 4 images in .* cannot be read \(first: a.png\)"):
        listed(folder)
    for name in ("a.png", "b/c/2.jpg", "sideways.jpg"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"its only image, b/1.png, cannot be read"):
        listed(folder)
    with pytest.raises(UserError, match=r"unlabeled: .*nowhere: no such image, video, folder or list"):
        listed(folder / "nowhere")


def loader(tiny_coco: Any, folder: Path, **changes: int) -> TrainLoader:
    data = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    options: dict[str, Any] = {
        "batch_size": 4,
        "seed": 0,
        "start_step": 0,
        "stop_step": 5,
    }
    resize = ResizeConfig(train_short_sides=[64], train_long_side=64)
    more = listed(folder).records
    return TrainLoader(data, resize, AugmentConfig(), **(options | changes), unlabeled=more, labeled_ratio=0.5)


def test_the_loader_flags_them_and_gives_them_no_objects(tiny_coco: Any, folder: Path) -> None:
    for batch in loader(tiny_coco, folder):
        assert batch.targets.labeled_B is not None
        assert batch.targets.labeled_B.tolist() == [True, True, False, False]
        assert [str(record.image_id).startswith("unlabeled/") for record in batch.records] == [False] * 2 + [True] * 2
        assert (batch.targets.labels_BG[2:] == -1).all()
        two = batch.targets.to("cpu").first(2)
        assert two.labeled_B is not None
        assert two.labeled_B.tolist() == [True, True]
        assert len(two.boxes_BG4) == len(two.seeds_B) == 2


def test_a_resumed_loader_continues_with_the_same_batches(tiny_coco: Any, folder: Path) -> None:
    whole = [batch.images.pixels_BCHW for batch in loader(tiny_coco, folder)]
    rest = [batch.images.pixels_BCHW for batch in loader(tiny_coco, folder, start_step=3)]
    assert len(whole) == 5
    assert all(a.equal(b) for a, b in zip(whole[3:], rest, strict=True))


def test_an_unreadable_image_is_replaced_by_one_of_the_same_part(
    tiny_coco: Any, folder: Path, files_below: Callable[[Path], set[str]]
) -> None:
    batches = loader(tiny_coco, folder)
    for name in files_below(folder) - {"a.png", "notes.txt"}:
        (folder / name).write_bytes(b"damaged since it was listed")
    unreadable = set()
    for batch in batches:
        assert [record.path.endswith("images/a.png") for record in batch.records[2:]] == [True, True]
        assert all("/train/" in record.path for record in batch.records[:2])
        unreadable |= {Path(image.name).name for image in batch.unreadable}
    assert unreadable == {"1.png", "2.jpg", "sideways.jpg"}


@pytest.mark.parametrize(
    ("ratio", "line"),
    [
        (0.75, "6 labeled + 2 unlabeled images per batch"),
        (0.7, "6 labeled + 2 unlabeled images per batch: labeled_ratio is 0.75, not 0.7"),
        (1.0, "3 unlabeled images of {folder}"),
    ],
)
def test_the_log_has_the_content_of_a_batch(tmp_path: Path, ratio: float, line: str) -> None:
    for number in range(3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    data = TrainingData(CocoData("x.json", True, ("a",), (1,), []), more=listed(tmp_path))
    assert list(data.describe(TrainConfig.model_construct(batch_size=8, labeled_ratio=ratio)))[-1] == line.format(
        folder=tmp_path
    )


def test_the_log_counts_evaluation_images_that_are_trained_on(tiny_coco: Any, tmp_path: Path) -> None:
    """Under another path of their folder too; images of the same name in another folder are other images."""
    link = tmp_path / "link"
    link.symlink_to(tiny_coco.train_images)
    train = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True)
    again = read_coco(tiny_coco.train_annotations, link, training=False)
    other = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False)
    config = TrainConfig.model_construct(batch_size=8)
    assert list(TrainingData(train, again).describe(config))[-1] == (
        f"warning: the scores are too good, since the training images contain 12 of 12 evaluation images (first: {link}/0.png); "
        "`ssld doctor --fix DIR` removes these from a copy of the training annotations"
    )
    assert list(TrainingData(train, other).describe(config)) == [train.describe(), other.describe()]
