"""Training streams: every image once a pass, and a step's batch a function of (seed, step) alone: not of ranks, workers or where a run began."""

import gc
import io
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data import shards, streams
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.data.shards import RowShard, TarShard
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data.streams import Part, StreamPlan, StreamViews, plan_streams, stream_batches
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig

Pools = dict[str, str]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def pools(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Pools:
    """The 30 images of `tiny.train` as a folder, Parquet files of 5 row groups, and 5 tar files of 4 to 8 images."""
    folder = tmp_path_factory.mktemp("pools")
    images = {path.relative_to(tiny.train).as_posix(): path.read_bytes() for path in sorted(tiny.train.rglob("*.png"))}
    names = list(images)
    (folder / "tars").mkdir()
    for number, (first, last) in enumerate(((0, 4), (4, 9), (9, 15), (15, 22), (22, 30))):
        write_tar(folder / "tars" / f"{number}.tar", {name: images[name] for name in names[first:last]})
    (folder / "table").mkdir()
    pq.write_table(pa.table({"image": list(images.values())}), folder / "table" / "0.parquet", row_group_size=6)
    return {"folder": str(tiny.train), "table": str(folder / "table"), "tars": str(folder / "tars")}


def data_of(*paths: Any, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"train": list(paths), "streaming": True, "image_size": 8, **settings})


def batches(
    data: DataConfig, *, batch: int = 6, steps: range = range(5), workers: int = 0, seed: int = 1, **split: int
) -> list[Batch]:
    plan = plan_streams(data, batch, seed)
    split = {"rank": 0, "ranks": 1, "accumulate": 1} | split
    views = StreamViews(plan, data, seed=seed, steps=steps, **split)
    with closing(stream_batches(views, workers=workers, pin_memory=False)) as stream:
        return list(stream)


def keys(result: list[Batch]) -> list[list[str]]:
    return [batch.keys for batch in result]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BUFFERED", 12)
    monkeypatch.setattr(shards, "ROWS", 7)


