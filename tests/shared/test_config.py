"""Strict settings: YAML first, flags on top, nothing else; mistakes are one line with the nearest known name."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from shared.config import CommandConfig, Config, differences, dump_yaml, identity, merge, parse_config, read_yaml
from shared.errors import UserError


class Group(Config):
    """A group."""

    rate: float = Field(0.1, gt=0)
    names: list[str] = []


class Inner(Config):
    """An item of a list."""

    path: Path


class Settings(CommandConfig):
    """Settings of a test."""

    steps: int = 5
    kind: Literal["plain", "fancy"] = "plain"
    group: Group = Group()
    maybe: Group | None = None
    items: list[Inner] = []
    workers: int = 2


def parse(tmp_path: Path, text: str | None, *flags: str) -> Settings:
    config: list[str] = []
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        config = ["--config", str(tmp_path / "c.yaml")]
    return parse_config(Settings, [*config, *flags], program="test.py")


def refused(tmp_path: Path, text: str | None, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(tmp_path, text, *flags)
    return str(caught.value).replace(str(tmp_path / "c.yaml"), "FILE")


def test_flags_lie_on_top_of_yaml(tmp_path: Path) -> None:
    text = "output: out\nsteps: 7\ngroup: {rate: 1e-4, names: [a, b]}\nmaybe: {rate: 2}\n"
    config = parse(tmp_path, text, "--group.rate", "0.5", "--maybe.names", "x,y")
    assert config.steps == 7
    assert config.group == Group(rate=0.5, names=["a", "b"])
    assert config.maybe == Group(rate=2, names=["x", "y"])
    assert parse(tmp_path, text).group.rate == 1e-4  # which PyYAML reads as text
    assert parse(tmp_path, text, "--maybe", "null").maybe is None
    assert parse(tmp_path, None, "--output", "o", "--steps=3").steps == 3


def test_environment_is_not_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEPS", "steps", "GROUP__RATE", "SSLD_STEPS"):
        monkeypatch.setenv(name, "99")
    (tmp_path / ".env").write_text("steps=99\n")
    monkeypatch.chdir(tmp_path)
    assert parse(tmp_path, "output: o\n").steps == 5


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("output: o\nstep: 3\n", (), "FILE: step: unknown key; did you mean 'steps'?"),
        ("output: o\ngroup: {rte: 3}\n", (), "FILE: group.rte: unknown key; did you mean 'rate'?"),
        ("output: o\nmaybe: {rte: 3}\n", (), "FILE: maybe.rte: unknown key; did you mean 'rate'?"),
        ("output: o\nitems: [{path: a, pth: b}]\n", (), "FILE: items.0.pth: unknown key; did you mean 'path'?"),
        ("output: o\nzebra: 3\n", (), "FILE: zebra: unknown key; known: group, items, kind, maybe, output, steps,"),
        ("steps: 3\n", (), "FILE: output: missing; give it in the YAML file or as --output"),
        ("output: o\ngroup: {rate: 0}\n", (), "FILE: group.rate: Input should be greater than 0 (given: 0)"),
        ("output: o\nsteps: many\n", (), "FILE: steps: Input should be a valid integer"),
        ("output: o\nkind: fany\n", (), "FILE: kind: Input should be 'plain' or 'fancy' (given: \"fany\")"),
        ("output: o\nsteps: 1\nsteps: 2\n", (), "FILE, line 3: key 'steps' is given twice"),
        ("output: o\ngroup: {rate: 1, rate: 2}\n", (), "FILE, line 2: key 'rate' is given twice"),
        ("output: [\n", (), "FILE: not valid YAML:"),
        ("- output\n", (), "FILE: expected keys and values at the top level, found list"),
        ("output: o\n", ("--stepz", "3"), "--stepz: unknown flag; did you mean '--steps'?"),
        ("output: o\n", ("--group.rat=3",), "--group.rat: unknown flag; did you mean '--group.rate'?"),
        ("output: o\n", ("--steps",), "expected one argument"),
        ("output: o\n", ("--steps", "x"), "steps: Input should be a valid integer"),
        (None, ("--config", "gone.yaml"), "gone.yaml: No such file or directory"),
    ],
)
def test_mistakes(text: str | None, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    line = refused(tmp_path, text, *flags)
    assert message in line
    assert "\n" not in line


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    lines = refused(tmp_path, "output: o\nstep: 3\ngroup: {rate: -1}\n").splitlines()
    assert len(lines) == 2


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(tmp_path, "output: o\nitems: [{path: a}]\n", "--steps", "9", "--print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert parse(tmp_path, printed) == parse(tmp_path, "output: o\nitems: [{path: a}]\nsteps: 9\n")


def test_settings_are_frozen_and_dump_back(tmp_path: Path) -> None:
    config = parse(tmp_path, "output: o\n")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    assert Settings(**yaml.safe_load(dump_yaml(config))) == config


def test_identity_leaves_out_where_and_how_fast(tmp_path: Path) -> None:
    a = identity(parse(tmp_path, "output: o\n"))
    b = identity(parse(tmp_path, "output: p\nworkers: 7\nthreads: 3\n"))
    assert a == b
    assert "steps" in a
    c = identity(parse(tmp_path, "output: o\nmaybe: {rate: 3}\ngroup: {rate: 2}\n"))
    assert list(differences(a, c)) == [("group.rate", 0.1, 2.0), ("maybe", None, {"rate": 3.0, "names": []})]


def test_merge_goes_group_by_group() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(base, {"a": {"y": [3]}, "c": 2}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge({"a": None}, {"a": {"x": 1}}) == {"a": {"x": 1}}


def test_empty_yaml_is_no_settings(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "e.yaml") == {}


def test_config_modules_do_not_import_torch() -> None:
    code = "import sys; import stage1_ssld.config, shared.run_dir, shared.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
