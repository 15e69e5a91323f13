"""ENTRY: write a commented pipeline for your own photos that fits the time you have.

    python pipelines/init.py --images photos --annotations annotations.json --minutes 20 --output mine.yaml
    python pipelines/run.py mine.yaml

The data are checked first, as by `ssld doctor`. Anchors, warm-up and the largest useful image size follow from the photos; a trial of three real
steps of each training then decides networks, image size and steps such that the whole pipeline fits `--minutes`. Without an evaluation file, a random
fifth of the images (seeded) becomes one: `mine_train.json` and `mine_val.json` beside the YAML file. With `--unlabeled DIR` the backbone is first
distilled on those images where this may help, and a second detector without that step measures its gain; with `--moving_teacher yes` one more
detector learns from them too. `--unlabeled` without annotations: a backbone and nothing else. A detector that starts from COCO weights is compared
with the others where these are at hand and fit the time.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.checks.data import FLAGS, check_data, run_script, words_of
from ssld.pipelines.checks.machine import ask_torch
from ssld.pipelines.config import ReportConfig
from ssld.pipelines.folder import inside_folder_of
from ssld.pipelines.reports.table import RECORD
from ssld.pipelines.runner.cost import disk_text, steps_text, total_text
from ssld.pipelines.runner.estimate import Costs
from ssld.pipelines.runner.stages import Stage
from ssld.pipelines.scaffold.augment import choose_augment
from ssld.pipelines.scaffold.command_line import parser
from ssld.pipelines.scaffold.fit import MOVING, REPORT_SECONDS, Fit, fit
from ssld.pipelines.scaffold.pipeline_file import pipeline_text
from ssld.pipelines.scaffold.pool import Pool, divide_pool, some_photos, unlisted, unreadable_photos
from ssld.pipelines.scaffold.split import split_content
from ssld.pipelines.scaffold.stage1 import proposes_stage_1
from ssld.pipelines.scaffold.starts import STAGE_1, Init, Start, choose_starts, find_init, read_starts
from ssld.pipelines.scaffold.suggest import Facts, Networks, detector_batch, networks_of, shapes, untrained
from ssld.pipelines.scaffold.trials import keep_rates, trials
from ssld.pipelines.scaffold.weights import available, check_file
from ssld.shared.config.command import exit_code
from ssld.shared.config.words import underscored
from ssld.shared.errors import STOPPED, Stopped, UserError
from ssld.shared.files import fits_a_list, list_images, write_atomically
from ssld.shared.machine import cores
from ssld.shared.terminal import say
from ssld.shared.wording import FEW_IMAGES, count, duration, printable

MINUTES = 60.0
"""time that a pipeline fits if the user gives none"""
LONGEST = 1_000_000
"""greatest number of minutes, or of hours, that a user may give"""
MOVING_HINT = (
    "--moving_teacher yes adds a detector that learns from the unlabeled photos too, for comparison; on blood cells it gained 3 AP with 10 "
    "labeled photos, nothing with 41 (docs/benchmarks/few_labels_cpu_2026-12-01.md)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 for a user's mistake."""
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not words:
        parser().print_usage(sys.stderr)
    return exit_code(lambda: _init(parser().parse_args(words)))


