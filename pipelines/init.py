"""ENTRY: a pipeline for one's own photos, written to be read and changed.

    python pipelines/init.py --images photos --annotations annotations.json --output mine.yaml
    python pipelines/run.py mine.yaml --dry-run

The data are looked over first, as `ssld doctor` does. Sizes, anchors, length and warm-up follow from the number of pictures, the size of the objects
and the machine. Where no evaluation file is given, a seeded fifth of the images becomes one: `mine_train.json` and `mine_val.json` beside the YAML
file. With `--unlabeled DIR` the backbone is first distilled on those pictures, and a detector without that step shows what it is worth.
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
    statistics, content = _look_over(arguments)
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
            raise UserError(f"{arguments.unlabeled}: {pool.tally.describe()}; nothing is left to learn from")
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
    for file, text in written.items():  # the YAML file comes last: where it is, everything is
        write_atomically(file, text)
        say(f"wrote {file}")
    say(f"look at it, then: ssld run {shlex.quote(str(output))} --dry-run, --smoke, and without either")
    return 0


def _names(arguments: Namespace) -> dict[str, Path]:
    """Every file that is going to be written."""
    output: Path = arguments.output
    names = {"pipeline": output}
    if not arguments.val_annotations:
        names |= {part: output.with_name(f"{output.stem}_{part}.json") for part in ("train", "val")}
    if arguments.unlabeled:
        parts = {"listing": "train", "pool": "unlabeled", "held_out": "held_out"}
        names |= {name: output.with_name(f"{output.stem}_{part}.txt") for name, part in parts.items()}
    return names


def _files(content: dict[str, Any], folder: Path) -> list[Path]:
    """The images of a COCO file that are there."""
    files = [folder / row["file_name"] for row in content["images"]]
    return [file for file in files if file.is_file()]


def _check_arguments(arguments: Namespace, names: Iterable[Path]) -> None:
    output: Path = arguments.output
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: give the name of a YAML file, as mine.yaml")
    for file in names:
        if file.exists():
            raise UserError(f"{file}: is there already; give another --output, or delete it")
    given = {"output": output} | {name: getattr(arguments, name) for name in (*FLAGS, "unlabeled")}
    for name, path in given.items():
        if path and "${" in str(path):
            raise UserError(f"--{name} {path}: ${{ stands for a variable in a pipeline; give a path without it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # before the data are looked over
        why = "cannot be written to" if above.is_dir() else "is no folder"
        raise UserError(f"--output {output}: {above} {why}; give another --output")
    if arguments.val_images and not arguments.val_annotations:
        raise UserError("--val_images: give --val_annotations too")
    if not 0 < arguments.val_share < 1:
        raise UserError(f"--val_share {arguments.val_share:g}: give a share between 0 and 1")
    if arguments.unlabeled and not arguments.unlabeled.is_dir():
        raise UserError(f"{arguments.unlabeled}: no such folder")
    if arguments.unlabeled and not list_images(arguments.unlabeled):
        raise UserError(f"{arguments.unlabeled}: no images in it")


def _look_over(arguments: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(statistics of the files, content of the training annotations as training reads them), from the data check. Raises UserError where it finds a
    fault."""
    val_images = (arguments.val_images or arguments.images) if arguments.val_annotations else None
    places = (arguments.annotations, arguments.images, arguments.val_annotations, val_images)
    with tempfile.TemporaryDirectory() as folder:
        accepted = Path(folder) / "accepted.json"
        code, report = check_data(places, "--accepted", str(accepted))
        content = json.loads(accepted.read_bytes()) if accepted.is_file() else {}
    if report is None:
        raise UserError(f"{arguments.annotations}: cannot be looked over, see above")
    if code:
        given = " ".join(f"--{name} {path}" for name, path in zip(FLAGS, places, strict=True) if path)
        advice = f"ssld doctor {given} --fix DIR writes cleaned copies"
        if any(one["level"] == "fault" and not one["fix"] for one in report["findings"]):
            advice = "mend them first"
        raise UserError(f"the data have faults, see above; {advice}")
    return report["files"], content


def _with_orientation(content: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The content of a file that says which form of its images its boxes are for: a part of it may lack the images that show it
    (`stage2_detect/data/orientation.py`)."""
    if not (found["upright"] or found["stored"] or found["both"]):
        return content
    info = content.get("info")
    return {**content, "info": {**(info if isinstance(info, dict) else {}), "image_orientation": found["convention"]}}


def parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        prog="ssld init",
        description="Write a pipeline for your own photos, to be read and changed.",
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the annotated photos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="their COCO JSON")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pipeline.yaml"),
        metavar="YAML",
        help="the pipeline to write (pipeline.yaml)",
    )
    parser.add_argument(
        "--unlabeled", type=Path, metavar="DIR", help="folder of photos without annotations: SSLD learns from them"
    )
    parser.add_argument(
        "--val_annotations",
        type=Path,
        metavar="JSON",
        help="annotations to evaluate on, instead of a part of the others",
    )
    parser.add_argument("--val_images", type=Path, metavar="DIR", help="folder of their photos, where it is another")
    parser.add_argument(
        "--val_share", type=float, default=0.2, metavar="SHARE", help="share of the images to evaluate on (0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that split and of the runs (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
