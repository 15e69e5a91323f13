"""The console script `ssld`: sub-commands that hand the rest of the line to an entry script, nothing more.

A sub-command's module is imported when it is called, so that `ssld --help` needs no torch.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command import USER_ERROR
from shared.config import did_you_mean, read_yaml
from shared.errors import UserError

# name -> (module with main(argv), one line of help)
COMMANDS = {
    "run": ("pipelines.run", "run a pipeline, from images to the table and the report"),
    "teach": ("stage1_ssld.teach", "fine-tune a teacher on labelled images"),
    "curate": ("stage1_ssld.curate", "select unlabelled images: the best of each class, without near-duplicates"),
    "soft-labels": ("stage1_ssld.write_soft_labels", "write a store of the teacher's answers"),
    "distill": ("stage1_ssld.distill", "train a student from a teacher's soft labels, without human labels"),
    "train": ("stage2_detect.train", "train a detector from a backbone file"),
    "evaluate": ("", "evaluate a backbone or detector file, told apart by what it holds"),
    "predict": ("stage2_detect.predict", "find objects in pictures: drawn, as COCO JSON, or as pseudo-labels"),
    "export": ("stage1_ssld.export", "export a backbone file: ONNX, checked, and a folder for the hub"),
    "convert-paddle": ("stage1_ssld.convert_paddle", "turn a PaddleClas ResNet_vd file into a backbone file"),
    "convert-paddle-detector": (
        "stage2_detect.convert_paddle",
        "turn a PaddleDetection R-CNN file into a detector file",
    ),
    "convert-data": ("stage2_detect.convert_data", "turn YOLO, Pascal VOC or Parquet detection data into COCO JSON"),
    "inspect": ("", "print what a backbone or detector file is"),
    "report": ("pipelines.report", "write report.html from a pipeline's run directories"),
    "toy-data": ("shared.toy_data", "draw the embedded data set"),
}
_EVALUATORS = {"backbone": "stage1_ssld.evaluate", "detector": "stage2_detect.evaluate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to an entry script; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else USER_ERROR
    name, rest = words[0], words[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"ssld {name}: no such command{did_you_mean(name, list(COMMANDS))}")
        if name == "inspect":
            return _inspect(rest)
        if name == "evaluate" and {"-h", "--help"} & set(rest) and _evaluated(rest) is None:
            print(
                f"usage: ssld evaluate --model FILE ...\n\nThe settings are those of {_evaluators()}: add --model FILE to see them."
            )
            return 0
        return _main_of(_evaluator(rest) if name == "evaluate" else COMMANDS[name][0], rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def usage() -> str:
    """What `ssld --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: ssld COMMAND ...", "", *lines, "", "ssld COMMAND --help lists the settings of a command."]
    )


def _main_of(module: str, argv: list[str]) -> int:
    code: int = importlib.import_module(module).main(argv)
    return code


def _inspect(argv: list[str]) -> int:
    from shared.model_file import inspect_text

    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: ssld inspect FILE")
    print(inspect_text(Path(argv[0])))
    return 0


def _evaluator(argv: list[str]) -> str:
    """The module that evaluates the file a command line names."""
    from shared.model_file import read_metadata

    file = _evaluated(argv)
    if file is None:
        raise UserError(f"ssld evaluate: needs --model FILE; the settings are those of {_evaluators()}")
    kind = read_metadata(Path(file)).get("kind", "backbone")  # a file of plain timm has no kind
    if kind not in _EVALUATORS:
        raise UserError(f"{file}: a {kind} file cannot be evaluated")
    return _EVALUATORS[kind]


def _evaluated(argv: list[str]) -> str | None:
    """The file that a command line wants evaluated, said by a flag or in a file of settings."""
    file: object = _value(argv, "--model")
    config = _value(argv, "--config")
    if file is None and config is not None:
        file = read_yaml(Path(config)).get("model")
    return file if isinstance(file, str) else None


def _evaluators() -> str:
    return ", ".join(f"{name.replace('.', '/')}.py for a {kind}" for kind, name in _EVALUATORS.items())


def _value(argv: list[str], flag: str) -> str | None:
    """The last value given to a flag, as `--flag VALUE` or `--flag=VALUE`."""
    found = None
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


if __name__ == "__main__":
    sys.exit(main())
