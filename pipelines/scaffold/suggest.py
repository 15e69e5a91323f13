"""Suggestions of `ssld init` for a data set and a machine: the evaluation split, the settings, and the commented pipeline.

The settings are starting points, not optima: the optimizer is the one measured in docs/benchmarks on 205 photos of blood cells; sizes, anchors and
length are scaled to the data by the rules in the comments. Does not import torch.
"""

import hashlib
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from ssld.pipelines.folder import folder_of, written_in
from ssld.pipelines.scaffold.starts import Init, Start, arch_of, main_row, plain_start, rows_of
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import kind_of
from ssld.shared.wording import duration, printable

Trained = Literal["detector", "coco", "ssld"]
"""trainings that differ in cost: a detector from a backbone, one from a detector trained on COCO, stage 1"""


@dataclass(frozen=True)
class Facts:
    """Facts about the data and the machine from which a pipeline is written."""

    annotations: Path | None
    """training annotations; None: a backbone alone"""
    images_folder: Path | None
    val_annotations: Path | None
    val_images: Path | None
    split: bool
    """whether the evaluation part was split from the annotations"""
    images: int
    """number of training images"""
    val_count: int
    """number of evaluation images"""
    statistics: dict[str, Any]
    """statistics of the annotations from the data check; empty without annotations"""
    unlabeled: Path | None
    """folder of photos for stage 1; None: no stage 1"""
    unlabeled_images: int
    pool: Path | None
    """list file of the unlabeled photos for stage 1"""
    held_out: Path | None
    """list file of the held-out unlabeled photos; None if there are too few"""
    shown: Path | None
    """list file of unlabeled photos whose predictions the report shows"""
    listing: Path | None
    """list file of the training photos, for distillation"""
    gpu: tuple[Any, ...] | None
    """(name, free bytes, total bytes, major, minor) of the first GPU"""
    gpus: int
    cores: int
    seed: int
    pretrained: bool = True
    """whether all detectors start from weights"""
    starts: tuple[Start, ...] = ("imagenet",)
    """starts of the detectors, in the order of their stages"""
    init: Init | None = None
    """detector of the start `coco`"""
    augment: str = "none"
    """named set of augmentations"""
    augment_reason: str = ""
    trackers: tuple[str, ...] = ()
    """trackers that are installed"""
    moving: Path | None = None
    """list file of the unlabeled photos of a detector under a moving teacher; None: no such detector"""
    moving_images: int = 0

    @property
    def detectors(self) -> int:
        """Number of detectors that the pipeline trains: one per start, and one under a moving teacher."""
        return 0 if self.annotations is None else len(self.starts) + (self.moving is not None)

    @property
    def detector_kinds(self) -> tuple[Trained, ...]:
        """Kind of training of the detector of each start."""
        starts = self.starts if self.annotations is not None else ()
        return tuple(_kind(start) for start in starts)

    @property
    def moving_kind(self) -> Trained | None:
        """Kind of training that the detector under a moving teacher is like; None if there is none."""
        return None if self.moving is None else _kind(plain_start(self.starts))

    @property
    def trainings(self) -> tuple[Trained, ...]:
        """Trainings that differ in cost, in the order of their trials: those that may be left out come last."""
        order: tuple[Trained, ...] = ("ssld", "detector", "coco")
        return tuple(kind for kind in order if kind in self.detector_kinds or (kind == "ssld" and self.unlabeled))


def _kind(start: Start) -> Trained:
    return "coco" if start in ("coco", "coco_ssld") else "detector"


@dataclass(frozen=True)
class Networks:
    """Networks of a pipeline, from strong to small, and the width of the detector's heads."""

    backbone: str
    """student and backbone: a file, `timm:NAME` or `random:NAME`"""
    arch: str | None
    """timm name of the backbone, for a file that does not name it"""
    teacher: str
    teacher_arch: str | None
    channels: int
    hidden: int
    weight: float
    """seconds of a training step relative to other networks on the same machine, roughly"""


@dataclass(frozen=True)
class Shape:
    """What a training step costs: the networks and the size of the images."""

    networks: Networks
    short_side: int


