"""The two pictures of a curation: numbers (images a class, scores) and examples (kept and rejected images). matplotlib is loaded when drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_KEPT, _POOL = "#0072b2", "#c8c8c8"


class Picture(NamedTuple):
    """image_HWC uint8 and what is written below it."""

    image_HWC: np.ndarray
    caption: str


class Row(NamedTuple):
    """Pictures beside each other; `title` stands left of them."""

    title: str
    pictures: list[Picture]


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
