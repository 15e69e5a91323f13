"""What stage 1 gives a student without pretrained weights, compared with training on labels and with random weights.

    OMP_NUM_THREADS=1 python benchmarks/new_student.py DATA --output runs/new --rows random supervised ssld ssld_x4 --seeds 0 1 2

DATA holds `tinyimagenet100/`, `bccd/` and `weights/efficientnet_lite{0,2}.safetensors`. The student is a ResNet10-T of half its width, for which
there are no weights. A row is a backbone (`ROWS`): `random`, its initial weights; `supervised`, trained on the 10,000 labels; the others see all
42,500 images and never a label. All have the same steps, views, optimizer and schedule; `..._x4` has four times the steps, `..._lr0.001` another
learning rate; `own_...` sees the photos of blood cells. The teacher of `ssld` (symmetric KL) and `kl` (KL alone) is EfficientNet-Lite2 through a
store (`--views` of each image, the 10 most likely of 1,000 classes); `live` has it without a store, `lite2_...` its features; `lite0_...` have
EfficientNet-Lite0: its 1,000 classes, prototypes made of its embeddings, or its features.

Each backbone is measured on the 5,000 validation images of Tiny ImageNet: by the vote of the 20 nearest neighbors and by a linear probe, both from
the 10,000 labeled images. With `--seeds` it also makes one Faster R-CNN per seed and set: `bccd`, blood cells, and `mosaics`, dogs and cats of Tiny
ImageNet pasted on canvases; `--frozen` trains all but the backbone. Finished runs are not repeated. Tables go to standard output: mean AP over the
seeds, and the difference to `--base` with 95 % intervals over the evaluation images and over the seeds of the detector (`paired.py`), which both
leave out what another seed of stage 1 would change.
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from benchmarks import paired
from benchmarks.pretrained_student import command, paste
from ssld.shared.models.backbones import InputSettings, create_classifier, save_backbone
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import embed
from ssld.shared.run_dir import read_result
from ssld.stage1_ssld import distill, prototypes, write_soft_labels
from ssld.stage1_ssld.evaluation.knn import vote
from ssld.stage2_detect import evaluate, train

# Half as wide as timm's network, so its weights do not fit.
STUDENT, NARROW = "resnet10t", {"channels": [32, 64, 128, 256], "stem_width": 16}
STAGE1 = """
batch_size: 128
optim: {name: adamw, reference_batch: 128, weight_decay: 0.05, decay_norm_and_bias: false, warmup_steps: 0.1}
channels_last: true
"""
STAGE2 = """
model:
  {kind: faster_rcnn, fpn_channels: 64, rpn: {anchor_sizes: [8, 16, 32, 64, 128]}, roi: {hidden: 256, samples_per_image: 64}}
