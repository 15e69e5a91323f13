"""What augmentation and unlabeled photos bring a detector that has few labeled photos.

    OMP_NUM_THREADS=1 python benchmarks/few_labels.py DATA --output runs/few --labeled 160 --rows supervised light strong cells --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/few_labels.py DATA --output runs/few --labeled 41 --rows supervised moving_teacher --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/few_labels.py DATA --output runs/few --labeled 41 --rows retinanet retinanet_sad --base retinanet

DATA holds `bccd/`, `coco-mini/`, `tinyimagenet100/` and `weights/efficientnet_lite{0,2}.safetensors`. Every row is a detector that starts from
EfficientNet-Lite0, with the settings that `ssld init` writes for the labeled photos on a CPU, but no augmentation beyond flips, at a smaller size
(`--side`), and with the same steps: a Faster R-CNN, or a RetinaNet in the rows `retinanet...`. What a row adds is in `ROWS`. A seed also chooses
which of the training photos are labeled; the others are the unlabeled ones. `--data-set coco-mini` has persons, animals and vehicles as its classes,
`--data-set animals` its animals as one; `--data-set mosaics`: dogs and cats of Tiny ImageNet on canvases of 160 px, 300 to train on and 300 to
evaluate on. `supervised_doubled` has twice the labeled photos per step, which takes about the time of a moving teacher.

`retinanet_sad` has the detector of the row `retinanet` of its seed as its teacher, which also writes the pseudo-labels of the unlabeled photos; run
that row before. `..._ssld` start from a backbone of the same seed: stage 1 under EfficientNet-Lite2, as `ssld init` sets it for a student with
weights, on the training photos without their labels (nine tenths; the others tell whether it improves). `..._ssld_x4`: the same, four times as long.
`..._ssld_batch`: with BatchNorm by batch statistics. `..._ssld_features`: the teacher's pooled features and maps in place of its soft labels.
`..._ssld_tiny1000`: 250 steps of stage 1 on 1,000 images of Tiny ImageNet, whatever their number.

A run is a process of its own with one thread; its time is processor time of training, without imports. Finished runs are not repeated. Printed: mean
AP over the seeds and each seed's, the difference to `--base` with 95 % intervals over the evaluation images and over the seeds (`paired.py`), and the
time relative to that of `--base`.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks import paired
from benchmarks.finetune import DATA, FEW, few_classes, our_settings, write_settings
from benchmarks.pretrained_student import command, paste
from ssld.shared.config.flag_values import flags
from ssld.shared.config.yaml_files import merge
from ssld.stage1_ssld import distill
from ssld.stage2_detect import evaluate, predict, train
from ssld.stage2_detect.config import TrainConfig

MOSAICS = "mosaics"
# As many labeled photos per step as without a teacher, at the same rate: the reference batch is doubled with the batch.
_DOUBLED = {"batch_size": 4, "optim": {"reference_batch": 16}}
_MOVING = _DOUBLED | {"moving_teacher": {"unlabeled": "{folder}/unlabeled.txt"}}
_RETINANET = {"model": {"kind": "retinanet"}}
# Numbers of images of Tiny ImageNet, the first ones, that stage 1 of the rows `strong_ssld_tiny...` sees.
TINY = (1_000, 10_000, 42_500)
BODIES = ("ssld", "ssld_x4", "ssld_batch", "ssld_features", *(f"ssld_tiny{images}" for images in TINY))


def _body(kind: str) -> dict[str, Any]:
    return {"backbone": f"{{{kind}}}/student.safetensors", "arch": None}


_SSLD = _body("ssld")
_SAD = {
    "unlabeled": "{images}",
    "pseudo": "{pseudo}/pseudo_labels.json",
    "distill": {"teacher": "{teacher}", "check_images": 0},
}
ROWS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "supervised_doubled": _DOUBLED,
    "light": {"augment": "light"},
    "strong": {"augment": "strong"},
    "cells": {"augment": "cells"},
    "average": {"ema": {"decay": 0.999}},
    "moving_teacher": _MOVING,
    "moving_teacher_cells": _MOVING | {"augment": "cells"},
    "moving_teacher_strong": _MOVING | {"augment": "strong"},
    "ssld": _SSLD,
    "ssld_batch": _body("ssld_batch"),
    **{f"strong_{kind}": {"augment": "strong"} | _body(kind) for kind in BODIES},
    "moving_teacher_ssld": _MOVING | _SSLD,
    "moving_teacher_strong_ssld": _MOVING | {"augment": "strong"} | _SSLD,
    "retinanet": _RETINANET,
    "retinanet_sad": _RETINANET | _DOUBLED | _SAD,
    "retinanet_moving_teacher": _RETINANET | _MOVING,
}
# What `ssld init` writes for a student that has weights, shorter.
STAGE1 = """
data: {image_size: 128}
steps: 120
batch_size: 32
optim: {name: adamw, lr: 5.0e-5, reference_batch: 256, weight_decay: 0.05, decay_norm_and_bias: false, warmup_steps: 0.05}
"""
# The same on Tiny ImageNet, whose images have 64 px: 16,000 views.
TINY_STAGE1 = """
data: {image_size: 64, crop_area: [0.35, 1.0]}
teacher: {size: 96, check_images: 0}
steps: 250
batch_size: 64
"""


def photos_of(data: Path, output: Path, name: str) -> tuple[Path, dict[str, Path]]:
    """Folder of the images of a data set, and its COCO files by part; canvases are made at the first call."""
    if name == MOSAICS:
        folder = output / MOSAICS
        paste(data / "tinyimagenet100", folder, (300, 300), 160)
        return folder, {part: folder / f"{part}.json" for part in ("train", "val")}
    folder = data / DATA[name]
    return folder / "images", {part: folder / "annotations" / f"instances_{part}.json" for part in ("train", "val")}


def prepare(data: Path, output: Path, name: str, labeled: int, seed: int) -> Path:
    """Write `train.json`, `val.json`, `unlabeled.txt` and the settings of `ssld init`; return their folder."""
    folder = output / f"{name}-{labeled}-{seed}"
    if (folder / "init.yaml").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = photos_of(data, output, name)
    for part in ("train", "val"):
        content = json.loads(annotations[part].read_bytes())
        content = few_classes(content, FEW[name]) if name in FEW else content
        if part == "train":
            ordered = sorted(content["images"], key=lambda image: _draw(seed, image["id"]))
            content["images"], rest = ordered[:labeled], ordered[labeled:]
            kept = {image["id"] for image in content["images"]}
            content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
            lines = [str((images / image["file_name"]).resolve()) for image in rest]
            (folder / "unlabeled.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
    write_settings(folder, images, data / "weights")
    return folder


def _draw(seed: int, image_id: Any) -> bytes:
    return hashlib.sha256(f"{seed} {image_id}".encode()).digest()


def run_one(data: Path, folder: Path, name: str, row: str, options: argparse.Namespace) -> None:
    """Train and evaluate one detector in this process."""
    torch.set_num_threads(1)
    images = photos_of(data, folder.parent, name)[0]
    weights = data / "weights" / "efficientnet_lite0.safetensors"
    settings = our_settings(folder, images, weights, options)
    del settings["train_epochs"]
    settings["data"] = {key: value for key, value in settings["data"].items() if key.startswith("train_")}
    run = folder / "runs" / f"{row}-{options.steps}-{options.side}"
    settings |= {"steps": options.steps, "threads": 1, "device": "cpu", "output": str(run)}
    names = {"folder": folder, "images": images}
    names |= {kind: folder.parent / f"{kind}-{name}-{options.seed}" for kind in BODIES}
    length = f"{options.steps}-{options.side}"
    names["teacher"] = folder / "runs" / f"retinanet-{length}" / "detector.safetensors"
    names["pseudo"] = folder / f"pseudo-{length}"
    for kind in BODIES:
        if ROWS[row].get("backbone") == _body(kind)["backbone"]:
            stage1(data, name, kind, names[kind], options.seed)
    if row == "retinanet_sad":
        wanted = {"model": str(names["teacher"]), "images": str(folder / "unlabeled.txt"), "pseudo_labels": True}
        command(predict.main, wanted, names["pseudo"])
    settings = merge(settings, _filled(ROWS[row], names))
    began = time.process_time()
    if train.main(flags(TrainConfig, settings)):
        raise SystemExit(f"{run}: the training failed")
    seconds = time.process_time() - began
    model = run / "detector.safetensors"
    scoring = {"model": str(model), "annotations": str(folder / "val.json"), "images": str(images)}
    command(evaluate.main, scoring, scored(folder, row, options))
    for file in run.glob("checkpoints/**/*"):
        if file.is_file():
            file.unlink()
    (scored(folder, row, options) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def _filled(value: Any, names: dict[str, Path]) -> Any:
    """Put the files of a seed where a row's settings name them."""
    if isinstance(value, dict):
        return {key: _filled(one, names) for key, one in value.items()}
    return value.format(**names) if isinstance(value, str) else value


