"""Gain that a teacher brings to one-stage detectors: the terms of LD one by one, and SAD with a fifth of the labels, over seeds.

    python benchmarks/dense_grid.py DATA --teacher-backbone T.safetensors --backbones B0.safetensors B1.safetensors B2.safetensors --output runs/dense

DATA holds `train.json`, `val.json` and the folders `train/`, `val/`, each with its own images alone: an image in `train/` without annotations is
learnt from. Seed n of a row takes file n of the backbones, and the same steps, augmentation and schedule as every other row, except where the row's
name says otherwise. GFL students and their teacher learn from all annotations; RetinaNet students and their teacher from those of every fifth image,
and the other images are unlabeled. There is one teacher of each kind, of seed 0. Runs that are finished are not run again; a row counts when all its
seeds are. The table goes to standard output.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.detector_grid import spread
from ssld.shared.run_dir import read_result

BATCH = 8
# name of a term -> its weight in the released settings; kd_vlr is off in them, here it has kd's
LD_TERMS = {"ld": 0.25, "ld_vlr": 0.25, "kd": 10.0, "kd_vlr": 10.0, "imitation": 2.0}
DEFAULT_TERMS = ("ld", "ld_vlr", "kd")
LONGER = "labeled fifth, twice the steps"
LABELED = 5  # every fifth image keeps its annotations


def gfl_rows(teacher: Path) -> dict[str, list[str]]:
    """Name of a row -> what it adds to the plain student's line."""
    terms = {"alone": (), **{name: (name,) for name in LD_TERMS}, "ld+ld_vlr": ("ld", "ld_vlr")}
    terms |= {"ld+ld_vlr+kd (the default)": DEFAULT_TERMS}
    lines: dict[str, list[str]] = {}
    for name, on in terms.items():
        weights = [
            [f"--distill.ld.{term}_weight", str(weight if term in on else 0)] for term, weight in LD_TERMS.items()
        ]
        lines[name] = ["--distill.teacher", str(teacher), *itertools.chain(*weights)] if on else []
    return lines


def retinanet_rows(teacher: Path, pseudo: Path, unlabeled: Path) -> dict[str, list[str]]:
    """As `gfl_rows`; half of a batch of twice the size has no annotations but the teacher's boxes."""
    distill = ["--distill.teacher", str(teacher)]
    boxes = ["--unlabeled", str(unlabeled), "--pseudo", str(pseudo)]
    boxes += ["--batch_size", str(2 * BATCH), "--optim.reference_batch", str(2 * BATCH)]
    return {
        "labeled fifth": [],
        LONGER: [],
        "with the teacher (ADL)": distill,
        "with pseudo-labels": boxes,
        "with both (SAD)": [*distill, *boxes],
    }


def schedule(steps: int) -> list[str]:
    """Flags of a run's length: the learning rate falls at 70 and 90 %."""
    return ["--steps", str(steps), "--optim.milestones_steps", f"{steps * 7 // 10},{steps * 9 // 10}"]


def train(kind: str, data: Path, annotations: Path, backbone: Path, output: Path, extra: Sequence[str]) -> list[str]:
    """The line that trains one run."""
    return [
        *(sys.executable, str(ROOT / "stage2_detect" / "train.py")),
        *("--config", str(ROOT / "stage2_detect" / "configs" / f"toy_{kind}.yaml"), "--backbone", str(backbone)),
        *("--data.train_annotations", str(annotations), "--data.train_images", str(data / "train")),
        *("--data.val_annotations", str(data / "val.json"), "--data.val_images", str(data / "val")),
        *("--output", str(output), *extra),
    ]


def images_of(annotations: Path) -> set[str]:
    """Names of the images of a COCO JSON, without folders."""
    return {Path(image["file_name"]).name for image in json.loads(annotations.read_text(encoding="utf-8"))["images"]}


def write_labeled(source: Path, target: Path) -> None:
    """A COCO JSON with every fifth image of another, by file name."""
    content = json.loads(source.read_text(encoding="utf-8"))
    content["images"] = sorted(content["images"], key=lambda image: image["file_name"])[::LABELED]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content), encoding="utf-8")


