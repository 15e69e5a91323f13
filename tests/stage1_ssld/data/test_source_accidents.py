"""Accidents in users' sources: mixtures, splits below one root, odd names, tars with dots in their names. Nothing is lost or exchanged without a
word."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.stage1_ssld.data.listing import of_split
from ssld.stage1_ssld.data.manifest import write_manifest
from ssld.stage1_ssld.data.shards import source_shards
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data_config import SourceConfig
from tests.stage1_ssld.data.small_sources import (
    pack,
    png,
    refusal,
    source,
    streamed,
    write,
)

# ---- folders


def test_a_class_whose_images_are_out_of_reach_stops_the_run(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/2.png", ".net/1.png", "dog/1.png")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path) == (
        f"data.train: {tmp_path}: all images of class '.net' would be left out: 1 in a hidden folder (first: .net/1.png); correct the source, or set "
        "data.allow_loss: true to continue with the remaining images"
    )
    config = SourceConfig(path=str(tmp_path))
    (images,) = open_sources([config], "data.train", allow_loss=True)
    assert images.class_names == ["cat", "dog"]
    assert images.tally.describe() == (
        "1 image dropped: 1 in a hidden folder (first: .net/1.png); 1 class dropped: 1 without an image (first: empty)"
    )
    assert images.tally.record()["image"]["kept"] == 3


def test_class_folders_with_any_name(tmp_path: Path) -> None:
    names = ["b anana", "chérry", "gra,pe", os.fsdecode(b"caf\xe9"), "[old]", "x.jpg", "a=b&c"]
    for number, name in enumerate(names):
        write(tmp_path, f"{name}/{number}")
        write(tmp_path, f"{name}/{number}.jpg?w=300")
    images = source(tmp_path)
    assert len(images) == 14
    assert set(images.class_names or []) == {*names[:3], "caf\\udce9", *names[4:]}
    assert all(images.read(row).shape == (3, 4, 4) for row in range(14))
    assert all((images.key(row) + images.location(row)).encode() for row in range(14))
    assert len(source(f"{tmp_path}/[[]old]/*")) == len(source(f"{tmp_path}/b anana/*")) == 2
    assert len(source(tmp_path / "[old]")) == 2
    assert len(source(f"{tmp_path / '[old]'}/*.jpg*")) == 1


def test_splits_below_one_root_are_not_mixed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")
    expected = "holds the splits train, val: set split to the one to read, or path to"
    assert expected in refusal(folder)
    assert expected in refusal(f"file://{folder}")
    assert "but not test; set split to one of them" in refusal(folder, split="test")
    images = source(folder, split="val")
    assert (images.labels, images.class_names) == ([0, 1], ["cat", "dog"])
    assert images.location(0) == f"{folder}/val/cat/1.png"
    assert len(source(f"{folder}/**/*.png")) == 4
    flat = write(tmp_path / "b", "train2017/1.png", "val2017/1.png", "unlabeled2017/1.png")
    assert "holds the splits train2017, unlabeled2017, val2017" in refusal(flat)
    nested = write(
        tmp_path / "d", "images/training_set/cat/1.png", "images/training_set/dog/1.png", "images/test_set/cat/1.png"
    )
    assert "d/images: holds the splits test_set, training_set: set split" in refusal(nested)
    assert source(nested, split="training_set").labels == [0, 1]
    beside = write(tmp_path / "e", "train/cat/1.png", "val/cat/1.png", "docs/1.png", "cover.png")
    assert "holds the splits train, val: set split" in refusal(beside)
    inside = write(
        tmp_path / "f", *(f"{name}/{split}/1.png" for name in ("bolt", "nut") for split in ("test", "train"))
    )
    assert f"splits test, train in each of 2 folders (first: bolt); set path to {inside}/**/test/**/* for" in refusal(
        inside
    )
    assert len(source(f"{inside}/**/test/**/*")) == 2
    classes = write(tmp_path / "c", "train/1.png", "bus/1.png")
    assert source(classes).class_names == ["bus", "train"]


def test_splits_of_parquet_and_tar_files_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, split in enumerate(("train", "validation")):
        table = pa.table({"image": [png(number)] * (number + 1), "label": [number] * (number + 1)})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    for place in (tmp_path, tmp_path / "data"):
        assert "holds the splits train, validation: set split" in refusal(place)
        assert source(place, split="validation").labels == [1, 1]
        assert streamed(place, split="train") == ["0"]
    assert len(source(f"{tmp_path}/data/*.parquet")) == 3
    for name in ("train-0", "train-1", "test-0"):
        pack(tmp_path / f"{name}.tar", {f"{name}.png": png()})
    shutil.rmtree(tmp_path / "data")
    assert "holds the splits test, train" in refusal(tmp_path)
    assert len(source(tmp_path, split="train")) == 2


def test_the_name_of_a_split_is_taken_exactly() -> None:
    of_train = [
        "train/0.parquet", "train.parquet", "train-00000-of-00002.parquet", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train-0.parquet",
        "train_07.tar", "imagenet1k-train-0012.tar", "plain/train/x.parquet",
    ]  # fmt: skip
    others = [
        "train_extra-00000-of-00001.parquet", "trainval-00000-of-00001.parquet", "train-extra.parquet", "training.parquet", "train2-0.parquet",
        "pretrain-0.parquet", "my_train-00000-of-00001.parquet", "train_extra/0.parquet",
    ]  # fmt: skip
    assert [name for name in (*of_train, *others) if of_split(name, "train")] == of_train
    assert of_split("v1.train-00000-of-00001.parquet", "v1.train")


def test_a_mixture_of_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    pack(tmp_path / "dog.tar", {"1.png": png()})
    assert refusal(tmp_path) == (
        f"data.train: {tmp_path}: holds 1 .tar file and 2 images in folders (first: cat/1.png); set path to {tmp_path}/*.tar to use "
        "the .tar files, or move them elsewhere to use the others"
    )
    assert "to use the .tar files, or move them" in refusal(f"file://{tmp_path}")
    assert len(source(f"{tmp_path}/*.tar")) == 1
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "x.parquet")
    shutil.rmtree(tmp_path / "cat")
    shutil.rmtree(tmp_path / "dog")
    assert "holds 1 .parquet file and 1 .tar file" in refusal(tmp_path)
    (tmp_path / "x.parquet").unlink()
    write(tmp_path, "preview.png")
    images = source(tmp_path)
    assert len(images) == 1
    assert images.tally.describe() == "1 file skipped: 1 images beside .tar files (first: preview.png)"


def test_hidden_files_are_skipped_elsewhere_too(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    for name in (
        "cat/1.png",
        "cat/._1.png",
        "cat/.thumb/1.png",
        "cat/@eaDir/1.png",
        "dog/2",
        "dog/notes",
        "dog/notes.txt",
    ):
        filesystem.pipe(f"/pool/{name}", b"text" if "notes" in name else png())
    images = source("memory://pool")
    assert [images.key(row) for row in range(len(images))] == ["0:cat/1.png", "0:dog/2"]
    assert len(source("memory://pool/*/*.png")) == 1
    assert (images.tally.skipped("file", "without a suffix"), images.tally.skipped("file", "with suffix .txt")) == (
        1,
        1,
    )
    filesystem.store.clear()


@pytest.mark.parametrize("name", ["train.csv", "train.lst", "images.arrow", "images.h5", "x.tar.gz"])
def test_files_that_are_no_sources(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"path,label\n")
    expected = "unpack it" if name == "x.tar.gz" else f"{name}: unsupported source type {Path(name).suffix}; use a"
    assert expected in refusal(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.parquet")
    assert "pipe.parquet: is neither a file nor a folder" in refusal(tmp_path / "pipe.parquet")


def test_parquet_under_any_name(tmp_path: Path) -> None:
    for name in ("x.pq", "y", "Z.PARQUET"):
        pq.write_table(pa.table({"image": [png()]}), tmp_path / name)
        assert len(source(tmp_path / name)) == 1


def test_an_image_folder_of_the_hub_is_listed_like_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set", *(f"{name}/{number}.jpg" for name in ("apple", "test", "validation") for number in (1, 2)))
    images = source(f"hub:{tmp_path / 'set'}")
    assert (images.labels, images.class_names) == ([0, 0, 1, 1, 2, 2], ["apple", "test", "validation"])


# ---- tar files


def test_names_with_dots_are_one_sample_and_refused(tmp_path: Path) -> None:
    members = {f"shop.00{n}.{end}": content for n in range(3) for end, content in (("png", png(n)), ("cls", b"1"))}
    file = pack(tmp_path / "a.tar", members)
    expected = "a.tar: shop.000.png and shop.001.png are one sample, because their names agree up to the first dot; pack the file again"
    assert expected in refusal(file)
    with pytest.raises(UserError, match=r"shop\.000\.png and shop\.001\.png are one sample"):
        streamed(file)
    twice = tmp_path / "b.tar"
    with tarfile.open(twice, "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("1.png")
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
    assert "1.png and 1.png are one sample" in refusal(twice)


def test_one_image_of_a_sample_is_taken(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for n in range(3):
        members |= {f"{n}.depth.png": png(), f"{n}.jpg": png(n), f"{n}.cls": str(n).encode(), f"{n}.mask.png": png(99)}
    file = pack(tmp_path / "a.tar", members)
    images = source(file)
    assert [images.rows.name(row) for row in range(3)] == streamed(file) == [f"a.tar/{n}.jpg" for n in range(3)]
    assert images.labels == [0, 1, 2]
    assert [int(images.read(row)[0, 0, 0]) for row in range(3)] == [0, 1, 2]
    assert (
        images.tally.describe() == f"6 files skipped: 6 images beside that of their sample (first: {file}, 0.depth.png)"
    )
    (shard,) = source_shards(SourceConfig(path=str(file)), 0, streaming=True)
    assert [(sample.name, sample.encoded) for sample in shard.samples(2)] == [("a.tar/2.jpg", png(2))]
    masks = source(file, image_column="mask.png")
    assert [masks.rows.name(row) for row in range(3)] == [f"a.tar/{n}.mask.png" for n in range(3)]


def test_the_field_says_which_image_where_no_name_is_bare(tmp_path: Path) -> None:
    members = {f"{n}.{end}.png": png(n) for n in range(2) for end in ("left", "right")}
    file = pack(tmp_path / "a.tar", members)
    assert "0.left.png and 0.right.png are one sample" in refusal(file)
    assert streamed(file, image_column="right") == ["a.tar/0.right.png", "a.tar/1.right.png"]
    assert len(source(file, image_column="left")) == 2
    # "image" is what the setting says by itself
    assert streamed(pack(tmp_path / "b.tar", {"1.mask.png": png(), "1.image.png": png()})) == ["b.tar/1.image.png"]


def test_members_of_a_sample_that_lie_apart(tmp_path: Path) -> None:
    first = {f"{n}.png": png(n) for n in range(2)}
    masks = {f"{n}.mask.png": png(99) for n in range(2)}
    assert streamed(pack(tmp_path / "a.tar", first | masks)) == ["a.tar/0.png", "a.tar/1.png"]
    assert source(tmp_path / "a.tar").tally.skipped("file") == 2
    file = pack(tmp_path / "b.tar", masks | first)
    assert "0.png is not adjacent to the other images of its sample; pack the file again" in refusal(file)
    with pytest.raises(UserError, match="is not adjacent to"):
        streamed(file)


def test_hidden_and_unnamed_members_and_links(tmp_path: Path) -> None:
    members = {"./._0.png": b"\0\5\x16\7" + bytes(80), "./0.png": png(), "./0.cls": b"1", "__MACOSX/0.png": png()}
    file = pack(tmp_path / "a.tar", members | {"./1.img": png(5), "./1.cls": b"0", "./1.json": b"{}", "2": b"text"})
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.LNKTYPE, "./0.png"
        archive.addfile(link)
    images = source(file)
    assert [images.rows.name(row) for row in range(2)] == streamed(file) == ["a.tar/./0.png", "a.tar/./1.img"]
    assert images.labels == [1, 0]
    assert int(images.read(1)[0, 0, 0]) == 5
    shard = source_shards(SourceConfig(path=str(file)), 0, streaming=True)[0]
    assert [sample.encoded for sample in shard.samples()] == [png(), png(5)]
    assert images.tally.dropped("image", "that are links inside a tar file") == 1


def test_streams_tell_what_is_known_before_they_are_read(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    (tmp_path / "cat" / "3.png").symlink_to(tmp_path / "gone.png")
    tally = Tally()
    source_shards(SourceConfig(path=str(tmp_path)), 0, streaming=True, tally=tally)
    assert (tally.kept("image"), tally.dropped("image", "behind broken links")) == (3, 1)


def test_a_manifest_finds_names_that_are_not_utf8_and_splits(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    folder = write(tmp_path / "pool", f"train/{name}/1.png", f"val/{name}/2.png")
    config = SourceConfig(path=str(folder), split="train")
    images = ImageSource(config, 0)
    for pool, keys in ((config, [images.rows.name(0)]), (SourceConfig(path=str(folder / "val")), ["caf\\udce9/2.png"])):
        columns = {"source": [pool.path], "key": keys, "class": [0], "score": [1.0], "hash": [0]}
        write_manifest(tmp_path / "selected.parquet", columns, [pool.model_dump(mode="json")], {})
        assert source(tmp_path / "selected.parquet").read(0).shape == (3, 4, 4)


# ---- depth


def test_bits_that_a_camera_leaves_empty(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for bits in (8, 10, 12, 14, 16):
        full = 2**bits - 1
        Image.fromarray(np.array([[0, full // 2, full]], np.uint16)).save(tmp_path / "x" / f"{bits:02}.png")
    images = source(tmp_path)
    for row in range(5):
        assert images.read(row)[0, 0].tolist() == [0, 127, 255]
