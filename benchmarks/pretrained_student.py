"""Why a short stage 1 makes a pretrained student worse for a detector, one cause at a time, and what may prevent it.

    OMP_NUM_THREADS=1 python benchmarks/pretrained_student.py DATA --output runs/harm --rows start init frozen --seeds 0 1

DATA holds `coco-mini/`, `tinyimagenet100/`, `imagenet1k-sample/` and `weights/efficientnet_lite{0,2}.safetensors`. The student is EfficientNet-Lite0
with its ImageNet weights, the teacher EfficientNet-Lite2 with its own. Stage 1 sees photos of coco-mini that show a person or an animal and 800
photos of ImageNet. A row is a backbone: `start`, what a stage 1 left of it (`STUDENTS`), or either with a suffix (`MADE`), as in `init/stats_back`.

Each is looked at without a detector, on whole photos that stage 1 did not see (`look`). With `--seeds` it also makes one Faster R-CNN a seed with the
settings that `ssld init` writes, smaller: 155 steps at 224 px, 128 RoIs per image. The detector finds dogs and cats of Tiny ImageNet pasted on 124
canvases (`mosaics.py`), since so few steps on coco-mini itself end near AP 3. Finished runs are not repeated. The tables go to standard output:
mean AP over the seeds, and the difference to `start` with 95 % intervals over the evaluation images and over the seeds (`paired.py`).
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import paired
from benchmarks.mosaics import read_images, write_split
from ssld.shared.images import decode_image
from ssld.shared.models.backbones import Classifier, create_classifier, save_backbone
from ssld.shared.models.model_file import read_tensors
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import embed
from ssld.shared.run_dir import read_result
from ssld.stage1_ssld import distill
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.evaluation.better_weights import nearest_images, neighbors_in_common
from ssld.stage2_detect import evaluate, train

STUDENT, TEACHER = "efficientnet_lite0", "efficientnet_lite2"
ARCHES = {STUDENT: "tf_efficientnet_lite0", TEACHER: "tf_efficientnet_lite2"}
HELD_OUT = 5  # every fifth photo of ImageNet is held out

# Settings that `ssld init` writes for stage 1 and, smaller, for stage 2.
STAGE1 = """
optim: {name: adamw, lr: 5.0e-4, reference_batch: 256, weight_decay: 0.05, decay_norm_and_bias: false}
channels_last: true
"""
STAGE2 = """
model:
  {kind: faster_rcnn, fpn_channels: 128, freeze_stages: 0, rpn: {anchor_sizes: [16, 32, 64, 128, 256]}, roi: {hidden: 512, samples_per_image: 128}}
