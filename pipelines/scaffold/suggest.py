"""Suggestions of `ssld init` for a data set and a machine: the evaluation split, the settings, and the commented pipeline.

The settings are starting points, not optima: the optimizer is the one measured in docs/benchmarks on 205 photos of blood cells; sizes, anchors and
length are scaled to the data by the rules in the comments. Does not import torch.
"""

import hashlib
import math
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ssld.shared.errors import UserError
from ssld.shared.wording import printable


@dataclass(frozen=True)
class Facts:
    """Facts about the data and the machine from which a pipeline is written."""

    annotations: Path
    images_folder: Path
    val_annotations: Path
    val_images: Path
    split: bool
    """whether the evaluation part was split from the annotations"""
    images: int
    """number of training images"""
    statistics: dict[str, Any]
    """statistics of the annotations from the data check"""
    unlabeled: Path | None
    unlabeled_images: int
    pool: Path | None
    """list file of the unlabeled photos for stage 1"""
    held_out: Path | None
    """list file of the held-out unlabeled photos; None if there are too few"""
    listing: Path | None
    """list file of the training photos, for distillation"""
    gpu: tuple[Any, ...] | None
    """(name, free bytes, total bytes, major, minor) of the first GPU"""
    gpus: int
    cores: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """Suggested settings of a pipeline."""

    backbone: str
    teacher: str
    batch: int
    processes: int
    """one per GPU"""
    steps: int
    warmup: float
    """fraction of the run"""
    short_sides: tuple[int, ...]
    short_side: int
    long_side: int
    anchors: tuple[int, ...]
    channels: int
    hidden: int
    precision: str
    workers: int
    distill_batch: int
    distill_processes: int
    distill_steps: int
    distill_size: int


def suggest(facts: Facts) -> Settings:
    """Choose settings for a data set and a machine."""
    gpu, measured = facts.gpu is not None, facts.statistics
    smallest, small, _, _, largest = measured["object_sizes"]
    # Objects at the lower quartile should be 24 pixels long, so that half of that exceeds a cell of the finest level. At most 1.25 times the size of
    # the photos, and at most what the machine can train in reasonable time.
    required = 24 / max(small, 1e-3)
    short = _multiple(min(max(required, 320), 1.25 * measured["short_side"], 800 if gpu else 384))
    aspect = measured["long_side"] / measured["short_side"]
    long = 32 * math.ceil(min(short * aspect * 1.05, 1.7 * short) / 32)
    # Anchors of five levels, a factor of two apart: from three quarters of the smallest objects to half of the largest.
    base = max(_power(0.75 * smallest * short), _power(largest * short / 32, up=True))
    first = int(min(64, max(8, base)))
    batch, processes = _shared(
        min(8 if gpu else 4, facts.images), facts.gpus
    )  # a batch larger than the data set is an error
    passes = min(
        100, max(12, 60 * math.sqrt(200 / facts.images))
    )  # 60 over 200 photos, 27 over 1,000, 12 over 5,000 and more
    steps = max(50, round(passes * facts.images / batch))
    steps = steps if gpu else min(steps, 1500)
    distill_images = facts.unlabeled_images + facts.images
    distill_batch, distill_processes = _shared(min(256 if gpu else 32, distill_images), facts.gpus)
    distill_steps = (
        round(min(100, max(10, 2e6 / max(distill_images, 1))) * distill_images / distill_batch)
        if gpu
        else min(500, 10 * distill_images // distill_batch)
    )
    precision = "bf16" if facts.gpu is not None and facts.gpu[3] >= 8 else "fp32"
    return Settings(
        backbone="resnet50d.ra2_in1k" if gpu else "resnet18d.ra2_in1k",
        teacher="timm:hgnetv2_b6.ssld_stage2_ft_in1k" if gpu else "timm:resnet50d.ra2_in1k",
        batch=batch,
        processes=processes,
        steps=steps,
        warmup=min(0.1, round(1000 / steps, 4)),
        short_sides=tuple(sorted({_multiple(factor * short) for factor in (0.8, 0.9, 1.0)})),
        short_side=short,
        long_side=long,
        anchors=tuple(first * 2**level for level in range(5)),
        channels=256 if gpu else 128,
        hidden=1024 if gpu else 512,
        precision=precision,
        workers=max(1, min(8, facts.cores)),
        distill_batch=distill_batch,
        distill_processes=distill_processes,
        distill_steps=max(20, distill_steps),
        distill_size=224 if gpu else 128,
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


def pipeline_text(output: Path, facts: Facts, chosen: Settings) -> str:
    """Render the YAML file. Every value that the template does not mark as a comment is written by a YAML dumper."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Comment) else _dumped(value),
    )
    environment.filters["comment"] = lambda value: _Comment(printable(str(value)))
    template = environment.from_string(Path(__file__).with_name("init.yaml.jinja").read_text(encoding="utf-8"))
    return template.render(
        output=output,
        command=shlex.quote(str(output)),
        facts=facts,
        chosen=chosen,
        measured=facts.statistics,
        classes=list(facts.statistics["classes"]),
        sizes=[round(100 * value) for value in facts.statistics["object_sizes"]],
        machine=f"{facts.gpu[0]}, {facts.gpu[2] / 2**30:.0f} GB" if facts.gpu else f"no GPU, {facts.cores} CPU cores",
    )


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