def stage1(data: Path, name: str, kind: str, output: Path, seed: int) -> None:
    """Train a backbone of BODIES, unless it is finished: on all training photos, or on Tiny ImageNet; it reads no label."""
    output.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = yaml.safe_load(STAGE1)
    for role, model in (("student", "efficientnet_lite0"), ("teacher", "efficientnet_lite2")):
        settings[role] = {"model": str(data / "weights" / f"{model}.safetensors"), "arch": f"tf_{model}"}
    settings["student"]["batchnorm"], settings["seed"] = "batch" if kind == "ssld_batch" else "eval", seed
    if kind == "ssld_x4":
        settings["steps"] *= 4
    if kind == "ssld_features":
        settings["losses"] = ["pooled", {"name": "spatial", "weight": 0.5}]
    if kind.startswith("ssld_tiny"):
        settings = merge(settings, yaml.safe_load(TINY_STAGE1))
        settings["data"]["train"] = [str(_first(data, output.parent, int(kind.removeprefix("ssld_tiny"))))]
        command(distill.main, settings, output)
        return
    images, annotations = photos_of(data, output.parent, name)
    content = json.loads(annotations["train"].read_bytes())
    files = sorted(str(image["file_name"]) for image in content["images"])
    parts = {"val": files[::10], "train": [file for number, file in enumerate(files) if number % 10]}
    for part, listed in parts.items():
        listing = output.with_name(f"{output.name}_{part}.txt")
        listing.write_text("".join(f"{file}\n" for file in listed), encoding="utf-8")
        source = {"path": str(listing), "root": str(images.resolve())}
        settings["data"][part] = [source] if part == "train" else source
    command(distill.main, settings, output)