batch_size: 4
optim: {name: adamw, lr: 1.0e-3, reference_batch: 4, weight_decay: 0.05, decay_norm_and_bias: false, clip_grad_norm: 10.0}
channels_last: true
"""
TIMES = (2, 4, 8, 16)
SPATIAL = {"name": "spatial", "weight": 0.5}


@dataclass(frozen=True)
class Row:
    """How a student is trained.

    Attributes:
        teacher: Lite0 or Lite2, live; `store`: Lite2 through the store; `prototypes`: a file made of Lite0.
        losses: names or mappings, as in `losses`; None: the labels.
        times: length of the run in units of `--steps`.
        prototypes: K.
        lr: learning rate for batches of 128.
        own: on the detector's 205 training photos in place of Tiny ImageNet, in as many steps of 32 views of 128 px.
    """

    teacher: str = "store"
    losses: tuple[Any, ...] | None = ("symmetric_kl",)
    times: int = 1
    prototypes: int = 0
    lr: float = 3e-3
    own: bool = False


ROWS: dict[str, Row] = {
    "supervised": Row(losses=None),
    **{f"supervised_x{times}": Row(losses=None, times=times) for times in TIMES},
    "ssld": Row(),
    **{f"ssld_x{times}": Row(times=times) for times in TIMES},
    "kl": Row(losses=("kl",)),
    **{f"ssld_lr{rate:g}": Row(lr=rate) for rate in (3.5e-4, 1e-3)},
    "live": Row("lite2"),
    "lite0_classes": Row("lite0"),
    **{f"lite0_prototypes{k}": Row("prototypes", prototypes=k) for k in (64, 256, 1024)},
    "lite0_classes_spatial": Row("lite0", ("symmetric_kl", SPATIAL)),
    "lite0_pooled": Row("lite0", ("pooled",)),
    "lite0_pooled_spatial": Row("lite0", ("pooled", SPATIAL)),
    "lite0_pooled_spatial_x4": Row("lite0", ("pooled", SPATIAL), times=4),
    "lite0_spatial": Row("lite0", (SPATIAL,)),
    "lite0_classes_pooled_spatial": Row("lite0", ({"name": "symmetric_kl", "weight": 0.1}, "pooled", SPATIAL)),
    "own_pooled_spatial": Row("lite0", ("pooled", SPATIAL), own=True),
    "lite2_pooled_spatial": Row("lite2", ("pooled", SPATIAL)),
    "lite0_prototypes256_spatial": Row("prototypes", ("symmetric_kl", SPATIAL), prototypes=256),
}


@dataclass(frozen=True)
class Scale:
    """Sizes; the defaults are a CPU's."""

    steps: int = 330
    views: int = 1
    teacher_size: int = 96
    teacher_precision: str = "bf16"
    images: int | None = None
    canvases: tuple[int, int] = (300, 300)
    detector_steps: int = 120
    labeled: int | None = None
    side: int = 160
    draws: int = 200
    norms: str = "trained"
    stage1_seed: int = 0
    student: str = STUDENT


