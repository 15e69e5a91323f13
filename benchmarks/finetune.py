"""A detector for few own photos, two ways: torchvision's Faster R-CNN as its tutorial trains it, and ours as `ssld init` sets it.

    OMP_NUM_THREADS=1 python benchmarks/finetune.py DATA --output runs/finetune --rows bccd animals --seeds 0 1 2

DATA holds `bccd/`, `coco-mini/` and `weights/efficientnet_lite0.safetensors`. Both sides have the same backbone and weights, training and evaluation
images, sizes of the images, passes over the training images, and evaluation (COCO AP). All else is each side's own:

torchvision   its TorchVision Object Detection Finetuning Tutorial and the training loop that it uses: SGD, learning rate 0.005, momentum 0.9, weight
              decay 0.0005, two images per batch, a warm-up over the first pass, a tenth of the rate every three passes, flips; a pyramid of 256
              channels, 1024 hidden features, 512 RoIs per image, the stem and the first stage frozen, BatchNorm frozen
ours          the settings of the stage `detector` that `ssld init` writes for these photos on a CPU, with its anchors scaled to the size here

Row `coco-mini`: the objects of coco-mini as person, animal and vehicle, and the images that have one; row `animals`: its animals as one class. A run
is a process of its own with one thread; its time is processor time, user and system together, of training and the evaluation at its end, without
imports. Finished runs are not repeated. Printed: mean and range over the seeds, what ours is to torchvision's, and runs without a finite loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from ssld.pipelines import init
from ssld.shared.config.flag_values import flags
from ssld.shared.models.backbones import create_body, input_settings
from ssld.shared.models.references import parse_reference
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import train
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.coco import CocoImage, read_coco
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.models import freezing
from ssld.stage2_detect.models.batch import Detections

SIDES = ("torchvision", "ours")
ARCH = "tf_efficientnet_lite0"
DATA = {"bccd": "bccd", "coco-mini": "coco-mini", "animals": "coco-mini"}  # row: its folder
FEW = {"coco-mini": ("person", "animal", "vehicle"), "animals": ("animal",)}
"""row: supercategories of COCO, its classes"""
NUMBERS = {"AP": 100.0, "AP50": 100.0, "seconds": 1.0, "peak_mb": 1.0}  # in a result, and their factor in the table


# ---- data


def prepare(data: Path, output: Path, row: str, most: dict[str, int]) -> None:
    """Write `train.json` and `val.json` of a row, with at most `most` images each, and `init.yaml`, the settings of `ssld init`."""
    folder = output / row
    if (folder / "init.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        content = json.loads((data / DATA[row] / "annotations" / f"instances_{part}.json").read_bytes())
        content = few_classes(content, FEW[row]) if row in FEW else content
        kept = sorted(content["images"], key=lambda image: str(image["id"]))[: most[part]]
        ids = {image["id"] for image in kept}
        annotations = [one for one in content["annotations"] if one["image_id"] in ids]
        written = content | {"images": kept, "annotations": annotations}
        (folder / f"{part}.json").write_text(json.dumps(written), encoding="utf-8")
    write_settings(folder, data / DATA[row] / "images", data / "weights")


def write_settings(folder: Path, images: Path, weights: Path) -> None:
    """Write `init.yaml`, the settings of `ssld init` for `train.json` and `val.json` of a folder."""
    words = ["--images", str(images), "--annotations", str(folder / "train.json")]
    words += ["--val_images", str(images), "--val_annotations", str(folder / "val.json")]
    words += ["--backbone", str(weights / "efficientnet_lite0.safetensors"), "--arch", ARCH, "--starts", "imagenet"]
    if init.main([*words, "--output", str(folder / "init.yaml")]):
        raise SystemExit(f"{folder}: ssld init failed")


def few_classes(content: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """COCO content with these supercategories as its classes, and the images that have one of their objects."""
    number = {kind: label for label, kind in enumerate(kinds, 1)}
    of_category = {one["id"]: number.get(one["supercategory"]) for one in content["categories"]}
    annotations = [one | {"category_id": of_category[one["category_id"]]} for one in content["annotations"]]
    annotations = [one for one in annotations if one["category_id"]]
    shown = {one["image_id"] for one in annotations}
    categories = [{"id": label, "name": name} for name, label in number.items()]
    images = [image for image in content["images"] if image["id"] in shown]
    return content | {"images": images, "annotations": annotations, "categories": categories}


# ---- torchvision's side


class Body(nn.Module):
    """torchvision's `BackboneWithFPN` for a timm body: frozen BatchNorm, and the stem and the first stage without gradients."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.out_channels = 256
        info = freezing.feature_info(body)
        self.indices = [i for i in freezing.level_indices(info.reduction()) if i is not None]
        self.fpn = FeaturePyramidNetwork([info.channels()[i] for i in self.indices], 256, LastLevelMaxPool())
        freezing.freeze(body, stages=2, norm=False)
        for name, norm in [
            (name, module) for name, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)
        ]:
            frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            frozen.load_state_dict({key: value for key, value in norm.state_dict().items() if "num_" not in key})
            rest = nn.Sequential(
                OrderedDict((key, child) for key, child in norm.named_children())
            )  # timm's norms hold the activation
            body.set_submodule(name, nn.Sequential(frozen, rest))

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.body(pixels_BCHW)
        return dict(self.fpn(OrderedDict((str(level), maps[i]) for level, i in enumerate(self.indices))))


