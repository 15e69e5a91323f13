"""What a curation hands over beside the manifest: copies of the images where they are asked for, and pictures."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.distributed.ranks import rank, world_size
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped
from ssld.shared.files import atomically
from ssld.shared.images import UnreadableImage, pixels_of
from ssld.shared.run_dir import RunDir
from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.pictures import Picture, Row, draw_examples, draw_numbers
from ssld.stage1_ssld.curation.score_files import ScoreFiles
from ssld.stage1_ssld.curation.shard_pass import picked
from ssld.stage1_ssld.data.shards import Shard
from ssld.stage1_ssld.data.sources import decode
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.data_config import SourceConfig

_SIDE = 96  # pixels of an example
_COPIED = 256  # images a row group of the copies
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COPIES = pa.schema(
    [("image", _IMAGE), ("source", pa.string()), ("key", pa.string()), ("class", pa.int32()), ("score", pa.float32())]
)


class Images(NamedTuple):
    """Images by their row over all shards of a folder of score files."""

    files: ScoreFiles
    shards: Sequence[Shard]
    source: Sequence[SourceConfig]


def draw(run: Path, outcome: dict[str, Any], pool: Images, protected: Images, config: CurateConfig) -> list[Path]:
    """Draw the pictures that an outcome describes; their paths."""
    paths = [run / "curation.png", run / "examples.png"]
    histograms = np.array(outcome["histogram"]), np.array(outcome["kept_histogram"])
    draw_numbers(paths[0], np.array(outcome["kept_of_class"]), config.keep, *histograms)
    images = {"pool": pool, "protected": protected}
    wanted: dict[str, set[int]] = {name: set() for name in images}
    for row in outcome["examples"]:
        for whose, number, _ in row["pictures"]:
            wanted[whose].add(number)
    views = {name: _read(images[name], np.array(sorted(rows), np.int64)) for name, rows in wanted.items()}
    rows = [
        Row(row["title"], [Picture(views[whose][number], caption) for whose, number, caption in row["pictures"]])
        for row in outcome["examples"]
    ]
    draw_examples(paths[1], rows, config.examples)
    return paths


def materialise(run: RunDir, pool: Images) -> None:
    """Copy the kept images, encoded as they are, to one Parquet file a shard; the ranks share the shards. Raises Stopped after a whole file."""
    folder = run.path / "selected"
    folder.mkdir(exist_ok=True)
    kept = np.load(run.path / "kept.npy", mmap_mode="r")
    edges = np.searchsorted(kept["id"], pool.files.starts)
    jobs = [number for number in range(len(pool.shards)) if edges[number] < edges[number + 1]]
    with StopRequest() as stop:
        for number in jobs[rank() :: world_size()]:
            file = folder / f"part-{number:06d}.parquet"
            if not file.exists():
                rows = np.array(kept[edges[number] : edges[number + 1]])
                with atomically(file) as temporary, pq.ParquetWriter(temporary, COPIES) as writer:
                    for group in _copies(pool, number, rows):
                        writer.write_table(pa.Table.from_pylist(group, COPIES))
            if stop.requested:
                raise Stopped(f"{number + 1} of {len(pool.shards)} shards are copied")


def _copies(pool: Images, number: int, kept: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Rows of the copies of a shard, in groups."""
    group: list[dict[str, Any]] = []
    source = pool.source[number].path
    rows = kept["id"] - pool.files.starts[number]
    with closing(picked(pool.shards[number], rows)) as samples:  # type: ignore[type-var]
        for sample, label, score in zip(samples, kept["class"].tolist(), kept["score"].tolist(), strict=True):
            content = sample.encoded.read_bytes() if isinstance(sample.encoded, Path) else sample.encoded
            image = {"bytes": content, "path": None}
            group.append({"image": image, "source": source, "key": sample.name, "class": label, "score": score})
            if len(group) == _COPIED:
                yield group
                group = []
    if group:
        yield group


def _read(images: Images, ids_N: np.ndarray) -> dict[int, np.ndarray]:
    """Small square views [S,S,3] of some ascending rows; grey where one cannot be read."""
    views = {}
    for number, rows in images.files.shard_rows(ids_N):
        with closing(picked(images.shards[number], rows)) as samples:  # type: ignore[type-var]
            for row, sample in zip(rows.tolist(), samples, strict=True):
                try:
                    image = pixels_of(decode(sample.encoded, sample.location))
                    view = val_view(image, size=_SIDE, crop=1.0).permute(1, 2, 0).numpy()
                except UnreadableImage:
                    view = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
                views[int(images.files.starts[number]) + row] = view
    return views