class Bench:
    """Files of one run of the script."""

    def __init__(self, data: Path, output: Path, scale: Scale) -> None:
        self.data, self.output, self.scale = data, output, scale
        self.labeled, self.unlabeled, self.val = (self._table(name) for name in ("labeled", "unlabeled", "val"))
        paste(data / "tinyimagenet100", output / "mosaics", scale.canvases, scale.side)
        cells = data / "bccd"
        self.sets = {
            "bccd": [(cells / "annotations" / f"instances_{part}.json", cells / "images") for part in ("train", "val")],
            "mosaics": [(output / "mosaics" / f"{part}.json", output / "mosaics") for part in ("train", "val")],
        }

    def _table(self, name: str) -> Path:
        """A Parquet file of Tiny ImageNet, or its first images."""
        source = self.data / "tinyimagenet100" / f"{name}.parquet"
        if self.scale.images is None:
            return source
        target = self.output / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            pq.write_table(pq.read_table(source).slice(0, self.scale.images), target)
        return target

    # ---- backbones

    def start(self) -> Path:
        """The file of the student's initial weights, written at the first call."""
        file = self.output / "start.safetensors"
        if not file.exists():
            torch.manual_seed(0)
            name, mean = self.scale.student, (0.5, 0.5, 0.5)
            narrow = NARROW if name == STUDENT else {}
            net = timm.create_model(name, **narrow)
            inputs = InputSettings(mean, mean, (64, 64), "bilinear", False)
            save_backbone(file, net, arch=name, inputs=inputs, classes=1000, model_args=narrow)
        return file

    def lite(self, number: str) -> dict[str, Any]:
        file = self.data / "weights" / f"efficientnet_{number}.safetensors"
        return {"model": str(file), "arch": f"tf_efficientnet_{number}"} | self.as_teacher()

    def as_teacher(self) -> dict[str, Any]:
        return {"size": self.scale.teacher_size, "precision": self.scale.teacher_precision, "check_images": 0}

    def views(self, *tables: Path) -> dict[str, Any]:
        return {"train": [str(one) for one in tables], "image_size": 64, "crop_area": [0.35, 1.0], "val_crop": 1.0}

    def own_photos(self) -> dict[str, Any]:
        """The photos that detectors of blood cells are trained on, without their boxes."""
        annotations, images = self.sets["bccd"][0]
        names = sorted(image["file_name"] for image in json.loads(annotations.read_bytes())["images"])
        listing = self.output / "own.txt"
        listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        return self.views() | {"train": [{"path": str(listing), "root": str(images.resolve())}], "image_size": 128}

    def soft_labels(self) -> tuple[dict[str, Any], Path]:
        """Settings of the store, and where it is written."""
        settings = {"data": self.views(self.labeled, self.unlabeled), "teacher": self.lite("lite2")}
        return settings | {"views": self.scale.views, "channels_last": True}, self.output / "soft_labels"

    def prototypes(self, number: int) -> tuple[dict[str, Any], Path]:
        """Settings of the teacher made of Lite0, and where it is written."""
        encoder = {key: self.lite("lite0")[key] for key in ("model", "arch")}
        settings = {"pool": [str(self.labeled), str(self.unlabeled)], "encoder": encoder, "prototypes": number}
        settings |= {"image_size": self.scale.teacher_size, "val_crop": 1.0, "channels_last": True}
        return settings | {"precision": self.scale.teacher_precision}, self.output / f"prototypes{number}"

    def named(self, name: str) -> str:
        """Name of a row's files; those of the first seed of stage 1 have the row's own."""
        seed = self.scale.stage1_seed
        return f"{name}-stage1_{seed}" if seed and name != "random" else name

    def student(self, row: Row) -> dict[str, Any]:
        """Settings of a row's stage 1."""
        steps = row.times * self.scale.steps
        settings: dict[str, Any] = yaml.safe_load(STAGE1) | {"steps": steps, "seed": self.scale.stage1_seed}
        settings["optim"]["lr"] = row.lr
        settings["student"] = {"model": str(self.start()), "batchnorm": "batch"}  # the file holds random weights
        if row.losses is None:
            return settings | {"objective": "labels", "data": self.views(self.labeled)}
        settings |= {"losses": list(row.losses), "data": self.views(self.labeled, self.unlabeled)}
        if row.own:
            return settings | {
                "batch_size": 32,
                "data": self.own_photos(),
                "teacher": self.lite(row.teacher) | {"size": None},
            }
        if row.teacher == "store":
            return settings | {"store": str(self.soft_labels()[1] / "store")}
        if row.teacher == "prototypes":
            file = self.prototypes(row.prototypes)[1] / "teacher.safetensors"
            return settings | {"teacher": {"model": str(file)} | self.as_teacher()}
        return settings | {"teacher": self.lite(row.teacher)}

    def backbone(self, name: str) -> str:
        """Return the reference of a row's backbone; trains it first if its file is missing."""
        if name == "random":
            return str(self.start())
        row, output = ROWS[name], self.output / "students" / self.named(name)
        if row.losses is not None and row.teacher == "store":
            command(write_soft_labels.main, *self.soft_labels())
        if row.teacher == "prototypes":
            command(prototypes.main, *self.prototypes(row.prototypes))
        command(distill.main, self.student(row), output)
        return str(output / "student.safetensors")

    # ---- without a detector

    def look(self, name: str) -> dict[str, float]:
        """Shares of the validation images whose class is found, in percent: `knn` and `probe`."""
        file = self.output / "looks" / f"{self.named(name)}.json"
        if not file.exists():
            (bank, labels), (queries, truth) = (
                embeddings(self.backbone(name), one) for one in (self.labeled, self.val)
            )
            found = {"knn": nearest(bank, labels, queries), "probe": probe(bank, labels, queries)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({key: 100 * (one == truth).float().mean().item() for key, one in found.items()}))
        return dict(json.loads(file.read_text()))

    # ---- detectors

    def scores(self, name: str, place: str, frozen: bool, seed: int) -> Path:
        """Folder of a detector's detections."""
        photos = f"-{self.scale.labeled}photos" if self.scale.labeled else ""
        kind = f"{'-frozen' if frozen else ''}-{self.scale.norms}{photos}-{self.scale.detector_steps}"
        return self.output / "scores" / place / f"{self.named(name)}{kind}-{seed}"

    def annotations(self, place: str, seed: int) -> Path:
        """The annotations that a detector learns from: of all images, or of as many as `--labeled`, chosen by the seed."""
        file: Path = self.sets[place][0][0]
        if self.scale.labeled is None:
            return file
        content = json.loads(file.read_bytes())
        if self.scale.labeled > len(content["images"]):
            raise SystemExit(f"--labeled {self.scale.labeled}: {file} has {len(content['images'])} images")
        content["images"] = random.Random(seed).sample(content["images"], self.scale.labeled)
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
        chosen = self.output / f"{place}-{self.scale.labeled}photos-{seed}.json"
        chosen.write_text(json.dumps(content), encoding="utf-8")
        return chosen

    def detector(self, name: str, place: str, frozen: bool, seed: int) -> None:
        """Train and evaluate one detector."""
        scored, steps, side = self.scores(name, place, frozen, seed), self.scale.detector_steps, self.scale.side
        if read_result(scored):
            return
        (_, images), (val_annotations, val_images) = self.sets[place]
        settings: dict[str, Any] = yaml.safe_load(STAGE2)
        settings |= {"backbone": self.backbone(name), "steps": steps, "seed": seed}
        settings["data"] = {"train_annotations": str(self.annotations(place, seed)), "train_images": str(images)}
        sides = {"train_short_sides": [side * 5 // 6, side], "short_side": side}
        settings["resize"] = sides | {"train_long_side": 2 * side, "long_side": 2 * side}
        settings["model"] |= {
            "freeze_stages": 5 if frozen else 0,
            "freeze_norm": frozen or self.scale.norms == "frozen",
        }
        settings["optim"]["warmup_steps"] = steps // 10
        settings["optim"]["milestones_steps"] = [round(0.7 * steps), round(0.9 * steps)]
        output = self.output / "detectors" / place / scored.name
        command(train.main, settings, output)
        scoring = {"model": str(output / "detector.safetensors"), "annotations": str(val_annotations)}
        command(evaluate.main, scoring | {"images": str(val_images)}, scored)
        for file in [*output.glob("checkpoints/**/*"), output / "detector.safetensors"]:
            if file.is_file():
                file.unlink()

    # ---- tables

    def looks_table(self, rows: Sequence[str]) -> Iterator[str]:
        yield "| backbone | nearest neighbors | linear probe |"
        yield "| --- | --- | --- |"
        for name in rows:
            if (self.output / "looks" / f"{self.named(name)}.json").exists():
                found = self.look(name)
                yield f"| {name} | {found['knn']:.1f} | {found['probe']:.1f} |"

    def scores_table(
        self, rows: Sequence[str], place: str, frozen: bool, seeds: Sequence[int], base: str
    ) -> Iterator[str]:
        """Lines of the table; nothing if no row has a detector."""
        drawn: dict[str, paired.Drawn] = {}
        for name in rows:
            folders = {seed: self.scores(name, place, frozen, seed) for seed in seeds}
            drawn[name] = paired.draw(dict.fromkeys(seeds, self.sets[place][1][0]), folders, self.scale.draws)
        lines = [f"| {' | '.join(cells)} |" for cells in paired.rows(drawn, base)]
        if lines:
            yield from paired.columns(f"{place}, {'frozen' if frozen else 'full'}", base)
            yield from lines


# ---- measures of embeddings; N images of the bank, Q queries, D features


@torch.no_grad()
def embeddings(reference: str, table: Path) -> tuple[Tensor, Tensor]:
    """Embeddings [N,D] of the images of a Parquet file as they are, and labels [N]."""
    net = create_classifier(parse_reference(reference))[0].eval().to(memory_format=torch.channels_last)
    content, parts = pq.read_table(table, columns=["image", "label"]).to_pylist(), []
    for start in range(0, len(content), 250):
        encoded = [one["image"]["bytes"] for one in content[start : start + 250]]
        photos = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded]
        pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
        parts.append(embed(net, pixels.contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(parts), torch.tensor([one["label"] for one in content])


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, neighbors: int = 20) -> Tensor:
    """Class [Q] by the vote of the nearest images of the bank, as in `evaluate.py --bank`."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    found = cosines.topk(min(neighbors, len(bank)), dim=1)
    return vote(found.values, labels[found.indices], int(labels.max()) + 1)


def probe(bank: Tensor, labels: Tensor, queries: Tensor, decay: float = 1e-3) -> Tensor:
    """Class [Q] by logistic regression on standardized features: cross-entropy + decay / 2 * |weights|^2, minimized by L-BFGS."""
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(labels.max()) + 1
    weights, bias = (
        bank.new_zeros(bank.shape[1], classes, requires_grad=True),
        bank.new_zeros(classes, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(bank @ weights + bias, labels) + decay / 2 * weights.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return (queries @ weights.detach() + bias.detach()).argmax(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--rows", nargs="+", choices=["random", *ROWS], default=["random", "supervised", "ssld", "ssld_x4"]
    )
    parser.add_argument("--base", default="supervised", help="row that the others are compared with")
    parser.add_argument("--steps", type=int, default=Scale.steps, help="of 128 images, in stage 1")
    parser.add_argument("--views", type=int, default=Scale.views, help="of each image in the store")
    parser.add_argument(
        "--teacher-size", type=int, default=Scale.teacher_size, help="pixels per side of the teacher's views"
    )
    parser.add_argument("--teacher-precision", default=Scale.teacher_precision, choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--student", default=Scale.student, help="timm network; each needs an --output of its own")
    parser.add_argument("--stage1-seed", type=int, default=Scale.stage1_seed, help="of the rows' stage 1")
    parser.add_argument("--images", type=int, help="of each part of Tiny ImageNet; all by default")
    parser.add_argument("--canvases", type=int, nargs=2, default=Scale.canvases, help="to train on, to evaluate on")
    parser.add_argument("--detector-steps", type=int, default=Scale.detector_steps, help="of 4 images")
    parser.add_argument("--labeled", type=int, help="of the detector's images, chosen by its seed; all by default")
    parser.add_argument("--side", type=int, default=Scale.side, help="short side of the detector's images")
    parser.add_argument("--draws", type=int, default=Scale.draws, help="of the bootstrap")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="of the detectors; none: no detectors")
    parser.add_argument("--sets", nargs="+", choices=["bccd", "mosaics"], default=["bccd", "mosaics"])
    parser.add_argument("--frozen", action="store_true", help="freeze the detectors' backbones")
    parser.add_argument(
        "--norms", default=Scale.norms, choices=["trained", "frozen"], help="the backbone's BatchNorm in detectors"
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    scale = Scale(**{name: getattr(arguments, name) for name in Scale.__dataclass_fields__})
    bench = Bench(arguments.data, arguments.output, scale)
    if not arguments.table_only:
        for name in arguments.rows:
            bench.look(name)
        for seed in arguments.seeds:
            for place in arguments.sets:
                for name in arguments.rows:
                    bench.detector(name, place, arguments.frozen, seed)
    print("\n".join(bench.looks_table(arguments.rows)))
    for place in arguments.sets if arguments.seeds else []:
        lines = bench.scores_table(arguments.rows, place, arguments.frozen, arguments.seeds, arguments.base)
        print("", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