@dataclass(frozen=True)
class Settings:
    """Suggested settings of a pipeline."""

    networks: Networks
    batch: int
    freeze_norm: bool
    processes: int
    """one per GPU"""
    steps: int
    warmup: float
    """fraction of the run"""
    evaluate_every: float | None
    """fraction of the run; None: at the end only"""
    short_sides: tuple[int, ...]
    short_side: int
    long_side: int
    anchors: tuple[int, ...]
    precision: str
    workers: int
    distill_batch: int
    distill_processes: int
    distill_steps: int
    distill_size: int


_LARGE = Networks("timm:resnet50d.ra2_in1k", None, "timm:hgnetv2_b6.ssld_stage2_ft_in1k", None, 256, 1024, 3.0)
_SMALL = Networks("timm:resnet18d.ra2_in1k", None, "timm:resnet50d.ra2_in1k", None, 128, 512, 1.0)
_NARROW = Networks("timm:resnet18d.ra2_in1k", None, "timm:resnet50d.ra2_in1k", None, 64, 256, 0.8)
FEW = 2
"""images per process up to which BatchNorm is frozen"""
LEAST_PIXELS, LEAST_SIDE = 12, 160


def networks_of(
    *, gpu: bool, backbone: str | None, arch: str | None, teacher: str | None, teacher_arch: str | None
) -> list[Networks]:
    """Return the networks to choose from on a machine with or without GPU, with those that the user names in all of them."""
    choices = [_LARGE, _SMALL] if gpu else [_SMALL, _NARROW]
    if backbone:
        choices = [replace(one, backbone=backbone, arch=arch) for one in choices]
    if teacher:
        choices = [replace(one, teacher=teacher, teacher_arch=teacher_arch) for one in choices]
    return choices


def untrained(networks: Sequence[Networks]) -> list[Networks]:
    """Return the networks with random weights; those whose backbone is a file without a known architecture stay as they are."""
    names = [arch_of(one.backbone, one.arch) for one in networks]
    pairs = zip(networks, names, strict=True)
    return [replace(one, backbone=f"random:{name}", arch=None) if name else one for one, name in pairs]


def shapes(facts: Facts, networks: Sequence[Networks]) -> list[Shape]:
    """Return the networks at each image size that suits the photos; the largest size is the one that the photos deserve if time does not matter.

    Objects at the lower quartile should be 24 pixels long, so that half of that exceeds a cell of the finest level; 12 are the least. No size is
    above 1.25 times that of the photos.
    """
    if facts.annotations is None:
        pairs = {(one.backbone, one.teacher): one for one in reversed(networks)}
        return [Shape(one, 0) for one in networks if one in pairs.values()]
    measured = facts.statistics
    small = max(measured["object_sizes"][1], 1e-3)
    most = 800 if facts.gpu else 640
    largest = _multiple(min(max(24 / small, 320), 1.25 * measured["short_side"], most))
    least = min(largest, _multiple(max(LEAST_SIDE, LEAST_PIXELS / small)))
    sides = {largest, least} | {_multiple(largest * factor) for factor in (0.8, 0.65, 0.5, 0.4)}
    return [Shape(one, side) for one in networks for side in sorted(sides, reverse=True) if least <= side <= largest]


def wanted_steps(facts: Facts) -> int:
    """Return the steps of a detector if time does not matter: 60 passes over 200 photos, 27 over 1,000, 12 over 5,000 and more."""
    passes = min(100, max(12, 60 * math.sqrt(200 / max(facts.images, 1))))
    return max(50, round(passes * facts.images / detector_batch(facts)[0]))


def wanted_distill_steps(facts: Facts) -> int:
    """Return the steps of stage 1 if time does not matter: 100 passes over 20,000 photos and fewer, 10 over 200,000 and more."""
    photos = facts.unlabeled_images + facts.images
    return max(20, round(min(100, max(10, 2e6 / max(photos, 1))) * photos / distill_batch(facts)[0]))


def detector_batch(facts: Facts) -> tuple[int, int]:
    """Return (images per step, processes) of a detector; a batch larger than the data set is an error.

    On a CPU, steps of two images: twice the steps in the same time, which is measured in docs/benchmarks/finetune_cpu_2026-11-30.md. BatchNorm of
    two images is frozen then, which random weights do not allow; they get four.
    """
    return _shared(min(8 if facts.gpu else 2 if facts.pretrained else 4, facts.images), facts.gpus)


