"""ENTRY: check the machine, a settings file or pipeline, and detection data before a run.

    python pipelines/doctor.py
    python pipelines/doctor.py pipelines/quickstart.yaml
    python pipelines/doctor.py pipelines/quickstart.yaml --look sheets
    python pipelines/doctor.py --annotations train.json --images photos --val_annotations val.json --val_images photos

Exit code 0: no faults (there may be warnings), 1: a fault that would end a run or make its scores worthless, 2: a mistake in the command.
`stage2_detect/check_data.py` checks the data in a separate process, so that a broken torchvision is reported instead of crashing the doctor.
Changes nothing; `--fix DIR` writes cleaned copies of the JSON files there, `--look DIR` the first images of each training. Does not import torch.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.checks.data import FLAGS, DataNeeds, DataSet, check_words, words_of
from ssld.pipelines.checks.look import sheet_lines
from ssld.pipelines.checks.machine import Line, ask_torch, machine_lines
from ssld.pipelines.checks.settings import is_pipeline, settings_lines
from ssld.pipelines.folder import inside_folder_of, rebased
from ssld.pipelines.runner.stages import find_pipeline
from ssld.shared.config.command import exit_code
from ssld.shared.config.settings import Parser
from ssld.shared.config.words import underscored
from ssld.shared.errors import USER_ERROR, UserError
from ssld.shared.terminal import say, say_lines
from ssld.shared.wording import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 without faults, 1 with at least one, 2 for a user's mistake."""
    return exit_code(lambda: _doctor([underscored(word) for word in (sys.argv[1:] if argv is None else argv)]))


def _doctor(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    data = dict.fromkeys(_data_of(arguments), DataNeeds(masks=False, allow_loss=False))
    lines: list[Line] = []

    def report(findings: Iterator[Line]) -> None:
        for line in findings:
            lines.append(line)
            say(f"  {line.level:<8}{line.topic:<12}{printable(line.text)}")

    settings = find_pipeline(arguments.settings) if arguments.settings else None
    if settings and not settings.exists():
        raise UserError(f"{settings}: no such file; settings are a YAML file")
    if arguments.look and not settings:
        raise UserError("--look: give a settings file or a pipeline too")
    print("machine", flush=True)
    probe = cache(ask_torch)
    report(machine_lines(probe))
    if settings:
        say("")
        say(f"settings: {arguments.settings}")
        with inside_folder_of(settings) if is_pipeline(settings) else nullcontext(settings) as own:
            variables = dict(arguments.variable)
            findings, data_sets = settings_lines(own, probe(), variables, quick=arguments.quick)
            report(iter(findings))
            data = data or data_sets
            if arguments.look:
                say_lines("\nfirst training images")
                report(sheet_lines(own, rebased(arguments.look), variables))
    codes = []
    for data_set, needs in data.items():
        print("\ndata", flush=True)
        code, findings = _check_data(data_set, arguments, needs)
        codes.append(code)
        lines += findings
    say_lines("\n" + _verdict(lines, arguments.fix if codes and USER_ERROR not in codes else None))
    if USER_ERROR in codes:
        return USER_ERROR
    return 1 if any(line.level == "fault" for line in lines) else 0


def _verdict(lines: list[Line], copies: Path | None) -> str:
    """Summarize the faults and warnings, faults first, one shortened line each; `copies` is the folder of cleaned copies, if they were written."""
    worst = [line for level in ("fault", "warning") for line in lines if line.level == level]
    faults = sum(line.level == "fault" for line in lines)
    warnings = len(worst) - faults
    if not worst:
        return "verdict: no faults, no warnings"
    head = f"verdict: {faults or 'no'} fault{'' if faults == 1 else 's'}, {warnings or 'no'} warning{'' if warnings == 1 else 's'}"
    rows = [
        f"  {line.level:<8}{line.topic}: {printable(line.text[:100])}{'...' if len(line.text) > 100 else ''}"
        for line in worst[:16]
    ]
    more = [f"  and {len(worst) - 16} more, above"] if len(worst) > 16 else []
    end = (
        f"  fix the faults before you start a run{f'; in {copies} there are copies without those marked --fix' if copies else ''}"
        if faults
        else "  a run can start; check that the warnings are intended"
    )
    return "\n".join([head, *rows, *more, end])


def _check_data(data: DataSet, arguments: Namespace, needs: DataNeeds) -> tuple[int, list[Line]]:
    """Run the data check; return (its exit code, its findings)."""
    more = ["--fix", str(arguments.fix)] if arguments.fix else []
    more += [flag for flag in ("--quick", "--near_duplicates") if getattr(arguments, flag[2:])]
    more += [flag for flag in ("--masks", "--allow_loss") if getattr(needs, flag[2:])]
    code, report = check_words(data, *more)
    if report is None:
        return code, [Line("fault", "data", f"{data[1]}: not checked, see above")]
    lines = [Line(finding["level"], finding["file"], finding["text"]) for finding in report["findings"]]
    if code and not any(line.level == "fault" for line in lines):  # the check failed after it had written its findings
        lines.append(Line("fault", "data", f"{data[1]}: not finished, see above"))
    return code, lines


def _data_of(arguments: Namespace) -> list[DataSet]:
    given = {name: getattr(arguments, name) or [] for name in FLAGS}
    if arguments.data:
        if any(given.values()):
            raise UserError("--data: names the whole data set; leave out --annotations and the like")
        return [words_of({"data": [arguments.data]})]
    if not any(given.values()):
        if arguments.fix and not arguments.settings:
            raise UserError("--fix: give the data too, by --data, or by --annotations and --images")
        return []
    if not (given["annotations"] and given["images"]) or bool(given["val_annotations"]) != bool(given["val_images"]):
        raise UserError("give --annotations and --images together, and --val_annotations and --val_images")
    return [words_of(given)]


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--variable {text}: expected NAME=VALUE")
    return name, value


def parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        prog="ssld doctor",
        description="Check this machine, a settings file or pipeline, and detection data before a run.",
        epilog="Exit code 0: no faults, 1: a fault that would end a run or make its scores worthless, 2: a mistake in the command.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "settings",
        nargs="?",
        metavar="YAML",
        help="a pipeline (a file, or the name of a shipped one such as quickstart) or the settings of one command",
    )
    parser.add_argument(
        "--variable",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a variable of the pipeline",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="data set to check, instead of the files: data.yaml or folder (YOLO), folder (VOC, COCO, Roboflow), hub:ORG/NAME",
    )
    files: dict[str, Any] = {"type": Path, "nargs": 1, "action": "extend"}
    parser.add_argument("--annotations", **files, metavar="JSON", help="COCO JSON file to check; repeated for several")
    parser.add_argument("--images", **files, metavar="DIR", help="folder of its images; one for all files, or repeated")
    parser.add_argument("--val_annotations", **files, metavar="JSON", help="COCO JSON file for evaluation")
    parser.add_argument("--val_images", **files, metavar="DIR", help="folder of the evaluation images")
    parser.add_argument("--fix", type=Path, metavar="DIR", help="folder for cleaned copies of the JSON files")
    parser.add_argument(
        "--look",
        type=Path,
        metavar="DIR",
        help="folder for a sheet of the first images of each training, as its network gets them: STAGE.jpg",
    )
    parser.add_argument(
        "--near_duplicates",
        action="store_true",
        help="also search for near-duplicates between training and evaluation images",
    )
    parser.add_argument("--quick", action="store_true", help="do not open the images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
