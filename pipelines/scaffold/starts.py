"""Starts of the detectors in a new pipeline: the weights that each begins with, and the stages that compare them. Does not import torch.

coco: a detector trained on COCO, heads included, or another detector file. imagenet: the backbone's own weights, heads at random. random: no weights.
ssld: the backbone of stage 1, heads at random. coco_ssld: that backbone below the heads of coco; both backbones have one architecture.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from ssld.shared.config.yaml_files import flatten
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import PICKLE_SUFFIXES, kind_of
from ssld.shared.models.metadata import parse_metadata
from ssld.shared.wording import did_you_mean
from ssld.stage2_detect.config import PREFIX, ResizeConfig, published
from ssld.stage2_detect.model_config import DetectorConfig

Start = Literal["coco", "coco_ssld", "imagenet", "random", "ssld"]
STARTS: tuple[Start, ...] = get_args(Start)
"""all starts, in the order of their stages"""
PROPOSED = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn")
"""detectors trained on COCO that are proposed: the better one, and the faster one, whose box head has two layers in place of four convolutions of
all RoIs; those with masks or of one stage only where the user names them"""
STAGE_1: frozenset[Start] = frozenset({"ssld", "coco_ssld"})
"""starts that need stage 1"""
_MAIN: tuple[Start, ...] = ("ssld", "coco_ssld", "coco", "imagenet", "random")
_BASE: tuple[Start, ...] = ("imagenet", "random", "coco", "coco_ssld", "ssld")
_CHOSEN = {
    f"model.{name}"
    for name in ("kind", "fpn_channels", "freeze_stages", "freeze_norm", "rpn.anchor_sizes", "roi.hidden")
}
"""settings that init.yaml.jinja writes for a detector from a backbone"""


@dataclass(frozen=True)
class Init:
    """A detector whose weights, heads included, others start from.

    Attributes:
        reference: `coco:NAME`, or a detector file.
        arch, model_args: architecture of its backbone.
        settings: settings that its weights need, by dotted key; none for `coco:NAME`, which a training follows by itself.
        defaults: values of these settings for detectors that start from a backbone, where the pipeline does not choose them.
        here: whether its file is on this machine.
        optional: whether it is left out if it does not fit the time; the user's own choice is not.
    """

    reference: str
    arch: str = "resnet50"
    model_args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    here: bool = True
    optional: bool = False

    @property
    def title(self) -> str:
        """Name of its row in the table."""
        return "COCO" if self.is_published else Path(self.reference).name

    @property
    def is_published(self) -> bool:
        """Whether it is one of torchvision's detectors, trained on COCO."""
        return self.reference.startswith(PREFIX)

    def untrained(self) -> dict[str, Any]:
        """Return the settings, by dotted key, of a training of the same network from random weights, as fast as one from these weights."""
        model = dict(flatten({"model": published(self.reference, "--init").model})) if self.is_published else {}
        return {"init": None, "backbone": f"random:{self.arch}", **model, **self.settings, "model.freeze_norm": False}


def published_init(name: str, *, optional: bool = False) -> Init:
    """Return torchvision's detector `name`, with or without `coco:`. Raises UserError for an unknown name."""
    about = published(name, "--init")
    reference = f"{PREFIX}{name.removeprefix(PREFIX)}"
    return Init(
        reference, about.arch, dict(about.model_args), here=(hub_folder() / about.file).is_file(), optional=optional
    )


def download_of(init: Init) -> dict[str, str]:
    """Return the reference of its download, by its name for messages; none for a proposal where the user works without a network."""
    if init.optional and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    return {init.reference: f"url:{published(init.reference, '--init').url}"}


def absence(init: Init) -> str:
    """Return the line about a published detector that is neither on this machine nor within reach of the network."""
    about = published(init.reference, "--init")
    what = "COCO weights, which may be the better start," if init.optional else f"--init {init.reference}: its weights"
    where = f"put {about.url} into {hub_folder()}, or give a detector file as --init FILE"
    return f"{what} are not on this machine and cannot be downloaded here: {where}"


def find_init(text: str | None, given: Sequence[Start] | None, *, gpu: bool) -> Init | None:
    """Return the detector of the start `coco`; None if the starts that were given do not need one.

    Args:
        text: `coco:NAME` or a detector file; None: a published detector, one that is on this machine where there is one.
        given: the starts; None: not decided.
        gpu: whether there is a GPU; a CPU gets the faster one.

    Raises:
        UserError: an unknown name, or not a detector file.
    """
    if given is not None and not {"coco", "coco_ssld"} & set(given):
        return None
    if text is not None:
        return published_init(text) if text.startswith(PREFIX) else file_init(Path(text))
    proposed = [published_init(name, optional=given is None) for name in PROPOSED[:: 1 if gpu else -1]]
    return next((init for init in proposed if init.here), proposed[0])


