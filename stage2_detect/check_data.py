"""Check a COCO data set before training: rows that training refuses or drops, and data that would mislead it.

    python stage2_detect/check_data.py --annotations train.json --images photos --val_annotations val.json --val_images photos --fix data/clean

Prints the findings and, for each, the change that --fix makes in a cleaned copy of the JSON file, written to a separate folder; the given files and
the images are never changed. Exit code 0: training can begin; 1: a finding would stop training or make its scores worthless; 2: a mistake in the
command. `ssld doctor` runs this check and one of the machine.
"""

import json
import posixpath
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import exit_code
from ssld.shared.config.settings import Parser
from ssld.shared.config.words import underscored
from ssld.shared.errors import UserError
from ssld.shared.files import short_names
from ssld.shared.terminal import say
from ssld.shared.wording import count, printable, some
from ssld.stage2_detect.data.check.findings import LEVELS, Finding

if TYPE_CHECKING:
    from ssld.stage2_detect.data.check.annotations import FileCheck
    from ssld.stage2_detect.data.check.images import ImageFacts
    from ssld.stage2_detect.data.convert.parts import DataSet

_WIDTH, _CLASSES = 24, 12


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 without faults, 1 with some, 2 for a user's mistake."""
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    return exit_code(lambda: check_data(_parser().parse_args(words)))


def check_data(arguments: Namespace) -> int:
    """Check the files, print the findings, write the cleaned copies; returns the exit code."""
    from ssld.stage2_detect.data.check.annotations import check_rows
    from ssld.stage2_detect.data.check.images import check_frames, check_images, check_unlisted

    data = _data(arguments)
    if arguments.parts:
        _write_parts(data, arguments)
        return 0
    for note in data.notes:
        say(printable(note))
    places = _places(data, arguments)
    labels = short_names(str(file) for _, file, _ in places)
    checks = [
        check_rows(name, file, folder, label=labels[str(file)], masks=arguments.masks, allow_loss=arguments.allow_loss)
        for name, file, folder in places
    ]
    facts = [check_images(check, quick=arguments.quick) for check in checks]
    check_unlisted(checks)
    if len(checks) == 1:
        check_frames(checks[0], facts[0])
    if len(checks) == 2:
        _compare_classes(*checks)
        _compare_images(checks[0], checks[1], facts[0], facts[1], near=arguments.near_duplicates)
    for line in [*(line for check in checks for line in _about(check)), *_histogram(checks)]:
        say(printable(line))
    findings = [finding for check in checks for finding in check.findings]
    for level in reversed(LEVELS):
        for finding in findings:
            if finding.level == level:
                say(line_of(finding))
    if arguments.report:
        record = {
            "files": {check.name: check.statistics | {"tally": check.tally.record()} for check in checks},
            "findings": [asdict(one) for one in findings],
        }
        arguments.report.write_text(json.dumps(record), encoding="utf-8")
    if arguments.accepted:
        _write_accepted(checks[0], arguments.accepted)
    if arguments.fix:
        _write_copies(checks, _copies(places, arguments.fix), allow_loss=arguments.allow_loss)
    levels = Counter(finding.level for finding in findings)
    if not arguments.report:  # a program that reads the report prints its own last line
        say(
            f"{count(levels['fault'], 'fault')}, {count(levels['warning'], 'warning')}, {count(levels['note'], 'note')}"
        )
    return 1 if levels["fault"] else 0


def line_of(finding: Finding) -> str:
    """Return the printed line of a finding."""
    fix = f" [--fix DIR {finding.fix}]" if finding.fix else ""
    return f"  {finding.level:<8}{printable(f'{finding.file}: {finding.text}')}{fix}"


def _data(arguments: Namespace) -> "DataSet":
    """Return the parts that the arguments name, converted or merged where needed."""
    from ssld.shared.config.validation import validate
    from ssld.stage2_detect.data.convert.parts import find_data
    from ssld.stage2_detect.data_config import DetectionDataConfig

    if (arguments.val_annotations is None) != (arguments.val_images is None):
        raise UserError("give both --val_annotations and --val_images, or neither")
    given = {
        "source": arguments.data,
        "train_annotations": arguments.annotations,
        "train_images": arguments.images,
        "val_annotations": arguments.val_annotations,
        "val_images": arguments.val_images,
    }
    if not arguments.data and not (arguments.annotations and arguments.images):
        raise UserError("give --data, or --annotations and --images")
    for folder in [*(arguments.images or []), *(arguments.val_images or [])]:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    values = {key: value for key, value in given.items() if value is not None}
    return find_data(
        validate(DetectionDataConfig, {**values, "allow_loss": arguments.allow_loss}, source="command line")
    )


