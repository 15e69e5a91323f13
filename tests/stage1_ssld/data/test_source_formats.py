"""Sources that are not folders or Parquet on this disk: tar files, lists, patterns, URLs, data sets of the hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.labels import match_classes
from ssld.stage1_ssld.data.loaders import TrainViews, make_loader
from ssld.stage1_ssld.data.shards import source_shards
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import DataConfig, SourceConfig
from tests.stage1_ssld.data.small_sources import pack, unlabeled_because


def source(path: Any, **settings: Any) -> ImageSource:
    return ImageSource(SourceConfig(path=str(path), **settings), 0)


def message(path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def same_images(actual: ImageSource, other: ImageSource) -> bool:
    return len(actual) == len(other) and all(
        torch.equal(actual.read(row), other.read(row)) for row in range(len(actual))
    )


# ---- WebDataset tar files


def test_tar_files_are_read_in_place(tiny: Any, tmp_path: Path) -> None:
    members = images_of(tiny.train)
    names = list(members)
    for number in range(3):
        pack(tmp_path / f"{number}.tar", {name: members[name] for name in names[10 * number : 10 * number + 10]})
    images = source(tmp_path)
    assert same_images(images, source(tiny.train))
    assert images.labels is None
    assert images.key(12) == "0:1.tar/ring/ring_002.png"
    assert images.location(12) == f"{tmp_path}/1.tar, ring/ring_002.png"
    assert len(source(tmp_path / "2.tar")) == 10
    assert source(tmp_path / "2.tar").key(0) == "0:2.tar/stripes/stripes_000.png"


def test_class_members_are_labels(tmp_path: Path, jpeg: Any) -> None:
    members = {
        "a/0001.jpg": jpeg(seed=1), "a/0001.cls": b"4", "a/0001.json": b"{}",
        "a/0002.cls": b" 0\n", "a/0002.seg.png": jpeg(seed=2),
        "a/0003.jpg": jpeg(seed=3), "b/0001.jpg": jpeg(seed=4), "b/0001.cls": b"-7",
    }  # fmt: skip
    images = source(pack(tmp_path / "x.tar", members))
    assert images.labels == [4, 0, NO_LABEL, NO_LABEL]
    assert match_classes(images, None, 5, "m") == images.labels
    assert source(tmp_path / "x.tar", labels="none").labels is None
    pack(tmp_path / "y.tar", {"1.jpg": jpeg(), "1.cls": b"cat"})
    assert "y.tar, 1.cls: is not a class number" in unlabeled_because(source(tmp_path / "y.tar"))
    pack(tmp_path / "y.tar", {"1.jpg": jpeg(), "1.cls": b"3", "1.b.cls": b"4"})
    assert "y.tar, 1.b.cls: its sample has another class number too" in unlabeled_because(source(tmp_path / "y.tar"))
    assert source(tmp_path / "y.tar", labels="none").unlabeled_because is None


def test_tar_files_that_cannot_be_read(tmp_path: Path, jpeg: Any) -> None:
    (tmp_path / "text.tar").write_text("no tar file at all")
    assert "text.tar: not readable as an uncompressed tar file" in message(tmp_path / "text.tar")
    whole = pack(tmp_path / "whole.tar", {f"{n}.jpg": jpeg(seed=n) for n in range(4)})
    (tmp_path / "short.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "short.tar: not readable as an uncompressed tar file" in message(tmp_path / "short.tar")
    pack(tmp_path / "none.tar", {"a.txt": b"hello"})
    assert "none.tar: holds no images" in message(tmp_path / "none.tar")
    pack(tmp_path / "x.tar.gz", {"1.jpg": jpeg()}, "w:gz")
    assert "compressed archives cannot be read in place; unpack it" in message(tmp_path / "x.tar.gz")
    assert "a label file is for Parquet sources; sort these images" in message(whole, labels="truth.parquet")


# ---- lists


def test_tar_files_that_are_not_read_to_their_end(tmp_path: Path, jpeg: Any) -> None:
    members = {f"{number}.jpg": jpeg(seed=number) for number in range(4)}
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    header = whole.index(b"2.jpg")
    damaged = whole[:header] + b"3" + whole[header + 1 :]
    faults = {"damaged": damaged, "cut": whole[: header + 100], "joined": whole + whole}
    for name, content in faults.items():
        file = tmp_path / f"{name}.tar"
        file.write_bytes(content)
        assert "neither a file nor the end marker" in message(file)
        shards = source_shards(SourceConfig(path=str(file)), 0, streaming=True)
        with pytest.raises(UserError, match="neither a file nor the end marker"):
            list(shards[0].samples())
    for name, content in {"damaged": damaged, "joined": whole + whole}.items():
        with fsspec.open(f"memory://ends/{name}.tar", "wb") as opened:
            opened.write(content)
        shards = source_shards(SourceConfig(path=f"memory://ends/{name}.tar"), 0, streaming=True)
        with pytest.raises(UserError, match="neither a file nor the end marker"):
            list(shards[0].samples())
    (tmp_path / "unmarked.tar").write_bytes(whole[:header])
    unmarked = source(tmp_path / "unmarked.tar")
    assert len(unmarked) == 2
    assert unmarked.tally.changed("file", "without an end marker, so perhaps truncated") == 1
    assert not source(tmp_path / "whole.tar").tally.describe()


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.tar", "pipe.parquet"])
def test_a_pipe_is_no_source(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{name}: is neither a file nor a folder" in message(tmp_path / name)


def test_a_list_of_files(tiny: Any, tmp_path: Path) -> None:
    names = sorted(images_of(tiny.train))
    (tmp_path / "all.txt").write_text("".join(f"{name}\n\n" for name in names))
    images = source(tmp_path / "all.txt", root=str(tiny.train))
    assert same_images(images, source(tiny.train))
    assert images.labels is None
    assert images.key(3) == f"0:{names[3]}"
    (tmp_path / "classes.txt").write_text("".join(f"{tiny.train}/{name}\t{n // 10}\n" for n, name in enumerate(names)))
    labeled = source(tmp_path / "classes.txt")
    assert labeled.labels == source(tiny.train).labels
    assert same_images(labeled, images)
    assert labeled.class_names is None
    assert source(tmp_path / "classes.txt", labels="none").labels is None


def test_a_list_beside_its_images_and_names_with_spaces(tmp_path: Path, jpeg: Any) -> None:
    (tmp_path / "my photo 1.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg(seed=2))
    (tmp_path / "list.txt").write_text("my photo 1.jpg 3\nb.jpg -1\n")
    images = source(tmp_path / "list.txt")
    assert [images.location(row) for row in range(2)] == [f"{tmp_path}/my photo 1.jpg", f"{tmp_path}/b.jpg"]
    assert images.labels == [3, NO_LABEL]
    (tmp_path / "list.txt").write_text("my photo 1.jpg\nb.jpg\n")
    assert source(tmp_path / "list.txt").labels is None
    assert source(tmp_path / "list.txt").key(0) == "0:my photo 1.jpg"


def test_lists_that_are_refused(tmp_path: Path, jpeg: Any) -> None:
    file = tmp_path / "list.txt"
    (tmp_path / "a.jpg").write_bytes(jpeg())
    file.write_text("a.jpg\nb.jpg\nc.jpg\n")
    assert f"2 of 3 checked files do not exist, first {tmp_path}/b.jpg; set root to the folder" in message(file)
    file.write_text("a.jpg 1\na.jpg\n")
    assert "image 2 has no class number, others have; give one to all or none" in unlabeled_because(source(file))
    file.write_text("\n")
    assert "holds no images" in message(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "list.txt: not readable as text" in message(file)
    assert "write the class numbers into the list instead" in message(file, labels="truth.parquet")


# ---- patterns


def test_patterns(tiny: Any, tmp_path: Path, jpeg: Any) -> None:
    images = source(f"{tiny.train}/*/*_00[0-4].png")
    assert len(images) == 15
    assert images.labels is None  # a pattern names no classes
    assert images.key(0) == "0:disc/disc_000.png"
    assert images.location(0) == f"{tiny.train}/disc/disc_000.png"
    assert len(source(f"{tiny.train}/**/*.png")) == 30
    for part in "ab":
        pack(tmp_path / part / "0.tar", {"1.jpg": jpeg(seed=ord(part))})
    tars = source(f"{tmp_path}/*/0.tar")
    assert [tars.key(row) for row in range(2)] == ["0:a/0.tar/1.jpg", "0:b/0.tar/1.jpg"]
    assert same_images(source(f"{tiny.parquet.parent}/*.parquet"), source(tiny.train))
    assert source(f"{tiny.parquet.parent}/*.parquet").class_names == ["disc", "ring", "stripes"]
    assert "no Parquet files, tar files or images match" in message(f"{tmp_path}/*.webp")


def test_a_pattern_where_the_command_is_started(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.train)
    images = source("*/ring_*.png")
    assert images.key(2) == "0:ring/ring_002.png"
    assert torch.equal(images.read(2), source(tiny.train).read(12))


# ---- URLs


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_sources_behind_urls(tiny: Any, memory: Any, tmp_path: Path) -> None:
    local = source(tiny.train)
    for name, content in images_of(tiny.train).items():
        memory.pipe(f"/pool/{name}", content)
    memory.pipe("/table/part-0.parquet", tiny.parquet.read_bytes())
    memory.pipe(
        "/pool/list.txt", "".join(f"{name} {n // 10}\n" for n, name in enumerate(images_of(tiny.train))).encode()
    )
    images = source("memory://pool")
    assert images.labels == local.labels
    assert images.class_names == local.class_names
    assert [images.key(row) for row in range(30)] == [local.key(row) for row in range(30)]
    assert images.location(0) == "memory://pool/disc/disc_000.png"
    for path in (
        "memory://pool", f"file://{tiny.train}", "memory://table", "memory://table/part-0.parquet", f"file://{tiny.parquet}",
        "memory://pool/list.txt", "memory://pool/*/*.png", "simplecache::memory://pool",
    ):  # fmt: skip
        assert same_images(source(path), local), path
    assert source("memory://table").class_names == ["disc", "ring", "stripes"]
    assert source("memory://pool/list.txt").labels == local.labels
    assert source("memory://pool/*/ring_*.png").key(0) == "0:ring/ring_000.png"
    memory.rm("/pool/disc/disc_000.png")
    with pytest.raises(Exception, match=r"cannot read image memory://pool/disc/disc_000\.png"):
        images.read(0)


def test_urls_that_are_refused(memory: Any, tmp_path: Path, jpeg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/pool/readme.md", b"hello")
    memory.pipe("/tars/0.tar", pack(tmp_path / "0.tar", {"1.jpg": jpeg()}).read_bytes())
    assert "memory://gone: no such file or folder" in message("memory://gone")
    assert "memory://pool: holds no images, Parquet or tar files" in message("memory://pool")
    assert "remote tar files cannot be indexed; set data.streaming: true" in message("memory://tars")
    assert "no Parquet files, tar files or images match" in message("memory://pool/*.png")
    assert "memory://pool/gone.txt: no such file" in message("memory://pool/gone.txt")
    assert "noproto://x: cannot be opened" in message("noproto://x")
    (tmp_path / "urls.txt").write_text("noproto://x/1.jpg\n")
    assert "noproto://x/1.jpg: cannot be opened" in message(tmp_path / "urls.txt")
    memory.pipe("/pool/x.parquet", b"no parquet")
    assert "not readable as Parquet" in message("memory://pool")

    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "exists", refuses)
    monkeypatch.setattr(MemoryFileSystem, "glob", refuses)
    assert "memory://pool: cannot be listed (no credentials)" in message("memory://pool")
    assert "memory://pool/*.png: cannot be listed (no credentials)" in message("memory://pool/*.png")


class OtherFileSystem(MemoryFileSystem):
    """Files in memory under another protocol. As those of object stores, of no use in a process that was forked later."""

    protocol = "other"
    store: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made_in = os.getpid()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace(f"{cls.protocol}://", "memory://"))
        return stripped

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        if self.made_in != os.getpid():
            raise RuntimeError("this class is not fork-safe")
        content: bytes = super().cat_file(path, **kwargs)
        return content


class HubFileSystem(OtherFileSystem):
    protocol = "hf"
    store: dict[str, Any] = {}


@pytest.fixture
def register() -> Iterator[Any]:
    """Makes a file system known for the length of a test."""
    known = dict(_registry)

    def make_known(kind: Any) -> Any:
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
        return fsspec.filesystem(kind.protocol)

    yield make_known
    _registry.clear()
    _registry.update(known)


def test_loader_workers_open_filesystems_of_their_own(tiny: Any, register: Any) -> None:
    filesystem = register(OtherFileSystem)
    for name, content in list(images_of(tiny.train).items())[:4]:
        filesystem.pipe(f"/pool/{name}", content)
    images = source("other://pool/*/*.png")
    images.read(0)
    views = TrainViews([images], [None], DataConfig(train=[images.config], image_size=16), seed=0)
    (batch,) = make_loader(views, [[(row, 0) for row in range(4)]], workers=1, pin_memory=False)
    assert len(batch.keys) == 4


# ---- the hub


@pytest.fixture
def hub(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in a folder, which stands for one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "org" / "name" / "data"
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00001.parquet").write_bytes(tiny.parquet.read_bytes())
    (folder / "test-00000-of-00001.parquet").write_bytes(tiny.parquet.read_bytes())
    return f"hub:{folder.parent}"


def test_a_data_set_of_the_hub(hub: str, tiny: Any) -> None:
    images = source(hub)
    assert same_images(images, source(tiny.parquet))
    assert images.labels == source(tiny.parquet).labels
    assert images.class_names == ["disc", "ring", "stripes"]
    assert images.key(7) == "0:7"
    assert len(source(hub, split="test[:20%]")) == 6
    assert source(hub, labels="none").labels is None
    assert "has no column 'picture' (it has image, label, id); set image_column" in message(hub, image_column="picture")
    assert "a label file is for Parquet sources" in message(hub, labels="truth.parquet")
    line = message(hub, split="nothing")
    assert line.startswith(f"{hub}: cannot be loaded from the hub (")
    assert line.endswith("; check the name, split and subset")


def test_a_data_set_of_the_hub_is_streamed_from_its_files(tiny: Any, register: Any) -> None:
    filesystem = register(HubFileSystem)
    for name in ("small/train-0.parquet", "small/val-0.parquet", "large/train-0.parquet"):
        filesystem.pipe(f"/datasets/org/name/{name}", tiny.parquet.read_bytes())
    config = SourceConfig(path="hub:org/name", subset="small")
    (shard,) = source_shards(config, 0, streaming=True)
    assert shard.name == "hf://datasets/org/name/small/train-0.parquet#0"
    assert [sample.name for sample in shard.samples(27)] == ["27", "28", "29"]
    with pytest.raises(UserError) as caught:
        source_shards(SourceConfig(path="hub:org/name"), 0, streaming=True)
    assert str(caught.value) == (
        "hub:org/name: has several configurations ('large', 'small'); set subset to one of them, "
        "or path to the files to use: hf://datasets/org/name/FOLDER/*.parquet"
    )
    assert len(source_shards(SourceConfig(path="hf://datasets/org/name/*/train*.parquet"), 0, streaming=True)) == 2
    for name in ("train/0.parquet", "train/1.parquet", "test/0.parquet"):
        filesystem.pipe(f"/datasets/org/other/{name}", tiny.parquet.read_bytes())
    assert len(source_shards(SourceConfig(path="hub:org/other"), 0, streaming=True)) == 2
    filesystem.pipe("/datasets/org/other/trainval/0.parquet", tiny.parquet.read_bytes())
    filesystem.pipe("/datasets/org/other/train_extra-00000-of-00001.parquet", tiny.parquet.read_bytes())
    filesystem.pipe("/datasets/org/other/assets/logo.png", images_of(tiny.train)["disc/disc_000.png"])
    assert len(source_shards(SourceConfig(path="hub:org/other"), 0, streaming=True)) == 2
    for name, content in list(images_of(tiny.train).items())[::10]:
        filesystem.pipe(f"/datasets/org/folder/{name}", content)
    (shard,) = source_shards(SourceConfig(path="hub:org/folder"), 0, streaming=True)
    assert [sample.name for sample in shard.samples()] == list(images_of(tiny.train))[::10]
    with pytest.raises(
        UserError, match="hub:org/name: none of its 3 files belongs to the split 'test'; set split or subset"
    ):
        source_shards(SourceConfig(path="hub:org/name", split="test"), 0, streaming=True)
