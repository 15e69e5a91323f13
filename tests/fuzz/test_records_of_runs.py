"""Records of runs on thousands of damaged files: resumed, inspected and reported."""

from pathlib import Path
from typing import Any

import pytest

from ssld.pipelines.inspecting import inspect_text
from ssld.pipelines.reports.budget import Budget
from ssld.pipelines.reports.photos import Photos
from ssld.pipelines.reports.stage_view import view
from ssld.pipelines.reports.table import read_record
from ssld.shared.config.settings import CommandConfig
from ssld.shared.run_dir import read_metrics, read_result
from ssld.shared.run_identity import changes_since
from tests.fuzz.conftest import Fuzz, write_json
from tests.fuzz.mutations import as_json


class _Settings(CommandConfig):
    steps: int = 3


@pytest.mark.parametrize(
    "name",
    ["result.json", "metrics.jsonl", "environment.json", "config.yaml", "store.json", "state.json", "pipeline.json"],
)
def test_run_directories(name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = _Settings(output=run)
    sound: dict[str, Any] = {
        "result.json": {
            "command": "x",
            "metrics": {"AP": 0.5},
            "outputs": {},
            "config": {},
            "inputs": {},
            "seconds": 1.5,
            "finished": "x",
        },
        "environment.json": {
            "command": "x",
            "arguments": [],
            "versions": {"torch": "2"},
            "inputs": {"a": "b"},
            "started": "x",
        },
        "metrics.jsonl": {"step": 3, "loss": 1.5, "seconds": 2.0},
        "config.yaml": {"steps": 3},
    }
    more: dict[str, Any] = {
        "store.json": {
            "teacher": {"arch": "x"},
            "sources": [{"path": "p", "rows": 3}],
            "shards": [{"file": "a", "images": 3}],
        },
        "state.json": {"step": 3, "loss": {"a": 1}},
        "pipeline.json": {
            "name": "x",
            "smoke": False,
            "pipeline": {"output": "o", "stages": {"a": {"command": "train"}}},
        },
    }
    for file, content in sound.items():
        write_json(run / file, content)
    if name in more:
        write_json(run / name, more[name])

    def read() -> None:
        read_metrics(run)
        changes_since(run, config, {"a": "b"})
        inspect_text(run)
        read_record(run)
        view("x", None, run, Photos(Budget()))
        read_result(run)

    # a line of metrics that cannot be read is left out
    fuzz(as_json({**sound, **more}[name]), run / name, read, refuses=name != "metrics.jsonl")
