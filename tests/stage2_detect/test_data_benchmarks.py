"""The benchmarks of evaluation and of the annotation cache run, and fail if the two sides differ; the benchmark of masks stays small."""

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ssld.stage2_detect.evaluation.coco_ap import coco_ap

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = script("evaluate_coco")
    assert benchmark.main(["--images", "12", "--per-image", "20", "--classes", "3", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"12 images, \d+ objects, 240 detections, 3 classes", lines[0])
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| hotcoco", "| pycocotools", "| analysis"]
    truth, result = benchmark.draw(12, 20, 3)
    one = coco_ap(truth, result)
    assert 0.05 < one["AP50"] < 0.9
    other = copy.deepcopy(one)
    benchmark.compare(one, other)
    other["per_class"]["class 1"] += 1e-9
    with pytest.raises(AssertionError, match="per_class"):
        benchmark.compare(one, other)


def test_the_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = script("annotation_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ssld.stage2_detect.data.annotation_cache.LEAST_BYTES", 0)

    def read_in_process(file: Path, way: str, shapes: bool, _folder: str) -> dict[str, Any]:
        result: dict[str, Any] = benchmark.read(file, cache=way == "cache", shapes=shapes)
        return result

    monkeypatch.setattr(benchmark, "start", read_in_process)
    assert benchmark.main(["--images", "20", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| boxes", "| boxes and masks"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    monkeypatch.setattr(benchmark, "start", lambda *args: read_in_process(*args) | {"digest": args[1]})
    with pytest.raises(AssertionError, match="the cache gives something else than the file"):
        benchmark.main(["--images", "20", "--rounds", "1"])


def test_memory_of_masks(capsys: pytest.CaptureFixture[str]) -> None:
    """A few images of it, in the process that is measured."""
    assert script("segm_memory").main(["--images", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"6 images, \d+ objects, 600 masks of \d+ bytes, hotcoco", lines[0])
    result = re.match(r"greatest memory (\d+) MiB, (\d+) MiB of it before the first image; ", lines[1])
    assert result
    peak, start = map(int, result.groups())
    assert 100 < start < peak < 2000
