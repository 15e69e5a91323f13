"""Console script `ssld`: dispatches each sub-command to its entry script and passes the remaining arguments on.

A sub-command's module is imported only when the command runs, and settings only with one: `ssld --help` imports neither torch nor pydantic.
"""

import importlib
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.errors import USER_ERROR, UserError
from ssld.shared.machine import installed_version
from ssld.shared.terminal import say_lines
from ssld.shared.wording import did_you_mean

# {title: {name: (module with main(argv), one line of help)}}
_GROUPS = {
    "start": {
        "init": ("ssld.pipelines.init", "write a pipeline for your own photos, with settings fitted to them"),
        "doctor": ("ssld.pipelines.doctor", "check the machine, the settings and the data before a run"),
        "run": ("ssld.pipelines.run", "run a pipeline, from images to the table and the report"),
        "report": ("ssld.pipelines.report", "write report.html from a pipeline's run directories"),
        "recipes": ("", "list the shipped recipes and pipelines: purpose, published score, image size, cost"),
        "inspect": (
            "",
            "print the contents of a model file, annotations, detections, image, store, manifest, checkpoint or run directory",
        ),
    },
    "backbones": {
        "prototypes": (
            "ssld.stage1_ssld.prototypes",
            "make a teacher from an encoder without classes, with your own images",
        ),
        "curate": (
            "ssld.stage1_ssld.curate",
            "select unlabeled images: the best of each class, without near-duplicates",
        ),
        "teach": ("ssld.stage1_ssld.teach", "fine-tune a teacher on labeled images"),
        "soft-labels": ("ssld.stage1_ssld.write_soft_labels", "write a store of the teacher's soft labels"),
        "distill": ("ssld.stage1_ssld.distill", "train a student from a teacher's soft labels, without human labels"),
    },
    "detectors": {
        "train": ("ssld.stage2_detect.train", "train a detector from a backbone file"),
        "predict": (
            "ssld.stage2_detect.predict",
            "detect objects in images and videos; write drawn images, COCO JSON, CSV, YOLO labels, crops or pseudo-labels",
        ),
        "audit": (
            "ssld.stage2_detect.audit",
            "list unlabeled photos to annotate next by a detector's doubts, or labels to look at first",
        ),
    },
    "both": {
        "evaluate": ("", "evaluate a backbone or detector file; the kind is read from the file"),
        "export": (
            "",
            "export a backbone or detector file to ONNX and torch.export, checked, and to a folder for the hub",
        ),
    },
    "data and files of other projects": {
        "convert-data": (
            "ssld.stage2_detect.convert_data",
            "convert YOLO, Pascal VOC, LabelMe or Hugging Face detection data to COCO JSON",
        ),
        "convert-paddle": ("ssld.stage1_ssld.convert_paddle", "convert a PaddleClas ResNet_vd file to a backbone file"),
        "convert-paddle-detector": (
            "ssld.stage2_detect.convert_paddle",
            "convert a PaddleDetection R-CNN file to a detector file",
        ),
        "convert-detector": (
            "ssld.stage2_detect.convert_detector",
            "convert a detector of torchvision, detectron2 or mmdetection to a detector file",
        ),
        "toy-data": ("ssld.pipelines.toy_data", "draw the synthetic data set of the quickstart"),
    },
    "this command": {"completion": ("", "print a tab-completion script for bash or zsh")},
}
COMMANDS = {name: command for group in _GROUPS.values() for name, command in group.items()}
# command -> (participle for messages, {kind of file: module})
_BY_KIND = {
    "evaluate": ("evaluated", {"backbone": "ssld.stage1_ssld.evaluate", "detector": "ssld.stage2_detect.evaluate"}),
    "export": ("exported", {"backbone": "ssld.stage1_ssld.export", "detector": "ssld.stage2_detect.export"}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to an entry script; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        print(first_hour())
        return USER_ERROR
    if words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    from ssld.shared.config.command import exit_code

    return exit_code(lambda: _call(words[0], words[1:]))


def _call(name: str, rest: list[str]) -> int:
    if name in ("-V", "--version"):
        print(_version())
        return 0
    if name not in COMMANDS:
        raise UserError(f"ssld {name}: no such command{did_you_mean(name, list(COMMANDS))}")
    if name == "recipes":
        return _recipes(rest)
    if name == "inspect":
        return _inspect(rest)
    if name == "completion":
        return _completion(rest)
    if name in _BY_KIND and {"-h", "--help"} & set(rest) and _model(rest) is None:
        print(
            f"usage: ssld {name} --model FILE ...\n\nThe settings depend on the kind of the file, {' or '.join(_BY_KIND[name][1])}:"
        )
        for kind, module in _BY_KIND[name][1].items():
            print(f"\n---- {kind} file ----\n")
            with suppress(SystemExit):  # as argparse ends after a help
                _main_of(module, ["--help"])
        return 0
    return _main_of(_script(name, rest) if name in _BY_KIND else COMMANDS[name][0], rest)


def usage() -> str:
    """Return the text of `ssld --help`."""
    width = max(map(len, COMMANDS))
    lines = []
    for title, group in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}} {about}" for name, (_, about) in group.items())]
    return "\n".join(
        [
            "usage: ssld COMMAND ...",
            "",
            "Distill a teacher into a small backbone without labels, then train a detector from that backbone.",
            *lines,
            "",
            "ssld COMMAND --help lists the settings of a command, ssld --version the version.",
            "Exit codes: 0 done, 1 failed (doctor: found a fault), 2 invalid input, named in one line, 143 stopped with a checkpoint.",
        ]
    )


