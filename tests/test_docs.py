"""The pages of docs/: every command parses with the command's own settings, every link leads somewhere, every YAML block is valid settings."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.stages import KINDS
from shared.config import parse_config
from stage1_ssld.data_config import DataConfig, LossConfig, TeacherConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TYPES = {kind.script: kind.config_type for kind in KINDS.values()}


def commands(page: Path) -> list[str]:
    """The indented command lines of a page, continuation lines joined."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.findall(
        r"(?:^ {4}\S.*\n?)(?:^ {4,}\S.*\n?)*", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE
    ):
        found += [line.strip() for line in re.sub(r"\\\n\s+", "", block).splitlines()]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        words = shlex.split(line)
        script = next((word for word in words if word in TYPES), None)
        if script is None:
            assert words[0] in ("pip", "python"), line  # installs, and the runner, whose recipes are tested elsewhere
            assert all((ROOT / word).exists() for word in words if word.endswith((".py", ".yaml"))), line
            continue
        arguments = words[words.index(script) + 1 :]
        parse_config(
            TYPES[script], [*arguments, *([] if "--output" in arguments else ["--output", "runs/x"])], program=script
        )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_are_valid(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        values = yaml.safe_load(block)
        for key, value in values.items():
            if key == "data":
                DataConfig.model_validate(value)
            elif key == "teacher":
                TeacherConfig.model_validate(value)
            else:
                assert key == "losses"
                assert all(LossConfig.model_validate(term) for term in value)
