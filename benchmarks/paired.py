"""AP of runs over seeds, and its difference to another row; for the tables of several scripts here.

A difference has two 95 % intervals. That over the images is a paired bootstrap, seeds averaged, and leaves out what another seed would change. That
over the seeds is Student's t on the differences of equal seeds, of at most ten, and leaves out the choice of the images.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ssld.pipelines.config import MOST_SEEDS
from ssld.pipelines.reports.table import over_seeds
from ssld.shared.run_dir import read_result
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.evaluation.bootstrap import draw_ap, interval, match_detections, read_detections

# Seed -> AP in percent on all images, then on each draw of the bootstrap [1 + draws].
Drawn = dict[int, np.ndarray]


def draw(annotations: Mapping[int, Path], folders: Mapping[int, Path], draws: int) -> Drawn:
    """AP of each seed whose folder holds a finished evaluation on the images of its COCO file."""
    drawn = {}
    for seed, folder in folders.items():
        if read_result(folder):
            data = read_coco(annotations[seed], None, training=False)
            matches = match_detections(data, read_detections(folder / "detections.json", data))
            drawn[seed] = 100 * draw_ap(matches, draws)["AP"]
    return drawn


def columns(title: str, base: str, *more: str) -> Iterator[str]:
    """Lines of Markdown above the rows; `more` are columns behind those of `rows`."""
    names = [title, "AP", "each seed", f"to {base}, 95 % interval over the images", "over the seeds", *more]
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"


def rows(drawn: Mapping[str, Drawn], base: str) -> Iterator[list[str]]:
    """Cells of a row for each that has a finished run, under the first `columns`; a difference is the mean over the seeds that both rows have."""
    for name, one in drawn.items():
        if not one:
            continue
        aps = [value[0] for value in one.values()]
        cells = [name, f"{np.mean(aps):.1f}", ", ".join(f"{ap:.1f}" for ap in aps), "-", "-"]
        common = sorted(one.keys() & drawn.get(base, {}).keys())
        if common and name != base:
            differences = [one[seed] - drawn[base][seed] for seed in common]
            mean = np.mean(differences, axis=0)
            low, high = interval(mean)
            cells[3] = f"{mean[0]:+.1f} ({low:+.1f} to {high:+.1f})"
            if 1 < len(common) <= MOST_SEEDS and (
                spread := over_seeds([float(difference[0]) for difference in differences])
            ):
                cells[4] = f"{spread.low:+.1f} to {spread.high:+.1f}"
        yield cells
