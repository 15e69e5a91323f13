"""Parquet by rows: the same images whether they are held in memory or read a row group at a time, and the memory of the latter."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage
from ssld.stage1_ssld.data import row_groups
from ssld.stage1_ssld.data.listing import list_path
from ssld.stage1_ssld.data.loaders import TrainViews, make_loader
from ssld.stage1_ssld.data.manifest import write_manifest
from ssld.stage1_ssld.data.row_groups import GroupRows
from ssld.stage1_ssld.data.rows import Rows, TableRows
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import DataConfig, SourceConfig


@pytest.fixture
def table(tiny: Any, tmp_path: Path) -> Path:
    """The 30 images of `tiny.parquet` in three files of row groups of 4; image 11 is missing."""
    rows = pq.read_table(tiny.parquet).to_pylist()
    rows[11]["image"] = None
    (tmp_path / "table").mkdir()
    for number, part in enumerate(np.split(np.array(rows, object), [13, 13])):
        schema = pq.read_schema(tiny.parquet)
        pq.write_table(
            pa.Table.from_pylist(part.tolist(), schema), tmp_path / "table" / f"{number}.parquet", row_group_size=4
        )
    return tmp_path / "table"


def both(config: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageSource, ImageSource]:
    """The source in memory, and by row group."""
    held = ImageSource(config, 3)
    with monkeypatch.context() as patch:
        patch.setattr(row_groups, "IN_MEMORY", 0)
        return held, ImageSource(config, 3)


def kind_of(rows: Rows) -> type:
    """Of what is below a manifest."""
    return kind_of(rows._parts[-1]) if hasattr(rows, "_parts") else type(rows)


@pytest.mark.parametrize("kind", ["whole", "joined", "manifest"])
def test_by_row_group_as_in_memory(
    kind: str, table: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SourceConfig(path=str(table))
    if kind == "joined":
        ids = pq.read_table(table, columns=["id"])["id"].to_pylist()
        chosen = [ids[number] for number in (29, 2, 7, 11, 12, 20)]
        pq.write_table(pa.table({"id": chosen, "label": [0, 1, 2, 0, 1, 2]}), tmp_path / "truth.parquet")
        config = SourceConfig(path=str(table), labels=str(tmp_path / "truth.parquet"))
    if kind == "manifest":
        keys = ["28", "3", "11", "12", "13", "2"]
        columns = {"source": [str(table)] * 6, "key": keys, "class": [0] * 6, "score": [0.5] * 6, "hash": [1] * 6}
        write_manifest(tmp_path / "selected.parquet", columns, [config.model_dump(mode="json")], {})
        config = SourceConfig(path=str(tmp_path / "selected.parquet"))
    held, lazy = both(config, monkeypatch)
    assert (kind_of(held.rows), kind_of(lazy.rows)) == (TableRows, GroupRows)
    count = 30 if kind == "whole" else 6
    assert len(held) == len(lazy) == count
    assert held.labels == lazy.labels
    assert held.class_names == lazy.class_names
    missing = 0
    for row in np.random.default_rng(0).permutation(count).tolist():
        assert held.key(row) == lazy.key(row)
        assert held.location(row) == lazy.location(row)
        if held.rows.encoded(row) is None:
            missing += 1
            for images in (held, lazy):
                with pytest.raises(UnreadableImage, match=r"table, row \d+: empty$"):
                    images.read(row)
        else:
            assert torch.equal(lazy.read(row), held.read(row))
    assert missing == 1


def test_loader_processes_read_for_themselves(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that the main process holds is none that a worker may go on with, and the other way round."""
    held, lazy = both(SourceConfig(path=str(table)), monkeypatch)
    lazy.read(5)
    data = DataConfig(train=[held.config], image_size=16)
    batches = [[(row, 0) for row in rows] for rows in ([0, 29, 4], [5, 17, 6], [20, 8, 21])]
    local, there = (
        list(make_loader(TrainViews([images], [None], data, 0), batches, workers=workers, pin_memory=False))
        for images, workers in ((held, 0), (lazy, 2))
    )
    assert all(torch.equal(a.pixels_BCHW, b.pixels_BCHW) for a, b in zip(local, there, strict=True))


def test_memory_is_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of images in groups of 1 MB: opening them and reading rows here and there takes a few MB, holding them all of it."""
    generator = np.random.default_rng(0)
    images = [generator.bytes(1 << 16) for _ in range(1024)]
    pq.write_table(pa.table({"image": images}), tmp_path / "large.parquet", row_group_size=16)
    config = SourceConfig(path=str(tmp_path / "large.parquet"))
    before = pa.total_allocated_bytes()
    monkeypatch.setattr(row_groups, "IN_MEMORY", (1 << 26) - 1)
    lazy = ImageSource(config, 0)
    most = 0
    for row in generator.permutation(1024)[:200].tolist():
        assert lazy.rows.encoded(row) == images[row]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 6 << 20
    monkeypatch.setattr(row_groups, "IN_MEMORY", 1 << 27)
    held = ImageSource(config, 0)
    assert pa.total_allocated_bytes() - before > 60 << 20
    assert held.rows.encoded(77) == images[77]


def test_a_file_that_was_damaged_later(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of a group that cannot be read is unreadable, like a file that went away."""
    _, lazy = both(SourceConfig(path=str(table)), monkeypatch)
    lazy.read(0)
    (table / "0.parquet").write_bytes(b"no parquet")
    with pytest.raises(UnreadableImage, match=r"table, row 5: "):
        lazy.read(5)
    lazy.read(20)


def test_a_page_that_does_not_match_its_checksum(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of an image; a copy of a curation has such checksums."""
    file = tmp_path / "x.parquet"
    rows = pq.read_table(tiny.parquet)
    pq.write_table(rows, file, row_group_size=15, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    image = rows["image"][20]["bytes"].as_py()
    content[content.index(image) + len(image) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: not readable as Parquet \(.*checksum"):
        ImageSource(SourceConfig(path=str(file)), 0)
    monkeypatch.setattr(row_groups, "IN_MEMORY", 0)
    source = ImageSource(SourceConfig(path=str(file)), 0)
    assert source.read(14).shape[0] == 3
    with pytest.raises(UnreadableImage, match="checksum"):
        source.read(20)
    first, second = row_groups.row_groups(list_path(str(file), None), SourceConfig(path=str(file)))
    assert len(list(first.samples())) == 15
    with pytest.raises(OSError, match=rf"^{file}#1: .*checksum"):
        list(second.samples())
