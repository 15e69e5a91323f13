"""The stream of training batches as a pure function of (seed, step), cut over ranks; evaluation batches; errors that stay one line."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.images import decode_image, stable_seed
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig, TTAConfig
from ssld.stage2_detect.data.batch_order import BatchOrder, eval_batches
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.loaders import ImageLoader, TrainBatch, TrainLoader, eval_loader, load_record
from ssld.stage2_detect.data.sizing import MultiScaleBatch, Sizing
from ssld.stage2_detect.data.views import draw_view, view_boxes, view_image
from ssld.stage2_detect.models.batch import ImageBatch

SIZES = [(40, 30), (30, 40), (48, 24), (24, 48), (32, 32), (50, 30), (40, 31), (20, 44), (33, 32), (32, 33), (36, 20)]


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    """11 images of 5 to 6 widths and heights; image i has i % 4 boxes, so some have none; ids are strings for odd i."""
    rng = np.random.default_rng(0)
    raw: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 4, "name": "a"}, {"id": 2, "name": "b"}],
    }
    for i, (width, height) in enumerate(SIZES):
        image_id = f"i{i}" if i % 2 else i
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        raw["images"].append({"id": image_id, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(i % 4):
            box = {"bbox": [j, 2 * j, 10 + i, 5], "category_id": 4 if j % 2 else 2}
            raw["annotations"].append({"id": len(raw["annotations"]), "image_id": image_id, **box})
    (tmp_path / "data.json").write_text(json.dumps(raw))
    return read_coco(tmp_path / "data.json", tmp_path, training=True)


def loader(data: CocoData, resize: dict[str, Any] | None = None, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "start_step": 0, "stop_step": 6}
    sizes: dict[str, Any] = {"train_short_sides": [32, 48], "train_long_side": 80} | (resize or {})
    return TrainLoader(data, ResizeConfig(**sizes), AugmentConfig(), **settings | options)


def same(a: TrainBatch, b: TrainBatch) -> bool:
    tensors = ["pixels_BCHW", "sizes_B2", "scales_B"], ["boxes_BG4", "labels_BG", "seeds_B"]
    parts = [(getattr(a[i], name), getattr(b[i], name)) for i in (0, 1) for name in tensors[i]]
    return all(torch.equal(x, y) for x, y in parts) and [r.image_id for r in a.records] == [
        r.image_id for r in b.records
    ]


def split_images(batches: list[TrainBatch]) -> list[tuple]:
    """Every image of the batches without its padding: (id, pixels, scale, boxes, labels, seed)."""
    images = []
    for batch in batches:
        for i, record in enumerate(batch.records):
            height, width = batch.images.sizes_B2[i].tolist()
            real = batch.targets.labels_BG[i] >= 0
            pixels = batch.images.pixels_BCHW[i, :, :height, :width].contiguous().numpy().tobytes()
            boxes = batch.targets.boxes_BG4[i][real].numpy().tobytes()
            labels, seed = batch.targets.labels_BG[i][real].tolist(), int(batch.targets.seeds_B[i])
            images.append((record.image_id, pixels, float(batch.images.scales_B[i]), boxes, labels, seed))
    return images


@pytest.mark.parametrize("wide_images", [0, 3, 7, 29, 58])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_order_covers_an_epoch_once_in_groups(wide_images: int, batch_size: int) -> None:
    wide = np.zeros(58, dtype=bool)
    wide[np.random.default_rng(1).permutation(58)[:wide_images]] = True
    order = BatchOrder(wide.tolist(), batch_size=batch_size, seed=0)
    assert order.steps_per_epoch == 58 // batch_size
    for epoch in range(3):
        batches = [order.step(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert all(len(batch) == batch_size for batch in batches)
        indices = [index for batch in batches for index in batch]
        assert len(set(indices)) == len(indices) == order.steps_per_epoch * batch_size
        mixed = sum(wide[batch].any() and not wide[batch].all() for batch in batches)
        assert mixed <= 1
    first, second = ([order.step(e * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)] for e in (0, 1))
    assert first != second
    assert BatchOrder(wide.tolist(), batch_size=batch_size, seed=1).step(0) != order.step(0) or batch_size == 1


def test_order_is_shuffled_over_groups() -> None:
    """Wide and high batches come in random order, not one group after the other."""
    wide = [i < 200 for i in range(400)]
    order = BatchOrder(wide, batch_size=4, seed=0)
    kinds = [wide[order.step(i)[0]] for i in range(100)]
    assert 30 < sum(a != b for a, b in itertools.pairwise(kinds)) < 70


def test_order_is_cut_contiguously() -> None:
    whole = BatchOrder([True] * 50, batch_size=12, seed=5)
    cut = BatchOrder([True] * 50, batch_size=12, seed=5, ranks=2, accumulate=3)
    for step in (0, 3, 4, 17):
        parts = [cut.micro_batch(step, rank, part) for rank in range(2) for part in range(3)]
        assert [len(part) for part in parts] == [2] * 6
        assert list(itertools.chain(*parts)) == whole.step(step)


def test_order_errors() -> None:
    with pytest.raises(UserError, match="batch_size 11 does not fit the data set of 10 training images"):
        BatchOrder([True] * 10, batch_size=11, seed=0)
    with pytest.raises(UserError, match="batch_size 0"):
        BatchOrder([True] * 10, batch_size=0, seed=0)
    with pytest.raises(UserError, match="batch_size 6 does not divide over 2 processes x 2 accumulation steps"):
        BatchOrder([True] * 10, batch_size=6, seed=0, ranks=2, accumulate=2)


def test_batches_have_the_stated_content(data: CocoData) -> None:
    batches = list(loader(data))
    assert len(batches) == len(loader(data)) == 6
    seen_boxes = 0
    for step, batch in enumerate(batches):
        images, targets, records, unreadable, weak = batch
        assert (unreadable, weak) == ([], None)
        assert images.pixels_BCHW.dtype == torch.uint8
        assert images.sizes_B2.dtype == targets.labels_BG.dtype == targets.seeds_B.dtype == torch.int64
        assert images.scales_B.dtype == targets.boxes_BG4.dtype == torch.float32
        most = images.sizes_B2.max(0).values.tolist()
        assert list(images.pixels_BCHW.shape) == [4, 3, *(-(-side // 32) * 32 for side in most)]
        assert targets.labels_BG.shape[1] == max(len(record.labels_N) for record in records)
        for i, record in enumerate(records):
            view = draw_view(
                record.height, record.width, seed=3, image_id=record.image_id, view=step // 2,
                train_short_sides=[32, 48], train_long_side=80, flip=0.5,
            )  # fmt: skip
            assert images.sizes_B2[i].tolist() == [view.height, view.width]
            assert images.scales_B[i] == np.float32(view.scale)
            pixels = images.pixels_BCHW[i]
            assert torch.equal(pixels[:, : view.height, : view.width], view_image(decode_image(record.path), view))
            assert not pixels[:, view.height :].any()
            assert not pixels[:, :, view.width :].any()
            objects = len(record.labels_N)
            seen_boxes += objects
            assert np.array_equal(targets.boxes_BG4[i, :objects].numpy(), view_boxes(record.boxes_N4, view))
            assert targets.labels_BG[i].tolist() == record.labels_N.tolist() + [-1] * (
                targets.labels_BG.shape[1] - objects
            )
            assert not targets.boxes_BG4[i, objects:].any()
            assert targets.seeds_B[i] == stable_seed(3, step, record.image_id)
    assert seen_boxes > 10


def test_stream_is_resumable_at_any_step(data: CocoData) -> None:
    whole = list(loader(data, accumulate=2))
    assert len(whole) == 12
    for start in (0, 1, 2, 5, 6):
        rest = list(loader(data, accumulate=2, start_step=start))
        assert len(rest) == 12 - 2 * start
        assert all(same(a, b) for a, b in zip(whole[2 * start :], rest, strict=True))


def test_ranks_and_accumulation_split_the_same_images(data: CocoData) -> None:
    whole = [split_images([batch]) for batch in loader(data)]
    accumulated = list(loader(data, accumulate=2))
    ranks = [list(loader(data, ranks=2, rank=rank)) for rank in range(2)]
    both = [list(loader(data, ranks=2, rank=rank, accumulate=2)) for rank in range(2)]
    for step in range(6):
        assert split_images(accumulated[2 * step : 2 * step + 2]) == whole[step]
        assert split_images([ranks[0][step], ranks[1][step]]) == whole[step]
        assert split_images(both[0][2 * step : 2 * step + 2] + both[1][2 * step : 2 * step + 2]) == whole[step]


def test_workers_change_nothing_and_global_randomness_stays(data: CocoData) -> None:
    plain = list(loader(data))
    state = torch.get_rng_state()
    workers = list(loader(data, workers=2))
    assert all(same(a, b) for a, b in zip(plain, workers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_without_any_object(data: CocoData) -> None:
    empty = [record for record in data.images if not len(record.labels_N)]
    bare = CocoData(data.file, True, data.class_names, data.category_ids, empty)
    (batch,) = loader(bare, batch_size=len(empty), stop_step=1)
    assert batch.targets.boxes_BG4.shape == (len(empty), 0, 4)
    assert batch.targets.labels_BG.shape == (len(empty), 0)


def test_sliver_that_rounding_removes_is_no_target(data: CocoData) -> None:
    record = data.images[1]
    sliver = np.array([[record.width - 0.002, 0, record.width, 9], [1, 1, 9, 9]], dtype=np.float32)
    record = replace(record, boxes_N4=sliver, labels_N=np.array([1, 0]))
    bare = CocoData(data.file, True, data.class_names, data.category_ids, [record])
    # 30 x 40 at short side 37: the width becomes 37 exactly and keeps its sliver; the height 49.33 is cut to 49
    batch = next(iter(loader(bare, {"train_short_sides": [37], "flip": 0.0}, batch_size=1, stop_step=1)))
    assert batch.targets.labels_BG[0].tolist() == [1, 0]
    tall = np.array([[0, record.height - 0.002, 9, record.height], [1, 1, 9, 9]], dtype=np.float32)
    bare = CocoData(data.file, True, data.class_names, data.category_ids, [replace(record, boxes_N4=tall)])
    batch = next(iter(loader(bare, {"train_short_sides": [37], "flip": 0.0}, batch_size=1, stop_step=1)))
    assert batch.targets.labels_BG[0].tolist() == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_replaced_and_reported(data: CocoData, workers: int) -> None:
    before = list(loader(data))
    for victim in (2, 3, 10):
        path = Path(data.images[victim].path)
        path.write_bytes(path.read_bytes()[:60])
    ids = [record.image_id for record in data.images]
    heirs = {ids[2]: ids[4], ids[3]: ids[4], ids[10]: ids[0]}
    reported: Counter[str] = Counter()
    for old, new in zip(before, loader(data, workers=workers), strict=True):
        expected = [heirs.get(record.image_id, record.image_id) for record in old.records]
        assert [record.image_id for record in new.records] == expected
        reported.update(Path(error.name).name for error in new.unreadable)
        assert all(error.reason for error in new.unreadable)
    assert set(reported) == {"2.png", "3.png", "10.png"}


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_are_one_line_from_workers_too(data: CocoData, workers: int) -> None:
    Image.new("RGB", (7, 9)).save(data.images[0].path)
    with pytest.raises(UserError) as caught:
        list(loader(data, workers=workers))
    assert "0.png is 7x9, but 40x30 in the annotations (id 0)" in str(caught.value)
    assert "\n" not in str(caught.value)
    for record in data.images:
        Path(record.path).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 11 training images can be read") as caught:
        list(loader(data, workers=workers))
    with pytest.raises(UserError, match=r"cannot read image .*png: not an image") as caught:
        list(eval_loader(data, Sizing(32, 64), batch_size=2, workers=workers))
    assert "\n" not in str(caught.value)


def test_exif_rotation_only_where_it_fits(data: CocoData) -> None:
    stored, exif = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6
    first, second = data.images[0], data.images[1]  # 40 x 30 and 30 x 40
    for record in (first, second):
        Image.fromarray(stored).save(record.path, exif=exif)
    assert np.array_equal(load_record(first).permute(1, 2, 0).numpy(), stored)
    assert np.array_equal(load_record(second).permute(1, 2, 0).numpy(), np.rot90(stored, -1))


def test_evaluation_batches_are_fixed_and_distributed(data: CocoData) -> None:
    batches = eval_batches(data.images, 3)
    order = list(itertools.chain(*batches))
    assert sorted(order) == list(range(11))
    ratios = [data.images[i].width / data.images[i].height for i in order]
    assert ratios == sorted(ratios)
    whole = list(eval_loader(data, Sizing(32, 64), batch_size=3))
    assert [[record.image_id for record in records] for _, records in whole] == [
        [data.images[i].image_id for i in batch] for batch in batches
    ]
    for world in (2, 3, 5):
        parts = [list(eval_loader(data, Sizing(32, 64), batch_size=3, rank=r, ranks=world)) for r in range(world)]
        for number, (images, records) in enumerate(whole):
            other, other_records = parts[number % world][number // world]
            assert other_records == records
            assert isinstance(images, ImageBatch)
            assert isinstance(other, ImageBatch)
            assert torch.equal(other.pixels_BCHW, images.pixels_BCHW)
        assert sum(len(part) for part in parts) == len(whole)


def test_evaluation_view_is_the_plain_fit(data: CocoData) -> None:
    loader = eval_loader(data, Sizing(64, 90), batch_size=1, workers=1)
    for _ in range(2):
        for images, (record,) in loader:
            assert isinstance(images, ImageBatch)
            scale = min(64 / min(record.width, record.height), 90 / max(record.width, record.height))
            assert images.scales_B.item() == np.float32(scale)
            expected = [int(scale * record.height + 0.5), int(scale * record.width + 0.5)]
            assert images.sizes_B2.tolist() == [expected]


def test_shared_data_goes_through(shared_data: Callable) -> None:
    root = shared_data("coco-mini")
    data = read_coco(root / "annotations" / "instances_val.json", root / "images", training=True)
    batches = list(loader(data, {"train_short_sides": [96], "train_long_side": 160}, batch_size=10, stop_step=10))
    assert sorted(str(r.image_id) for b in batches for r in b.records) == sorted(str(r.image_id) for r in data.images)
    assert not any(batch.unreadable for batch in batches)


def test_batches_of_a_loader_are_pinned(data: CocoData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned as a `DataLoader` does with a GPU: the content stays equal."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    made = next(iter(loader(data)._loader))
    assert pin_memory(made) == made
    assert {id(tensor) for tensor in pinned} == {
        id(tensor)
        for part in (made.images, made.targets)
        for tensor in vars(part).values()
        if isinstance(tensor, torch.Tensor)
    }
    assert len(pinned) == 6
    pinned.clear()
    sizing = Sizing(32, 64, tta=TTAConfig(short_sides=[32, 48]))
    views, _ = next(iter(eval_loader(data, sizing, batch_size=3)))
    assert isinstance(pin_memory(views), MultiScaleBatch)
    assert len(pinned) == 2 * 3


def test_an_error_of_a_stream_and_unreadable_images_are_values(data: CocoData) -> None:
    """Unreadable images from an iterator are treated as those of indexed batches: left out and recorded, or an error of one line."""
    Path(data.images[2].path).write_bytes(b"no image")
    batches = [data.images[:2], data.images[2:3], data.images[3:6]]
    for given in (batches, iter(batches)):
        images = ImageLoader(given, load_record, Sizing(32, 64), skip_unreadable=True)
        assert [[record.image_id for record in records] for _, records in images] == [[0, "i1"], ["i3", 4, "i5"]]
        assert [Path(error.name).name for error in images.unreadable] == ["2.png"]
    with pytest.raises(UserError, match=r"cannot read image .*2\.png: not an image"):
        list(ImageLoader(iter(batches), load_record, Sizing(32, 64)))


@pytest.mark.parametrize("used", [False, True])
def test_loaders_pin_only_in_a_process_that_uses_a_gpu(
    data: CocoData, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """Pinning opens a CUDA context: with `device: cpu` a GPU of the machine is left alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    assert loader(data)._loader._loader.pin_memory is used
