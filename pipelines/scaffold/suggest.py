"""Suggestions of `ssld init` for a data set and a machine: networks, image sizes, batches and lengths.

The settings are starting points, not optima: the optimizer is the one measured in docs/benchmarks on 205 photos of blood cells; sizes, anchors and
length are scaled to the data by the rules in the comments. Does not import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssld.pipelines.scaffold.starts import Init, Start, arch_of, start_of_moving

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
        return None if self.moving is None else _kind(start_of_moving(self.starts))

    @property
    def trainings(self) -> tuple[Trained, ...]:
        """Trainings that differ in cost, in the order of their trials: those that may be left out come last."""
        order: tuple[Trained, ...] = ("ssld", "detector", "coco")
        return tuple(kind for kind in order if kind in self.detector_kinds or (kind == "ssld" and self.unlabeled))


def _kind(start: Start) -> Trained:
    return "coco" if start in ("coco", "coco_ssld") else "detector"


@dataclass(frozen=True)
class Networks:
    """Networks of a pipeline, and the width of the detector's pyramid and heads."""

    backbone: str
    """student and backbone: a file, `timm:NAME` or `random:NAME`"""
    arch: str | None
    """timm name of the backbone, for a file that does not name it"""
    teacher: str
    teacher_arch: str | None
    channels: int
    """channels of the pyramid"""
    hidden: int
    """width of the layers in the box head"""
    weight: float
    """seconds of a training step relative to other networks on the same machine, roughly"""

    @property
    def random(self) -> bool:
        """Whether the backbone starts without weights."""
        return self.backbone.startswith("random:")


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


RESNET50 = 3.0
"""seconds of a training step of a detector on ResNet50, relative to those of `_SMALL`, roughly"""
_LARGE = Networks("timm:resnet50d.ra2_in1k", None, "timm:hgnetv2_b6.ssld_stage2_ft_in1k", None, 256, 1024, RESNET50)
_SMALL = Networks("timm:resnet18d.ra2_in1k", None, "timm:resnet50d.ra2_in1k", None, 128, 512, 1.0)
_NARROW = Networks("timm:resnet18d.ra2_in1k", None, "timm:resnet50d.ra2_in1k", None, 64, 256, 0.8)
USUAL_TEACHERS = frozenset(one.teacher for one in (_LARGE, _SMALL, _NARROW))
"""teachers that are proposed where the user names none"""
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
