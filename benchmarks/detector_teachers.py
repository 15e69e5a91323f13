"""What a teacher detector brings to a student detector that is much weaker, term by term: LD for GFL, ADL and SAD for RetinaNet, PKD and RoI soft
labels for Faster R-CNN.

    OMP_NUM_THREADS=1 python benchmarks/detector_teachers.py DATA --output runs/teachers --backbone STUDENT.safetensors --kinds gfl --seeds 0 1 2

DATA holds `bccd/`, `coco-mini/`, `tinyimagenet100/` and `weights/efficientnet_lite0.safetensors`. Students are the project's smallest settings
(`toy_....yaml`) on the given backbone file. There is one teacher of each kind: the same detector on EfficientNet-Lite0 with its ImageNet weights,
trained for longer. All rows of a kind have the same images, steps, augmentation and schedule, except where the row's name says otherwise. `--every
5` keeps the annotations of every fifth image, for teacher and students; the other images are unlabeled. `pseudo` and `sad` learn from the teacher's
boxes on them too, `pkd+roi, unlabeled images too` from its features and class probabilities there, with as many labeled images per step as the
other rows, so that its steps have twice the images; those of `..., twice the batch` have as many, all labeled. `--set coco-mini` has persons,
animals and vehicles as its classes; `--set mosaics`: dogs and cats of Tiny ImageNet pasted on canvases.

Finished runs are not repeated. Printed: mean AP over the seeds and each seed's, and the difference to `alone` with 95 % intervals over the evaluation
images and over the seeds (`paired.py`).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import yaml

from benchmarks import paired
from benchmarks.finetune import FEW, few_classes
from benchmarks.pretrained_student import command, paste
from ssld.shared.config.yaml_files import merge
from ssld.stage2_detect import evaluate, predict, train

# Weights of LD's terms in the released settings; kd_vlr is off in them and has kd's here.
LD_TERMS = {"ld": 0.25, "ld_vlr": 0.25, "kd": 10.0, "kd_vlr": 10.0, "imitation": 2.0}
ALONE, LONGER, TEACHER = "alone", "alone, twice the steps", "the teacher"
PSEUDO = ("pseudo", "sad")
MORE_IMAGES = "pkd+roi, unlabeled images too"
TWICE_THE_BATCH = ("alone, twice the batch", "pkd+roi, twice the batch")


def _ld(*terms: str, temperature: float = 10.0) -> dict[str, Any]:
    weights = {f"{term}_weight": weight if term in terms else 0.0 for term, weight in LD_TERMS.items()}
    return {"ld": weights | {"ld_temperature": temperature}}


# Kind -> row -> settings of `distill`; None: no teacher.
ROWS: dict[str, dict[str, dict[str, Any] | None]] = {
    "gfl": {
        ALONE: None,
        LONGER: None,
        **{term: _ld(term) for term in LD_TERMS},
        "ld+ld_vlr": _ld("ld", "ld_vlr"),
        "ld+ld_vlr+kd (the default)": _ld("ld", "ld_vlr", "kd"),
        "ld at temperature 1": _ld("ld", temperature=1.0),
        "ld+ld_vlr+kd at temperature 1": _ld("ld", "ld_vlr", "kd", temperature=1.0),
        "pkd": _ld() | {"pkd_weight": 6.0},
    },
    "retinanet": {
        ALONE: None,
        LONGER: None,
        "adl": {},
        "pseudo": None,
        "sad": {},
    },
    "faster_rcnn": {
        ALONE: None,
        LONGER: None,
        "pkd": {"roi_weight": 0.0},
        "roi": {"pkd_weight": 0.0},
        "pkd+roi (the default)": {},
        MORE_IMAGES: {},
        TWICE_THE_BATCH[0]: None,
        TWICE_THE_BATCH[1]: {},
    },
}


@dataclass(frozen=True)
class Scale:
    """Sizes; the defaults are a CPU's."""

    steps: int = 200
    teacher_steps: int = 600
    side: int = 160
    every: int = 1
    canvases: tuple[int, int] = (300, 300)
    threshold: float = 0.4
    draws: int = 1000