# ---- what is read


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.usefixtures("small_blocks")
def test_every_image_once_a_pass(kind: str, pools: Pools) -> None:
    result = keys(batches(data_of(pools[kind]), steps=range(15)))
    assert {len(batch) for batch in result} == {6}
    source = ImageSource(data_of(pools[kind]).train[0], 0)
    whole = sorted(source.key(row) for row in range(30))
    passes = [[key for batch in result[first : first + 5] for key in batch] for first in (0, 5, 10)]
    assert all(sorted(one) == whole for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert passes[0] != whole
    assert keys(batches(data_of(pools[kind]), steps=range(15), seed=2)) != result


@pytest.mark.usefixtures("small_blocks")
def test_readers_of_tar_files_go_through_their_own_in_turn(pools: Pools) -> None:
    """Lengths are unknown, so one reader may begin its second pass before another ends its first."""
    data = data_of(pools["tars"])
    plan = plan_streams(data, 6, 1)
    assert plan.images is None
    assert plan.given == [2, 2, 2]
    assert all(isinstance(part.shard, TarShard) and part.last is None for r in plan.readers for part in r.parts)
    sizes = [sum(len(list(part.shard.samples())) for part in reader.parts) for reader in plan.readers]
    assert sum(sizes) == 30
    result = keys(batches(data, steps=range(30)))
    for number, size in enumerate(sizes):
        own = [batch[slot] for batch in result for slot, (reader, _) in enumerate(plan.slots) if reader == number]
        assert len(own) == 60
        assert {tuple(sorted(Counter(own[first : first + size]).values())) for first in range(0, 60 - size, size)} == {
            (1,) * size
        }


def test_images_are_shuffled_within_blocks(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BUFFERED", 4)
    order = [
        key for batch in keys(batches(data_of(f"{pools['tars']}/4.tar"), batch=2, steps=range(12))) for key in batch
    ]
    blocks = [order[first : first + 4] for first in range(0, 24, 4)]  # 8 images, one reader: two blocks a pass
    assert all(sorted(block) == sorted(blocks[number % 2]) for number, block in enumerate(blocks))
    assert max(blocks[0]) < min(blocks[1])
    assert len({tuple(block) for block in blocks}) == 6
    assert not all(block == sorted(block) for block in blocks)


@pytest.mark.parametrize("kind", ["folder", "table", "tars"])
def test_views_are_those_of_the_image_and_the_pass(kind: str, pools: Pools) -> None:
    data = data_of(pools[kind], augment="trivial")
    source = ImageSource(data.train[0], 0)
    row_of = {source.key(row): row for row in range(30)}
    recorded: Counter[str] = Counter()
    for batch in batches(data, steps=range(7)):
        assert batch.pixels_BCHW.shape == (6, 3, 8, 8)
        assert batch.labels_B.tolist() == [NO_LABEL] * 6
        for pixels, key in zip(batch.pixels_BCHW, batch.keys, strict=True):
            assert torch.equal(pixels, training_view(source.read(row_of[key]), key, recorded[key], data, 1))
            recorded[key] += 1
    assert max(recorded.values()) >= 2


# ---- nothing but the step decides


@pytest.mark.parametrize("kind", ["folder", "table", "tars"])
@pytest.mark.usefixtures("small_blocks")
def test_going_on_is_the_tail(kind: str, pools: Pools) -> None:
    data = data_of(pools[kind])
    whole = batches(data, steps=range(14))
    for start in (1, 3, 5, 6, 11, 13, 14):
        tail = batches(data, steps=range(start, 14))
        assert keys(tail) == keys(whole)[start:]
        assert all(torch.equal(a.pixels_BCHW, b.pixels_BCHW) for a, b in zip(tail, whole[start:], strict=True))


@pytest.mark.parametrize("kind", ["folder", "tars"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.usefixtures("small_blocks")
def test_ranks_and_accumulation_cut_the_same_batches(kind: str, ranks: int, accumulate: int, pools: Pools) -> None:
    data = data_of(pools[kind], pools["table"])
    whole = keys(batches(data))
    parts = [keys(batches(data, rank=rank, ranks=ranks, accumulate=accumulate)) for rank in range(ranks)]
    for step in range(5):
        pieces = [part[step * accumulate + micro] for part in parts for micro in range(accumulate)]
        assert [key for piece in pieces for key in piece] == whole[step]
    # a checkpoint of these ranks goes on with another number of them
    assert keys(batches(data, steps=range(3, 5))) == whole[3:]


@pytest.mark.usefixtures("small_blocks")
def test_workers_change_nothing(pools: Pools) -> None:
    data = data_of(pools["tars"], pools["folder"])
    for split in ({}, {"rank": 1, "ranks": 2, "accumulate": 3}):
        local = batches(data, steps=range(2, 5), **split)
        other = batches(data, steps=range(2, 5), workers=2, **split)
        assert keys(other) == keys(local)
        assert all(torch.equal(a.pixels_BCHW, b.pixels_BCHW) for a, b in zip(other, local, strict=True))
    assert multiprocessing.active_children() == []


# ---- weights


@pytest.mark.usefixtures("small_blocks")
def test_weights_are_the_shares_of_every_batch_and_every_piece_of_it(pools: Pools) -> None:
    data = data_of({"path": pools["tars"], "weight": 1}, {"path": pools["folder"], "weight": 3})
    whole = keys(batches(data, batch=8, steps=range(10)))
    for batch in whole:
        for piece in (batch[:4], batch[4:]):
            assert Counter(key[0] for key in piece) == {"0": 1, "1": 3}
    drawn = [key for batch in whole for key in batch if key[0] == "1"]
    assert set(Counter(drawn[:30]).values()) == set(Counter(drawn[30:]).values()) == {1}  # 6 a step, 30 images
    assert keys(batches(data, batch=8, steps=range(7, 10))) == whole[7:]


def test_a_weight_too_small_for_the_batch(pools: Pools) -> None:
    data = data_of({"path": pools["folder"], "weight": 1}, {"path": pools["tars"], "weight": 0.01})
    with pytest.raises(
        UserError, match=r"data\.train\.1\.weight: too small for a batch of 6: less than one image per step; raise"
    ):
        plan_streams(data, 6, 0)


# ---- readers


def rows_of(plan: StreamPlan) -> list[tuple[int, str, int]]:
    parts: list[Part] = [part for reader in plan.readers for part in reader.parts]
    assert all(part.last is not None for part in parts)
    return [(p.source, p.shard.name, row) for p in parts for row in range(p.first, p.last or 0)]


@pytest.mark.parametrize(("batch", "readers"), [(1, 1), (7, 7), (8, 8), (31, 7), (62, 15), (64, 16), (77, 11)])
def test_rows_are_dealt_in_proportion_to_what_a_reader_gives(batch: int, readers: int, pools: Pools) -> None:
    """31 a step cannot be shared evenly by the 30 readers there may be: seven give 5 or 4, and own as many more rows."""
    plan = plan_streams(data_of(pools["folder"], pools["folder"]), batch, 0)
    plan_rows = rows_of(plan)
    assert len(plan_rows) == len(set(plan_rows)) == plan.images == 60
    assert (len(plan.readers), sum(plan.given)) == (readers, batch)
    assert max(plan.given) - min(plan.given) <= 1
    for reader, given in zip(plan.readers, plan.given, strict=True):
        own = sum((part.last or 0) - part.first for part in reader.parts)
        assert abs(own - 60 * given / batch) < 1
    assert sorted(plan.slots) == [(number, which) for number, given in enumerate(plan.given) for which in range(given)]


def test_row_groups_are_not_read_by_many_and_tar_files_by_one(pools: Pools) -> None:
    assert len(plan_streams(data_of(pools["tars"]), 60, 0).readers) == 5
    assert len(plan_streams(data_of(pools["table"]), 60, 0).readers) == 15  # half as many as rows
    readers = plan_streams(data_of(pools["tars"]), 29, 0).readers  # a prime: 6, 6, 6, 6, 5
    assert sorted(part.shard.name for reader in readers for part in reader.parts) == [
        f"{pools['tars']}/{number}.tar" for number in range(5)
    ]


# ---- what is skipped is not read


@pytest.mark.usefixtures("small_blocks")
def test_a_resumed_run_does_not_read_what_it_has_seen(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    samples, extract = RowShard.samples, tarfile.TarFile.extractfile

    def noted(self: RowShard, start: int = 0) -> Any:
        for sample in samples(self, start):
            read.append(sample.name)
            yield sample

    def extracted(self: Any, member: Any) -> Any:
        read.append(member.name)
        return extract(self, member)

    monkeypatch.setattr(RowShard, "samples", noted)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", extracted)
    for kind, most in (("folder", 16), ("tars", 24)):  # 6 for the step, and the rest of their blocks of 2 and of 4
        read.clear()
        batches(data_of(pools[kind]), steps=range(403, 404))
        assert 6 <= len(read) <= most


# ---- damage


def test_unreadable_images_are_replaced(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.jpg").write_bytes(jpeg(seed=number)[: 300 if number in (3, 8) else None])
    for workers in (0, 2):
        result = batches(data_of(tmp_path), batch=12, steps=range(1), workers=workers)
        assert sorted(result[0].unreadable) == [f"{tmp_path}/03.jpg", f"{tmp_path}/08.jpg"]
        assert len(result[0].keys) == len(result[0].pixels_BCHW) == 12
        assert set(result[0].keys) == {f"0:{number:02d}.jpg" for number in range(12)} - {"0:03.jpg", "0:08.jpg"}


def test_nothing_but_unreadable_images(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg()[:300])
    for workers in (0, 2):
        (result,) = batches(data_of(tmp_path), batch=4, steps=range(1), workers=workers)
        assert result.keys == []
        assert len(result.pixels_BCHW) == 0
        assert set(result.unreadable) == {f"{tmp_path}/{number}.jpg" for number in range(4)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_is_one_line(workers: int, pools: Pools, tmp_path: Path) -> None:
    whole = Path(pools["tars"], "4.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        batches(data_of(tmp_path), batch=2, workers=workers)
    assert str(caught.value).startswith(f"{tmp_path}/short.tar: not readable as an uncompressed tar file (")
    assert "\n" not in str(caught.value)
    (tmp_path / "short.tar").unlink()
    write_tar(tmp_path / "none.tar", {"readme.txt": b"hello"})
    with pytest.raises(UserError, match=r"none\.tar: holds no images$"):
        batches(data_of(tmp_path), batch=2, workers=workers)


def test_a_place_that_goes_away(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> Any:
        raise OSError("connection reset")
        yield

    monkeypatch.setattr(TarShard, "samples", away)
    with pytest.raises(
        UserError, match=r"data\.train: a stream ended early \(connection reset\); run again to continue from"
    ):
        batches(data_of(pools["tars"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_is_closed_leaves_nothing_open(workers: int, pools: Pools) -> None:
    data = data_of(pools["tars"], pools["table"])
    views = StreamViews(plan_streams(data, 6, 0), data, seed=0, steps=range(100), rank=0, ranks=1, accumulate=1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    stream = stream_batches(views, workers=workers, pin_memory=False)
    next(stream)
    stream.close()
    del views
    assert multiprocessing.active_children() == []
    if workers == 0:
        assert len(os.listdir("/proc/self/fd")) == before