def _init(arguments: Namespace) -> int:
    """Choose, try and write a pipeline; returns the exit code. Nothing is written before all of it is known."""
    begun = time.monotonic()
    _check_arguments(arguments)
    minutes = 60 * arguments.hours if arguments.hours is not None else arguments.minutes or MINUTES
    gpus = ask_torch().get("devices") or []
    detector = bool(arguments.annotations or arguments.data)
    choice = _choose(arguments, detector=detector, gpu=bool(gpus))
    facts, files = _facts(_as_files(arguments), choice, gpus)
    _check_moving(facts)
    if choice.why:
        say(choice.why)
    if detector and arguments.unlabeled and not facts.moving:
        say(MOVING_HINT)
    if facts.moving:
        say(
            f"the detector under a moving teacher takes about {MOVING:g} times as long as the same one without it; a trial tells whether "
            f"{minutes:g} min are enough for all {count(facts.detectors, 'detector')}"
        )
    # If no detector has the sizes of the others, the first ones are for all.
    networks = choice.networks[:1] if "detector" not in facts.trainings and facts.detectors else choice.networks
    try:
        with trials(facts, files) as trial:
            fitting = fit(facts, shapes(facts, networks), minutes, trial, absent=choice.absent)
    except Stopped as error:
        say(str(error), sys.stderr)
        return STOPPED
    passes = fitting.settings.steps * fitting.settings.batch / max(facts.images, 1)
    augment, augment_reason = choose_augment(arguments.augment, passes)
    fitting = replace(fitting, facts=replace(fitting.facts, augment=augment, augment_reason=augment_reason))
    output: Path = arguments.output
    files[output] = pipeline_text(output, fitting.facts, fitting.settings, minutes, fitting.seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():  # the YAML file comes last: if it exists, all files exist
        write_atomically(file, text)
        say(f"wrote {file}")
    with inside_folder_of(output) as own:
        _tell(fitting, *keep_rates(own, fitting.rates), minutes, begun)
    say(f"read {output}, then start it: ssld run {shlex.quote(str(output))}")
    return 0


def _facts(arguments: Namespace, choice: "_Choice", gpus: Sequence[Any]) -> tuple[Facts, dict[Path, str]]:
    """Read and divide the photos; return what the pipeline is made for, and the content of the files to write beside it."""
    names = _names(arguments)
    _check_unwritten(names.values())
    photos_read = _read_photos(arguments, names) if arguments.annotations else _Photos()
    distills, moving = choice.distills, arguments.moving_teacher == "yes"
    if arguments.unlabeled:
        training = [row["file_name"] for row in photos_read.train["images"]] if distills else []
        if line := unlisted(arguments.unlabeled, training):
            say(line)
    pool = _divide(arguments, photos_read) if distills or moving else None
    if pool and (not distills or (arguments.annotations and choice.networks[0].random)):
        # Held-out photos are for stage 1, and show nothing of a student that learns features, as one without weights does (init.yaml.jinja).
        pool = replace(pool, train=sorted([*pool.train, *pool.held_out]), held_out=[])
    moving_photos = [arguments.unlabeled.absolute() / name for name in pool.train] if pool and moving else []
    pool = pool if distills else None
    lists = _lists(arguments, photos_read, pool, moving_photos)
    files = photos_read.files | {names[name]: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
    facts = Facts(
        annotations=names.get("train", arguments.annotations),
        images_folder=arguments.images,
        val_annotations=names.get("val", arguments.val_annotations),
        val_images=arguments.val_images or arguments.images,
        split="train" in names,
        images=len(photos_read.train["images"]),
        val_count=len(photos_read.val["images"]),
        statistics=photos_read.statistics,
        unlabeled=arguments.unlabeled if pool else None,
        unlabeled_images=len(pool.train) if pool else 0,
        pool=names["pool"] if pool else None,
        held_out=names["held_out"] if pool and pool.held_out else None,
        shown=names.get("shown"),
        listing=names["listing"] if pool and arguments.annotations else None,
        gpu=tuple(gpus[0]) if gpus else None,
        gpus=len(gpus),
        cores=cores(),
        seed=arguments.seed,
        pretrained="random" not in choice.starts and not choice.networks[0].random,
        starts=choice.starts,
        init=choice.init,
        trackers=("tensorboard",) if find_spec("tensorboard") else (),
        moving=names.get("moving"),
        moving_images=len(moving_photos),
        augment="none" if arguments.augment == "auto" else arguments.augment,  # `auto` follows from the length
    )
    return facts, files


@dataclass(frozen=True)
class _Choice:
    """Networks and starts of the detectors, before anything is measured.

    Attributes:
        networks: those to choose from, large ones first.
        starts: of the detectors; empty without a detector.
        init: the detector of the start `coco`.
        distills: whether there is stage 1.
        why: line on whether stage 1 is proposed; empty where the starts are given.
        absent: a detector that would have been proposed for the start `coco`, if its weights were within reach.
    """

    networks: list[Networks]
    starts: tuple[Start, ...]
    init: Init | None
    distills: bool
    why: str
    absent: Init | None


def _choose(arguments: Namespace, *, detector: bool, gpu: bool) -> _Choice:
    """Choose networks and starts by what the user gives, and what is on this machine or can be downloaded.

    Raises UserError where a start is impossible, or weights are out of reach.
    """
    networks = networks_of(
        gpu=gpu,
        backbone=arguments.backbone,
        arch=arguments.arch,
        teacher=arguments.teacher,
        teacher_arch=arguments.teacher_arch,
    )
    given = read_starts(arguments.starts)
    distills, why = bool(STAGE_1 & set(given or ())), ""
    if arguments.unlabeled and given is None:
        photos = len(list_images(arguments.unlabeled))
        distills, why = proposes_stage_1(arguments.distill, networks[0].backbone, photos, detector=detector)
    init = find_init(arguments.init, given, gpu=gpu) if detector else None
    if given and not {"imagenet", *STAGE_1} & set(given):
        networks = untrained(networks)
    found = available(networks, init, given, distills=distills, detects=detector, own=bool(arguments.backbone))
    networks, init, given = found.networks, found.init, found.starts
    backbone, arch = networks[0].backbone, networks[0].arch
    starts = choose_starts(given, init, backbone, arch, distills=distills) if detector else ()
    return _Choice(networks, starts, init, distills, why, found.absent)


@dataclass(frozen=True)
class _Photos:
    """Annotated photos: contents of both COCO files, statistics of the training photos, and the files to write."""

    train: dict[str, Any] = field(default_factory=lambda: {"images": []})
    val: dict[str, Any] = field(default_factory=lambda: {"images": []})
    statistics: dict[str, Any] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)


def _read_photos(arguments: Namespace, names: dict[str, Path]) -> _Photos:
    """Check the annotated photos, and split them unless an evaluation file is given."""
    statistics, content = _check_photos(arguments)
    if arguments.val_annotations:
        return _Photos(content, json.loads(arguments.val_annotations.read_bytes()), statistics["train"])
    content = _with_orientation(content, statistics["train"]["orientation"])
    parts = split_content(
        content, share=arguments.val_share, seed=arguments.seed, together=statistics["train"]["together"]
    )
    files = {names[name]: json.dumps(part) for name, part in zip(("train", "val"), parts, strict=True)}
    return _Photos(*parts, statistics["train"], files)


def _divide(arguments: Namespace, photos: _Photos) -> Pool:
    """Divide the unlabeled photos into those to train on and those held out; print how many copies of annotated and unreadable photos are dropped."""
    training, evaluation = _annotated(arguments, photos)
    unreadable = unreadable_photos(arguments.unlabeled / name for name in list_images(arguments.unlabeled))
    pool = divide_pool(arguments.unlabeled, training, evaluation, arguments.seed, unreadable)
    if not pool.train:
        raise UserError(f"{arguments.unlabeled}: {pool.tally.describe()}; no photo is left to train on")
    if pool.tally.dropped("photo"):
        say(f"{arguments.unlabeled}: {pool.tally.describe()}")
    return pool


def _annotated(arguments: Namespace, photos: _Photos) -> tuple[list[Path], list[Path]]:
    """Return the image files to train on and to evaluate on, those that exist."""
    return _files(photos.train, arguments.images), _files(photos.val, arguments.val_images or arguments.images)


def _lists(
    arguments: Namespace, photos: _Photos, pool: Pool | None, moving_photos: Sequence[Path]
) -> dict[str, Sequence[Path | str]]:
    """Return the lists of photos to write, one file per line, by their role as in `_names`.

    Args:
        pool: the photos of stage 1; None without it.
        moving_photos: those of a moving teacher.
    """
    lists: dict[str, Sequence[Path | str]] = {}
    if arguments.moving_teacher == "yes":
        lists["moving"] = moving_photos
    if pool:
        lists["pool"] = pool.train
    if pool and pool.held_out:
        lists["held_out"] = pool.held_out
    if pool and arguments.annotations:
        names = (row["file_name"] for row in photos.train["images"])
        lists["listing"] = [name for name in names if fits_a_list(name)]
    if arguments.unlabeled and arguments.annotations:
        lists["shown"] = some_photos(arguments.unlabeled, chain(*_annotated(arguments, photos)), arguments.seed)
    return lists


def _check_moving(facts: Facts) -> None:
    """Raise UserError if a moving teacher has fewer unlabeled photos than a step uses."""
    batch = detector_batch(facts)[0]
    if facts.moving and facts.moving_images < batch:
        raise UserError(
            f"--moving_teacher yes: {count(facts.moving_images, 'unlabeled photo')}, and a step uses {batch}; give more photos"
        )


def _tell(fitting: Fit, stages: list[Stage], costs: Costs, minutes: float, begun: float) -> None:
    """Print the choice, the time of each stage, what more time would change, and the time since `begun` (of `time.monotonic`)."""
    chosen, facts = fitting.settings, fitting.facts
    for note in fitting.notes:
        say(note)
    if facts.init and not facts.init.here:
        say(f"{facts.init.reference}: its weights are downloaded when the pipeline runs")
    own = f"{chosen.networks.backbone}, " if facts.starts != ("coco",) else ""
    channels = f", {chosen.networks.channels} channels" if "detector" in facts.trainings else ""
    size = f"photos of {chosen.short_side} px (short side), batches of {chosen.batch}{channels}; "
    say(f"chosen: {own}{size if facts.detectors else ''}{fitting.reason}")
    if facts.detectors:
        say(f"augmentation: {facts.augment}, {facts.augment_reason}")
        say(_evaluation(facts))
    width = max(len(stage.name) for stage in stages)
    known = 0.0
    for stage in stages:
        expected = costs.times.get(stage.name)
        if expected is None and isinstance(stage.config, ReportConfig):
            expected = REPORT_SECONDS
        known += expected or 0.0
        disk = disk_text(costs.disk[stage.name]) if stage.name in costs.disk else ""
        say(
            "; ".join(
                text for text in (f"  {stage.name:<{width}}  {_about(expected)}", steps_text(stage), disk) if text
            )
        )
    total = f"{_about(fitting.seconds)} of the {minutes:g} min"
    if fitting.seconds is None:  # an earlier trial of this machine may know a part
        least = f"more than {duration(known)}" if known > REPORT_SECONDS else "unknown time"
        total = f"{least}; whether it fits the {minutes:g} min is not known"
    say(f"  {'sum':<{width}}  {total}; {total_text(costs.disk)}")
    say(f"more time: {fitting.more}")
    say(f"this took {duration(time.monotonic() - begun)}, {duration(fitting.tried)} of it for the trial")


def _evaluation(facts: Facts) -> str:
    """Say on how many photos AP is measured, and what so few cannot tell."""
    photos = count(facts.val_count, "photo")
    part = f", a random part of the {facts.images + facts.val_count} annotated ones" if facts.split else ""
    few = f"; with fewer than {FEW_IMAGES} photos AP is a rough number, and no difference between detectors is claimed"
    return f"evaluation: on {photos}{part}{few * (facts.val_count < FEW_IMAGES)}"


def _about(seconds: float | None) -> str:
    return "unknown time" if seconds is None else f"about {duration(seconds)}"


def _names(arguments: Namespace) -> dict[str, Path]:
    """Return every file that may be written, by its role: the pipeline itself, both parts of the annotations, and the lists of `_lists`."""
    output: Path = arguments.output
    names = {"pipeline": output}
    if arguments.annotations and not arguments.val_annotations:
        names |= {part: output.with_name(f"{output.stem}_{part}.json") for part in ("train", "val")}
    if arguments.unlabeled:
        parts = {"pool": "unlabeled", "held_out": "held_out"} | ({"listing": "train"} if arguments.annotations else {})
        parts |= {"shown": "shown"} if arguments.annotations else {}
        parts |= {"moving": "moving"} if arguments.moving_teacher == "yes" else {}
        names |= {name: output.with_name(f"{output.stem}_{part}.txt") for name, part in parts.items()}
    return names


def _files(content: dict[str, Any], folder: Path) -> list[Path]:
    """Return the image files of a COCO file that exist."""
    files = [folder / row["file_name"] for row in content["images"]]
    return [file for file in files if file.is_file()]


def _check_arguments(arguments: Namespace) -> None:
    """Raise UserError for flags that do not go together, values out of range, and missing paths: before weights are searched and steps tried."""
    for name, path in _paths(arguments, "output", "data", "unlabeled", "init", *FLAGS):
        if "${" in str(path):
            raise UserError(f"--{name} {path}: ${{ marks a variable in a pipeline; give a path without it")
    _check_output(arguments.output)
    if arguments.val_images and not arguments.val_annotations:
        raise UserError("--val_images: give --val_annotations too")
    if arguments.data and any(getattr(arguments, name) for name in FLAGS):
        raise UserError(
            "--data: has its own images and annotations; leave out --annotations, --images and those for evaluation"
        )
    if bool(arguments.annotations) != bool(arguments.images):
        raise UserError(
            "give --annotations and --images together, or --data for a data set in another form; photos without boxes are --unlabeled"
        )
    if not arguments.annotations and not arguments.data:
        for name, usual in (("starts", "auto"), ("init", None), ("augment", "auto"), ("moving_teacher", "no")):
            if getattr(arguments, name) != usual:
                raise UserError(f"--{name}: is about detectors; give --data, or --images and --annotations, too")
        if not arguments.unlabeled:
            raise UserError(
                "give --data, or --images and --annotations, for a detector, or --unlabeled for a backbone alone"
            )
        if arguments.val_annotations or arguments.distill == "no":
            raise UserError("give --data, or --images and --annotations, too: without them there is stage 1 alone")
    for name, path in _paths(arguments, "data", *FLAGS):  # before a search for weights, which may end with another line
        if not str(path).startswith("hub:") and not Path(path).exists():
            raise UserError(f"--{name} {path}: no such file or folder")
    if arguments.distill == "yes" and not arguments.unlabeled:
        raise UserError("--distill yes: give --unlabeled too, a folder of photos")
    if arguments.moving_teacher == "yes" and not arguments.unlabeled:
        raise UserError("--moving_teacher yes: give --unlabeled too, a folder of photos without boxes")
    starts = read_starts(arguments.starts) or ()
    if starts and arguments.distill != "auto":
        raise UserError(f"--distill {arguments.distill}: leave it out, --starts says whether there is stage 1")
    if STAGE_1 & set(starts) and not arguments.unlabeled:
        raise UserError(f"--starts {arguments.starts}: stage 1 needs --unlabeled too, a folder of photos")
    if arguments.init and starts and not {"coco", "coco_ssld"} & set(starts):
        raise UserError(f"--init: --starts {arguments.starts} does not use it; add coco")
    for name, needs in (("arch", "backbone"), ("teacher_arch", "teacher")):
        if getattr(arguments, name) and not getattr(arguments, needs):
            raise UserError(f"--{name}: give --{needs} too, a weights file")
    for name in ("minutes", "hours"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= LONGEST:
            raise UserError(f"--{name} {value:g}: give a number above 0, {LONGEST:,} at most")
    if not 0 < arguments.val_share < 1:
        raise UserError(f"--val_share {arguments.val_share:g}: give a share between 0 and 1")
    if arguments.unlabeled and not arguments.unlabeled.is_dir():
        raise UserError(f"--unlabeled {arguments.unlabeled}: no such folder")
    if arguments.unlabeled and not list_images(arguments.unlabeled):
        raise UserError(f"--unlabeled {arguments.unlabeled}: no images in it")
    for role in ("backbone", "teacher"):
        if getattr(arguments, role):
            check_file(role, getattr(arguments, role))


def _paths(arguments: Namespace, *names: str) -> Iterator[tuple[str, str | Path]]:
    """Yield (name of the flag, path) of the paths that these flags were given, some of them several."""
    for name in names:
        given = getattr(arguments, name)
        yield from ((name, path) for path in (given if isinstance(given, list) else [given]) if path)


def _check_output(output: Path) -> None:
    """Raise UserError for a file that cannot be written, exists, or belongs to runs of another pipeline."""
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: give the name of a YAML file, as mine.yaml")
    _check_unwritten([output])
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is not writable" if above.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {above} {why}; give another --output")
    runs = output.parent / "runs" / output.stem
    if (runs / RECORD).exists():
        raise UserError(f"{runs}: has runs of another pipeline; give another --output, or delete it")


def _check_unwritten(files: Iterable[Path]) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists already; give another --output, or delete it")


def _as_files(arguments: Namespace) -> Namespace:
    """Return the arguments with one COCO file and one folder of images for each part: a data set in another format is converted, and several files
    are merged, in the user's cache folder."""
    places = {name: getattr(arguments, name) for name in FLAGS}
    if not arguments.data and all(paths is None or len(paths) == 1 for paths in places.values()):
        return Namespace(**vars(arguments) | {name: paths and paths[0] for name, paths in places.items()})
    words = words_of(
        {"data": [arguments.data] if arguments.data else [], **{name: places[name] or [] for name in FLAGS}}
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "parts.json"
        code = run_script([*words, "--parts", str(report)])
        if code:
            raise UserError(f"{arguments.data or arguments.annotations[0]}: cannot be read, see above")
        parts = json.loads(report.read_text(encoding="utf-8"))
    found: dict[str, Path | None] = dict.fromkeys(FLAGS)
    for part, prefix in (("train", ""), ("val", "val_")):
        if parts[part]:
            found |= {f"{prefix}{name}": Path(parts[part][name]) for name in ("annotations", "images")}
    for note in parts["notes"]:
        say(printable(note))
    return Namespace(**vars(arguments) | found)


def _check_photos(arguments: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the data check; return (statistics per file, content of the training annotations as training reads them). Raises UserError for a fault."""
    val_images = (arguments.val_images or arguments.images) if arguments.val_annotations else None
    places = (arguments.annotations, arguments.images, arguments.val_annotations, val_images)
    with tempfile.TemporaryDirectory() as folder:
        accepted = Path(folder) / "accepted.json"
        code, report = check_data(places, "--accepted", str(accepted))
        content = json.loads(accepted.read_bytes()) if accepted.is_file() else {}
    if report is None:
        raise UserError(f"{arguments.annotations}: the check failed, see above")
    if code:
        given = " ".join(f"--{name} {path}" for name, path in zip(FLAGS, places, strict=True) if path)
        advice = f"ssld doctor {given} --fix DIR writes cleaned copies"
        if any(finding["level"] == "fault" and not finding["fix"] for finding in report["findings"]):
            advice = "fix them first"
        raise UserError(f"the data have faults, see above; {advice}")
    return report["files"], content


def _with_orientation(content: dict[str, Any], orientation: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file with its EXIF convention recorded: after the split, one part may lack the images that show the convention
    (`stage2_detect/data/orientation.py`)."""
    if not (orientation["upright"] or orientation["stored"] or orientation["both"]):
        return content
    info = content.get("info")
    info = info if isinstance(info, dict) else {}
    return {**content, "info": {**info, "image_orientation": orientation["convention"]}}


if __name__ == "__main__":
    sys.exit(main())
