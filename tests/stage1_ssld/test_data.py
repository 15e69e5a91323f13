"""Image sources (every image in, every image out), batches as a function of the step, and images that cannot be read."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shared.errors import UserError
from stage1_ssld.data import (
    NO_LABEL,
    ImageSource,
    StepSampler,
    TrainViews,
    ValViews,
    collate,
    make_loader,
    open_sources,
    val_batches,
)
from stage1_ssld.data_config import DataConfig, SourceConfig
from stage1_ssld.distill import main as distill
from stage1_ssld.labels import labelled_classes, match_classes


def source(path: Path, **settings: Any) -> ImageSource:
    return ImageSource(SourceConfig(path=path, **settings), 0)


def png(value: int = 7, size: tuple[int, int] = (4, 5), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


# ---- folders


def test_real_thousand_in_thousand_out(shared_data: Callable[[str], Path]) -> None:
    images = source(shared_data("imagenet1k-sample"))
    assert len(images) == 1000
    assert images.labels == list(range(1000))
    assert len({images.key(row) for row in range(1000)}) == 1000


def test_class_folders_named_like_splits_lose_nothing(tmp_path: Path) -> None:
    names = ["test", "train", "validation", "dev", "eval_toy", "a-train-of-thought", "10", "9"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        for image in range(3):
            (tmp_path / name / f"train-{image}.png").write_bytes(png(10 * number + image))
    images = source(tmp_path)
    assert len(images) == 24
    assert images.class_names == sorted(names)
    assert images.labels is not None
    values = {int(images.read(row)[0, 0, 0]): images.labels[row] for row in range(24)}
    assert values == {
        10 * number + image: sorted(names).index(name) for number, name in enumerate(names) for image in range(3)
    }
    assert {images.key(row) for row in range(24)} == {f"0:{name}/train-{n}.png" for name in names for n in range(3)}


def test_plain_and_nested_folders_are_unlabelled(tmp_path: Path) -> None:
    for name in ("a.png", "deep/er/b.PNG", "deep/c.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    images = source(tmp_path)
    assert len(images) == 3
    assert images.labels is None
    assert images.class_names is None
    (tmp_path / "a.png").unlink()
    (tmp_path / "deep/er/b.PNG").unlink()
    assert source(tmp_path).labels == [0]
    assert source(tmp_path, labels="none").labels is None


@pytest.mark.parametrize("stray", ["stray.png", "cat/deeper/stray.png"])
def test_a_stray_image_does_not_silently_drop_the_labels(stray: str, tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "dog/2.png", stray):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    with pytest.raises(UserError, match=rf"but {stray} does not \(1 of 4\); move it into one, or set labels: none"):
        source(tmp_path)
    assert len(source(tmp_path, labels="none")) == 4
    (tmp_path / stray).unlink()
    assert source(tmp_path).labels == [0, 1, 1]


def test_keys_name_the_source(tiny: Any) -> None:
    first, second = open_sources([SourceConfig(path=tiny.train), SourceConfig(path=tiny.train)], "data.train")
    assert first.key(0) == "0:disc/disc_000.png"
    assert second.key(0) == "1:disc/disc_000.png"
    assert first.location(0) == f"{tiny.train}/disc/disc_000.png"


# ---- Parquet


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A datasets cache that must stay empty."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def test_parquet_with_metadata_is_not_copied_into_the_cache(tiny: Any, no_cache: Path) -> None:
    images, folder = source(tiny.parquet), source(tiny.train)
    assert len(images) == 30
    assert images.class_names == ["disc", "ring", "stripes"]
    assert images.labels == folder.labels == [0] * 10 + [1] * 10 + [2] * 10
    assert all(torch.equal(images.read(row), folder.read(row)) for row in range(30))
    assert images.key(4) == "0:4"
    assert images.location(4) == f"{tiny.parquet}, row 4"
    assert os.listdir(no_cache) == []


def test_several_files_without_metadata(tmp_path: Path, no_cache: Path) -> None:
    for number in (1, 0):
        rows = {"picture": [png(10 * number + n) for n in range(4)], "kind": [number, 1, 2, 0], "other": list("abcd")}
        pq.write_table(pa.table(rows), tmp_path / f"part-{number}.parquet")
    images = source(tmp_path, image_column="picture", label_column="kind")
    assert [int(images.read(row)[0, 0, 0]) for row in range(8)] == [0, 1, 2, 3, 10, 11, 12, 13]
    assert images.labels == [0, 1, 2, 0, 1, 1, 2, 0]
    assert images.class_names is None
    assert source(tmp_path, image_column="picture").labels is None  # there is no column "label"
    assert os.listdir(no_cache) == []


def test_label_file_is_joined_by_id(tiny: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [129, 100, 7, 111, 112], "label": [5, 6, 0, -1, None]}), tmp_path / "truth.parquet")
    images = source(tiny.parquet, labels=str(tmp_path / "truth.parquet"))
    assert images.labels == [6, 5]  # in the order of the images; negative and missing ones are dropped
    whole = source(tiny.parquet)
    assert torch.equal(images.read(0), whole.read(0))
    assert torch.equal(images.read(1), whole.read(29))


def test_the_join_does_not_make_one_chunk_of_all_images(tmp_path: Path) -> None:
    """One chunk of binary values cannot hold more than 2 GB."""
    (tmp_path / "images").mkdir()
    for part in range(3):
        rows = {"image": [png(10 * part + n) for n in range(4)], "id": [4 * part + n for n in range(4)]}
        pq.write_table(pa.table(rows), tmp_path / "images" / f"{part}.parquet")
    truth = {"id": list(range(12)), "label": [n if n % 2 else -1 for n in range(12)]}
    pq.write_table(pa.table(truth), tmp_path / "truth.parquet")
    images = source(tmp_path / "images", labels=str(tmp_path / "truth.parquet"))
    assert images.labels == [1, 3, 5, 7, 9, 11]
    assert [int(images.read(row)[0, 0, 0]) for row in range(6)] == [1, 3, 11, 13, 21, 23]
    assert images._rows.data.column("image").num_chunks == 3


def test_real_parquet(shared_data: Callable[[str], Path], no_cache: Path) -> None:
    folder = shared_data("tinyimagenet100")
    joined = source(folder / "unlabeled.parquet", labels=str(folder / "unlabeled_truth.parquet"))
    assert joined.labels is not None
    assert len(joined) == sum(
        label >= 0 for label in pq.read_table(folder / "unlabeled_truth.parquet")["label"].to_pylist()
    )
    labelled = source(folder / "labeled.parquet")
    assert (len(labelled), len(labelled.class_names or [])) == (10_000, 100)
    assert labelled.read(0).shape == (3, 64, 64)
    assert os.listdir(no_cache) == []


def test_refused_sources(tmp_path: Path, tiny: Any) -> None:
    def message(path: Path, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            source(path, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "no such file or folder" in message(tmp_path / "gone")
    assert "no images in" in message(tmp_path / "empty")
    assert "not readable as Parquet" in message(tmp_path / "text.parquet")
    assert "has no column 'picture' (it has image, label, id); set image_column" in message(
        tiny.parquet, image_column="picture"
    )
    assert "a label file is for Parquet sources" in message(tiny.train, labels="truth.parquet")
    assert "gone.parquet: no such file" in message(tiny.parquet, labels=str(tmp_path / "gone.parquet"))
    assert "has no column 'key' to join" in message(tiny.parquet, labels=str(tiny.parquet), id_column="key")
    assert "needs the columns 'id' and 'kind'" in message(tiny.parquet, labels=str(tiny.parquet), label_column="kind")
    assert "not readable as Parquet" in message(tiny.parquet, labels=str(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    assert "holds no images" in message(tmp_path / "none.parquet")
    pq.write_table(pa.table({"image": [png()] * 2, "label": ["cat", "dog"]}), tmp_path / "words.parquet")
    assert "column 'label' holds string, class numbers are needed" in message(tmp_path / "words.parquet")
    assert source(tmp_path / "words.parquet", labels="none").labels is None


def test_missing_labels_in_a_column_are_no_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()] * 4, "label": [1, None, -1, 0]}), tmp_path / "some.parquet")
    images = source(tmp_path / "some.parquet")
    assert images.labels == [1, NO_LABEL, NO_LABEL, 0]
    assert match_classes(images, None, 2, "x") == [1, NO_LABEL, NO_LABEL, 0]
    with pytest.raises(UserError, match="2 of 4 images have no label; leave them out"):
        labelled_classes([images])


# ---- classes


def test_classes_are_matched_by_name(tmp_path: Path, tiny: Any) -> None:
    images = source(tiny.train)
    assert match_classes(images, ["stripes", "x", "ring", "disc"], 4, "m") == [3] * 10 + [2] * 10 + [0] * 10
    assert match_classes(images, None, 3, "m") == images.labels
    assert match_classes(source(tiny.unlabelled), ["a"], 1, "m") is None
    with pytest.raises(UserError, match="class 'ring' is not among the 2 classes of m"):
        match_classes(images, ["disc", "stripes"], 2, "m")
    for count in (2, 4):
        with pytest.raises(UserError, match=f"has 3 classes, but m has {count}"):
            match_classes(images, None, count, "m")


def test_labelled_sources_must_agree(tmp_path: Path, tiny: Any) -> None:
    train, nothing = source(tiny.train), source(tiny.unlabelled)
    assert labelled_classes([train, nothing, source(tiny.parquet)])[1:] == (3, ["disc", "ring", "stripes"])
    for kind in ("disc", "rung", "stripes"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(png())
    with pytest.raises(UserError, match=r"class names differ from those of .*'rung'.*'ring'"):
        labelled_classes([train, source(tmp_path)])
    with pytest.raises(UserError, match="no labels; sort the images into class folders or add a label column"):
        labelled_classes([nothing])


# ---- batches


def sampler(**changes: int) -> StepSampler:
    settings = {"batch_size": 12, "steps": 9, "start_step": 0, "seed": 3, "rank": 0, "ranks": 1, "accumulate": 1}
    return StepSampler(25, **(settings | changes))


def test_every_image_once_a_pass() -> None:
    numbers = [item for batch in sampler(steps=25) for item in batch]
    assert len(numbers) == 300
    for epoch in range(12):
        indices = [index for index, number in numbers[25 * epoch : 25 * epoch + 25] if number == epoch]
        assert sorted(indices) == list(range(25))
    orders = {tuple(index for index, _ in numbers[25 * epoch : 25 * epoch + 25]) for epoch in range(12)}
    assert len(orders) == 12
    assert list(sampler(seed=4)) != list(sampler())


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (2, 1), (2, 3), (3, 2)])
def test_ranks_and_accumulation_cut_the_same_batches(ranks: int, accumulate: int) -> None:
    parts = [list(sampler(rank=rank, ranks=ranks, accumulate=accumulate)) for rank in range(ranks)]
    assert len(sampler(ranks=ranks, accumulate=accumulate)) == len(parts[0]) == 9 * accumulate
    for step, whole in enumerate(sampler()):
        pieces = [part[step * accumulate + micro] for part in parts for micro in range(accumulate)]
        assert {len(piece) for piece in pieces} == {12 // (ranks * accumulate)}
        assert [item for piece in pieces for item in piece] == whole


def test_going_on_is_the_tail() -> None:
    for start in (1, 4, 8):
        assert list(sampler(start_step=start)) == list(sampler())[start:]
        assert (
            list(sampler(start_step=start, rank=1, ranks=2, accumulate=2))
            == list(sampler(rank=1, ranks=2, accumulate=2))[2 * start :]
        )
    assert list(sampler(start_step=9)) == []


def test_batch_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match="batch_size 12 is not a multiple of 5 processes x accumulate 1"):
        sampler(ranks=5)


def test_validation_batches_do_not_depend_on_ranks() -> None:
    whole = val_batches(23, 4, 0, 1)
    assert [row for batch in whole for row in batch] == list(range(23))
    for ranks in (2, 3, 7):
        parts = [val_batches(23, 4, rank, ranks) for rank in range(ranks)]
        assert sorted(batch for part in parts for batch in part) == whole


# ---- views of a source


def views(*folders: Path, **changes: Any) -> TrainViews:
    config = DataConfig(train=[SourceConfig(path=folder) for folder in folders], image_size=16, **changes)
    sources = open_sources(config.train, "data.train")
    return TrainViews(sources, [opened.labels for opened in sources], config, seed=1)


def test_views_do_not_depend_on_order_or_workers(tiny: Any) -> None:
    data = views(tiny.train, tiny.unlabelled)
    order = [[(3, 0), (40, 0), (12, 1)], [(3, 1), (31, 0), (12, 0)]]
    loaded: dict[Any, list[torch.Tensor]] = {}
    for workers in (0, 2):
        for batch in make_loader(data, order, workers=workers, pin_memory=False):
            for pixels, label, key in zip(batch.pixels_BCHW, batch.labels_B.tolist(), batch.keys, strict=True):
                loaded.setdefault((key, label), []).append(pixels)
    (_, label_3, key_3, _), (_, label_40, key_40, _) = data[3, 0], data[40, 0]
    assert (label_3, label_40) == (0, NO_LABEL)
    assert key_3.startswith("0:disc/")
    assert key_40.startswith("1:")
    first, later, first_again, later_again = loaded[key_3, 0]
    assert torch.equal(first, first_again)
    assert torch.equal(later, later_again)
    assert not torch.equal(first, later)  # another pass, another view
    again = data[3, 0][0]
    assert again is not None
    assert torch.equal(again, first)


def test_an_unreadable_image_is_replaced_by_the_next(tmp_path: Path, jpeg: Any) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(seed=ord(name))[: 400 if name in "bd" else None])
    data = views(tmp_path)
    pixels, _, key, unreadable = data[1, 0]
    assert key == "0:c.jpg"
    assert unreadable == [str(tmp_path / "b.jpg")]
    plain = data[2, 0][0]
    assert pixels is not None
    assert plain is not None
    assert torch.equal(pixels, plain)
    assert data[3, 0][2:] == ("0:a.jpg", [str(tmp_path / "d.jpg")])
    batch = collate([data[1, 0], data[0, 0], data[3, 0]])
    assert batch.keys == ["0:c.jpg", "0:a.jpg", "0:a.jpg"]
    assert batch.unreadable == [str(tmp_path / "b.jpg"), str(tmp_path / "d.jpg")]
    evaluated = ValViews(data.sources[0], None, size=16, crop=1.0)
    batch = collate([evaluated[row] for row in range(4)])
    assert batch.keys == ["0:a.jpg", "0:c.jpg"]
    assert batch.unreadable == [str(tmp_path / "b.jpg"), str(tmp_path / "d.jpg")]
    assert collate([evaluated[1]]).pixels_BCHW.shape[0] == 0


# ---- whole runs over difficult images


def test_odd_images_go_through_a_training_run(arguments: Any, distill_settings: Any, call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 29, 3), dtype=np.uint8))
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("1", "png")):
        noise.convert(mode).save(folder / f"{mode}.{suffix}")
    noise.resize((1, 1)).save(folder / "dot.png")
    noise.resize((300, 1)).save(folder / "line.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    data = {"train": [str(folder)], "val": str(folder), "image_size": 32}
    assert call(distill, arguments(distill_settings | {"data": data})) == 0
    assert not (tmp_path / "run" / "quarantine.txt").exists()
    assert "on 9 images" in (tmp_path / "run" / "log.txt").read_text()


def broken_folder(folder: Path, count: int, broken: int, jpeg: Any) -> str:
    folder.mkdir()
    for number in range(count):
        content = jpeg(seed=number % 4)
        (folder / f"{number:03d}.jpg").write_bytes(content[: 300 if number < broken else None])
    return str(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_truncated_image_is_skipped_and_listed(
    workers: int, arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 12, 1, jpeg)], "image_size": 32}
    assert call(distill, arguments(distill_settings | {"data": data, "workers": workers})) == 0
    run = tmp_path / "run"
    assert (run / "quarantine.txt").read_text() == f"{tmp_path}/f/000.jpg\n"
    assert "1 unreadable image(s), see" in (run / "log.txt").read_text()


def test_too_many_truncated_images_end_the_run(
    arguments: Any, distill_settings: Any, user_error: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 12, 3, jpeg)], "image_size": 32}
    line = user_error(distill, arguments(distill_settings | {"data": data}))
    assert "3 of 12 images cannot be read, listed in" in line
    assert len((tmp_path / "run" / "quarantine.txt").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_truncated_images(
    workers: int, arguments: Any, distill_settings: Any, user_error: Any, tmp_path: Path, jpeg: Any
) -> None:
    data = {"train": [broken_folder(tmp_path / "f", 5, 5, jpeg)], "image_size": 32}
    line = user_error(distill, arguments(distill_settings | {"data": data, "workers": workers}))
    assert "f/" in line
    assert line.endswith("and the images after it are all unreadable; mend or remove them")


def test_the_list_survives_a_kill(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, jpeg: Any, monkeypatch: Any
) -> None:
    """Met before the checkpoint, not logged before the kill: the list of the resumed run still has it."""
    from shared.loss_watch import LossWatch

    data = {"train": [broken_folder(tmp_path / "f", 9, 1, jpeg)], "image_size": 32}
    settings = distill_settings | {"data": data, "steps": 5, "log_every": 50, "save_every": 2}
    add, calls = LossWatch.add, []

    def killed(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise SystemError
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossWatch, "add", killed)
        with pytest.raises(SystemError):
            call(distill, arguments(settings))
    assert (tmp_path / "run" / "quarantine.txt").read_text() == f"{tmp_path}/f/000.jpg\n"


def test_a_file_without_labels_among_files_with_labels_makes_an_unlabelled_source(tiny: Any, tmp_path: Path) -> None:
    table = pq.read_table(tiny.parquet)
    pq.write_table(table.slice(0, 12), tmp_path / "a.parquet")
    pq.write_table(table.slice(12).drop_columns(["label"]), tmp_path / "b.parquet")
    source = ImageSource(SourceConfig(path=tmp_path), 0)
    assert len(source) == 30
    assert source.labels is None
    assert source.read(29).shape == source.read(0).shape
    pq.write_table(table.drop_columns(["image"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: has no column 'image' \(it has label, id\); set image_column"):
        ImageSource(SourceConfig(path=tmp_path), 0)
