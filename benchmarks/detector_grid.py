"""Gain that the backbone brings to the detector: Faster and Cascade R-CNN from random, supervised and SSLD weights, over seeds.

    python benchmarks/mosaics.py DIR/tinyimagenet100 --output data/mosaics
    python benchmarks/detector_grid.py data/mosaics --supervised A0.safetensors A1.safetensors A2.safetensors \
        --ssld B0.safetensors B1.safetensors B2.safetensors --output runs/grid

DATA holds `train.json`, `val.json` and the folders `train/`, `val/`. Seed n of a row takes file n of its backbone, and the same images, steps,
augmentation and schedule as every other row. Every layer trains, norms too (a random backbone under frozen norms would be a straw man); the weights
that were learnt before are tried with all learning rates equal and with the small factors of the SSLD recipes. Runs that are finished are not run
again; a row counts when all its seeds are. The table goes to standard output.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from ssld.shared.run_dir import read_result

TOY = ROOT / "stage2_detect" / "configs" / "toy_faster_rcnn.yaml"
SMALL_FACTORS = "0.05,0.05,0.05,0.1,0.15"


class Row(NamedTuple):
    """Settings in which two rows of the table differ."""

    kind: str
    dcn: bool
    backbone: str
    small_factors: bool

    @property
    def name(self) -> str:
        """Of its run directories, without the seed."""
        return "-".join([self.kind, *["dcn"] * self.dcn, self.backbone, *["small"] * self.small_factors])


def rows(kinds: Sequence[str], dcn: Sequence[bool], small_factors: Sequence[bool]) -> Iterator[Row]:
    """Every row, the rows that are compared with each other together."""
    for kind, deformable in itertools.product(kinds, dcn):
        yield Row(kind, deformable, "random", False)
        for backbone, small in itertools.product(("supervised", "ssld"), small_factors):
            yield Row(kind, deformable, backbone, small)


def command(row: Row, seed: int, data: Path, backbone: str, output: Path, extra: Sequence[str]) -> list[str]:
    """The line that trains one run."""
    line = [sys.executable, str(ROOT / "stage2_detect" / "train.py"), "--config", str(TOY), "--backbone", backbone]
    for split in ("train", "val"):
        line += [
            f"--data.{split}_annotations",
            str(data / f"{split}.json"),
            f"--data.{split}_images",
            str(data / split),
        ]
    line += ["--model.kind", row.kind, "--seed", str(seed), "--output", str(output / f"{row.name}-{seed}"), *extra]
    if row.dcn:
        line += ["--model.dcn_strides", "8,16,32"]
    if row.small_factors:
        line += ["--optim.backbone_lr_factors", SMALL_FACTORS]
    return line


def spread(values: Sequence[float]) -> str:
    """Mean and range, in percent."""
    low, mean, high = (100 * value for value in (min(values), statistics.mean(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def table(output: Path, all_rows: Sequence[Row], seeds: int) -> str:
    """Markdown: a line a row with all its seeds, and what SSLD gains over the supervised weights, each at its better factors."""
    scores: dict[Row, list[float]] = {}
    lines = ["| detector | DCNv2 | backbone | factors | AP | AP50 | mask AP |", f"|{' --- |' * 7}"]
    for row in all_rows:
        results = [read_result(output / f"{row.name}-{seed}") for seed in range(seeds)]
        metrics = [result["metrics"] for result in results if result]
        if len(metrics) < seeds:
            continue
        scores[row] = [one["AP"] for one in metrics]
        factors = "small" if row.small_factors else "1"
        cells = [row.kind, "yes" if row.dcn else "no", row.backbone, factors, spread(scores[row])]
        cells += [spread([one["AP50"] for one in metrics])]
        cells += [spread([one["AP_segm"] for one in metrics]) if "AP_segm" in metrics[0] else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "SSLD against supervised weights, each at its better factors:", ""]
    for kind, dcn in dict.fromkeys((row.kind, row.dcn) for row in scores):
        best = {}
        for backbone in ("supervised", "ssld"):
            mine = [scores[row] for row in scores if row[:3] == (kind, dcn, backbone)]
            if mine:
                best[backbone] = max(mine, key=statistics.mean)
        if len(best) == 2:
            gain = 100 * (statistics.mean(best["ssld"]) - statistics.mean(best["supervised"]))
            inside = min(best["ssld"]) <= max(best["supervised"]) and min(best["supervised"]) <= max(best["ssld"])
            note = ", inside the spread of the seeds" if inside else ""
            lines.append(f"- {kind}{' with DCNv2' * dcn}: {gain:+.1f} AP{note}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--supervised", nargs="+", required=True, metavar="FILE", help="one a seed")
    parser.add_argument("--ssld", nargs="+", required=True, metavar="FILE", help="one a seed")
    parser.add_argument("--random", default="random:test_resnet", metavar="NAME")
    parser.add_argument("--kinds", nargs="+", default=["faster_rcnn", "cascade_rcnn"])
    parser.add_argument("--dcn", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--factors", choices=["1", "both"], default="both", help="of the backbone's learning rate")
    parser.add_argument("--seeds", type=int, help="default: as many as there are files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments, extra = parser.parse_known_args(argv)  # what is left goes to train.py
    seeds = arguments.seeds or min(len(arguments.supervised), len(arguments.ssld))
    files = {"supervised": arguments.supervised, "ssld": arguments.ssld, "random": [arguments.random] * seeds}
    dcn = {"no": [False], "yes": [True], "both": [False, True]}[arguments.dcn]
    all_rows = list(rows(arguments.kinds, dcn, [False, True] if arguments.factors == "both" else [False]))
    if not arguments.table_only:
        for seed, row in itertools.product(range(seeds), all_rows):
            line = command(row, seed, arguments.data, files[row.backbone][seed], arguments.output, extra)
            code = subprocess.run(line, stdout=subprocess.DEVNULL).returncode
            if code:
                return code
    print(table(arguments.output, all_rows, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