def _first(data: Path, output: Path, images: int) -> Path:
    """A Parquet file of the first images of Tiny ImageNet, those of its unlabeled part before the labeled ones."""
    file = output / f"tiny{images}.parquet"
    if not file.exists():
        parts = [pq.read_table(data / "tinyimagenet100" / f"{part}.parquet") for part in ("unlabeled", "labeled")]
        pq.write_table(pa.concat_tables([part.select(["image"]) for part in parts]).slice(0, images), file)
    return file


def scored(folder: Path, row: str, options: argparse.Namespace) -> Path:
    """Folder of a detector's detections."""
    return folder / "scores" / f"{row}-{options.steps}-{options.side}"


def table(folders: dict[int, Path], options: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown: a row for each that has a finished run."""
    drawn: dict[str, paired.Drawn] = {}
    seconds: dict[str, dict[int, float]] = {}
    annotations = {seed: folder / "val.json" for seed, folder in folders.items()}
    for row in options.rows:
        places = {seed: scored(folder, row, options) for seed, folder in folders.items()}
        drawn[row] = paired.draw(annotations, places, options.draws)
        seconds[row] = {seed: json.loads((places[seed] / "seconds.json").read_text()) for seed in drawn[row]}
    yield from paired.columns(f"{options.data_set}, {options.labeled} labeled photos", options.base, "processor time")
    for cells in paired.rows(drawn, options.base):
        row, time_ratio = cells[0], "-"
        if common := sorted(drawn[row].keys() & drawn.get(options.base, {}).keys()):
            ratio = statistics.mean(seconds[row][seed] / seconds[options.base][seed] for seed in common)
            time_ratio = f"x {ratio:.2f}"
        yield f"| {' | '.join([*cells, time_ratio])} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-set", choices=[*DATA, MOSAICS], default="bccd")
    parser.add_argument("--labeled", type=int, default=160, help="number of labeled photos")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--base", default="supervised", help="row that the others are compared with")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of two labeled photos")
    parser.add_argument("--side", type=int, default=160, help="short side of the images in pixels")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    options.epochs = None  # the length is in steps
    if options.one:
        options.seed = int(options.one[1])
        folder = prepare(options.data, options.output, options.data_set, options.labeled, options.seed)
        run_one(options.data, folder, options.data_set, options.one[0], options)
        return 0
    folders = {
        seed: prepare(options.data, options.output, options.data_set, options.labeled, seed) for seed in options.seeds
    }
    line = [sys.executable, __file__, str(options.data), "--output", str(options.output)]
    for key in ("data_set", "labeled", "steps", "side"):
        line += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    for seed, folder in folders.items():
        for row in options.rows:
            if not options.table_only and not (scored(folder, row, options) / "seconds.json").exists():
                subprocess.run([*line, "--one", row, str(seed)], check=True, stdout=subprocess.DEVNULL)
    print("\n".join(table(folders, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
