"""A manifest of selected images as a source: the images by name, in its order, wherever they are; and missing ones are reported."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data import manifest as manifests
from ssld.stage1_ssld.data.manifest import facts_of, is_manifest, open_manifest, write_manifest
from ssld.stage1_ssld.data.shards import source_shards
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import SourceConfig


def source(path: Any, number: int = 0, **settings: Any) -> ImageSource:
    return ImageSource(SourceConfig(path=str(path), **settings), number)


def write(path: Path, chosen: list[tuple[str, str]], pool: list[Any]) -> Path:
    """A manifest of (source, key) pairs over a pool of paths."""
    columns = {
        "source": [name for name, _ in chosen],
        "key": [key for _, key in chosen],
        "class": list(range(len(chosen))),
        "score": [0.5] * len(chosen),
        "hash": [2**63 + n for n in range(len(chosen))],
    }
    settings = [SourceConfig(path=str(item)).model_dump(mode="json") for item in pool]
    write_manifest(path, columns, settings, {"keep": 7})
    return path


def message(path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pool(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """A folder, Parquet files of several row groups, a tar file, a URL and a folder that nothing is chosen from."""
    names = sorted(path.relative_to(tiny.train).as_posix() for path in tiny.train.rglob("*.png"))
    images = [(tiny.train / name).read_bytes() for name in names]
    (tmp_path / "table").mkdir()
    table = pa.table({"image": images})
    pq.write_table(table.slice(0, 20), tmp_path / "table" / "0.parquet", row_group_size=6)
    pq.write_table(table.slice(20), tmp_path / "table" / "1.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in zip(names, images, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    fsspec.filesystem("memory").pipe("/manifest/a.png", images[4])
    places = {"folder": tiny.train, "table": tmp_path / "table", "tar": tmp_path / "x.tar", "url": "memory://manifest"}
    return {key: str(path) for key, path in (places | {"none": tiny.unlabeled}).items()}


@pytest.fixture
def chosen(pool: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (pool["table"], "23"),
        (pool["folder"], "ring/ring_003.png"),
        (pool["table"], "5"),
        (pool["tar"], "x.tar/disc/disc_007.png"),
        (pool["url"], "a.png"),
        (pool["table"], "6"),
        (pool["folder"], "disc/disc_001.png"),
        (pool["table"], "19"),
    ]


ROWS = [23, 13, 5, 7, 4, 6, 1, 19]  # of tiny.train
KEYS = [
    "1/23",
    "0/ring/ring_003.png",
    "1/5",
    "2/x.tar/disc/disc_007.png",
    "3/a.png",
    "1/6",
    "0/disc/disc_001.png",
    "1/19",
]


def test_the_selected_images_in_their_order(chosen: Any, pool: dict[str, str], tiny: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "selected.parquet", chosen, list(pool.values()))
    assert is_manifest(pq.read_schema(file))
    assert facts_of(pq.read_schema(file))["keep"] == 7
    assert not is_manifest(pq.read_schema(tiny.parquet))
    assert pq.read_table(file)["hash"][0].as_py() == 2**63
    images, whole = source(file, 2), source(tiny.train)
    assert images.labels is None
    assert len(images) == 8
    assert all(torch.equal(images.read(row), whole.read(other)) for row, other in enumerate(ROWS))
    assert [images.key(row) for row in range(8)] == [f"2:{key}" for key in KEYS]
    assert images.location(0) == f"{pool['table']}, row 23"
    assert images.location(1) == f"{tiny.train}/ring/ring_003.png"
    assert images.location(3) == f"{pool['tar']}, disc/disc_007.png"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_manifest_in_shards(streaming: bool, chosen: Any, pool: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "selected.parquet", chosen, list(pool.values()))
    (shard,) = source_shards(SourceConfig(path=str(file)), 0, streaming=streaming)
    assert [sample.name for sample in shard.samples()] == KEYS
    assert shard.length == 8


def test_only_the_rows_that_are_named_stay_in_memory(chosen: Any, pool: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "selected.parquet", chosen, list(pool.values()))
    rows: Any = open_manifest(str(file), SourceConfig(path=str(file)), lambda part: ImageSource(part, 0).rows)
    table = rows._parts[1]._parts[0]
    assert len(table) == 4
    assert [table.name(row) for row in range(4)] == ["5", "6", "19", "23"]


def test_a_manifest_elsewhere(chosen: Any, pool: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "selected.parquet", chosen, list(pool.values()))
    fsspec.filesystem("memory").pipe("/manifest.parquet", file.read_bytes())
    assert len(source("memory://manifest.parquet")) == 8
    (shard,) = source_shards(SourceConfig(path="memory://manifest.parquet"), 0, streaming=True)
    assert shard.length == 8


def test_a_folder_that_moved(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path begins at root, or where the command is started; an absolute one is looked for by its last name."""
    (tmp_path / "old").mkdir()
    shutil.copytree(tiny.train, tmp_path / "old" / "images")
    chosen = ["disc/disc_001.png", "ring/ring_000.png"]
    absolute = write(
        tmp_path / "a.parquet",
        [(str(tmp_path / "old" / "images"), key) for key in chosen],
        [tmp_path / "old" / "images"],
    )
    relative = write(tmp_path / "r.parquet", [("old/images", key) for key in chosen], ["old/images"])
    assert f"{relative}: its source old/images does not exist; move it back, or set root" in message(relative)
    assert len(source(relative, root=str(tmp_path))) == 2
    monkeypatch.chdir(tmp_path)
    assert len(source(relative)) == 2
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert f"{absolute}: its source {tmp_path}/old/images does not exist; move it back, or set root" in message(
        absolute
    )
    assert torch.equal(source(absolute, root=str(tmp_path / "new")).read(0), source(tiny.train).read(1))
    assert f"its source {tmp_path}/images does not exist" in message(absolute, root=str(tmp_path))


