"""AP of runs over seeds, and its difference to another row by a bootstrap over the same images; for the tables of several scripts here."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

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


def rows(drawn: Mapping[str, Drawn], base: str) -> Iterator[list[str]]:
    """Cells of a row for each that has a finished run: name, mean AP, AP of each seed, difference to `base` with its 95 % interval.

    The difference is the mean over the seeds that both rows have.
    """
    for name, one in drawn.items():
        if not one:
            continue
        aps = [value[0] for value in one.values()]
        cells = [name, f"{np.mean(aps):.1f}", ", ".join(f"{ap:.1f}" for ap in aps), "-"]
        common = sorted(one.keys() & drawn.get(base, {}).keys())
        if common and name != base:
            difference = np.mean([one[seed] - drawn[base][seed] for seed in common], axis=0)
            low, high = interval(difference)
            cells[3] = f"{difference[0]:+.1f} ({low:+.1f} to {high:+.1f})"
        yield cells
