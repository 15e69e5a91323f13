"""The pages of docs/ and the headers of the pipelines: every command parses with the command's own settings, links lead somewhere, YAML is valid."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ssld.pipelines import doctor
from ssld.pipelines.cli import COMMANDS
from ssld.pipelines.runner.stages import KINDS, build_stages, find_pipeline, read_pipeline
from ssld.shared.config.settings import parse_config
from ssld.stage1_ssld.data_config import DataConfig, LossConfig, TeacherConfig
from ssld.stage2_detect.augment_config import AugmentConfig
from tests.docs_sandbox import ROOT, commands, script_of

PAGES = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
PIPELINES = [*sorted((ROOT / "pipelines").rglob("*.yaml")), ROOT / "docs" / "images" / "cells.yaml"]
TYPES = {kind.script: kind.config_type for kind in KINDS.values()}


def check(line: str) -> None:
    """Parse a command line with the parser of the command itself."""
    words = shlex.split(line)
    if words[:3] == ["srun", "bash", "-c"]:
        words = shlex.split(words[3])
    if words[0] == "ssld":
        assert words[1] in COMMANDS, line
        words = ["python", script_of(words[1:]), *words[2:]]
        if words[1] == "pipelines/cli.py":
            return
    script = next((word for word in words if word in TYPES), None)
    if script:
        arguments = words[words.index(script) + 1 :]
        output = [] if "--output" in arguments else ["--output", "runs/x"]
        parse_config(TYPES[script], [*arguments, *output], program=script)
    elif words[:2] == ["python", "pipelines/run.py"]:
        file = find_pipeline(words[2])
        switches = {"--dry-run", "--estimate", "--smoke"} & set(words)
        given = [word for word in words[3:] if word not in switches]
        flags = dict(zip(given[::2], given[1::2], strict=True))
        assert flags.pop("--redo", next(iter(read_pipeline(file).stages))) in read_pipeline(file).stages, line
        assert all(flag.startswith("--variables.") for flag in flags), line
        variables = {flag.removeprefix("--variables."): value for flag, value in flags.items()}
        pipeline = read_pipeline(file)
        assert set(variables) <= set(pipeline.variables), line
        build_stages(pipeline, file, output=pipeline.output, variables=variables)
    elif words[:2] == ["python", "pipelines/doctor.py"]:
        settings = doctor.parser().parse_args(words[2:]).settings
        assert settings is None or find_pipeline(settings).exists(), line
    else:
        assert words[0] in ("pip", "python"), line
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), line


@pytest.mark.parametrize("page", [*PAGES, *RESULTS, ROOT / "docs" / "images" / "README.md"], ids=lambda page: page.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        if not line.startswith("chromium "):
            check(line)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_in_sentences_name_existing_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for span in re.findall(r"`((?:ssld|python|accelerate launch|torchrun) [^`]+)`", text):
        words = span.split()
        if words[0] == "ssld":
            assert words[1] in COMMANDS or words[1] == "--help", f"{page.name}: {span}"
        for word in words:
            if word.endswith(".py") and word != "script.py":
                assert (ROOT / word).is_file(), f"{page.name}: {span}"


@pytest.mark.parametrize("name", ["scaling.md", "distillation.md"])
def test_the_pages_have_commands(name: str) -> None:
    lines = commands(ROOT / "docs" / name)
    assert len(lines) >= 3
    assert name != "scaling.md" or any(line.startswith("srun ") for line in lines)


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.name)
def test_the_command_in_the_header_of_a_pipeline_starts_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = file.read_text(encoding="utf-8").partition("output:")[0]
    lines = re.findall(r"^# {5}((?:ssld|python) .*)$", header, flags=re.MULTILINE)
    name = file.stem if file.is_relative_to(ROOT / "pipelines") else str(file.relative_to(ROOT))
    assert re.match(rf"ssld run {re.escape(name)}( |$)", lines[0])
    monkeypatch.chdir(ROOT)
    for line in lines:
        check(line)


@pytest.mark.parametrize("page", [*PAGES, *RESULTS, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_are_valid(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        values = yaml.safe_load(block)
        if "stages" in values:
            (tmp_path / "pipeline.yaml").write_text(block)
            pipeline = read_pipeline(tmp_path / "pipeline.yaml")
            missing = {name: "x" for name, value in pipeline.variables.items() if value is None}
            for smoke in (False, True):
                build_stages(pipeline, tmp_path / "pipeline.yaml", output=tmp_path, variables=missing, smoke=smoke)
            continue
        for key, value in values.items():
            if key == "data":
                DataConfig.model_validate(value)
            elif key == "augment":
                AugmentConfig.model_validate(value)
            elif key == "teacher":
                TeacherConfig.model_validate(value)
            else:
                assert key == "losses"
                assert all(LossConfig.model_validate(term) for term in value)