FIRST_HOUR = (
    ("check this machine", "ssld doctor"),
    (
        "write a pipeline that suits your photos and an hour of this machine (--minutes; --unlabeled DIR: photos without boxes)",
        "ssld init --images photos --annotations boxes.json --output first.yaml",
    ),
    ("run it; after an interruption the same command resumes it", "ssld run first.yaml"),
    ("look at runs/first/report/report.html; to write it again", "ssld report --runs runs/first"),
    (
        "detect objects in other photos",
        "ssld predict --model runs/first/detector/detector.safetensors --images new_photos --output runs/predictions",
    ),
)
"""(purpose, command line) of each step from photos with boxes to a detector"""


def first_hour() -> str:
    """Return the text of `ssld` without a command: the steps from one's own photos to a detector."""
    steps = [f"  {number}. {purpose}:\n       {line}" for number, (purpose, line) in enumerate(FIRST_HOUR, 1)]
    return "\n".join(
        [
            "usage: ssld COMMAND ...; ssld --help lists the commands",
            "",
            "From your photos and their boxes (COCO JSON) to a detector:",
            "",
            *steps,
            "",
            "Without photos at hand: ssld run quickstart, which draws its own images.",
        ]
    )


def _version() -> str:
    """Return the versions of ssld, torch, torchvision, timm and Python, without importing torch."""
    names = ("ssld", "torch", "torchvision", "timm")
    words = [f"{name} {installed_version(name) or 'not installed'}" for name in names]
    return f"{', '.join(words)}, Python {platform.python_version()}"


def _completion(argv: list[str]) -> int:
    from ssld.pipelines.completion import SHELLS, completion_script

    if _asks_for_help("completion", "|".join(SHELLS), argv):
        return 0
    print(completion_script(argv[0], {name: about for name, (_, about) in COMMANDS.items()}), end="")
    return 0


def _main_of(module: str, argv: list[str]) -> int:
    code: int = importlib.import_module(module).main(argv)
    return code


def _recipes(argv: list[str]) -> int:
    from ssld.pipelines.runner.recipes import recipe_list

    if not _asks_for_help("recipes", "", argv):
        say_lines(recipe_list())
    return 0


def _inspect(argv: list[str]) -> int:
    from ssld.pipelines.inspecting import inspect_text

    if _asks_for_help("inspect", "FILE_OR_FOLDER", argv):
        return 0
    say_lines(inspect_text(Path(argv[0])))
    return 0


def _asks_for_help(name: str, argument: str, argv: list[str]) -> bool:
    """Print the help of a command with one argument, or none, and return True if the line requests it. Raises UserError for any other line."""
    text = f"usage: ssld {name} {argument}".rstrip()
    if {"-h", "--help"} & set(argv):
        print(f"{text}\n\n{COMMANDS[name][1]}")
        return True
    if len(argv) != bool(argument) or any(word.startswith("-") for word in argv):
        raise UserError(text)
    return False


def _script(name: str, argv: list[str]) -> str:
    """Return the module for the kind of the file given as --model."""
    from ssld.shared.models.model_file import read_metadata

    file = _model(argv)
    if file is None:
        raise UserError(
            f"usage: ssld {name} --model FILE ...; ssld {name} --help lists the settings for each kind of file"
        )
    try:
        kind = read_metadata(Path(file)).get("kind", "backbone")  # a file of plain timm has no kind
    except UserError as error:
        raise UserError(f"model: {error}") from None
    done, scripts = _BY_KIND[name]
    if kind not in scripts:
        raise UserError(f"{file}: a {kind} file cannot be {done}")
    return scripts[kind]


def _model(argv: list[str]) -> str | None:
    """Return the model file of a command line, from --model or from the --config file."""
    file: object = _value(argv, "--model")
    config = _value(argv, "--config")
    if file is None and config is not None:
        from ssld.shared.config.yaml_files import read_yaml

        file = read_yaml(Path(config)).get("model")
    return file if isinstance(file, str) else None


def _value(argv: list[str], flag: str) -> str | None:
    """Return the last value of a flag, written as `--flag VALUE` or `--flag=VALUE`."""
    value = None
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


if __name__ == "__main__":
    sys.exit(main())
