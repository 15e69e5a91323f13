"""The commands, markers, variables, fixtures and files that CONTRIBUTING.md names exist."""

import re
import shlex

import pytest

from tests.docs_sandbox import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SPANS = [span for line in TEXT.splitlines() if not line.startswith("    ") for span in re.findall(r"`([^`]+)`", line)]
RUNS = [span for span in SPANS if "pytest" in span.split()]


def test_there_are_runs() -> None:
    assert len(RUNS) >= 6


@pytest.mark.parametrize("line", RUNS)
def test_a_run_of_the_tests_is_understood(line: str, request: pytest.FixtureRequest) -> None:
    words = shlex.split(line)
    at = words.index("pytest")
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for word in words[:at]:
        assert re.fullmatch(r"(ATEN|ONEDNN|MKL)_\w+=\w+|SSLD_TEST_\w+=\d+", word)
        assert not word.startswith("SSLD") or f'"{word.split("=")[0]}"' in conftest
    options = words[at + 1 :]
    if "-m" in options:
        expression = options.pop(options.index("-m") + 1)
        options.remove("-m")
        markers = {text.split(":")[0] for text in request.config.getini("markers")}
        assert set(re.findall(r"\w+", expression)) - {"and", "not"} <= markers
    assert options == ["-n", "logical"] or all((ROOT / word).exists() for word in options)


def test_form_and_types_are_checked_as_in_ci() -> None:
    checks = next(span for span in SPANS if span.startswith("ruff "))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert all(command in map(str.strip, script) for command in checks.split(" && "))


def test_files_and_names_are_there() -> None:
    files = {span for span in SPANS if re.fullmatch(r"[\w.]+(/[\w.]+)+/?", span)}
    assert len(files) > 15
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    code = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("s*/**/*.py")) + "".join(
        file.read_text(encoding="utf-8")
        for file in (ROOT / "tests").rglob("*.py")
        if file.name != "test_contributing.py"
    )
    names = {span.removesuffix("()") for span in SPANS if re.fullmatch(r"[A-Za-z_]\w+(\(\))?", span)} - {"golden"}
    assert len(names) > 12
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_links_lead_somewhere() -> None:
    assert [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not (ROOT / link.split("#")[0]).exists()] == []