def hub_folder() -> Path:
    """Return the folder of torch hub's cache, as `torch.hub.get_dir` does without its import of torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def file_init(file: Path) -> Init:
    """Return the detector in a file of this project. Raises UserError for any other file."""
    if not file.is_file():
        raise UserError(f"--init {file}: no such file")
    metadata = _metadata(file)
    if metadata.get("kind") != "detector":
        other = f"ssld convert-detector --weights {file} --output DIR makes one of a detector of torchvision, detectron2 or mmdetection"
        hint = other if file.suffix in PICKLE_SUFFIXES else "give the detector.safetensors of a training, or coco:NAME"
        raise UserError(f"--init {file}: not a detector file of this project; {hint}")
    resize = metadata.get("resize") or {}
    interpolation = {key: value for key, value in resize.items() if key == "interpolation"}
    given = dict(flatten({"model": metadata.get("model") or {}, "resize": interpolation}))
    defaults = {"model": DetectorConfig().model_dump(mode="json"), "resize": ResizeConfig().model_dump(mode="json")}
    usual = dict(flatten(defaults))
    settings = {key: value for key, value in given.items() if value not in ({}, usual.get(key))}
    return Init(
        str(file.absolute()),
        str(metadata.get("arch")),
        metadata.get("model_args") or {},
        settings,
        {key: usual.get(key) for key in settings if key not in _CHOSEN},
    )


def _metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a model file; {} for other files."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            fields = tensors.metadata() or {}
    except (OSError, SafetensorError):
        return {}
    return parse_metadata(fields["ssld"], file) if "ssld" in fields else {}


def arch_of(backbone: str, arch: str | None) -> str | None:
    """Return timm's name of a backbone, without the tag of its weights; None if only a training knows it."""
    name = arch
    if name is None:
        with suppress(UserError):
            kind = kind_of(backbone)
            plain = kind in ("timm", "random")
            metadata = _metadata(Path(backbone)) if kind == "file" else {}
            name = backbone.partition(":")[2] or backbone if plain else metadata.get("arch")
            name = None if metadata.get("model_args") else name
    return name.partition(".")[0] if name else None


def read_starts(text: str) -> tuple[Start, ...] | None:
    """Read a list of starts from the command line; None for `auto`. Raises UserError for an unknown one."""
    if text == "auto":
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STARTS:
            raise UserError(f"--starts {text}: {name or 'an empty name'}{did_you_mean(name, STARTS)}")
    return tuple(start for start in STARTS if start in names)


def _own(backbone: str) -> Start:
    """The start that a backbone is without stage 1."""
    return "random" if backbone.startswith("random:") else "imagenet"


def choose_starts(
    given: Sequence[Start] | None, init: Init | None, backbone: str, arch: str | None, *, distills: bool
) -> tuple[Start, ...]:
    """Return the starts to compare, in the order of their stages: those given, else all that are at hand.

    Args:
        init: the detector of `coco`, if there is one.
        backbone: reference of the backbone, and `arch` its name where the reference has none.
        distills: whether the pipeline has stage 1.

    Raises:
        UserError: a start that was given is impossible, with the reason.
    """
    own = _own(backbone)
    name = arch_of(backbone, arch)
    below = init is not None and init.is_published and init.arch == name
    if given is None:
        here: dict[Start, bool] = {
            "coco": init is not None,
            "coco_ssld": distills and below,
            "ssld": distills,
            own: True,
        }
        return tuple(start for start in STARTS if here.get(start))
    if "imagenet" in given and own == "random":
        raise UserError(f"--starts: imagenet stands for the weights of --backbone, and {backbone} has none; use random")
    if "random" in given and name is None:
        raise UserError(f"--starts: random needs the name of the network; give it by --arch beside {backbone}")
    if "coco_ssld" in given and init and not init.is_published:
        raise UserError(
            f"--starts: coco_ssld needs a detector of torchvision, --init coco:NAME; {init.reference} keeps its backbone"
        )
    if "coco_ssld" in given and init and not below:
        raise UserError(
            f"--starts: coco_ssld needs backbones of one architecture: the heads of {init.reference} belong to a {init.arch}, "
            f"{backbone} is {'a ' + name if name else 'unknown'}; --backbone timm:{init.arch} is one"
        )
    return tuple(given)


