"""Output of a curation beside the manifest: two plots and, on request, copies of the images.

curation.png: images per class, scores; examples.png: kept and rejected images. matplotlib is imported when they are drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from textwrap import wrap
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
_COPIED = 256  # images per row group of the copies
_KEPT, _POOL = "#0072b2", "#c8c8c8"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COPIES = pa.schema(
    [("image", _IMAGE), ("source", pa.string()), ("key", pa.string()), ("class", pa.int32()), ("score", pa.float32())]
)


class Images(NamedTuple):
    """Access to images by their row over all shards of a folder of score files."""

    files: ScoreFiles
    shards: Sequence[Shard]
    source: Sequence[SourceConfig]


class Example(NamedTuple):
    """An image (uint8) and the caption below it."""

    image_HWC: np.ndarray
    caption: str


class Row(NamedTuple):
    """A row of examples with its title on the left."""

    title: str
    examples: list[Example]


def draw(run: Path, outcome: dict[str, Any], pool: Images, held_out: Images, config: CurateConfig) -> list[Path]:
    """Draw the plots that an outcome describes; returns their paths."""
    paths = [run / "curation.png", run / "examples.png"]
    histograms = np.array(outcome["histogram"]), np.array(outcome["kept_histogram"])
    draw_numbers(paths[0], np.array(outcome["kept_of_class"]), config.keep, *histograms)
    images = {"pool": pool, "held_out": held_out}
    needed: dict[str, set[int]] = {name: set() for name in images}
    for row in outcome["examples"]:
        for whose, number, _ in row["images"]:
            needed[whose].add(number)
    views = {name: small_views(images[name], np.array(sorted(rows), np.int64)) for name, rows in needed.items()}
    rows = [
        Row(row["title"], [Example(views[whose][number], caption) for whose, number, caption in row["images"]])
        for row in outcome["examples"]
    ]
    draw_examples(paths[1], rows, config.examples)
    return paths


def draw_numbers(path: Path, kept_K: np.ndarray, keep: int, histogram: np.ndarray, kept_histogram: np.ndarray) -> None:
    """Plot the kept images of each of K classes in descending order, against `keep`, and the scores of pool and kept images.

    Args:
        path: PNG file to write.
        kept_K: kept images per class.
        keep: most images kept per class.
        histogram: scores of the pool, in equal bins from 0 to 1.
        kept_histogram: scores of the kept images, in the same bins.
    """
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    ordered = np.sort(kept_K)[::-1]
    left.fill_between(np.arange(len(ordered) + 1), np.r_[ordered, ordered[-1:]], step="post", color=_KEPT, linewidth=0)
    left.axhline(keep, color="black", linewidth=1, linestyle=":")
    full = int((kept_K >= keep).sum())
    left.set(
        xlabel="classes by number of images kept",
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


def draw_examples(path: Path, rows: Sequence[Row], columns: int, title: str = "") -> None:
    """Draw a grid of examples, `columns` wide, below a title; rows without examples are left out."""
    filled = [row for row in rows if row.examples]
    figure = _figure(1.5 + 1.15 * columns, 1.55 * max(1, len(filled)) + (0.3 if title else 0))
    if title:
        figure.suptitle("\n".join(wrap(title, 16 * (columns + 1))), fontsize=9, parse_math=False)
    plain = {"parse_math": False}  # names of classes may have a $
    grid = figure.subplots(max(1, len(filled)), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, line in zip(filled, grid, strict=False):
        line[0].text(-0.12, 0.5, row.title, transform=line[0].transAxes, ha="right", va="center", fontsize=8, **plain)
        for example, axes in zip(row.examples, line, strict=False):
            axes.imshow(example.image_HWC, interpolation="nearest")
            caption = _shortened(example.caption)
            axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7, **plain)
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
    """Small square views [S,S,3] by row, for ascending rows; grey for an unreadable image."""
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
    """Copy the kept images, encoded as they are, to one Parquet file per shard; the ranks share the shards. Raises Stopped after a whole file."""
    folder = run.path / "selected"
    folder.mkdir(exist_ok=True)
    kept = np.load(run.path / "kept.npy", mmap_mode="r")
    edges = np.searchsorted(kept["id"], pool.files.starts)
    jobs = [number for number in range(len(pool.shards)) if edges[number] < edges[number + 1]]
    with StopRequest() as stop:
        for number in jobs[rank() :: world_size()]:
            file = folder / f"part-{number:06d}.parquet"
            if not _is_whole(file):
                run.log_if(f"{file}: does not match its checksums; recomputing it" if file.exists() else None)
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
    """Whether a file of copies exists and the checksums of its pages match. Arrow does not verify them for dictionaries, which are not used.

    There is no separate checksum file, because other programs read the folder too.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as copies:
            return sum(len(batch) for batch in copies.iter_batches(_COPIED)) == copies.metadata.num_rows
    except (OSError, pa.ArrowException):
        return False


def _copies(pool: Images, number: int, kept: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Rows of the copies of a shard, in row groups."""
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
