"""The scripts of benchmarks/: what their tables say of given numbers, and that every measurement runs. Nothing here is timed."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finish(run: Path, **metrics: float) -> None:
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"metrics": metrics}))


def test_table_of_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(tmp_path / "kl_2", top1=0.5, agreement=0.6, kl=0.25)
    finish(tmp_path / "kl", top1=0.4, agreement=0.5, kl=0.5)
    finish(tmp_path / "kl_1", top1=0.3, agreement=0.1, kl=0.75)
    finish(tmp_path / "teacher", top1=0.625)  # made last, first in the pipeline
    finish(tmp_path / "curated_images", kept=3)  # no rung
    finish(tmp_path / "another", top1=0.1, agreement=0.2, kl=1)  # a rung that the pipeline's file does not have
    (tmp_path / "supervised").mkdir()  # not finished
    assert script("ablation_table").main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| rung | seeds | top-1 | agreement | KL to the teacher |",
        "| --- | --- | --- | --- | --- |",
        "| teacher | 1 | 62.5 | - | - |",
        "| kl | 3 | 40.0 (30.0 to 50.0) | 40.0 (10.0 to 60.0) | 0.500 (0.250 to 0.750) |",
        "| another | 1 | 10.0 | 20.0 | 1.000 |",
    ]


def test_table_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("ablation_table").main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere: no such folder\n"
    finish(tmp_path / "curated_images", kept=3)
    assert script("ablation_table").main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no finished run with a top-1 in it; give the folder that pipelines/run.py wrote\n"
    )


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    order: list[str] = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = script("distill").rounds(works, 3, torch.device("cpu"))
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [set(seconds) for seconds in found] == [{"a", "b"}] * 3
    assert all(second > 0 for seconds in found for second in seconds.values())


def test_every_ratio_is_printed(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    networks = ["--student", "resnet10t", "--teacher", "resnet10t", "--size", "32", "--batch", "4"]
    threads = torch.get_num_threads()
    try:
        script("distill").main([str(tiny.train), "--pairs", "3", *networks])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    values = {line[:3]: [float(value) for value in re.findall(r"\d+\.\d{3}", line)] for line in lines}
    for letter in "abcd":
        middle, low, high = values[f"({letter})"]
        assert 0 < low <= middle <= high
    (share,) = values["(e)"]
    assert 0 <= share <= 1