def in_a_trial(starts: Sequence[Start], backbone: str) -> tuple[Start, ...]:
    """Return starts that cost the same per step and do not wait for stage 1: of `ssld` the backbone as it is."""
    without_stage_1: dict[Start, Start] = {"ssld": _own(backbone), "coco_ssld": "coco"}
    without = {without_stage_1.get(start, start) for start in starts}
    return tuple(start for start in STARTS if start in without)


@dataclass(frozen=True)
class Row:
    """A detector of the pipeline: its stages, and the settings that differ from those of an earlier one.

    Attributes:
        stage, evaluation: names of its stages.
        title: name of its row in the table.
        like: earlier stage whose settings it takes over; None for the first.
        leads: whether it writes the settings of its kind of start, `coco` or backbone, which later ones take over.
        init: the detector it starts from; None: a backbone.
        backbone, arch: values of these settings; None: not written.
        baseline: evaluation that its own is compared with.
        moving: whether it also learns from unlabeled photos, under a moving teacher; everything else is as in `like`.
    """

    start: Start
    stage: str
    evaluation: str
    title: str
    like: str | None
    leads: bool
    init: Init | None
    backbone: str | None
    arch: str | None
    baseline: str | None
    moving: bool = False

    @property
    def about(self) -> str:
        """Where it starts, for a comment."""
        if self.moving:
            return f"as {self.like}; after a burn-in as many unlabeled photos per step, in which a moving average of it finds objects"
        heads = self.init.reference if self.init else ""
        trained = "a detector trained on COCO" if self.init and self.init.is_published else heads
        return {
            "coco": f"from {trained}: the network and its anchors follow the weights",
            "coco_ssld": f"from the backbone of stage 1 below the heads of {heads}",
            "imagenet": "from the backbone's own weights",
            "random": "from random weights",
            "ssld": "from the backbone of stage 1",
        }[self.start]


def rows_of(
    starts: Sequence[Start], init: Init | None, backbone: str, arch: str | None, *, moving: bool = False
) -> list[Row]:
    """Return the detectors of a pipeline in the order of their stages; the first has all settings, the others are `like` it.

    With `moving` the last one is like that of `start_of_moving`, and learns from unlabeled photos too.
    """
    alone = len(starts) == 1 and not moving
    own = _own(backbone)
    main = next(start for start in _MAIN if start in starts)
    base = next((start for start in _BASE if start in starts and start != main), main)
    student = "${ssld}/student.safetensors"
    bodies: dict[Start, str | None] = {"coco": None, "coco_ssld": student, "ssld": student, own: "${backbone}"}
    titles: dict[Start, str] = {
        "coco": init.title if init else "",
        "coco_ssld": f"SSLD below the heads of {init.title if init else ''}",
        "imagenet": "ImageNet" if kind_of(backbone) == "timm" else "own weights",
        "random": "random weights",
        "ssld": "SSLD",
    }
    rows: list[Row] = []
    for start in starts:
        heads = start in ("coco", "coco_ssld")
        same = next((row for row in rows if (row.init is not None) == heads), None)
        before = same or next(iter(rows), None)
        named = start == own and arch is not None
        rows.append(
            Row(
                start=start,
                stage="detector" if alone else f"detector_{start}",
                evaluation="ap" if alone else f"ap_{start}",
                title="detector" if alone else titles[start],
                like=before.stage if before else None,
                leads=same is None,
                init=init if heads else None,
                backbone=bodies.get(start, f"random:{arch_of(backbone, arch)}"),
                arch="${backbone_arch}" if named else "null" if same and same.arch else None,
                baseline=None if start == base else f"ap_{base}",
            )
        )
    if moving:
        like = next(row for row in rows if row.start == start_of_moving(starts))
        title = f"{like.title}, moving teacher" if like.start == "ssld" else "moving teacher"
        names: dict[str, Any] = {"stage": "detector_moving", "evaluation": "ap_moving", "title": title}
        own_part: dict[str, Any] = {"leads": False, "backbone": None, "arch": None, "moving": True}
        rows.append(replace(like, like=like.stage, baseline=like.evaluation, **names, **own_part))
    return rows


def start_of_moving(starts: Sequence[Start]) -> Start:
    """Return the start of the detector under a moving teacher.

    Stage 1, because the two gains add up (docs/benchmarks/few_labels_cpu_2026-12-01.md), else that of the usual baseline.
    """
    return "ssld" if "ssld" in starts else next(start for start in _BASE if start in starts)


def main_row(rows: Sequence[Row]) -> Row:
    """Return the row whose gain over the baseline is reported, and whose detector predicts."""
    if len(rows) == 2 and rows[1].moving:
        return rows[1]
    return next(row for start in _MAIN for row in rows if row.start == start)
