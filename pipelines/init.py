"""ENTRY: write a commented pipeline for your own photos that fits the time you have.

    python pipelines/init.py --images photos --annotations annotations.json --minutes 20 --output mine.yaml
    python pipelines/run.py mine.yaml

The data are checked first, as by `ssld doctor`. Anchors, warm-up and the largest useful image size follow from the photos; a trial of three real
steps of each training then decides networks, image size and steps such that the whole pipeline fits `--minutes`. Without an evaluation file, a random
fifth of the images (seeded) becomes one: `mine_train.json` and `mine_val.json` beside the YAML file. With `--unlabeled DIR` the backbone is first
distilled on those images where measurements say that this helps, and a second detector without that step measures its gain. `--unlabeled` without
annotations: a backbone and nothing else.
"""

import json
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.checks.data import FLAGS, check_data, run_script, words_of
from ssld.pipelines.checks.machine import ask_torch
from ssld.pipelines.config import ReportConfig
from ssld.pipelines.folder import inside_folder_of
from ssld.pipelines.runner.cost import disk_text, steps_text, total_text
from ssld.pipelines.runner.estimate import Costs
from ssld.pipelines.runner.plan import names_architecture
from ssld.pipelines.runner.stages import Stage
from ssld.pipelines.scaffold.fit import REPORT_SECONDS, Fit, fit
from ssld.pipelines.scaffold.pool import Pool, divide_pool, some_photos
from ssld.pipelines.scaffold.stage1 import proposes_stage_1
from ssld.pipelines.scaffold.suggest import Facts, Networks, networks_of, pipeline_text, shapes, split_content
from ssld.pipelines.scaffold.trials import keep_rates, trials
from ssld.shared.config.command import exit_code
from ssld.shared.config.settings import Parser, underscored
from ssld.shared.errors import STOPPED, Stopped, UserError
from ssld.shared.files import list_images, write_atomically
from ssld.shared.machine import cores
from ssld.shared.models.downloads import find_downloads_apart, kind_of
from ssld.shared.terminal import say
from ssld.shared.wording import duration, printable

MINUTES = 60.0
"""time that a pipeline fits if the user gives none"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 for a user's mistake."""
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not words:
        parser().print_usage(sys.stderr)
    return exit_code(lambda: _init(parser().parse_args(words)))