batch_size: 4
optim: {name: adamw, lr: 1.0e-3, reference_batch: 8, weight_decay: 0.05, decay_norm_and_bias: false, clip_grad_norm: 10.0}
channels_last: true
"""
# Flags of distill.py.
STUDENTS: dict[str, list[str]] = {
    "init": [],
    "frozen": ["--student.batchnorm", "eval"],
    "lr5e-5": ["--optim.lr", "5e-5"],
    "lr5e-5_frozen": ["--optim.lr", "5e-5", "--student.batchnorm", "eval"],
    "own_size": ["--teacher.size", "260"],
    "wide": ["--data.crop_area", "0.35,1.0"],
    "size224": ["--data.image_size", "224", "--teacher.size", "260"],
    "size224_frozen": ["--data.image_size", "224", "--teacher.size", "260", "--student.batchnorm", "eval"],
    "gentle": [
        *("--optim.lr", "1e-4", "--student.batchnorm", "eval", "--data.crop_area", "0.35,1.0"),
        *("--teacher.size", "260", "--steps", "560"),
    ],
}
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
MADE = ("stats_back", "weights_back", "half", "reestimated")


@dataclass(frozen=True)
class Scale:
    """How large everything is; `--tiny` only shows that it runs."""

    view: int = 160
    steps: int = 140
    batch: int = 16
    look: int = 224
    teacher_look: int = 260
    photos: int | None = None
    canvases: tuple[int, int] = (124, 300)
    detector_steps: int = 155
    side: int = 224
    draws: int = 200


TINY = Scale(
    view=32, steps=2, batch=4, look=32, teacher_look=32, photos=20, canvases=(4, 3), detector_steps=2, side=64, draws=10
)


# ---- data


class Photos:
    """The files: what stage 1 sees, what is looked at, and the canvases of the detector."""

    def __init__(self, data: Path, output: Path, scale: Scale) -> None:
        self.output, self.scale, self.weights = output, scale, data / "weights"
        output.mkdir(parents=True, exist_ok=True)
        paste(data / "tinyimagenet100", output, scale.canvases, scale.side)
        folder = data / "coco-mini"
        own = {
            part: _with_living_things(folder / "annotations" / f"instances_{part}.json") for part in ("train", "val")
        }
        imagenet = sorted((data / "imagenet1k-sample").glob("*/*"))[: scale.photos]  # one of each class, in their order
        shown = [str(Path(*file.parts[-2:])) for number, file in enumerate(imagenet) if number % HELD_OUT]
        self.sources: list[dict[str, Any]] = []
        self.trained: list[Path] = []
        for root, names in ((folder / "images", own["train"][: scale.photos]), (data / "imagenet1k-sample", shown)):
            listing = output / f"{len(self.sources)}.txt"
            listing.write_text("".join(f"{one}\n" for one in names))
            self.sources.append({"path": str(listing), "root": str(root), "labels": "none"})
            self.trained += [root / one for one in names]
        held_out = [folder / "images" / one for one in own["val"][: scale.photos]]
        self.whole = {"imagenet": imagenet[::HELD_OUT], "own": held_out}
        self.labels = torch.arange(0, len(imagenet), HELD_OUT)


def paste(folder: Path, output: Path, canvases: tuple[int, int], side: int) -> None:
    """Canvases with dogs and cats on them, three breeds of each, to train on and to evaluate on."""
    for number, (part, source) in enumerate((("train", "labeled"), ("val", "val"))):
        file = output / f"{part}.json"
        if file.exists():
            continue
        photos = read_images(folder / f"{source}.parquet", 20)
        photos = [(one, int(label > 16), box) for one, label, box in photos if label > 13]
        write_split(photos, ["dog", "cat"], output / part, images=canvases[number], side=side, seed=number)
        content = json.loads(file.read_bytes())
        for row in content["images"]:
            row["file_name"] = f"{part}/{row['file_name']}"
        file.write_text(json.dumps(content))


def _with_living_things(file: Path) -> list[str]:
    """Names of the photos that show a person or an animal."""
    content = json.loads(file.read_bytes())
    living = {row["id"] for row in content["categories"] if row["supercategory"] in ("person", "animal")}
    shown = {row["image_id"] for row in content["annotations"] if row["category_id"] in living}
    return [row["file_name"] for row in content["images"] if row["id"] in shown]


def batches(files: Sequence[Path], size: int, step: int = 25) -> Iterator[Tensor]:
    """Whole photos as evaluation sees them, uint8 [B,3,S,S]."""
    for start in range(0, len(files), step):
        some = files[start : start + step]
        yield torch.stack([val_view(decode_image(file), image_size=size, val_crop=1.0) for file in some])


# ---- backbones


def network(reference: Path) -> Classifier:
    """A classifier in evaluation mode; the two files of weights say no arch."""
    net, _ = create_classifier(parse_reference(str(reference), ARCHES.get(reference.stem)))
    return net.eval().to(memory_format=torch.channels_last)


def command(main: Callable[[Sequence[str]], int], settings: dict[str, Any], output: Path, *flags: str) -> None:
    """Run a command of the project here, unless it is finished."""
    if read_result(output):
        return
    file = output.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings | {"threads": torch.get_num_threads(), "workers": 0, "device": "cpu"}))
    AcceleratorState._reset_state(True)  # it refuses another precision than that of the command before
    if main(["--config", str(file), "--output", str(output), *flags]):
        sys.exit(f"{output}: failed")


def distilled(photos: Photos, row: str) -> Path:
    """The student file of a row of STUDENTS."""
    steps, output = photos.scale.steps, photos.output / "students" / row
    settings: dict[str, Any] = yaml.safe_load(STAGE1)
    settings |= {
        "student": {
            "model": str(photos.weights / f"{STUDENT}.safetensors"),
            "arch": ARCHES[STUDENT],
            "batchnorm": "batch",  # the rows `..frozen` keep the running statistics, which is the default
        },
        "teacher": {
            "model": str(photos.weights / f"{TEACHER}.safetensors"),
            "arch": ARCHES[TEACHER],
            "check_images": 0,
        },
        "data": {"train": photos.sources, "image_size": photos.scale.view},
        "steps": steps,
        "batch_size": photos.scale.batch,
    }
    settings["optim"]["warmup_steps"] = steps // 20
    command(distill.main, settings, output, *STUDENTS[row])
    return output / "student.safetensors"


def made(photos: Photos, row: str) -> Path:
    """The backbone file of any row.

    stats_back: the start's running statistics under the row's weights; weights_back: the other way round; half: the mean of the row and the start
    (WiSE-FT, arXiv 2109.01903); reestimated: the row's weights with the statistics of 500 whole training photos.
    """
    if row in STUDENTS:
        return distilled(photos, row)
    file = photos.output / "made" / f"{row.replace('/', '_')}.safetensors"
    if file.exists():
        return file
    base, _, how = row.partition("/")
    start = read_tensors(photos.weights / f"{STUDENT}.safetensors")
    result = start if base == "start" else read_tensors(distilled(photos, base))
    if how == "stats_back":
        result = {name: start[name] if name.endswith(RUNNING) else tensor for name, tensor in result.items()}
    elif how == "weights_back":
        result = {name: tensor if name.endswith(RUNNING) else start[name] for name, tensor in result.items()}
    elif how == "half":
        result |= {name: (start[name] + one) / 2 for name, one in result.items() if one.is_floating_point()}
    elif how == "reestimated":
        result = reestimated(result, photos.trained, photos.scale.look)
    _, inputs = create_classifier(parse_reference(str(photos.weights / f"{STUDENT}.safetensors"), ARCHES[STUDENT]))
    save_backbone(file, result, arch=ARCHES[STUDENT], inputs=inputs, classes=1000)
    return file


@torch.no_grad()
def reestimated(tensors: dict[str, Tensor], files: Sequence[Path], size: int) -> dict[str, Tensor]:
    """The same weights with the mean statistics of batches of 50 out of 500 training photos."""
    net = create_classifier(parse_reference(f"random:{ARCHES[STUDENT]}"))[0]
    net.net.load_state_dict(tensors)
    net.to(memory_format=torch.channels_last).eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:500]]
    for pixels in batches(chosen, size, 50):
        net(pixels)
    return dict(net.net.state_dict())


# ---- without a detector


@torch.no_grad()
def outputs(net: Classifier, files: Sequence[Path], size: int) -> tuple[Tensor, Tensor]:
    """Logits [N,K] and normalized embeddings [N,D] of whole photos."""
    logits, embeddings = [], []
    for pixels in batches(files, size):
        embedding = embed(net, pixels.contiguous(memory_format=torch.channels_last))
        logits.append(net.net.get_classifier()(embedding))  # type: ignore[operator]
        embeddings.append(F.normalize(embedding, dim=1))
    return torch.cat(logits), torch.cat(embeddings)


@functools.cache
def _teacher_outputs(photos: Photos, place: str) -> tuple[Tensor, Tensor]:
    net = network(photos.weights / f"{TEACHER}.safetensors")
    return outputs(net, photos.whole[place], photos.scale.teacher_look)


def look(photos: Photos, row: str) -> dict[str, float]:
    """Measures of a backbone without a detector.

    top1 on the held-out photos of ImageNet; there and on the evaluation photos of coco-mini (`own`): agreement and KL with the teacher at its own
    size, entropy of both in nats, and the share of the ten nearest photos by the student's embeddings that are also the teacher's ten (`knn`).
    """
    file = photos.output / "looks" / f"{row.replace('/', '_')}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    net, measures = network(made(photos, row)), {}
    for place, files in photos.whole.items():
        teacher_logits, teacher_embeddings = _teacher_outputs(photos, place)
        logits, embeddings = outputs(net, files, photos.scale.look)
        if place == "imagenet":
            measures["top1"] = (logits.argmax(1) == photos.labels).float().mean().item()
        measures[f"{place}_agreement"] = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean().item()
        measures[f"{place}_kl"] = F.kl_div(
            logits.log_softmax(1), teacher_logits.log_softmax(1), log_target=True, reduction="batchmean"
        ).item()
        measures[f"{place}_entropy"] = _entropy(logits)
        measures[f"{place}_teacher_entropy"] = _entropy(teacher_logits)
        measures[f"{place}_knn"] = neighbors_in_common(nearest_images(embeddings), nearest_images(teacher_embeddings))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measures))
    return measures


def _entropy(logits_NK: Tensor) -> float:
    """Mean entropy of the probabilities in nats."""
    log_probs = logits_NK.log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1).mean().item()


# ---- detectors


def scores_folder(photos: Photos, row: str, norms: str, seed: int) -> Path:
    return photos.output / "scores" / f"{row.replace('/', '_')}-{norms}-{seed}"


def detector(photos: Photos, row: str, norms: str, seed: int) -> None:
    """Train and evaluate one detector. norms: `trained`, as `ssld init` writes it, or `frozen`."""
    scored, scale = scores_folder(photos, row, norms, seed), photos.scale
    if read_result(scored):
        return
    steps, side, canvases = scale.detector_steps, scale.side, photos.output
    settings: dict[str, Any] = yaml.safe_load(STAGE2)
    settings |= {
        "backbone": str(made(photos, row)),
        "data": {"train_annotations": str(canvases / "train.json"), "train_images": str(canvases)},
        "steps": steps,
        "seed": seed,
    }
    sides = {"train_short_sides": [side * 6 // 7, side], "short_side": side}
    settings["resize"] = sides | {"train_long_side": 320, "long_side": 320}
    settings["model"]["freeze_norm"] = norms == "frozen"
    settings["optim"]["warmup_steps"] = steps // 10
    settings["optim"]["milestones_steps"] = [round(0.7 * steps), round(0.9 * steps)]
    output = photos.output / "detectors" / scored.name
    command(train.main, settings, output)
    scoring = {"model": str(output / "detector.safetensors"), "annotations": str(canvases / "val.json")}
    command(evaluate.main, scoring | {"images": str(canvases)}, scored)
    for file in [*output.glob("checkpoints/**/*"), output / "detector.safetensors"]:
        if file.is_file():
            file.unlink()


# ---- tables

LOOKS = [
    "top1",
    *(f"{place}_{what}" for place in ("imagenet", "own") for what in ("agreement", "knn", "kl", "entropy")),
]


def looks_table(photos: Photos, rows: Sequence[str]) -> Iterator[str]:
    yield f"| row | {' | '.join(LOOKS)} |"
    yield "| --- |" + " --- |" * len(LOOKS)
    for row in rows:
        if (photos.output / "looks" / f"{row.replace('/', '_')}.json").exists():
            measures = look(photos, row)
            digits = {name: (1, 2) if name.endswith(("kl", "entropy")) else (100, 1) for name in LOOKS}
            cells = [f"{factor * measures[name]:.{places}f}" for name, (factor, places) in digits.items()]
            yield f"| {row} | {' | '.join(cells)} |"


def scores_table(photos: Photos, rows: Sequence[str], norms: str, seeds: Sequence[int]) -> Iterator[str]:
    drawn: dict[str, paired.Drawn] = {}
    for row in rows:
        folders = {seed: scores_folder(photos, row, norms, seed) for seed in seeds}
        drawn[row] = paired.draw(dict.fromkeys(seeds, photos.output / "val.json"), folders, photos.scale.draws)
    yield from paired.columns(f"row, norms {norms}", "start", "seeds compared")
    for cells in paired.rows(drawn, "start"):
        common = sorted(drawn[cells[0]].keys() & drawn.get("start", {}).keys())
        compared = "-" if cells[3] == "-" else ", ".join(map(str, common))
        yield f"| {' | '.join([*cells, compared])} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["start", *STUDENTS], help=f"NAME or NAME/{{{','.join(MADE)}}}")
    parser.add_argument("--norms", default="frozen", choices=["trained", "frozen"], help="BatchNorm of the detector")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="of the detectors; none: no detectors")
    parser.add_argument("--tiny", action="store_true", help="a few photos and steps, only to see that it runs")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    for row in arguments.rows:
        base, _, how = row.partition("/")
        if base not in ("start", *STUDENTS) or how not in ("", *MADE):
            parser.error(f"--rows: {row}: no such row")
    photos = Photos(arguments.data, arguments.output, TINY if arguments.tiny else Scale())
    if not arguments.table_only:
        for row in arguments.rows:
            look(photos, row)
        for seed in arguments.seeds:
            for row in arguments.rows:
                detector(photos, row, arguments.norms, seed)
    print("\n".join(looks_table(photos, arguments.rows)))
    if arguments.seeds:
        print("\n" + "\n".join(scores_table(photos, arguments.rows, arguments.norms, arguments.seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