def distill_batch(facts: Facts) -> tuple[int, int]:
    """Return (images per step, processes) of stage 1."""
    return _shared(min(256 if facts.gpu else 32, facts.unlabeled_images + facts.images), facts.gpus)


def settings_of(
    facts: Facts, shape: Shape, *, steps: int, distill_steps: int, evaluate_every: float | None
) -> Settings:
    """Return all settings of a pipeline whose networks, sizes and lengths are decided."""
    short, long, first = shape.short_side, 0, 8
    if facts.annotations is not None:
        measured = facts.statistics
        smallest, _, _, _, largest = measured["object_sizes"]
        aspect = measured["long_side"] / measured["short_side"]
        long = 32 * math.ceil(min(short * aspect * 1.05, 1.7 * short) / 32)
        # Anchors of five levels, a factor of two apart: from three quarters of the smallest objects to half of the largest.
        base = max(_power(0.75 * smallest * short), _power(largest * short / 32, up=True))
        first = int(min(64, max(8, base)))
    batch, processes = detector_batch(facts)
    frozen = facts.pretrained and batch // processes <= FEW
    student_batch, distill_processes = distill_batch(facts)
    return Settings(
        networks=shape.networks,
        batch=batch,
        freeze_norm=frozen,
        processes=processes,
        steps=steps,
        warmup=min(0.1, round(1000 / steps, 4)),
        evaluate_every=evaluate_every,
        short_sides=tuple(sorted({_multiple(factor * short) for factor in (0.8, 0.9, 1.0)})),
        short_side=short,
        long_side=long,
        anchors=tuple(first * 2**level for level in range(5)),
        precision="bf16" if facts.gpu is not None and facts.gpu[3] >= 8 else "fp32",
        workers=max(1, min(8, facts.cores)),
        distill_batch=student_batch,
        distill_processes=distill_processes,
        distill_steps=distill_steps,
        distill_size=224 if facts.gpu else 128,
    )


