"""Stages on the report's page: blocks of a training and its evaluation, errors of failed stages, settings, many classes, rows of all detectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.report import main, render, with_every_detector
from ssld.pipelines.reports.settings_view import changed_settings
from ssld.pipelines.reports.stage_view import failure, label, number, percent
from ssld.stage2_detect.config import TrainConfig

DATA = {"train_annotations": "a.json", "train_images": "images"}


def write_run(run: Path, settings: dict[str, Any], metrics: dict[str, Any] | None, command: str = "train") -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "environment.json").write_text(json.dumps({"command": command, "arguments": []}))
    if metrics is not None:
        (run / "result.json").write_text(json.dumps({"metrics": metrics, "seconds": 1.0}))


def page_of(runs: Path, stages: dict[str, str], rows: dict[str, Any], gain: list[str] | None = None) -> str:
    content = {
        "output": str(runs),
        "stages": {name: {"command": command} for name, command in stages.items()},
        "table": {"rows": rows, "gain": gain},
    }
    return render(PipelineConfig.model_validate(content), runs, title="page")


def test_a_training_and_its_evaluation_are_one_block(tmp_path: Path) -> None:
    write_run(tmp_path / "detector", {"backbone": "random:x"}, {"AP": 0.1, "AP50": 0.15, "images_seen": 3})
    write_run(
        tmp_path / "ap",
        {"model": str(tmp_path / "detector/detector.safetensors"), "annotations": "a"},
        {"AP": 0.2, "AP50": 0.3},
    )
    (tmp_path / "ap/detections.json").write_text("[]")
    (tmp_path / "a").write_text("{}")
    write_run(tmp_path / "other", {"model": "elsewhere/detector.safetensors", "annotations": "a"}, {"AP": 0.4})
    stages = {"detector": "train", "ap": "evaluate_detector", "other": "evaluate_detector"}
    html = page_of(tmp_path, stages, {"a": {"detector": "ap"}})
    assert html.count('<section class="stage"') == 2
    block = html[
        html.index('<section class="stage" id="stage-detector"') : html.index('<section class="stage" id="stage-other"')
    ]
    assert '<div class="part" id="stage-ap">' in block
    assert html.count('href="#stage-ap"') == 1  # in the table of stages
    assert '<tr><th scope="row">other</th><td>40.0</td>' in html  # in no row of the pipeline's table


def test_every_detector_has_a_row_once() -> None:
    stages = {name: {"command": "evaluate_detector"} for name in ("ap", "ap_1", "extra")} | {"d": {"command": "train"}}
    table = {"rows": {"SSLD": {"detector": ["ap", "ap_1"]}}}
    pipeline = PipelineConfig.model_validate({"output": "x", "stages": stages, "table": table})
    filled = with_every_detector(pipeline)
    assert filled is not None
    assert {name: row.detector for name, row in filled.rows.items()} == {"SSLD": ("ap", "ap_1"), "extra": ("extra",)}
    without = PipelineConfig.model_validate({"output": "x", "stages": stages})
    assert with_every_detector(without) is None


@pytest.mark.parametrize(
    ("console", "expected"),
    [
        (
            "$ ssld train\nerror: old\n$ ssld train\nreading\nerror: data: no such file\nerror: and more\n",
            ("data: no such file", "and more"),
        ),
        ("$ ssld train\nTraceback (most recent call last):\n  File x\nValueError: no\n\n", ("ValueError: no",)),
        ("$ ssld train\nerror: old\n$ ssld train\nstep 3\n", ()),
        ("$ ssld train\nstopped: checkpoint of step 9 written\n", ()),
        (None, ()),
    ],
)
def test_errors_of_a_failed_stage(console: str | None, expected: tuple[str, ...], tmp_path: Path) -> None:
    if console is not None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs/broken.txt").write_text(console)
    assert failure(tmp_path / "broken") == expected
    html = page_of(tmp_path, {"broken": "train", "later": "train"}, {"a": {"detector": "broken"}})
    assert ("This stage failed." in html) == bool(expected)
    assert ('class="bad">failed</td>' in html) == bool(expected)
    assert "\n".join(expected) in html


def test_the_error_of_several_processes(tmp_path: Path) -> None:
    write_run(tmp_path / "broken", {"backbone": "x"}, None)
    (tmp_path / "broken/error.json").write_text(json.dumps({"error": "data: <gone>", "exit_code": 2}))
    assert failure(tmp_path / "broken") == ("data: <gone>",)
    assert main(["--runs", str(tmp_path / "broken")]) == 0
    assert "data: &lt;gone&gt;" in (tmp_path / "broken/report/report.html").read_text()
    (tmp_path / "broken/result.json").write_text(json.dumps({"metrics": {}, "seconds": 1.0}))  # repeated since
    assert "This stage failed" not in page_of(tmp_path, {"broken": "train"}, {"a": {"detector": "broken"}})


def test_settings_that_differ_from_the_defaults() -> None:
    config = TrainConfig.model_validate(
        {
            "output": "runs/x",
            "backbone": "random:x",
            "data": DATA,
            "steps": 3,
            "batch_size": 2,
            "optim": {"lr": 0.5, "reference_batch": 8},
            "model": {"rpn": {"anchor_sizes": [8, 16, 32, 64, 128]}},
        }
    )
    rows = dict[str, tuple[str, str]]()
    for key, value, default in changed_settings("train", yaml.safe_dump(config.model_dump(mode="json"))):
        rows[key] = (value, default)
    assert rows == {
        "backbone": ("random:x", "-"),
        "data.train_annotations": ("a.json", "-"),
        "data.train_images": ("images", "-"),
        "steps": ("3", "-"),
        "batch_size": ("2", "required"),
        "optim.lr": ("0.5", "required"),
        "optim.reference_batch": ("8", "required"),
        "model.rpn.anchor_sizes": ("8.0, 16.0, 32.0, 64.0, 128.0", "32.0, 64.0, 128.0, 256.0, 512.0"),
    }
    assert changed_settings("another", "a: 1") == []
    assert changed_settings("train", "gone: 1") == [("gone", "1", "-")]
    with pytest.raises(ValueError, match="no YAML"):
        changed_settings("train", "a: [")


def test_many_classes_are_folded(tmp_path: Path) -> None:
    for name, ap in (("ap_a", 0.5), ("ap_b", 0.4)):
        per_class = {f"c{n}": ap + (n - 40) / 1000 * (name == "ap_a") for n in range(80)} | {"none": None}
        write_run(tmp_path / name, {"model": "x"}, {"AP": ap, "per_class": per_class}, "evaluate_detector")
    html = page_of(
        tmp_path,
        {"ap_a": "evaluate_detector", "ap_b": "evaluate_detector"},
        {"A": {"detector": "ap_a"}, "B": {"detector": "ap_b"}},
        ["A", "B"],
    )
    first = html[html.index("largest and the smallest difference") : html.index("<summary>All 81 classes")]
    names = [part.partition("<")[0] for part in first.split('<th scope="row">')[1:]]
    assert names == [*(f"c{n}" for n in range(79, 74, -1)), *(f"c{n}" for n in range(4, -1, -1))]
    assert html.count("<details><summary>Each class</summary>") == 2


def test_units_and_signs() -> None:
    assert number("logit_scale", -0.25) == "\N{MINUS SIGN}0.25"
    assert number("AP", -1.0) == "-"  # as COCO's tools write for no value
    assert percent(0.256) == "25.6"
    assert [label(key) for key in ("AP", "kl", "teacher_top1", "steps")] == [
        "AP, %",
        "KL, nats",
        "teacher's top-1, %",
        "steps",
    ]
