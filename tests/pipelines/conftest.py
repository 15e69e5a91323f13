"""A command table of fake stages, and pipelines made of them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ssld.pipelines.config import ReportConfig
from ssld.pipelines.runner import stages as stages_module
from ssld.pipelines.runner.launch import Outcome, Signals
from ssld.pipelines.runner.stages import KINDS, Kind, Stage

FAKE = Path(__file__).with_name("fake_stage.py")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither read nor write the rates that the user's cache folder has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def fake_stage() -> ModuleType:
    """Module of the fake command."""
    spec = importlib.util.spec_from_file_location("fake_stage", FAKE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_stage"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_kinds(monkeypatch: pytest.MonkeyPatch, fake_stage: ModuleType) -> None:
    """Replace every command except the report by the fake one, which writes out.txt."""
    for name in KINDS:
        if name != "report":
            monkeypatch.setitem(stages_module.KINDS, name, Kind(str(FAKE), fake_stage.FakeConfig, ("out.txt",)))
    monkeypatch.setitem(
        stages_module.KINDS, "report", Kind("pipelines/report.py", ReportConfig, ("report.html",), remake=True)
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, fake_kinds: None, fake_stage: ModuleType) -> list[str]:
    """Names of the started stages, which run in this process to save time."""
    names: list[str] = []

    def run_here(stage: Stage, console: Path, signals: Signals) -> Outcome:
        from ssld.pipelines import report

        names.append(stage.name)
        work = report.main if stage.kind.remake else fake_stage.main
        return Outcome(work(list(stage.arguments)))

    monkeypatch.setattr("ssld.pipelines.run.run_stage", run_here)
    return names


WritePipeline = Callable[..., Path]


@pytest.fixture
def write_pipeline(tmp_path: Path) -> WritePipeline:
    """Write a pipeline file into tmp_path from its stages and other keys."""

    def write(stages: dict[str, Any], **other: Any) -> Path:
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": stages, **other}, sort_keys=False))
        return file

    return write


@pytest.fixture
def chain() -> dict[str, Any]:
    """data -> teacher -> student -> ap, and a baseline beside them that reads only data."""
    return {
        "data": {"command": "toy_data", "set": {"text": "d"}},
        "teacher": {"command": "teach", "set": {"source": "${data}/out.txt", "text": "t", "metrics": {"top1": 0.9}}},
        "student": {
            "command": "distill",
            "set": {"source": "${teacher}/out.txt", "text": "s", "metrics": {"top1": 0.7, "agreement": 0.75}},
        },
        "baseline": {
            "command": "distill",
            "set": {"source": "${data}/out.txt", "metrics": {"top1": 0.6, "agreement": 0.5}},
        },
        "ap": {
            "command": "evaluate_detector",
            "set": {"source": "${student}/out.txt", "metrics": {"AP": 0.257, "AP50": 0.5}},
        },
    }


@pytest.fixture
def table() -> dict[str, Any]:
    """The table for `chain`."""
    return {
        "rows": {
            "teacher": {"classifier": "teacher"},
            "SSLD": {"classifier": "student", "detector": "ap"},
            "baseline": {"classifier": "baseline"},
        },
        "gain": ["SSLD", "baseline"],
    }