def _init(arguments: Namespace) -> int:
    _check_arguments(arguments)
    minutes = 60 * arguments.hours if arguments.hours is not None else arguments.minutes or MINUTES
    probe = ask_torch()
    gpus = probe.get("devices") or []
    networks = networks_of(
        gpu=bool(gpus),
        backbone=arguments.backbone,
        arch=arguments.arch,
        teacher=arguments.teacher,
        teacher_arch=arguments.teacher_arch,
    )
    distills, why = False, ""
    if arguments.unlabeled:
        photos = len(list_images(arguments.unlabeled))
        detector = bool(arguments.annotations or arguments.data)
        distills, why = proposes_stage_1(arguments.distill, networks[0].backbone, photos, detector=detector)
    networks = _available(networks, distills=distills)
    arguments = _as_files(arguments)
    names = _names(arguments)
    _check_unwritten(names.values())
    photos_read = _read_photos(arguments, names) if arguments.annotations else _Photos()
    pool = _divide(arguments, photos_read) if distills else None
    files = dict(photos_read.files)
    if pool:
        lists = {"pool": pool.train} | ({"held_out": pool.held_out} if pool.held_out else {})
        lists |= {"listing": [row["file_name"] for row in photos_read.train["images"]]} if arguments.annotations else {}
        files |= {names[name]: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
    if "shown" in names:
        files[names["shown"]] = "".join(f"{photo}\n" for photo in some_photos(arguments.unlabeled, arguments.seed))
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
        pretrained=not networks[0].backbone.startswith("random:"),
    )
    if why:
        say(why)
    try:
        with trials(facts, files) as trial:
            fitting = fit(facts, shapes(facts, networks), minutes, trial)
    except Stopped as error:
        say(str(error), sys.stderr)
        return STOPPED
    output: Path = arguments.output
    files[output] = pipeline_text(output, facts, fitting.settings, minutes, fitting.seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():  # the YAML file comes last: if it exists, all files exist
        write_atomically(file, text)
        say(f"wrote {file}")
    with inside_folder_of(output) as own:
        _tell(fitting, *keep_rates(own, fitting.rates), minutes)
    say(f"read {output}, then start it: ssld run {shlex.quote(str(output))}")
    return 0


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
    """Divide the unlabeled photos into those to train on and those held out; print how many copies of annotated photos are dropped."""
    training, evaluation = (
        _files(part, folder)
        for part, folder in (
            (photos.train, arguments.images),
            (photos.val, arguments.val_images or arguments.images),
        )
    )
    pool = divide_pool(arguments.unlabeled, training, evaluation, arguments.seed)
    if not pool.train:
        raise UserError(f"{arguments.unlabeled}: {pool.tally.describe()}; no photo is left to train on")
    if pool.tally.dropped("photo"):
        say(f"{arguments.unlabeled}: {pool.tally.describe()}")
    return pool


def _available(networks: list[Networks], *, distills: bool) -> list[Networks]:
    """Return the networks whose weights are on this machine or can be downloaded. Raises UserError if there are none, or a file is not usable."""
    roles = ("backbone", "teacher") if distills else ("backbone",)
    for role, flag in zip(roles, ("arch", "teacher_arch"), strict=False):
        text, arch = getattr(networks[0], role), getattr(networks[0], flag)
        if kind_of(text) == "path":
            raise UserError(f"--{role} {text}: no such file")
        if kind_of(text) == "file" and arch is None and not names_architecture(Path(text)):
            raise UserError(f"--{role} {text}: does not name its architecture; add --{flag} with its timm name")
    texts = {getattr(one, role): role for one in networks for role in roles}
    found = find_downloads_apart({text: text for text in texts})
    missing = {text: one for text in texts for one in found if one.text.startswith(f"{text}: ")}
    impossible = [text for text, one in missing.items() if not one.possible]
    left = [one for one in networks if not any(getattr(one, role) in impossible for role in roles)]
    if not left:
        flags = {"backbone": "--backbone FILE --arch NAME", "teacher": "--teacher FILE --teacher_arch NAME"}
        lines = [f"{missing[text].text.removeprefix(f'{text}: ')}: {flags[texts[text]]}" for text in impossible]
        raise UserError("\n".join(lines))
    for text, download in missing.items():
        if download.possible and any(text in (one.backbone, one.teacher) for one in left):
            say(download.text.removeprefix(f"{text}: "))
    return left


def _tell(fitting: Fit, stages: list[Stage], costs: Costs, minutes: float) -> None:
    """Print the choice, the time of each stage, and what more time would change."""
    chosen = fitting.settings
    size = (
        f"photos of {chosen.short_side} px (short side), batches of {chosen.batch}, {chosen.networks.channels} channels; "
        if chosen.short_side
        else ""
    )
    say(f"chosen: {chosen.networks.backbone}, {size}{fitting.reason}")
    width = max(len(stage.name) for stage in stages)
    for stage in stages:
        time = costs.times.get(stage.name)
        if time is None and isinstance(stage.config, ReportConfig):
            time = REPORT_SECONDS
        disk = disk_text(costs.disk[stage.name]) if stage.name in costs.disk else ""
        say("; ".join(text for text in (f"  {stage.name:<{width}}  {_about(time)}", steps_text(stage), disk) if text))
    say(f"  {'sum':<{width}}  about {duration(fitting.seconds)} of {minutes:g} min; {total_text(costs.disk)}")
    say(f"more time: {fitting.more}")


def _about(seconds: float | None) -> str:
    return "unknown time" if seconds is None else f"about {duration(seconds)}"


def _names(arguments: Namespace) -> dict[str, Path]:
    """Return every file that may be written, by its role."""
    output: Path = arguments.output
    names = {"pipeline": output}
    if arguments.annotations and not arguments.val_annotations:
        names |= {part: output.with_name(f"{output.stem}_{part}.json") for part in ("train", "val")}
    if arguments.unlabeled:
        parts = {"pool": "unlabeled", "held_out": "held_out"} | ({"listing": "train"} if arguments.annotations else {})
        parts |= {"shown": "shown"} if arguments.annotations else {}
        names |= {name: output.with_name(f"{output.stem}_{part}.txt") for name, part in parts.items()}
    return names


def _files(content: dict[str, Any], folder: Path) -> list[Path]:
    """Return the image files of a COCO file that exist."""
    files = [folder / row["file_name"] for row in content["images"]]
    return [file for file in files if file.is_file()]


def _check_arguments(arguments: Namespace) -> None:
    output: Path = arguments.output
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: give the name of a YAML file, as mine.yaml")
    _check_unwritten([output])
    given = {name: getattr(arguments, name) for name in ("output", "data", "unlabeled", *FLAGS)}
    for name, paths in given.items():
        for path in paths if isinstance(paths, list) else [paths]:
            if path and "${" in str(path):
                raise UserError(f"--{name} {path}: ${{ marks a variable in a pipeline; give a path without it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # before the slow check of the data
        why = "is not writable" if above.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {above} {why}; give another --output")
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
        if not arguments.unlabeled:
            raise UserError(
                "give --data, or --images and --annotations, for a detector, or --unlabeled for a backbone alone"
            )
        if arguments.val_annotations or arguments.distill == "no":
            raise UserError("give --data, or --images and --annotations, too: without them there is stage 1 alone")
    for name in ("data", *FLAGS):  # before a search for weights, which may end with another line
        for path in given[name] if isinstance(given[name], list) else [given[name]]:
            if path and not str(path).startswith("hub:") and not Path(path).exists():
                raise UserError(f"--{name} {path}: no such file or folder")
    if arguments.distill == "yes" and not arguments.unlabeled:
        raise UserError("--distill yes: give --unlabeled too, a folder of photos")
    for name, needs in (("arch", "backbone"), ("teacher_arch", "teacher")):
        if getattr(arguments, name) and not getattr(arguments, needs):
            raise UserError(f"--{name}: give --{needs} too, a weights file")
    for name in ("minutes", "hours"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1e6:
            raise UserError(f"--{name} {value:g}: give a number above 0")
    runs = output.parent / "runs" / output.stem
    if (runs / "pipeline.json").exists():
        raise UserError(f"{runs}: has runs of another pipeline; give another --output, or delete it")
    if not 0 < arguments.val_share < 1:
        raise UserError(f"--val_share {arguments.val_share:g}: give a share between 0 and 1")
    if arguments.unlabeled and not arguments.unlabeled.is_dir():
        raise UserError(f"{arguments.unlabeled}: no such folder")
    if arguments.unlabeled and not list_images(arguments.unlabeled):
        raise UserError(f"{arguments.unlabeled}: no images in it")


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


def parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        prog="ssld init",
        description="Write a commented pipeline for your own photos, to be read and edited.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="annotated photos by one path: data.yaml or folder (YOLO), folder (Pascal VOC, COCO, Roboflow), Parquet files or hub:ORG/NAME",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folder of the annotated photos, or one for each of --annotations",
    )
    parser.add_argument(
        "--annotations", type=Path, nargs="+", metavar="JSON", help="COCO JSON file of these photos, or several"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pipeline.yaml"),
        metavar="YAML",
        help="YAML file to write (default: pipeline.yaml)",
    )
    parser.add_argument(
        "--unlabeled",
        type=Path,
        metavar="DIR",
        help="folder of photos without annotations, for stage 1; without --annotations: a backbone alone",
    )
    parser.add_argument(
        "--distill",
        choices=("auto", "yes", "no"),
        default="auto",
        help="stage 1 on the unlabeled photos; auto: only where measurements say that it helps (default: auto)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, metavar="N", help="time that the whole pipeline may take on this machine (default: 60)"
    )
    length.add_argument("--hours", type=float, metavar="N", help="the same in hours")
    parser.add_argument(
        "--backbone",
        metavar="MODEL",
        help="backbone, and student of stage 1: a weights file, timm:NAME or random:NAME (default: by the machine)",
    )
    parser.add_argument("--arch", metavar="NAME", help="timm name of the backbone, for a file that does not name it")
    parser.add_argument("--teacher", metavar="MODEL", help="teacher of stage 1: a weights file or timm:NAME")
    parser.add_argument(
        "--teacher_arch", metavar="NAME", help="timm name of the teacher, for a file that does not name it"
    )
    parser.add_argument(
        "--val_annotations",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="COCO JSON file for evaluation (default: a part of --annotations)",
    )
    parser.add_argument(
        "--val_images", type=Path, nargs="+", metavar="DIR", help="folder of the evaluation photos (default: --images)"
    )
    parser.add_argument(
        "--val_share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="fraction of the images to evaluate on (default: 0.2)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the split and of the runs, 0 to 2^32 - 1 (default: 0)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