def _write_parts(data: "DataSet", arguments: Namespace) -> None:
    parts = {
        name: part
        and {
            "split": part.split,
            "annotations": str(part.annotations.absolute()),
            "images": str(part.images.absolute()),
        }
        for name, part in (("train", data.train), ("val", data.val))
    }
    record = {
        "kind": data.kind,
        "source": arguments.data,
        "converted": data.converted,
        **parts,
        "notes": list(data.notes),
    }
    arguments.parts.write_text(json.dumps(record), encoding="utf-8")


def _places(data: "DataSet", arguments: Namespace) -> list[tuple[str, Path, Path]]:
    parts = (("train", data.train), ("val", data.val))
    places = [(name, part.annotations, part.images) for name, part in parts if part]
    for _, _, folder in places:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    if arguments.fix:
        if arguments.quick:
            raise UserError("--fix needs to read the images; leave out --quick")
        if not arguments.fix.is_dir() and arguments.fix.exists():
            raise UserError(f"--fix {arguments.fix}: is a file; give a folder for the cleaned copies")
        for copy in _copies(places, arguments.fix).values():
            if copy.exists():
                raise UserError(f"{copy}: exists already; give another folder to --fix")
    return places


def _copies(places: list[tuple[str, Path, Path]], folder: Path) -> dict[str, Path]:
    """Return the path of the cleaned copy of each file; files of equal name get the part as a prefix."""
    alike = len({file.name for _, file, _ in places}) < len(places)
    return {name: folder / (f"{name}_{file.name}" if alike else file.name) for name, file, _ in places}


def _about(check: "FileCheck") -> list[str]:
    facts = check.statistics
    dropped = (
        f", of {facts['boxes'] + facts['dropped']:,}: {facts['dropped']:,} {'dropped' if check.name == 'train' else 'crowd or unusable'}"
        if facts["dropped"]
        else ""
    )
    lines = [
        f"{check.file}: {count(facts['images'], 'image')}, {count(len(facts['classes']), 'class')}, {count(facts['boxes'], 'box')}{dropped}"
    ]
    if facts["object_sizes"]:
        low, _, middle, _, high = (100 * value for value in facts["object_sizes"])
        lines.append(
            f"  {facts['long_side']:g} x {facts['short_side']:g} pixels at the median; objects are {middle:.0f} % of the short side "
            f"(5 to 95 of 100: {low:.0f} to {high:.0f} %), at most {facts['most_boxes']:,} in one image"
        )
    return lines


