"""`ssld`: dispatch to the entry scripts, suggestions for misspelled names, and dispatch by the kind of a file."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ssld.pipelines import cli
from ssld.pipelines.cli import COMMANDS, main
from ssld.pipelines.completion import parsers
from ssld.shared.models.model_file import save_model_file


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """(module, argv) of every entry that was called; none is imported."""
    calls: list[tuple[str, list[str]]] = []

    def stand_in(module: str) -> types.SimpleNamespace:
        def entry(argv: list[str]) -> int:
            calls.append((module, argv))
            return 7

        return types.SimpleNamespace(main=entry)

    monkeypatch.setattr("ssld.pipelines.cli.importlib", types.SimpleNamespace(import_module=stand_in))
    return calls


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model file of each kind, one of another program, and one of an unknown kind."""
    tensors = {"weight": torch.zeros(2, 3)}
    paths = {kind: tmp_path / f"{kind}.safetensors" for kind in ("backbone", "detector", "plain", "odd")}
    for kind, path in paths.items():
        save_model_file(path, tensors, {} if kind == "plain" else {"kind": kind, "arch": "test_resnet"})
    return paths


@pytest.mark.parametrize("name", [name for name, (module, _) in COMMANDS.items() if module])
def test_dispatch(called: list[tuple[str, list[str]]], name: str) -> None:
    assert main([name, "--steps", "3"]) == 7
    assert called == [(COMMANDS[name][0], ["--steps", "3"])]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("backbone", "ssld.stage1_ssld.evaluate"),
        ("plain", "ssld.stage1_ssld.evaluate"),
        ("detector", "ssld.stage2_detect.evaluate"),
        ("backbone", "ssld.stage1_ssld.export"),
        ("detector", "ssld.stage2_detect.export"),
    ],
)
def test_evaluate_and_export_go_by_the_file(
    called: list[tuple[str, list[str]]], files: dict[str, Path], tmp_path: Path, kind: str, module: str
) -> None:
    command = module.rpartition(".")[2]
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"model: {files[kind]}\n")
    lines = [["--model", str(files[kind])], [f"--model={files[kind]}"], ["--config", str(config)]]
    for line in lines:
        assert main([command, *line]) == 7
    assert called == [(module, line) for line in lines]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["destill"], "error: ssld destill: no such command; did you mean 'distill'?"),
        (
            ["evaluate"],
            "error: usage: ssld evaluate --model FILE ...; ssld evaluate --help lists the settings for each kind of file",
        ),
        (
            ["export"],
            "error: usage: ssld export --model FILE ...; ssld export --help lists the settings for each kind of file",
        ),
        (["evaluate", "--model", "nowhere.safetensors"], "error: model: nowhere.safetensors: no such file"),
        (["inspect"], "error: usage: ssld inspect FILE_OR_FOLDER"),
        (["recipes", "gfl"], "error: usage: ssld recipes"),
        (["completion"], "error: usage: ssld completion bash|zsh"),
        (["completion", "fish"], "error: ssld completion fish: expected bash or zsh"),
        (["inspect", "nowhere.safetensors"], "error: nowhere.safetensors: no such file"),
    ],
)
def test_mistakes_end_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_help_of_evaluate_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "The settings depend on the kind of the file, backbone or detector:" in out
    detector = out.partition("---- detector file ----")[2]
    flags = re.findall(r"^  (--\w+)", detector.partition("more:")[0], re.MULTILINE)
    assert [
        flag for flag in ("--model", "--annotations", "--images", "--compare", "--output") if flag not in flags
    ] == []


@pytest.mark.parametrize(
    ("program", "usage"), [("/usr/bin/ssld", "ssld train"), ("stage2_detect/train.py", "train.py")]
)
def test_help_goes_by_the_name_that_was_called(
    program: str, usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "--help"])
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {usage} [--config FILE]")


def test_unknown_kind_is_refused(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(files["odd"])]) == 2
    assert capsys.readouterr().err == f"error: {files['odd']}: a odd file cannot be evaluated\n"


def test_inspect(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files["detector"])]) == 0
    out = capsys.readouterr().out
    assert "detector" in out
    assert "test_resnet" in out


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert any(line.startswith(f"  {name} ") and line.endswith(f" {text}") for line in lines), name


def test_without_a_command_each_step_of_the_first_hour_is_a_line_that_its_command_accepts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("       ssld ")]
    assert [line.split()[1] for line in lines] == ["doctor", "init", "run", "report", "predict"]
    by_command = dict(parsers())
    for _, name, *words in map(str.split, lines):
        by_command[name].parse_args(words)
    assert lines == [line for _, line in cli.FIRST_HOUR]


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from ssld.pipelines.cli import main; main(['--help']); main([]); "
        "sys.exit(' '.join({'torch', 'pydantic', 'numpy', 'yaml', 'timm'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}, " in out
    assert out.startswith("ssld ")


COMPLETED = [
    ("ssld do", {"doctor"}),
    ("ssld train --optim.wa", {"--optim.warmup_steps", "--optim.warmup_start"}),
    ("ssld train --precision ", {"auto", "fp32", "bf16", "fp16"}),
    ("ssld train --model.kind ret", {"retinanet"}),
    ("ssld run mine.yaml --dr", {"--dry-run"}),
    ("ssld evaluate --score", {"--score_threshold"}),
    ("ssld completion z", {"zsh"}),
    ("ssld inspect some", set()),  # left to the shell: file names
]


@pytest.mark.process
def test_completion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Bash itself lists the completions."""
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=($line); [ "${line% }" = "$line" ] || COMP_WORDS+=(""); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); '
    ask += '_shtab_ssld; echo "${COMPREPLY[*]}"'
    lines = "\n".join(f"line={line!r}; {ask}" for line, _ in COMPLETED)
    (tmp_path / "ask.sh").write_text(f"{script}\n{lines}\n")
    done = subprocess.run(["bash", "--norc", str(tmp_path / "ask.sh")], capture_output=True, text=True, check=True)
    completions = [set(line.split()) for line in done.stdout.splitlines()]
    for (line, expected), words in zip(COMPLETED, completions, strict=True):
        assert words == expected, line
    assert main(["completion", "zsh"]) == 0
    for_zsh = capsys.readouterr().out
    assert for_zsh.startswith("#compdef ssld\n")
    assert re.search(r'"--precision\[.*\]:.*:\(auto fp32 bf16 fp16\)"', for_zsh)


def test_completion_knows_the_flags_that_commands_take() -> None:
    """Every command with settings is listed, with exactly the flags of its parser."""
    known = {name for name, _ in parsers()}
    assert known | {"inspect", "completion", "recipes"} == set(COMMANDS)
    train = next(parser for name, parser in parsers() if name == "train")
    assert "--model.rpn.anchor_sizes" in train._option_string_actions


@pytest.mark.parametrize("module", sorted({module for module, _ in COMMANDS.values() if module}))
def test_every_entry_has_a_main(module: str) -> None:
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"doctor", "recipes"}))  # which need nothing
def test_a_bare_command_says_what_it_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    err = capsys.readouterr().err
    assert "usage: " in err.splitlines()[0]
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(("name", "argument"), [("inspect", "FILE_OR_FOLDER"), ("completion", "bash|zsh")])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_commands_with_one_argument(
    name: str, argument: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, flag]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ssld {name} {argument}\n")


@pytest.mark.process
def test_the_command_is_a_module_too() -> None:
    line = [sys.executable, "-m", "ssld", "toy-data"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ssld toy-data ")
    assert "error: command line: output: missing" in done.stderr
