"""Paths with letters beyond ASCII and with signs that have a meaning in lists arrive as they are, from a command line and from a pipeline."""

from pathlib import Path

import pytest

from ssld.pipelines.runner.stages import flags
from ssld.shared.config.settings import parse_config
from ssld.stage2_detect.config import EvaluateConfig

NAMES = ["Größe (2)", "写真", "back\\slash", "a,b", "[old]", "it's", "2024", "null"]


@pytest.mark.parametrize("name", NAMES)
def test_a_single_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    words = ["--model", "x", "--output", "o", "--annotations", "y.json"]
    assert parse_config(EvaluateConfig, [*words, "--images", name], program="x").images == Path(name)


def test_a_list_of_paths(tmp_path: Path) -> None:
    names = ["Größe, alt", "写真", "[old]"]
    settings = {"model": "x", "output": "o", "annotations": ["a.json"] * 3, "images": names}
    assert parse_config(EvaluateConfig, flags(settings), program="x").images == [Path(name) for name in names]
