"""What a curation hands over beside the manifest: copies of the images where they are asked for, and two pictures.

curation.png: images per class, scores; examples.png: kept and rejected images. matplotlib is loaded when they are drawn.
"""

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
from ssld.stage1_ssld.curation.score_files import ScoreFiles
from ssld.stage1_ssld.curation.shard_pass import picked
from ssld.stage1_ssld.data.shards import Shard
from ssld.stage1_ssld.data.sources import decode
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.data_config import SourceConfig

_SIDE = 96  # pixels of an example
_COPIED = 256  # images a row group of the copies
_KEPT, _POOL = "#0072b2", "#c8c8c8"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COPIES = pa.schema(
    [("image", _IMAGE), ("source", pa.string()), ("key", pa.string()), ("class", pa.int32()), ("score", pa.float32())]
)


class Images(NamedTuple):
    """Images by their row over all shards of a folder of score files."""

    files: ScoreFiles
    shards: Sequence[Shard]
    source: Sequence[SourceConfig]


class Picture(NamedTuple):
    """image_HWC uint8 and what is written below it."""

    image_HWC: np.ndarray
    caption: str


class Row(NamedTuple):
    """Pictures beside each other; `title` stands left of them."""

    title: str
    pictures: list[Picture]


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
    views = {name: small_views(images[name], np.array(sorted(rows), np.int64)) for name, rows in wanted.items()}
    rows = [
        Row(row["title"], [Picture(views[whose][number], caption) for whose, number, caption in row["pictures"]])
        for row in outcome["examples"]
    ]
    draw_examples(paths[1], rows, config.examples)
    return paths


def draw_numbers(path: Path, kept_K: np.ndarray, keep: int, histogram: np.ndarray, kept_histogram: np.ndarray) -> None:
    """Images kept of each of K classes, most first, against `keep`; and the scores of the pool and of what was kept.

    Args:
        histogram: of the pool's scores, in equal bins from 0 to 1; `kept_histogram`: the same of what was kept.
    """
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    ordered = np.sort(kept_K)[::-1]
    left.fill_between(np.arange(len(ordered) + 1), np.r_[ordered, ordered[-1:]], step="post", color=_KEPT, linewidth=0)
    left.axhline(keep, color="black", linewidth=1, linestyle=":")
    full = int((kept_K >= keep).sum())
    left.set(
        xlabel="classes, the fullest first",
        ylabel="images kept",
        xlim=(0, len(ordered)),
        ylim=(0, 1.12 * keep),
        title=f"{full} of {len(ordered)} classes have {keep} images",
    )
    edges = np.linspace(0, 1, len(histogram) + 1)
    right.stairs(histogram, edges, fill=True, color=_POOL, label=f"pool ({histogram.sum():,})")
    right.stairs(kept_histogram, edges, fill=True, color=_KEPT, label=f"kept ({kept_histogram.sum():,})")
    right.set(xlabel="probability of the first class", ylabel="images", xlim=(0, 1), yscale="symlog")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=120)


def draw_examples(path: Path, rows: Sequence[Row], columns: int) -> None:
    """A grid of pictures, `columns` wide; rows without a picture are left out."""
    shown = [row for row in rows if row.pictures]
    figure = _figure(1.5 + 1.15 * columns, 1.55 * max(1, len(shown)))
    grid = figure.subplots(max(1, len(shown)), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, line in zip(shown, grid, strict=False):
        line[0].text(-0.12, 0.5, row.title, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for picture, axes in zip(row.pictures, line, strict=False):
            axes.imshow(picture.image_HWC, interpolation="nearest")
            caption = _shortened(picture.caption)
            axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7)
    figure.savefig(path, dpi=120)


def _shortened(caption: str, most: int = 18) -> str:
    return "\n".join(line if len(line) <= most else f"{line[: most - 1]}…" for line in caption.split("\n"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def small_views(images: Images, ids_N: np.ndarray) -> dict[int, np.ndarray]:
    """Small square views [S,S,3] of some ascending rows; grey where one cannot be read."""
    views = {}
    for number, rows in images.files.shard_rows(ids_N):
        with closing(picked(images.shards[number], rows)) as samples:  # type: ignore[type-var]
            for row, sample in zip(rows.tolist(), samples, strict=True):
                try:
                    image = pixels_of(decode(sample.encoded, sample.location))
                    view = val_view(image, image_size=_SIDE, val_crop=1.0).permute(1, 2, 0).numpy()
                except UnreadableImage:
                    view = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
                views[int(images.files.starts[number]) + row] = view
    return views


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
            if not _is_whole(file):
                run.log_if(f"{file}: does not match its checksums; it is made again" if file.exists() else None)
                rows = np.array(kept[edges[number] : edges[number + 1]])
                with (
                    atomically(file) as temporary,
                    pq.ParquetWriter(temporary, COPIES, write_page_checksum=True, use_dictionary=False) as writer,
                ):
                    for group in _copies(pool, number, rows):
                        writer.write_table(pa.Table.from_pylist(group, COPIES))
            if stop.requested:
                raise Stopped(f"{number + 1} of {len(pool.shards)} shards are copied")


def _is_whole(file: Path) -> bool:
    """Whether a file of copies is there, and the checksums of its pages are right, which Arrow does not compare for dictionaries.

    No file with a checksum lies beside it: the folder is data for others too.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as copies:
            return sum(len(batch) for batch in copies.iter_batches(_COPIED)) == copies.metadata.num_rows
    except (OSError, pa.ArrowException):
        return False


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
