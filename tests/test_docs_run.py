"""Every command of the README and of docs/ is executed, tiny, one page after the other in one folder, as a reader would who tries them all.

A command that is added to a page is executed without a change here. `NOT_HERE` lists the exceptions with their reasons, which
test_docs.py parses nevertheless.
"""

import importlib
import re
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines import doctor, init
from ssld.pipelines.checks import data as checked_data
from ssld.pipelines.runner.estimate import Rate
from ssld.pipelines.runner.launch import Outcome, Signals
from ssld.pipelines.runner.stages import KINDS, Stage
from ssld.pipelines.scaffold import weights
from ssld.stage2_detect import check_data
from tests.docs_sandbox import ROOT, TINY, Sandbox, build, commands, script_of, shrunk, tiny_pipeline

PAGES = [
    ROOT / "README.md",
    ROOT / "docs/usage.md",
    ROOT / "docs/distillation.md",
]  # first: they write files that others read
PAGES += [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in PAGES and commands(page)]
NOT_HERE = {  # pattern of a command -> why it is not executed
    r"^(git clone|cd) ": "this is the clone, and its folder",
    r"^pip install ": "needs a network; a fresh environment is made by .ci/run",
    r"^pytest -n logical$": "runs this test",
    r"\.pdparams\b": "official weights are not at hand; the converters' own tests have files with their names and shapes",
    r"\btorchrun --nnodes 2\b": "needs two machines, whose names are to be filled in",
    r"\bconvert-detector --weights \S+ ": "downloads published weights, or names files that are not at hand",
    r"\bhub:ORG/NAME\b": "a name to fill in, of a data set that only the network has",
}
CPU: dict[str, Any] = {"broken": {}, "cuda": None, "threads": 2, "devices": [], "groups": ["gloo"], "mps": False}
LINES = {page: [part for line in commands(page) for part in re.split(r"\s+&&\s+", line)] for page in PAGES}


@pytest.fixture(scope="session")
def sandbox(tiny: Any, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    folder = tmp_path_factory.mktemp("reader")
    return build(folder, train=tiny.train, val=tiny.val, unlabeled=tiny.unlabeled, teacher=teacher_file)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, call: Callable[..., int], sandbox: Sandbox) -> None:
    """Use the reader's folder and no processes: stages of pipelines and the checks of the doctor run in this one."""

    def run_here(stage: Stage, console: Path, signals: Signals, *, quiet: bool = False) -> Outcome:
        return Outcome(call(main_of(stage.kind.script), list(stage.arguments)))

    monkeypatch.chdir(sandbox.folder)
    for place in ("folder", "runner.stages"):  # the pipelines of the sandbox are the shipped ones
        monkeypatch.setattr(f"ssld.pipelines.{place}.ROOT", sandbox.folder)
    for kind in KINDS.values():
        if recipes := kind.config_type.recipes:
            monkeypatch.setattr(kind.config_type, "recipes", sandbox.folder / recipes.relative_to(ROOT))
    for place in ("ssld.pipelines.run", "ssld.pipelines.runner.trial"):
        monkeypatch.setattr(f"{place}.run_stage", run_here)
    for module in (doctor, init):
        monkeypatch.setattr(module, "ask_torch", lambda: CPU)
    for module in (checked_data, init):
        monkeypatch.setattr(module, "run_script", check_data.main)
    monkeypatch.setattr(weights, "find_downloads_apart", lambda references: [])  # the sandbox replaces what timm names
    rate = Rate(start=1.0, step=0.01)
    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(lambda settings, trained, limit: rate))
    monkeypatch.setenv("XDG_CACHE_HOME", str(sandbox.folder / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(
    page: Path, sandbox: Sandbox, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for line in LINES[page]:
        if reason_not_to(line):
            continue
        script, arguments = program(line)
        words = [sandbox.tiny_names(word) for word in arguments]
        if script in {kind.script for kind in KINDS.values()} | set(TINY):
            words = shrunk(script, words)
        for word in words:
            sandbox.give(word)
        code = finished(call, script, words)
        printed = capsys.readouterr()
        assert code == 0, (
            f"{page.name}: this command ends with exit code {code}:\n    {line}\nexecuted as\n    {script} {shlex.join(words)}\n"
            f"{printed.out[-1500:]}\n{printed.err[-1500:]}\n"
            "If it cannot run, NOT_HERE in tests/test_docs_run.py names it with the reason; if it needs a file, tests/docs_sandbox.py makes it."
        )
        for flag, value in pairwise(words):
            if flag == "--output" and value.endswith(
                ".yaml"
            ):  # a pipeline for one's own photos, which names real networks and has real sizes
                file = sandbox.folder / value
                file.write_text(tiny_pipeline(sandbox.tiny_names(file.read_text())))
        sandbox.written |= {sandbox.folder / value for flag, value in pairwise(words) if flag == "--output"}


def test_every_exception_is_needed() -> None:
    lines = [line for page in PAGES for line in LINES[page]]
    for pattern in NOT_HERE:
        assert any(re.search(pattern, line) for line in lines), f"no command needs the exception {pattern}"


@pytest.mark.parametrize(
    ("line", "script", "words"),
    [
        ("ssld inspect FILE", "pipelines/cli.py", ["inspect", "FILE"]),
        (
            "accelerate launch --num_processes 8 stage1_ssld/teach.py --steps 3",
            "stage1_ssld/teach.py",
            ["--steps", "3"],
        ),
        (
            "srun bash -c 'torchrun --nnodes $N stage1_ssld/curate.py --keep 3'",
            "stage1_ssld/curate.py",
            ["--keep", "3"],
        ),
    ],
)
def test_the_script_of_a_command(line: str, script: str, words: list[str]) -> None:
    assert program(line) == (script, words)


@pytest.mark.parametrize(
    "line", ["conda install torch", "teacher   77.7", "python stage1_ssld/distil.py", "python -m http.server"]
)
def test_a_line_that_cannot_be_executed_is_named(line: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(line)):
        program(line)


def finished(call: Callable[..., int], script: str, words: list[str]) -> int:
    """Return the exit code of a command; `--help` and `--print-config` end with SystemExit."""
    try:
        return call(main_of(script), words)
    except SystemExit as end:
        return int(end.code or 0)


def reason_not_to(line: str) -> str | None:
    """Return why a command is not executed, or None."""
    return next((reason for pattern, reason in NOT_HERE.items() if re.search(pattern, line)), None)


def program(line: str) -> tuple[str, list[str]]:
    """(script below the project's root, its arguments) of a command line; launchers of several processes are left out: one is started."""
    words = shlex.split(line)
    if words[:3] == ["srun", "bash", "-c"]:
        words = shlex.split(words[3])
    if words[:3] == ["python", "-m", "ssld.pipelines.cli"]:
        words = ["ssld", *words[3:]]
    if words[0] == "ssld":
        script = script_of(words[1:])
        return (script, words[2:]) if script in TINY else ("pipelines/cli.py", words[1:])
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    known = words[0] in ("python", "accelerate", "torchrun") and place is not None
    assert known, (
        f"not a command that can be executed: {line}\nThe output of a command belongs into a ```text block, a reason into NOT_HERE."
    )
    assert place is not None
    assert (ROOT / words[place]).is_file(), f"{line}\nnames {words[place]}, which is not there"
    return words[place], words[place + 1 :]


def main_of(script: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(
        f"ssld.{script.removesuffix('.py').replace('/', '.')}"
    ).main
    return main