def table(output: Path, rows: dict[str, Sequence[str]], seeds: int) -> str:
    """Markdown: a line a row with all its seeds; the first row of a kind is what the others of it are compared with."""
    lines = ["| detector | student | AP | AP50 | difference |", f"|{' --- |' * 5}"]
    for kind, names in rows.items():
        first: list[float] = []
        for name in names:
            metrics = _metrics([run_folder(output, kind, name, seed) for seed in range(seeds)])
            if metrics is None:
                continue
            scores = [one["AP"] for one in metrics]
            difference = "-"
            if first:
                inside = min(scores) <= max(first) and min(first) <= max(scores)
                points = 100 * (statistics.mean(scores) - statistics.mean(first))
                difference = f"{points:+.1f}{', inside the spread' if inside else ''}"
            first = first or scores
            cells = [kind, name, spread(scores), spread([one["AP50"] for one in metrics]), difference]
            lines.append(f"| {' | '.join(cells)} |")
        teacher = _metrics([output / f"{kind}-teacher"])
        if teacher:
            lines.append(
                f"| {kind} | the teacher | {100 * teacher[0]['AP']:.1f} | {100 * teacher[0]['AP50']:.1f} | - |"
            )
    return "\n".join(lines)


def run_folder(output: Path, kind: str, name: str, seed: int) -> Path:
    """Where the run of a row and a seed lies."""
    return output / f"{kind}-{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"


def _metrics(runs: Sequence[Path]) -> list[dict[str, float]] | None:
    results = [read_result(run) for run in runs]
    return [result["metrics"] for result in results if result] if all(results) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher-backbone", type=Path, required=True, metavar="FILE")
    parser.add_argument("--backbones", type=Path, nargs="+", required=True, metavar="FILE", help="one a seed")
    parser.add_argument("--kinds", nargs="+", choices=["gfl", "retinanet"], default=["gfl", "retinanet"])
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="of the table, the one to compare with first; all by default"
    )
    parser.add_argument("--steps", type=int, default=300, help="of a student")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--score_threshold", default="0.4", help="of a pseudo-label's score")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments, extra = parser.parse_known_args(argv)  # what is left goes to train.py
    data, output, seeds = arguments.data, arguments.output, len(arguments.backbones)
    files = {kind: output / f"{kind}-teacher" / "detector.safetensors" for kind in arguments.kinds}
    labeled, pseudo = output / "labeled.json", output / "pseudo"
    rows: dict[str, dict[str, list[str]]] = {}
    for kind in arguments.kinds:
        rows[kind] = (
            gfl_rows(files[kind])
            if kind == "gfl"
            else retinanet_rows(files[kind], pseudo / "pseudo_labels.json", data / "train")
        )
        if arguments.rows:
            rows[kind] = {name: rows[kind][name] for name in arguments.rows if name in rows[kind]}
    if unknown := set(arguments.rows or []) - {name for names in rows.values() for name in names}:
        parser.error(f"--rows: {min(unknown)}: no such row")
    if not arguments.table_only:
        strays = images_of(data / "val.json") & {file.name for file in (data / "train").rglob("*")}
        if strays:
            print(f"error: {data / 'train'}: holds evaluation images ({min(strays)}); move them", file=sys.stderr)
            return 2
        write_labeled(data / "train.json", labeled)
        lines = []
        for kind in arguments.kinds:
            annotations = data / "train.json" if kind == "gfl" else labeled
            more = [*schedule(arguments.teacher_steps), *extra]
            lines.append(train(kind, data, annotations, arguments.teacher_backbone, files[kind].parent, more))
            if kind == "retinanet":
                predict = [sys.executable, str(ROOT / "stage2_detect" / "predict.py"), "--model", str(files[kind])]
                predict += ["--images", str(data / "train"), "--exclude", str(labeled), "--pseudo_labels", "true"]
                lines.append([*predict, "--score_threshold", arguments.score_threshold, "--output", str(pseudo)])
        for seed, kind in itertools.product(range(seeds), arguments.kinds):
            annotations = data / "train.json" if kind == "gfl" else labeled
            for name, flags in rows[kind].items():
                length = 2 * arguments.steps if name == LONGER else arguments.steps
                more = ["--seed", str(seed), *schedule(length), *flags, *extra]
                folder = run_folder(output, kind, name, seed)
                lines.append(train(kind, data, annotations, arguments.backbones[seed], folder, more))
        for line in lines:
            code = subprocess.run(line, stdout=subprocess.DEVNULL).returncode
            if code:
                return code
    print(table(output, {kind: list(names) for kind, names in rows.items()}, seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
