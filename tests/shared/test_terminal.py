"""Terminal output: control characters of a file or a name are escaped."""

import ast
import errno
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.pipelines.cli import main
from ssld.shared.config.command import exit_code, run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import save_model_file
from ssld.shared.run_dir import RunDir
from ssld.shared.terminal import say, say_lines
from ssld.shared.training.loss_watch import NotFinite
from ssld.stage2_detect.check_data import main as check_data

ROOT = Path(__file__).resolve().parents[2]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\udcff"
SAFE = "\\x1b]0;owned\\x07\\x1b[2J\\x9b1m\\u202e\\udcff"
# They print what this project's own text is: usage, versions, scripts, resolved settings as YAML, which escapes.
OWN_TEXT = {"shared/terminal.py", "shared/config/settings.py", "shared/config/help.py", "shared/config/command.py"} | {
    "pipelines/cli.py",
    "stage2_detect/check_data.py",
    "pipelines/checks/machine.py",
    "pipelines/doctor.py",
}


def clean(text: str) -> bool:
    text.encode()
    return not set(text) & set(EVIL[0] + "\x07\x9b\u202e\udcff")


def test_lines_and_tabs_stay() -> None:
    out = io.StringIO()
    say_lines(f"a\tb\n{EVIL} é", out)
    say(f"a\tb\n{EVIL} é", out)
    assert out.getvalue() == f"a\tb\n{SAFE} é\na\tb\\n{SAFE} é\n"


def test_a_name_begins_no_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in a log nor in an error, also one that a process passes to another, or that the system raises."""
    name = "a\nerror: all is lost\r.png"

    def work(config: CommandConfig) -> None:
        RunDir(config, "test").log(f"{name}: unreadable", "the next line")
        raise UserError(f"{name}: unreadable", "the next mistake")

    assert run_command(CommandConfig, work, ["--output", str(tmp_path / "run")], program="x.py") == 2
    out, err = capsys.readouterr()
    one = "a\\nerror: all is lost\\r.png: unreadable"
    assert out == f"{one}\nthe next line\n"
    assert (tmp_path / "run" / "log.txt").read_text() == out
    assert err == f"error: {one}\nerror: the next mistake\n"

    error = pickle.loads(pickle.dumps(UserError(name, "the next mistake")))
    assert str(error).count("\n") == 1
    not_finite = NotFinite(3, "after step 2")
    assert str(pickle.loads(pickle.dumps(not_finite))) == str(not_finite)

    def fail() -> int:
        raise OSError(errno.EACCES, "Permission denied", name)

    assert exit_code(fail) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_errors_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: CommandConfig) -> None:
        run = RunDir(config, "test")
        run.log(f"class {EVIL}")
        raise UserError(f"{EVIL}\x85\u2028: no such class")

    assert run_command(CommandConfig, work, ["--output", str(tmp_path / "run")], program="x.py") == 2
    out, err = capsys.readouterr()
    assert out == f"class {SAFE}\n"
    assert err == f"error: {SAFE}\\x85\\u2028: no such class\n"
    assert (tmp_path / "run" / "log.txt").read_text() == out

    def refuse() -> int:
        raise UserError(EVIL)

    assert exit_code(refuse) == 2
    assert capsys.readouterr().err == f"error: {SAFE}\n"


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.safetensors"
    evil = EVIL[:-1]  # half a character is no metadata
    facts = {
        "kind": "backbone",
        "arch": "test_resnet",
        "class_names": [evil, "a\nb"],
        evil: {evil: 1},
        "teacher": {evil: {evil: [evil]}},
    }
    save_model_file(file, {"weight": torch.zeros(2)}, facts)
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert clean(out)
    assert "a\\nb" in out


def test_findings_in_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": f"{EVIL}.png", "width": 4, "height": 4}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], EVIL: 1}],
        "categories": [{"id": 1, "name": f"{EVIL}\nfault"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert check_data(["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path)]) in (1, 2)
    out, err = capsys.readouterr()
    assert clean(out + err)
    assert "owned" in out + err
    assert not any(line.startswith("fault") for line in out.splitlines())


@pytest.mark.parametrize("package", ["shared", "stage1_ssld", "stage2_detect", "pipelines"])
def test_nothing_else_prints(package: str) -> None:
    """`print` does not escape control characters, so text of others is printed with `say`."""
    for file in (ROOT / package).rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        printed = [call for call in printed if "is not installed; run pip install" not in ast.unparse(call)]
        assert not printed or file.relative_to(ROOT).as_posix() in OWN_TEXT, file


CODE = """
import signal, sys, time
from ssld.shared.terminal import say
say("first")
sys.stdin.readline()  # the reader is gone now
for number in range(3):
    say("line " + "x" * 100_000)
print("and what is held back at the end")
print("done", file=sys.stderr)
"""


@pytest.mark.process
def test_a_reader_that_has_gone_ends_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stderr.read() == "done\n"
    assert process.wait() == 0
    for pipe in (process.stdin, process.stderr):
        pipe.close()


def test_other_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    with pytest.raises(OSError, match="No space"):
        say("text", Full())  # type: ignore[arg-type]
