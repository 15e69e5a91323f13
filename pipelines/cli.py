"""The console script `ssld`: sub-commands that hand the rest of the line to an entry script, nothing more.

A sub-command's module is imported when it is called, so that `ssld --help` needs no torch.
"""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import USER_ERROR, exit_code
from ssld.shared.config.settings import did_you_mean
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import UserError
from ssld.shared.machine import installed_version
from ssld.shared.terminal import say

# name -> (module with main(argv), one line of help)
COMMANDS = {
    "run": ("ssld.pipelines.run", "run a pipeline, from images to the table and the report"),
    "teach": ("ssld.stage1_ssld.teach", "fine-tune a teacher on labeled images"),
    "prototypes": ("ssld.stage1_ssld.prototypes", "make a teacher of an encoder without classes, from your own images"),
    "curate": ("ssld.stage1_ssld.curate", "select unlabeled images: the best of each class, without near-duplicates"),
    "soft-labels": ("ssld.stage1_ssld.write_soft_labels", "write a store of the teacher's answers"),
    "distill": ("ssld.stage1_ssld.distill", "train a student from a teacher's soft labels, without human labels"),
    "train": ("ssld.stage2_detect.train", "train a detector from a backbone file"),
    "evaluate": ("", "evaluate a backbone or detector file, told apart by what it holds"),
    "predict": (
        "ssld.stage2_detect.predict",
        "find objects in pictures and videos: drawn, as COCO JSON, CSV, YOLO labels, crops, or as pseudo-labels",
    ),
    "export": ("", "export a backbone or detector file: ONNX and torch.export, checked, and a folder for the hub"),
    "convert-paddle": ("ssld.stage1_ssld.convert_paddle", "turn a PaddleClas ResNet_vd file into a backbone file"),
    "convert-paddle-detector": (
        "ssld.stage2_detect.convert_paddle",
        "turn a PaddleDetection R-CNN file into a detector file",
    ),
    "convert-data": (
        "ssld.stage2_detect.convert_data",
        "turn YOLO, Pascal VOC or Parquet detection data into COCO JSON",
    ),
    "inspect": ("", "print what a model file, store, manifest, checkpoint or run directory of ours is"),
    "report": ("ssld.pipelines.report", "write report.html from a pipeline's run directories"),
    "toy-data": ("ssld.pipelines.toy_data", "draw the embedded data set"),
    "init": ("ssld.pipelines.init", "write a pipeline for your own photos, with settings that suit them"),
    "doctor": ("ssld.pipelines.doctor", "look at the machine, the settings and the data: what stands in the way?"),
    "completion": ("", "print a script with which the tab key completes all of this: bash or zsh"),
}
_GROUPS = {
    "begin here": ("init", "doctor", "run", "report", "inspect"),
    "backbones": ("prototypes", "curate", "teach", "soft-labels", "distill"),
    "detectors": ("train", "predict"),
    "both": ("evaluate", "export"),
    "data and files of others": ("convert-data", "convert-paddle", "convert-paddle-detector", "toy-data"),
    "this command": ("completion",),
}
# command -> what it can do to files, and the module for each kind of them
_BY_KIND = {
    "evaluate": ("evaluated", {"backbone": "ssld.stage1_ssld.evaluate", "detector": "ssld.stage2_detect.evaluate"}),
    "export": ("exported", {"backbone": "ssld.stage1_ssld.export", "detector": "ssld.stage2_detect.export"}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to an entry script; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else USER_ERROR
    return exit_code(lambda: _call(words[0], words[1:]))


def _call(name: str, rest: list[str]) -> int:
    if name in ("-V", "--version"):
        print(_version())
        return 0
    if name not in COMMANDS:
        raise UserError(f"ssld {name}: no such command{did_you_mean(name, list(COMMANDS))}")
    if name == "inspect":
        return _inspect(rest)
    if name == "completion":
        return _completion(rest)
    if name in _BY_KIND and {"-h", "--help"} & set(rest) and _model(rest) is None:
        print(
            f"usage: ssld {name} --model FILE ...\n\nThe settings are those of {_scripts(name)}: add --model FILE to see them."
        )
        return 0
    return _main_of(_script(name, rest) if name in _BY_KIND else COMMANDS[name][0], rest)


def usage() -> str:
    """What `ssld --help` prints."""
    width = max(map(len, COMMANDS))
    lines = []
    for title, names in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}} {COMMANDS[name][1]}" for name in names)]
    return "\n".join(
        [
            "usage: ssld COMMAND ...",
            "",
            "From a teacher to a small backbone without labels, and from the backbone to a detector.",
            *lines,
            "",
            "ssld COMMAND --help lists the settings of a command, ssld --version the version.",
            "Exit codes: 0 done, 1 something broke (of doctor: found a fault), 2 your mistake in one line, 143 stopped with a checkpoint.",
        ]
    )


def _version() -> str:
    """Version and what it runs on, without importing torch."""
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


def _inspect(argv: list[str]) -> int:
    from ssld.pipelines.inspecting import inspect_text

    if _asks_for_help("inspect", "FILE_OR_FOLDER", argv):
        return 0
    say(inspect_text(Path(argv[0])))
    return 0


def _asks_for_help(name: str, argument: str, argv: list[str]) -> bool:
    """Whether the line of a command with one argument asks for its help, which is then printed. Raises UserError for any line but these two."""
    text = f"usage: ssld {name} {argument}"
    if {"-h", "--help"} & set(argv):
        print(f"{text}\n\n{COMMANDS[name][1]}")
        return True
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(text)
    return False


def _script(name: str, argv: list[str]) -> str:
    """The module for the kind of file that a command line names."""
    from ssld.shared.models.model_file import read_metadata

    file = _model(argv)
    if file is None:
        raise UserError(f"usage: ssld {name} --model FILE ...; the settings are those of {_scripts(name)}")
    kind = read_metadata(Path(file)).get("kind", "backbone")  # a file of plain timm has no kind
    done, scripts = _BY_KIND[name]
    if kind not in scripts:
        raise UserError(f"{file}: a {kind} file cannot be {done}")
    return scripts[kind]


def _model(argv: list[str]) -> str | None:
    """The file that a command line is about, said by a flag or in a file of settings."""
    file: object = _value(argv, "--model")
    config = _value(argv, "--config")
    if file is None and config is not None:
        file = read_yaml(Path(config)).get("model")
    return file if isinstance(file, str) else None


def _scripts(name: str) -> str:
    return ", ".join(
        f"{module.removeprefix('ssld.').replace('.', '/')}.py for a {kind}"
        for kind, module in _BY_KIND[name][1].items()
    )


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