def train_torchvision(folder: Path, images: Path, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train as the tutorial does and evaluate; returns AP and AP50, or why it `failed`."""
    train_data = read_coco(folder / "train.json", images, training=True)
    val_data = read_coco(folder / "val.json", images, training=False, class_names=train_data.class_names)
    torch.manual_seed(options.seed)
    reference = parse_reference(str(weights), ARCH)
    body, _ = create_body(reference)
    inputs = input_settings(body, reference.metadata)
    model = FasterRCNN(
        Body(body),
        num_classes=len(train_data.class_names) + 1,
        min_size=options.side,
        max_size=longest(options.side),
        image_mean=list(inputs.mean),
        image_std=list(inputs.std),
    )
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.005, momentum=0.9, weight_decay=0.0005
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    for epoch in range(options.epochs):
        model.train()
        batches = list(shuffled(train_data.images, 2))
        warmup = min(1000, len(batches) - 1) if epoch == 0 and len(batches) > 1 else 0
        rises = (
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=warmup) if warmup else None
        )
        for batch in batches:
            pixels, targets = zip(*map(flipped_at_random, batch), strict=True)
            losses = model(list(pixels), list(targets))
            optimizer.zero_grad()
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
            if rises:
                rises.step()
            if not torch.isfinite(total):
                return {"failed": f"the loss is {total.item()} in pass {epoch + 1}"}
        scheduler.step()
    model.eval()
    found = {}
    with torch.no_grad():
        for record in val_data.images:
            (one,) = model([load_record(record) / 255])
            found[record.image_id] = Detections(one["boxes"], one["scores"], one["labels"] - 1)
    metrics = coco_ap(val_data, found)
    return {"AP": metrics["AP"], "AP50": metrics["AP50"]}


def shuffled(records: Sequence[CocoImage], batch: int) -> Iterator[list[CocoImage]]:
    """The batches of one pass, in random order; the last may be smaller."""
    order = torch.randperm(len(records)).tolist()
    for start in range(0, len(order), batch):
        yield [records[index] for index in order[start : start + batch]]


def flipped_at_random(record: CocoImage) -> tuple[Tensor, dict[str, Tensor]]:
    """An image in 0..1 and its objects, with a probability of a half flipped."""
    pixels_CHW, boxes_N4 = load_record(record) / 255, torch.from_numpy(record.boxes_N4).float()
    if torch.rand(()) < 0.5:
        pixels_CHW = pixels_CHW.flip(-1)
        boxes_N4 = torch.stack(
            (record.width - boxes_N4[:, 2], boxes_N4[:, 1], record.width - boxes_N4[:, 0], boxes_N4[:, 3]), 1
        )
    return pixels_CHW, {"boxes": boxes_N4, "labels": torch.from_numpy(record.labels_N).long() + 1}


# ---- our side


def train_ours(folder: Path, images: Path, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train as `ssld init` says, which evaluates at the end; returns AP and AP50."""
    run = folder / f"ours-{options.seed}"
    settings = our_settings(folder, images, weights, options) | {"output": str(run)}
    if train.main(flags(TrainConfig, settings)):
        raise SystemExit("ours: the training failed")
    metrics = (read_result(run) or {})["metrics"]
    return {"AP": metrics["AP"], "AP50": metrics["AP50"]}


def our_settings(folder: Path, images: Path, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of `train.py`: those that `ssld init` wrote, with this benchmark's backbone, size and length."""
    pipeline = yaml.safe_load((folder / "init.yaml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = _filled(pipeline["stages"]["detector"]["set"], pipeline["variables"])
    settings.pop("trackers", None)
    settings.pop("augment", None)  # suits the length that `ssld init` chose, not this one
    scale = options.side / settings["resize"]["short_side"]
    model = settings["model"]
    model["rpn.anchor_sizes"] = [max(4, round(size * scale)) for size in model["rpn.anchor_sizes"]]
    for length in ("steps", "train_epochs", "train_images"):
        settings.pop(length, None)
    data = {f"{part}_annotations": str(folder / f"{part}.json") for part in ("train", "val")}
    data |= {"train_images": str(images), "val_images": str(images)}
    long = longest(options.side)
    sizes = {
        "train_short_sides": [options.side],
        "train_long_side": long,
        "short_side": options.side,
        "long_side": long,
    }
    return settings | {
        "backbone": str(weights),
        "arch": ARCH,
        "data": data,
        "resize": settings["resize"] | sizes,
        "train_epochs": options.epochs,
        "evaluate_every": None,
        "workers": 0,
        "seed": options.seed,
    }


def _filled(value: Any, variables: dict[str, Any]) -> Any:
    """Put the variables of a pipeline where its settings name them."""
    if isinstance(value, dict):
        return {key: _filled(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, variables) for one in value]
    return variables[value[2:-1]] if isinstance(value, str) and value.startswith("${") else value


def longest(side: int) -> int:
    """Largest long side for a short side."""
    return round(side * 5 / 3)


# ---- runs and table


def run_one(side: str, data: Path, output: Path, row: str, options: argparse.Namespace) -> None:
    """One run in this process; writes its numbers."""
    folder, images, weights = (
        output / row,
        data / DATA[row] / "images",
        data / "weights" / "efficientnet_lite0.safetensors",
    )
    torch.set_num_threads(1)
    began = time.process_time()
    run = train_ours if side == "ours" else train_torchvision
    result: dict[str, Any] = run(folder, images, weights, options)
    result["seconds"] = time.process_time() - began
    # Not getrusage: its greatest is never less than what the process that started this one had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    result["peak_mb"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
    result_file(output, row, side, options.seed).write_text(json.dumps(result), encoding="utf-8")


def result_file(output: Path, row: str, side: str, seed: int) -> Path:
    """File with the numbers of a run."""
    return output / row / f"{side}-{seed}.json"


def table(output: Path, rows: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Lines of Markdown: a row for each side with the seeds that both sides have finished, and their ratio."""
    yield "| data | side | seeds | AP | AP50 | processor time, s | greatest memory, MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        found = {side: {seed: read(output, row, side, seed) for seed in seeds} for side in SIDES}
        for side, results in found.items():
            for seed, result in results.items():
                if "failed" in result:
                    yield f"| {row} | {side} | seed {seed} | {result['failed']} | - | - | - |"
        done = [seed for seed in seeds if all("AP" in found[side][seed] for side in SIDES)]
        if not done:
            continue
        means: dict[str, list[float]] = {}
        for side in SIDES:
            values = {name: [factor * found[side][seed][name] for seed in done] for name, factor in NUMBERS.items()}
            means[side] = [statistics.mean(column) for column in values.values()]
            cells = [spread(column, 1 if name.startswith("AP") else 0) for name, column in values.items()]
            yield f"| {row} | {side} | {len(done)} | {' | '.join(cells)} |"
        theirs, ours = means["torchvision"], means["ours"]
        gains = [f"{mine - other:+.1f}" for mine, other in zip(ours[:2], theirs[:2], strict=True)]
        ratios = [f"x {mine / other:.2f}" for mine, other in zip(ours[2:], theirs[2:], strict=True)]
        yield f"| {row} | ours to torchvision | {len(done)} | {' | '.join(gains + ratios)} |"


def read(output: Path, row: str, side: str, seed: int) -> dict[str, Any]:
    """The numbers of a run; empty if it is not finished."""
    file = result_file(output, row, side, seed)
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and range."""
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), statistics.mean(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=list(DATA), default=["bccd", "animals"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--side", type=int, default=192, help="short side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--images", type=int, default=1000, help="largest number of training images")
    parser.add_argument("--val-images", type=int, default=1000, help="largest number of evaluation images")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        options.seed = int(options.one[1])
        run_one(options.one[0], options.data, options.output, options.rows[0], options)
        return 0
    for row in options.rows:
        prepare(options.data, options.output, row, {"train": options.images, "val": options.val_images})
    sizes = ["--side", str(options.side), "--epochs", str(options.epochs)]
    for row in options.rows:
        for seed in options.seeds:
            for side in SIDES:
                if not result_file(options.output, row, side, seed).exists():
                    line = [sys.executable, __file__, str(options.data), "--output", str(options.output), "--rows", row]
                    subprocess.run([*line, "--one", side, str(seed), *sizes], check=True, stdout=subprocess.DEVNULL)
    print("\n".join(table(options.output, options.rows, options.seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