def _histogram(checks: "list[FileCheck]") -> list[str]:
    """Return lines with the number of boxes of each class in all files, sorted by frequency in the first file."""
    counts = [check.statistics["classes"] for check in checks]
    names = sorted(
        dict.fromkeys(name for classes in counts for name in classes), key=lambda name: -counts[0].get(name, 0)
    )
    most = max([1, *counts[0].values()])
    rows = [(name, [classes.get(name, 0) for classes in counts]) for name in names]
    if len(rows) > _CLASSES + 1:
        rest = [sum(numbers) for numbers in zip(*(numbers for _, numbers in rows[_CLASSES:]), strict=True)]
        rows = [*rows[:_CLASSES], (f"{len(rows) - _CLASSES} more", rest)]
    head = f"  {'boxes of a class':<20} {' '.join(f'{check.name:>8}' for check in checks)}"
    bars = ["#" * min(_WIDTH, -(-_WIDTH * numbers[0] // most)) if name in counts[0] else "" for name, numbers in rows]
    return [head] + [
        f"  {name[:20]:<20} {' '.join(f'{number:>8,}' for number in numbers)} {bar}".rstrip()
        for (name, numbers), bar in zip(rows, bars, strict=True)
    ]


def _compare_classes(train: "FileCheck", val: "FileCheck") -> None:
    """Report and repair class names that differ between both files, for which training stops."""
    train_names, val_names = (list(dict.fromkeys(check.class_of.values())) for check in (train, val))
    missing = [name for name in train_names if name not in val_names]
    extra = [name for name in val_names if name not in train_names]
    if not missing and not extra:
        return
    from ssld.stage2_detect.data.coco_rows import plain_name

    plain = {plain_name(name): name for name in missing}
    renamed = {name: plain[plain_name(name)] for name in extra if plain_name(name) in plain}
    stuck = [name for name in extra if name not in renamed and val.boxes_of[name]]
    words = [f"{name!r} is {other!r} in {train.label}" for name, other in list(renamed.items())[:3]]
    for title, names in (
        ("missing", [name for name in missing if name not in renamed.values()]),
        ("unknown", [name for name in extra if name not in renamed]),
    ):
        words += [f"{title}: {some(names, 5)}"] if names else []
    val.add(
        "fault",
        f"its classes are not those of {train.label} ({'; '.join(words)}): training stops",
        None if stuck else "gives it the same classes",
    )
    if stuck:
        return
    ids = set(val.class_of)
    for index, name in enumerate(val.rows.class_names):
        if name in renamed:
            val.repair.category_values.setdefault(index, {})["name"] = renamed[name]
        elif name in extra:
            val.repair.drop_categories.add(index)
    for index, row in enumerate(train.content["categories"]):
        new: Any = train.rows.category_ids[index]
        name = train.rows.class_names[index]
        if new is not None and index not in train.rows.unused and name in missing and name not in renamed.values():
            while new in ids:
                new = new + 1 if isinstance(new, int) else f"{new}_"
            ids.add(new)
            val.repair.new_categories.append({**row, "id": new, "name": name})


def _compare_images(
    train: "FileCheck",
    val: "FileCheck",
    train_facts: dict[int, "ImageFacts"],
    val_facts: dict[int, "ImageFacts"],
    *,
    near: bool,
) -> None:
    """Report images that are in both files, since scores on training images are worthless; `near` compares near-duplicates too."""
    from ssld.stage2_detect.data.check.images import near_duplicates

    names = [
        {index: check.content["images"][index]["file_name"] for index in check.image_of.values()}
        for check in (train, val)
    ]
    known = {one.digest: index for index, one in val_facts.items()}
    pairs = [(index, known[one.digest]) for index, one in train_facts.items() if one.digest in known]
    if not val_facts and train.folder.resolve() == val.folder.resolve():  # with --quick: compare the names at least
        known_names = {posixpath.normpath(name): index for index, name in names[1].items()}
        plain = {index: posixpath.normpath(name) for index, name in names[0].items()}
        pairs = [(index, known_names[name]) for index, name in plain.items() if name in known_names]
    if pairs:
        examples = some(
            [names[0][a] if names[0][a] == names[1][b] else f"{names[0][a]} = {names[1][b]}" for a, b in pairs]
        )
        train.add(
            "fault",
            f"{count(len(pairs), 'image')} also in {val.label} ({examples}): scores would be too good",
            f"removes them from {train.label}",
        )
        train.repair.drop_images |= {index: f"also in {val.label}" for index, _ in pairs}
    _compare_photos(train, val, names[0], names[1])
    if near:
        first, second = list(train_facts), list(val_facts)
        hashes = [train_facts[index].hash for index in first], [val_facts[index].hash for index in second]
        near_pairs = {(first[a], second[b]) for a, b in near_duplicates(*hashes)} - set(pairs)
        if near_pairs:
            examples = some([f"{names[0][a]} ~ {names[1][b]}" for a, b in sorted(near_pairs)])
            train.add(
                "warning",
                f"{count(len(near_pairs), 'pair')} of near-duplicates in {train.label} and {val.label} ({examples}): look at them",
            )


def _compare_photos(
    train: "FileCheck", val: "FileCheck", train_names: dict[int, str], val_names: dict[int, str]
) -> None:
    """Report photos with augmented copies in both files, which make scores too good."""
    from ssld.stage2_detect.data.image_names import photo_of

    known = {photo: name for name in val_names.values() if (photo := photo_of(name)) is not None}
    pairs = [f"{name} ~ {known[photo]}" for name in train_names.values() if (photo := photo_of(name)) in known]
    if pairs:
        train.add(
            "warning",
            f"{count(len(pairs), 'image')} of which {val.label} has an augmented copy by its name ({some(pairs, 2)}): scores "
            "would be too good; split the photos before augmenting them",
        )


def _check_category_ids(check: "FileCheck") -> None:
    """Raise UserError for a category without id, since its annotations are unknown."""
    for index, category_id in enumerate(check.rows.category_ids):
        if index not in check.repair.drop_categories and category_id is None:
            raise UserError(
                f"no cleaned copy: {check.file}: number {index + 1} of the categories has no unique id (number or text); give it one"
            )


def _write_accepted(check: "FileCheck", file: Path) -> None:
    """Write a file with the values that training reads, all rows included; nothing for a file with faults."""
    from ssld.stage2_detect.data.check.annotations import accept_changes
    from ssld.stage2_detect.data.check.findings import Repair

    accepted = Repair()
    accept_changes(accepted, check.rows)
    if not any(finding.level == "fault" for finding in check.findings):
        file.write_text(json.dumps(accepted.apply(check.content)), encoding="utf-8")


def _write_copies(checks: "Sequence[FileCheck]", copies: dict[str, Path], *, allow_loss: bool) -> None:
    """Write the cleaned copies, all or none, and read them back as training does; prints one line per file."""
    from ssld.shared.files import atomically, clear_leftovers
    from ssld.stage2_detect.data.coco import read_coco, require_boxes

    for check in checks:
        _check_category_ids(check)
        lost = None if allow_loss else check.left_out().bulk_loss()
        if lost:
            raise UserError(f"no cleaned copy: {check.file}: {lost}; correct the file itself")
    lines = []
    with ExitStack() as pending:
        for check in checks:
            file, content = copies[check.name], check.repair.apply(check.content)
            file.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(list(file.parent.glob(f".{file.name}.*")))
            written = pending.enter_context(atomically(file))
            written.write_text(json.dumps(content), encoding="utf-8")
            try:
                data = read_coco(written, check.folder, training=True)
                if check.name == "train":
                    require_boxes(data, allow_loss=allow_loss)
            except UserError as error:
                why = str(error).replace(str(written), str(check.file))
                raise UserError(f"no cleaned copy: training would refuse it: {why}") from None
            before = {key: len(check.content[key]) for key in ("images", "annotations")}
            dropped = [
                count(before[key] - len(content[key]), key[:-1]) for key in before if before[key] > len(content[key])
            ]
            note = f"; left out: {' and '.join(dropped)}" if dropped else ""
            lines.append(
                f"wrote {file}: {count(len(data.images), 'image')}, {count(data.counts['boxes'], 'box')}{note}; the images stay in {check.folder}"
            )
    for line in lines:
        say(line)


def _parser() -> Parser:
    parser = Parser(prog="check_data.py", description="Check a COCO data set before training.", allow_abbrev=False)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="data set to check, instead of the files: data.yaml or folder (YOLO), folder (VOC, LabelMe, COCO, Roboflow, Hugging Face), hub:ORG/NAME",
    )
    files: dict[str, Any] = {"type": Path, "nargs": "+", "action": "extend"}
    parser.add_argument(
        "--annotations", **files, metavar="JSON", help="COCO JSON file to check, or several, read as one"
    )
    parser.add_argument("--images", **files, metavar="DIR", help="folder of its images, or one for each file")
    parser.add_argument("--val_annotations", **files, metavar="JSON", help="COCO JSON file for evaluation, or several")
    parser.add_argument(
        "--val_images", **files, metavar="DIR", help="folder of the evaluation images, or one for each file"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="DIR", help="write cleaned copies of the JSON files into this folder"
    )
    parser.add_argument(
        "--near_duplicates", action="store_true", help="report near-duplicates between training and evaluation images"
    )
    parser.add_argument("--quick", action="store_true", help="check that the images exist without opening them")
    parser.add_argument("--masks", action="store_true", help="check segmentations for a detector with masks")
    parser.add_argument("--allow_loss", action="store_true", help="check as training with data.allow_loss: true")
    parser.add_argument(
        "--accepted",
        type=Path,
        metavar="FILE",
        help="JSON file for the training annotations as training reads them, written if there is no fault; for other programs",
    )
    parser.add_argument(
        "--parts",
        type=Path,
        metavar="FILE",
        help="JSON file for the COCO files and image folders of the parts, written in place of the check; for other programs",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON file for the findings and statistics, for other programs"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