def test_images_that_are_gone(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny.train, tmp_path / "images")
    keys = [path.relative_to(tiny.train).as_posix() for path in sorted(tiny.train.rglob("*.png"))]
    file = write(tmp_path / "m.parquet", [(str(tmp_path / "images"), key) for key in keys], [tmp_path / "images"])
    for name in ("disc/disc_004.png", "stripes/stripes_009.png"):
        (tmp_path / "images" / name).unlink()
    line = f"{file}: 2 of 30 images are no longer in {tmp_path}/images, first disc/disc_004.png; curate again, or put them back"
    assert message(file) == line
    monkeypatch.setattr(manifests, "LOOKED_AT", 10)  # every third is looked for; none of them is gone
    assert len(source(file)) == 30
    (tmp_path / "images" / "disc/disc_003.png").unlink()
    assert "3 of 30 images are no longer in" in message(file)


def test_rows_and_members_that_are_gone(pool: dict[str, str], tmp_path: Path) -> None:
    for place, good, bad, expected in (
        ("table", "3", "30", "row 30"),
        ("tar", "x.tar/disc/disc_001.png", "x.tar/x.png", "x.tar/x.png"),
    ):
        path = pool[place]
        file = write(tmp_path / f"{place}.parquet", [(path, bad), (path, good)], [path])
        assert f"1 of 2 images are no longer in {path}, first {expected}; curate again" in message(file)


def test_manifests_that_are_refused(pool: dict[str, str], tmp_path: Path) -> None:
    strange = write(tmp_path / "strange.parquet", [("elsewhere", "a.png")], [pool["folder"]])
    assert "names the source elsewhere, which is not in its pool" in message(strange)
    assert "holds no images" in message(write(tmp_path / "empty.parquet", [], [pool["folder"]]))


def test_a_damaged_manifest(tiny: Any, tmp_path: Path) -> None:
    """One bit of a name, which would be another image."""
    file = write(tmp_path / "m.parquet", [(str(tiny.train), f"disc/disc_{n:03d}.png") for n in range(9)], [tiny.train])
    content = bytearray(file.read_bytes())
    page = content.index(b"_000", content.index(b"c_000") + 20)  # behind the least name, which its header has
    content[page + 3] ^= 1
    file.write_bytes(content)
    assert "m.parquet: not readable as Parquet (" in message(file)
