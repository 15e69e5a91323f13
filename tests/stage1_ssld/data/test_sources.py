"""Image sources: every image in, every image out; their labels and classes."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.labels import labeled_classes, labels_in_classes, match_classes
from ssld.stage1_ssld.data.rows import TableRows
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data_config import SourceConfig


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


def test_plain_and_nested_folders_are_unlabeled(tmp_path: Path) -> None:
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
    images = source(tmp_path)
    assert (len(images), images.labels) == (4, None)  # enough if labels are not read
    expected = rf"but {stray} does not \(1 of 4\); move it into one, or set labels: none"
    with pytest.raises(UserError, match=expected):
        labeled_classes([images])
    with pytest.raises(UserError, match=expected):
        match_classes(images, ["cat", "dog"], 2, "the teacher")
    assert labels_in_classes(images, ["cat", "dog"], 2) is None
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
    assert isinstance(images.rows, TableRows)
    assert images.rows._rows.data.column("image").num_chunks == 3


def test_real_parquet(shared_data: Callable[[str], Path], no_cache: Path) -> None:
    folder = shared_data("tinyimagenet100")
    joined = source(folder / "unlabeled.parquet", labels=str(folder / "unlabeled_truth.parquet"))
    assert joined.labels is not None
    assert len(joined) == sum(
        label >= 0 for label in pq.read_table(folder / "unlabeled_truth.parquet")["label"].to_pylist()
    )
    labeled = source(folder / "labeled.parquet")
    assert (len(labeled), len(labeled.class_names or [])) == (10_000, 100)
    assert labeled.read(0).shape == (3, 64, 64)
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
    words = source(tmp_path / "words.parquet")  # enough if labels are not read
    assert (len(words), words.labels) == (2, None)
    with pytest.raises(UserError, match=r"words\.parquet: column 'label' holds string where class numbers are needed"):
        labeled_classes([words])
    with pytest.raises(UserError, match=r"words\.parquet: column 'label' holds string where class numbers are needed"):
        source(tiny.parquet, labels=str(tmp_path / "words.parquet"), id_column="image")
    assert source(tmp_path / "words.parquet", labels="none").labels is None


def test_missing_labels_in_a_column_are_no_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()] * 4, "label": [1, None, -1, 0]}), tmp_path / "some.parquet")
    images = source(tmp_path / "some.parquet")
    assert images.labels == [1, NO_LABEL, NO_LABEL, 0]
    assert match_classes(images, None, 2, "x") == [1, NO_LABEL, NO_LABEL, 0]
    with pytest.raises(UserError, match="2 of 4 images have no label; leave them out"):
        labeled_classes([images])


def test_a_file_without_labels_among_files_with_labels_makes_an_unlabeled_source(tiny: Any, tmp_path: Path) -> None:
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


# ---- classes


def test_classes_are_matched_by_name(tmp_path: Path, tiny: Any) -> None:
    images = source(tiny.train)
    assert match_classes(images, ["stripes", "x", "ring", "disc"], 4, "m") == [3] * 10 + [2] * 10 + [0] * 10
    assert match_classes(images, None, 3, "m") == images.labels
    assert match_classes(source(tiny.unlabeled), ["a"], 1, "m") is None
    with pytest.raises(UserError, match="class 'ring' is not among the 2 classes of m"):
        match_classes(images, ["disc", "stripes"], 2, "m")
    for count in (2, 4):
        with pytest.raises(UserError, match=f"has 3 classes, but m has {count}"):
            match_classes(images, None, count, "m")


def test_labeled_sources_must_agree(tmp_path: Path, tiny: Any) -> None:
    train, nothing = source(tiny.train), source(tiny.unlabeled)
    assert labeled_classes([train, nothing, source(tiny.parquet)])[1:] == (3, ["disc", "ring", "stripes"])
    for kind in ("disc", "rung", "stripes"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(png())
    with pytest.raises(UserError, match=r"class names differ from those of .*'rung'.*'ring'"):
        labeled_classes([train, source(tmp_path)])
    with pytest.raises(UserError, match="no labels; sort the images into class folders or add a label column"):
        labeled_classes([nothing])
