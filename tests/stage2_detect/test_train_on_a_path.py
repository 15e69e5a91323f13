"""`ssld train --data PATH` end to end, and a second start that converts nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from converted_data import write
from many_formats import yolo_file

from ssld.stage2_detect import evaluate, train


def test_training_on_a_path(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    user_error: Callable[..., str],
    train_settings: dict[str, Any],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, run = yolo_file(tmp_path / "set"), tmp_path / "run"
    settings = {key: value for key, value in train_settings.items() if key not in ("data", "output")}
    write(tmp_path / "mine.yaml", yaml.safe_dump(settings | {"data": str(source)}))
    words = ["--config", str(tmp_path / "mine.yaml"), "--workers", "0", "--batch_size", "2", "--output", str(run)]
    assert call(train.main, [*words, "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("converting it") == 1
    assert f"{source}: YOLO, trained on train, evaluated on val; 1 part not used: test" in printed
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["AP"] is not None
    assert result["config"]["data"]["source"] == str(source)
    assert result["read"]["data.train_annotations"]["box"]["kept"] == 4
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.json")}
    assert call(train.main, [*words, "--steps", "2"]) == 0  # resumes, with the same data
    printed = capsys.readouterr().out
    assert "steps: 1 -> 2" in printed
    assert "converting it" not in printed
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.json")} == files
    tested = ["--model", str(run / "detector.safetensors"), "--data", str(source), "--split", "test"]
    assert call(evaluate.main, [*tested, "--workers", "0", "--output", str(tmp_path / "ap")]) == 0
    assert "evaluated on test" in capsys.readouterr().out
    write(tmp_path / "set" / "train" / "labels" / "0.txt", "1 0.5 0.5 0.4 0.4\n")
    assert "has other content" in user_error(train.main, [*words, "--steps", "3"])
