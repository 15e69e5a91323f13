"""CI, container, hooks, citation and changelog say the same as README, pyproject.toml and `.ci/run`."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.shared.machine import installed_version
from tests.docs_sandbox import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def lines(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = read(".github/workflows/tests.yml")["jobs"]
    install, tests = next(line.strip() for line in README.splitlines() if line.endswith("&& pytest -n logical")).split(
        " && "
    )
    assert lines(jobs["tests"]) == [install, tests]
    checks = [line for line in CI if line.startswith(("ruff ", "mypy "))]
    assert lines(jobs["lint"]) == [install, *checks]
    supported = {re.sub(".*:: ", "", text) for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+", text)}
    assert set(jobs["tests"]["strategy"]["matrix"]["python-version"]) == supported
    oldest = jobs["oldest"]["steps"][1]["with"]["python-version"]
    assert PROJECT["requires-python"] == f">={oldest}"
    assert any("--resolution lowest-direct" in line for line in lines(jobs["oldest"]))


@pytest.mark.process
@pytest.mark.parametrize("failing", ["", "pip", "ruff", "mypy", "pytest"])
def test_ci_fails_with_each_of_its_steps(failing: str, tmp_path: Path) -> None:
    """Stand-ins for the environment's commands write their words; one of them fails."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    commands, words = tmp_path / "commands", tmp_path / "words.txt"
    commands.mkdir()
    scripts = {name: f'echo {name} "$@" >> {words}' for name in ("pip", "ruff", "mypy", "pytest")}
    scripts |= {"python": "cat > /dev/null", "chromium": "", "python3": f'mkdir "$3/bin"; cp {commands}/* "$3/bin"'}
    for name, script in scripts.items():
        last = "exit 1" if name == failing else ""
        (commands / name).write_text(f"#!/bin/sh\n{script}\n{last}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:/usr/bin:/bin"
    process = subprocess.run([tmp_path / ".ci" / "run"], env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL)
    assert process.returncode == (1 if failing else 0)
    done = ["pip install -e .[test]", "ruff check .", "ruff format --check .", "mypy ssld tests", "pytest -n logical"]
    assert set(words.read_text().splitlines()) == set({"pip": done[:1], "ruff": done[:2]}.get(failing, done))


def test_every_dependency_has_an_oldest_version() -> None:
    """Without a bound the job `oldest` would take releases of ten years ago."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert [name for group in groups for name in group if ">=" not in name] == []


def test_hooks_run_the_commands_of_ci() -> None:
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert all(hook["entry"] in CI for hook in repo["hooks"])
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repo["hooks"])


def test_the_container_runs_the_quickstart_of_the_readme() -> None:
    quickstart = next(line.strip() for line in README.splitlines() if line.endswith("pipelines/quickstart.yaml"))
    install, run = quickstart.split(" && ")
    steps = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    steps = [step for step in steps if not step[0].startswith("#")]
    assert ["RUN", install] in steps
    assert ["CMD", str(shlex.split(run)).replace("'", '"')] == steps[-1]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert steps[0] == ["FROM", f"python:{oldest}-slim"]
    assert ["ARG", "TORCH_INDEX"] in steps, "without a default: the project names no index"


def test_citation_and_changelog_are_of_this_version() -> None:
    version = PROJECT["version"]
    citation = read("CITATION.cff")
    assert citation["version"] == version == installed_version("ssld")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, flags=re.MULTILINE)
    assert dated
    assert citation["date-released"] == dated[1]
    assert citation["license"] == PROJECT["license"]


def test_the_issue_form_is_one() -> None:
    form = read(".github/ISSUE_TEMPLATE/problem.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])
