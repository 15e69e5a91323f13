"""Shards of every format: the images of the source by rows, once each, under the same names; and Parquet read a few rows at a time."""

import io
import os
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.shared.images import pixels_of
from ssld.stage1_ssld.data import shards
from ssld.stage1_ssld.data.shards import RowShard, Shard, count_samples, source_shards
from ssld.stage1_ssld.data.sources import ImageSource, decode
from ssld.stage1_ssld.data_config import SourceConfig


@pytest.fixture(scope="module")
def places(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The 30 images of `tiny.train` in every format that can be read by rows too."""
    folder = tmp_path_factory.mktemp("places")
    images = {path.relative_to(tiny.train).as_posix(): path.read_bytes() for path in sorted(tiny.train.rglob("*.png"))}
    names = list(images)
    (folder / "tars").mkdir()
    for number, part in enumerate((names[:13], names[13:])):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as archive:
            for name in part:
                for member_name, content in ((name, images[name]), (f"{name}.cls", b"3")):
                    member = tarfile.TarInfo(member_name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (folder / "table").mkdir()
    table = pa.table({"image": [{"bytes": images[name], "path": None} for name in names]})
    pq.write_table(table.slice(0, 20), folder / "table" / "0.parquet", row_group_size=7)
    pq.write_table(table.slice(20), folder / "table" / "1.parquet")
    (folder / "list.txt").write_text("".join(f"{tiny.train}/{name}\n" for name in names))
    memory = fsspec.filesystem("memory")
    for name, content in images.items():
        memory.pipe(f"/shards/{name}", content)
    return {
        "folder": str(tiny.train),
        "pattern": f"{tiny.train}/*/*.png",
        "parquet": str(folder / "table"),
        "tar": str(folder / "tars"),
        "list": str(folder / "list.txt"),
        "url": "memory://shards",
    }


KINDS = ["folder", "pattern", "parquet", "tar", "list", "url"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_source(
    kind: str, streaming: bool, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS", 8)
    config = SourceConfig(path=places[kind])
    source = ImageSource(config, 5)
    parts = source_shards(config, 5, streaming=streaming)
    assert len({part.name for part in parts}) == len(parts) == {"tar": 2, "parquet": 4}.get(kind, 4) if streaming else 4
    assert [part.name for part in source_shards(config, 0, streaming=streaming)] == [part.name for part in parts]
    samples = [sample for part in parts for sample in part.samples()]
    assert [f"5:{sample.name}" for sample in samples] == [source.key(row) for row in range(30)]
    assert [sample.location for sample in samples] == [source.location(row) for row in range(30)]
    assert all(torch.equal(pixels_of(decode(s.encoded, s.location)), source.read(row)) for row, s in enumerate(samples))
    assert sum(count_samples(part) for part in parts) == 30
    assert all(part.length is None for part in parts) == (kind == "tar" and streaming)


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_shards_begin_anywhere_and_close_their_files(kind: str, places: dict[str, str]) -> None:
    parts = source_shards(SourceConfig(path=places[kind]), 0, streaming=True)
    before = open_files()
    for part in parts:
        names = [sample.name for sample in part.samples()]
        for start in (0, 1, len(names) - 1, len(names), len(names) + 3):
            assert [sample.name for sample in part.samples(start)] == names[start:]
        with closing(part.samples(1)) as samples:
            assert next(samples).name == names[1]
    assert open_files() == before


def test_rows_that_are_not_labeled_are_not_left_out(tiny: Any) -> None:
    for streaming in (False, True):
        with pytest.raises(
            UserError, match=r"train\.parquet: a label file is not supported for streams and pools; set labels: none"
        ):
            source_shards(SourceConfig(path=str(tiny.parquet), labels="truth.parquet"), 0, streaming=streaming)


def test_labels_of_tar_files_are_not_read(tmp_path: Path, jpeg: Any) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("1.jpg", jpeg()), ("1.cls", b"no number")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for streaming in (False, True):
        (shard,) = source_shards(SourceConfig(path=str(tmp_path)), 0, streaming=streaming)
        assert [sample.name for sample in shard.samples()] == ["x.tar/1.jpg"]


def test_a_row_group_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """One row group of 48 MB: its first images come without the rest."""
    rows = [np.random.default_rng(n).bytes(100_000) for n in range(480)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", compression="none", write_batch_size=32)
    del rows
    (shard,) = source_shards(SourceConfig(path=str(tmp_path)), 0, streaming=True)
    before = pa.total_allocated_bytes()
    with closing(shard.samples()) as samples:
        for number in range(100):
            assert next(samples).name == str(number)
        assert pa.total_allocated_bytes() - before < 24e6
    (last,) = shard.samples(479)
    assert last.encoded == np.random.default_rng(479).bytes(100_000)


def test_images_outside_the_table(tmp_path: Path, jpeg: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    for streaming in (False, True):
        (shard,) = source_shards(SourceConfig(path=str(tmp_path)), 0, streaming=streaming)
        assert [sample.encoded for sample in shard.samples()] == [tmp_path / "a.jpg", None]


def test_a_file_that_is_gone_is_an_unreadable_image(tiny: Any, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/gone/a.png", b"x")
    (shard,) = source_shards(SourceConfig(path="memory://gone"), 0, streaming=True)
    memory.rm("/gone/a.png")
    assert [sample.encoded for sample in shard.samples()] == [None]


def test_streams_that_are_refused(tmp_path: Path, tiny: Any) -> None:
    def message(path: Path, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            shards_of(path, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def shards_of(path: Path, **settings: Any) -> list[Shard]:
        return source_shards(SourceConfig(path=str(path), **settings), 0, streaming=True)

    assert "gone.parquet: no such file or folder" in message(tmp_path / "gone.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "text.parquet: not readable as Parquet" in message(tmp_path / "text.parquet")
    assert "text.parquet: not readable as Parquet" in message(tmp_path)
    assert "has no column 'picture' (it has image, label, id)" in message(tiny.parquet, image_column="picture")
    (tmp_path / "empty").mkdir()
    assert "no images in" in message(tmp_path / "empty")
    (tmp_path / "list.txt").write_text("\n")
    assert "holds no images" in message(tmp_path / "list.txt")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty" / "none.parquet")
    assert "holds no images" in message(tmp_path / "empty" / "none.parquet")
    (tmp_path / "text.tar").write_text("no tar file at all")
    (tar,) = shards_of(tmp_path / "text.tar")
    with pytest.raises(
        UserError, match=r"text\.tar: not readable as an uncompressed tar file .*; download or pack it again"
    ):
        list(tar.samples())


def test_shards_of_a_source_by_rows_travel_to_workers(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setattr(shards, "ROWS", 16)
    for path in (tiny.train, tiny.parquet):
        first, second = pickle.loads(pickle.dumps(source_shards(SourceConfig(path=str(path)), 0, streaming=False)))
        assert isinstance(second, RowShard)
        assert (first.length, second.length) == (16, 14)
        assert len(list(second.samples())) == 14
