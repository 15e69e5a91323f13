"""ENTRY: write a commented pipeline for your own photos, to be read and edited.

    python pipelines/init.py --images photos --annotations annotations.json --output mine.yaml
    python pipelines/run.py mine.yaml --dry-run

The data are checked first, as by `ssld doctor`. Image sizes, anchors, length and warm-up follow from the number of images, the size of the objects
and the machine. Without an evaluation file, a random fifth of the images (seeded) becomes one: `mine_train.json` and `mine_val.json` beside the YAML
file. With `--unlabeled DIR` the backbone is first distilled on those images, and a second detector without that step measures its gain.
"""

import json
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.checks.data import FLAGS, check_data
from ssld.pipelines.checks.machine import ask_torch
from ssld.pipelines.scaffold.pool import divide_pool
from ssld.pipelines.scaffold.suggest import Facts, pipeline_text, split_content, suggest
from ssld.shared.config.command import exit_code
from ssld.shared.config.settings import Parser, underscored
from ssld.shared.errors import UserError
from ssld.shared.files import list_images, write_atomically
from ssld.shared.machine import cores
from ssld.shared.terminal import say


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 for a user's mistake."""
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    return exit_code(lambda: _init(parser().parse_args(words)))


def _init(arguments: Namespace) -> int:
    output: Path = arguments.output
    names = _names(arguments)
    _check_arguments(arguments, names.values())
    statistics, content = _check_photos(arguments)
    train, val = arguments.annotations, arguments.val_annotations
    val_images = arguments.val_images or arguments.images
    written: dict[Path, str] = {}
    if val is None:
        content = _with_orientation(content, statistics["train"]["orientation"])
        parts = split_content(
            content, share=arguments.val_share, seed=arguments.seed, together=statistics["train"]["together"]
        )
        train, val = names["train"], names["val"]
        written = {file: json.dumps(part) for file, part in zip((train, val), parts, strict=True)}
        content, evaluation = parts
    else:
        evaluation = json.loads(val.read_bytes())
    pool = None
    if arguments.unlabeled:
        pool = divide_pool(
            arguments.unlabeled,
            _files(content, arguments.images),
            _files(evaluation, val_images),
            arguments.seed,
        )
        if not pool.train:
            raise UserError(f"{arguments.unlabeled}: {pool.tally.describe()}; no photo is left to train on")
        lists = {"listing": [row["file_name"] for row in content["images"]], "pool": pool.train}
        lists |= {"held_out": pool.held_out} if pool.held_out else {}
        written |= {names[name]: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
        if pool.tally.dropped("photo"):
            say(f"{arguments.unlabeled}: {pool.tally.describe()}")
    probe = ask_torch()
    facts = Facts(
        annotations=train,
        images_folder=arguments.images,
        val_annotations=val,
        val_images=val_images,
        split=arguments.val_annotations is None,
        images=len(content["images"]),
        statistics=statistics["train"],
        unlabeled=arguments.unlabeled,
        unlabeled_images=len(pool.train) if pool else 0,
        pool=names.get("pool"),
        held_out=names["held_out"] if pool and pool.held_out else None,
        listing=names.get("listing"),
        gpu=tuple(probe["devices"][0]) if probe.get("devices") else None,
        gpus=len(probe.get("devices") or []),
        cores=cores(),
        seed=arguments.seed,
    )
    written[output] = pipeline_text(output, facts, suggest(facts))
    output.parent.mkdir(parents=True, exist_ok=True)
    for file, text in written.items():  # the YAML file comes last: if it exists, all files exist
        write_atomically(file, text)
        say(f"wrote {file}")
    command = f"ssld run {shlex.quote(str(output))}"
    say(
        f"read it, then start {command} with --dry-run --estimate (prints the time of each stage), with --smoke, and without flags"
    )
    return 0


def _names(arguments: Namespace) -> dict[str, Path]:
    """Return every file that will be written, by its role."""
    output: Path = arguments.output
    names = {"pipeline": output}
    if not arguments.val_annotations:
        names |= {part: output.with_name(f"{output.stem}_{part}.json") for part in ("train", "val")}
    if arguments.unlabeled:
        parts = {"listing": "train", "pool": "unlabeled", "held_out": "held_out"}
        names |= {name: output.with_name(f"{output.stem}_{part}.txt") for name, part in parts.items()}
    return names


def _files(content: dict[str, Any], folder: Path) -> list[Path]:
    """Return the image files of a COCO file that exist."""
    files = [folder / row["file_name"] for row in content["images"]]
    return [file for file in files if file.is_file()]


def _check_arguments(arguments: Namespace, names: Iterable[Path]) -> None:
    output: Path = arguments.output
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: give the name of a YAML file, as mine.yaml")
    for file in names:
        if file.exists():
            raise UserError(f"{file}: exists already; give another --output, or delete it")
    given = {"output": output} | {name: getattr(arguments, name) for name in (*FLAGS, "unlabeled")}
    for name, path in given.items():
        if path and "${" in str(path):
            raise UserError(f"--{name} {path}: ${{ marks a variable in a pipeline; give a path without it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # before the slow check of the data
        why = "is not writable" if above.is_dir() else "is not a folder"
        raise UserError(f"--output {output}: {above} {why}; give another --output")
    if arguments.val_images and not arguments.val_annotations:
        raise UserError("--val_images: give --val_annotations too")
    if not 0 < arguments.val_share < 1:
        raise UserError(f"--val_share {arguments.val_share:g}: give a share between 0 and 1")
    if arguments.unlabeled and not arguments.unlabeled.is_dir():
        raise UserError(f"{arguments.unlabeled}: no such folder")
    if arguments.unlabeled and not list_images(arguments.unlabeled):
        raise UserError(f"{arguments.unlabeled}: no images in it")


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
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the annotated photos")
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="JSON", help="COCO JSON file of these photos"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pipeline.yaml"),
        metavar="YAML",
        help="YAML file to write (default: pipeline.yaml)",
    )
    parser.add_argument(
        "--unlabeled", type=Path, metavar="DIR", help="folder of photos without annotations, for distillation"
    )
    parser.add_argument(
        "--val_annotations",
        type=Path,
        metavar="JSON",
        help="COCO JSON file for evaluation (default: a part of --annotations)",
    )
    parser.add_argument(
        "--val_images", type=Path, metavar="DIR", help="folder of the evaluation photos (default: --images)"
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