class Bench:
    """Files and runs of one set of images."""

    def __init__(self, data: Path, output: Path, place: str, backbone: str, scale: Scale) -> None:
        self.scale, self.backbone = scale, backbone
        self.output = output / (place if scale.every == 1 else f"{place}-every{scale.every}")
        self.weights = data / "weights" / "efficientnet_lite0.safetensors"
        if place == "mosaics":
            paste(data / "tinyimagenet100", output / "canvases", scale.canvases, scale.side)
            self.images = output / "canvases"
            files = {part: self.images / f"{part}.json" for part in ("train", "val")}
        else:
            self.images = data / place / "images"
            files = {part: data / place / "annotations" / f"instances_{part}.json" for part in ("train", "val")}
        content, evaluated = (json.loads(files[part].read_text(encoding="utf-8")) for part in ("train", "val"))
        if place in FEW:
            content, evaluated = few_classes(content, FEW[place]), few_classes(evaluated, FEW[place])
        self.train, self.val, self.unlabeled = (
            self.output / name for name in ("train.json", "val.json", "unlabeled.txt")
        )
        ordered = sorted(content["images"], key=lambda image: image["file_name"])
        content["images"] = ordered[:: scale.every]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
        rest = [image["file_name"] for image in ordered if image["id"] not in kept]
        self.output.mkdir(parents=True, exist_ok=True)
        self.train.write_text(json.dumps(content), encoding="utf-8")
        self.val.write_text(json.dumps(evaluated), encoding="utf-8")
        self.unlabeled.write_text("".join(f"{(self.images / name).resolve()}\n" for name in rest), encoding="utf-8")

    def settings(self, kind: str, steps: int) -> dict[str, Any]:
        """Settings that students and teacher of a kind share."""
        file, side = ROOT / "stage2_detect" / "configs" / f"toy_{kind}.yaml", self.scale.side
        sizes = {"train_short_sides": [side], "train_long_side": side * 2, "short_side": side, "long_side": side * 2}
        data = {"train_annotations": str(self.train), "train_images": str(self.images)}
        milestones = {"milestones_steps": [round(0.7 * steps), round(0.9 * steps)], "warmup_steps": steps // 10}
        mine = {"data": data, "resize": sizes, "steps": steps, "optim": milestones}
        return merge(yaml.safe_load(file.read_text(encoding="utf-8")), mine)

    def teacher(self, kind: str) -> Path:
        """The detector file of the teacher; trained and evaluated at the first call."""
        settings = self.settings(kind, self.scale.teacher_steps)
        settings |= {"backbone": str(self.weights), "arch": "tf_efficientnet_lite0", "seed": 0}
        return self.evaluated(settings, run_name(kind, "teacher", self.scale.teacher_steps, 0))

    def pseudo(self, kind: str) -> Path:
        """The teacher's boxes on the unlabeled images, as COCO JSON."""
        settings = {"model": str(self.teacher(kind)), "images": str(self.unlabeled), "pseudo_labels": True}
        output = self.output / run_name(kind, "pseudo", self.scale.teacher_steps, 0)
        command(predict.main, settings | {"score_threshold": self.scale.threshold}, output)
        return output / "pseudo_labels.json"

    def student(self, kind: str, row: str, seed: int) -> Path:
        """The detector file of a row and seed."""
        settings = self.settings(kind, self.scale.steps * (2 if row == LONGER else 1))
        settings |= {"backbone": self.backbone, "seed": seed}
        distill = ROWS[kind][row]
        if distill is not None:
            settings["distill"] = {"teacher": str(self.teacher(kind)), "check_images": 0} | distill
        if row in PSEUDO:
            settings |= {"unlabeled": str(self.images), "pseudo": str(self.pseudo(kind))}
        if row == MORE_IMAGES:
            settings["unlabeled"] = str(self.unlabeled)
        if "unlabeled" in settings or row in TWICE_THE_BATCH:
            batch = 2 * settings["batch_size"]
            settings = merge(settings, {"batch_size": batch, "optim": {"reference_batch": batch}})
        return self.evaluated(settings, run_name(kind, row, self.scale.steps, seed))

    def evaluated(self, settings: dict[str, Any], name: str) -> Path:
        """Train a detector and write its detections of the evaluation images; return its file."""
        model = self.output / name / "detector.safetensors"
        command(train.main, settings, model.parent)
        scoring = {"model": str(model), "annotations": str(self.val), "images": str(self.images)}
        command(evaluate.main, scoring, self.output / "scores" / name)
        for file in model.parent.glob("checkpoints/**/*"):
            if file.is_file():
                file.unlink()
        return model

    def table(self, kind: str, rows: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
        """Lines of Markdown: a row for each that has a finished run."""
        drawn: dict[str, paired.Drawn] = {}
        names = {row: {seed: run_name(kind, row, self.scale.steps, seed) for seed in seeds} for row in rows}
        for row, named in (names | {TEACHER: {0: run_name(kind, "teacher", self.scale.teacher_steps, 0)}}).items():
            folders = {seed: self.output / "scores" / name for seed, name in named.items()}
            drawn[row] = paired.draw(dict.fromkeys(folders, self.val), folders, self.scale.draws)
        yield from paired.columns(f"{self.output.name}, {kind}", ALONE)
        for cells in paired.rows(drawn, ALONE):
            yield f"| {' | '.join(cells)} |"


def run_name(kind: str, row: str, steps: int, seed: int) -> str:
    """Name of a run's folder."""
    return f"{kind}-{''.join(c if c.isalnum() else '_' for c in row)}-{steps}-{seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", required=True, help="file of the students' backbone, or random:NAME")
    parser.add_argument("--kinds", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="of the table; all by default")
    parser.add_argument("--set", choices=["bccd", "coco-mini", "mosaics"], default="bccd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Scale.steps, help="of 8 images, of a student")
    parser.add_argument("--teacher-steps", type=int, default=Scale.teacher_steps)
    parser.add_argument("--side", type=int, default=Scale.side, help="short side of the images in pixels")
    parser.add_argument("--every", type=int, default=Scale.every, help="keep the annotations of every such image")
    parser.add_argument("--canvases", type=int, nargs=2, default=Scale.canvases, help="to train on, to evaluate on")
    parser.add_argument("--threshold", type=float, default=Scale.threshold, help="of a pseudo-label's score")
    parser.add_argument("--draws", type=int, default=Scale.draws, help="of the bootstrap")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    known = {row for kind in options.kinds for row in ROWS[kind]}
    if unknown := sorted(set(options.rows or []) - known):
        parser.error(f"--rows: {unknown[0]}: no such row of {', '.join(options.kinds)}")
    scale = Scale(**{name: getattr(options, name) for name in Scale.__dataclass_fields__})
    bench = Bench(options.data, options.output, options.set, options.backbone, scale)
    chosen: dict[str, list[str]] = {}
    for kind in options.kinds:
        fits = [row for row in ROWS[kind] if scale.every > 1 or row not in (*PSEUDO, MORE_IMAGES)]
        chosen[kind] = [row for row in fits if row in (options.rows or fits)]
    if not options.table_only:
        for kind, rows in chosen.items():
            bench.teacher(kind)
            for seed in options.seeds:
                for row in rows:
                    bench.student(kind, row, seed)
    for kind, rows in chosen.items():
        print(*bench.table(kind, rows, options.seeds), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