def split_content(
    content: dict[str, Any], *, share: float, seed: int, together: list[list[Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a valid COCO file into (training part, evaluation part).

    Classes are assigned one after the other, the rarest first, since an image of a rare class usually shows common ones too (the idea of iterative
    stratification, Sechidis et al. 2011, in its simplest form). Images are ordered by a hash of the seed and their id, so that the split does not
    depend on the order of the file.

    Args:
        share: fraction of the images for evaluation.
        seed: seed of the split.
        together: groups of ids of near-duplicate images, which stay on one side; groups that share an image are merged.

    Raises:
        UserError: fewer than two images with boxes.
    """
    rows = {row["id"]: row for row in content["images"]}
    leader = _leaders(together or [])
    groups: dict[Any, list[Any]] = defaultdict(list)
    for image_id in rows:
        groups[leader.get(image_id, image_id)].append(image_id)
    order = sorted(groups, key=lambda image_id: hashlib.sha256(f"{seed} {image_id!r}".encode()).digest())
    containing: dict[Any, set[Any]] = defaultdict(set)
    for row in content["annotations"]:
        containing[row["category_id"]].add(leader.get(row["image_id"], row["image_id"]))
    side: dict[Any, bool] = {}  # True: evaluation
    for category in sorted(containing, key=lambda category: (len(containing[category]), repr(category))):
        members = [image_id for image_id in order if image_id in containing[category]]
        target = max(1, round(share * len(members))) if len(members) > 1 else 0
        missing = target - sum(side.get(image_id, False) for image_id in members)
        for image_id in members:
            if image_id not in side:
                side[image_id] = missing > 0
                missing -= side[image_id]
    rest = [image_id for image_id in order if image_id not in side]
    side |= {image_id: place < round(share * len(rest)) for place, image_id in enumerate(rest)}
    chosen = {member for image_id in groups for member in groups[image_id] if side[image_id]}
    if not chosen or len(chosen) == len(rows):
        raise UserError(f"{len(rows)} images are too few to split; give --val_annotations")
    return tuple(  # type: ignore[return-value]
        {
            **content,
            "images": [row for row in content["images"] if (row["id"] in chosen) == val],
            "annotations": [row for row in content["annotations"] if (row["image_id"] in chosen) == val],
        }
        for val in (False, True)
    )


class _Comment(str):
    """Text of a comment, written without YAML quoting."""


def _leaders(together: list[list[Any]]) -> dict[Any, Any]:
    """Map each image of a group to one representative image."""
    leader: dict[Any, Any] = {}
    for group in together:
        overlapping = {leader[image_id] for image_id in group if image_id in leader}
        if overlapping:
            leader |= {image_id: group[0] for image_id, first in leader.items() if first in overlapping}
        leader |= dict.fromkeys(group, group[0])
    return leader


def pipeline_text(
    output: Path, facts: Facts, chosen: Settings, minutes: float = 60, seconds: float | None = None
) -> str:
    """Render the YAML file, with paths relative to its folder, and commands in its first lines for the current one. Every value that the template
    does not mark as a comment is written by a YAML dumper.

    Args:
        output: the YAML file.
        minutes: time that the settings fit.
        seconds: expected time of the pipeline; None before it is known.
    """
    folder = folder_of(output)
    facts, chosen = _as_seen_from(folder, facts, chosen)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Comment) else _dumped(value),
    )
    environment.filters["comment"] = lambda value: _Comment(printable(str(value)))
    template = environment.from_string(Path(__file__).with_name("init.yaml.jinja").read_text(encoding="utf-8"))
    networks = chosen.networks
    moving = facts.moving is not None
    rows = rows_of(facts.starts, facts.init, networks.backbone, networks.arch, moving=moving) if facts.detectors else []
    smaller = sorted((side for side in chosen.short_sides if side < chosen.short_side), reverse=True)
    sides = dict(zip(("medium_size", "small_size"), smaller, strict=False))
    return template.render(
        rows=rows,
        main=main_row(rows) if rows else None,
        base=next((row for row in rows if row.baseline is None), None),
        evaluated=sorted(rows, key=lambda row: row.baseline is not None),
        titles={row.evaluation: row.title for row in rows},
        sides=sides,
        train_sides=[f"${{{name}}}" for name in (*reversed(sides), "size")],
        uses_backbone=bool(facts.unlabeled) or any(row.backbone == "${backbone}" for row in rows),
        output=output,
        command=shlex.quote(str(output)),
        elsewhere=folder != Path.cwd(),
        runs=shlex.quote(str((output.parent if folder != Path.cwd() else Path()) / "runs" / output.stem)),
        facts=facts,
        chosen=chosen,
        measured=facts.statistics,
        classes=list(facts.statistics.get("classes", [])),
        sizes=[round(100 * value) for value in facts.statistics.get("object_sizes", [])],
        minutes=minutes,
        expected="" if seconds is None else f"about {duration(seconds)}",
        machine=f"{facts.gpu[0]}, {facts.gpu[2] / 2**30:.0f} GB" if facts.gpu else f"no GPU, {facts.cores} CPU cores",
    )


def _as_seen_from(folder: Path, facts: Facts, chosen: Settings) -> tuple[Facts, Settings]:
    """Return facts and settings with relative paths as they are written in a file in `folder`."""
    paths: dict[str, Any] = {
        key: written_in(path, folder) for key, path in vars(facts).items() if isinstance(path, Path)
    }
    networks: dict[str, Any] = {
        role: str(written_in(Path(text), folder))
        for role in ("backbone", "teacher")
        if kind_of(text := getattr(chosen.networks, role)) in ("file", "folder", "path")
    }
    return replace(facts, **paths), replace(chosen, networks=replace(chosen.networks, **networks))


def _dumped(value: Any) -> str:
    """Format a value as one line of YAML that is also valid between brackets."""
    value = str(value) if isinstance(value, Path) else value
    for style in (None, '"'):  # the dumper splits long or unusual text into several lines unless it is double-quoted
        text = yaml.safe_dump([value], default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf)
        if text.count("\n") == 1:
            break
    return text.strip()[1:-1]


def _shared(batch: int, gpus: int) -> tuple[int, int]:
    """Return (batch, processes) such that every GPU gets the same number of images, at least one."""
    processes = max(1, min(gpus, batch))
    return max(1, batch // processes * processes), processes


def _multiple(side: float) -> int:
    return max(64, 32 * round(side / 32))


def _power(value: float, *, up: bool = False) -> int:
    """Return the next power of two at or below a value, or at or above it with `up`."""
    exponent = math.log2(max(value, 1))
    return int(2 ** (math.ceil(exponent) if up else math.floor(exponent)))
