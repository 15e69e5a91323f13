"""Sentences on how the rows of the table were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines.config import RowConfig, TableConfig
from ssld.pipelines.reports.provenance import compared, origin, start


def write(run: Path, settings: Any, images_seen: Any = None) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if images_seen is not None:
        (run / "result.json").write_text(json.dumps({"metrics": {"images_seen": images_seen}}))


def test_backbone_and_evaluated_detector(tmp_path: Path) -> None:
    student = {
        "student": {"model": "random:resnet18d"},
        "teacher": {"model": str(tmp_path / "teacher/teacher.safetensors")},
    }
    write(tmp_path / "ssld", student | {"data": {"image_size": 48}}, images_seen=25600)
    write(tmp_path / "base", student | {"objective": "labels", "data": {"image_size": 48}})
    resize = {"resize": {"short_side": 128}, "model": {"kind": "gfl"}}
    write(tmp_path / "detector", {"backbone": str(tmp_path / "ssld/student.safetensors"), **resize}, images_seen=2400)
    write(tmp_path / "ap", {"model": str(tmp_path / "detector/detector.safetensors")})
    distilled = "student random:resnet18d distilled from teacher/teacher.safetensors, 25,600 images seen, 48 px"
    expected = f"{distilled}, GFL, 2,400 images seen, 128 px"
    assert origin(RowConfig(detector=("ap", "ap_1")), tmp_path) == expected
    assert origin(RowConfig(detector=("detector",)), tmp_path) == expected
    assert origin(RowConfig.model_validate({"classifier": "ssld", "detector": "ap"}), tmp_path) == expected
    assert origin(RowConfig.model_validate({"classifier": "ssld"}), tmp_path) == distilled
    row = RowConfig.model_validate({"classifier": "base"})
    assert origin(row, tmp_path) == "student random:resnet18d trained on labels, 48 px"
    write(tmp_path / "teacher", {"model": {"model": "timm:resnet50"}})
    assert origin(RowConfig(classifier=("teacher",)), tmp_path) == "network timm:resnet50 trained on labels"


STARTS = (
    ({"backbone": "random:resnet18d"}, "random weights", "random weights of resnet18d"),
    ({"backbone": "timm:resnet18d"}, "pretrained weights", "timm's pretrained weights of resnet18d"),
    ({"backbone": "a/r18.safetensors"}, "pretrained weights", "weights of a/r18.safetensors"),
    ({"backbone": "timm:resnet18d", "init": "coco.safetensors"}, "detector file", "the detector file coco.safetensors"),
)


def test_every_start_is_named_and_what_is_shared_is_said_once(tmp_path: Path) -> None:
    more = {"resize": {"short_side": 640}, "distill": {"teacher": "big.safetensors"}}
    for number, (settings, _, _) in enumerate(STARTS):
        write(tmp_path / f"d{number}", settings | more, images_seen=800 if number else 400)
    write(tmp_path / "student", {"student": {"model": "timm:resnet18d"}, "teacher": {"model": "timm:resnet50"}}, 1)
    write(tmp_path / "d4", {"backbone": str(tmp_path / "student/student.safetensors"), **more}, images_seen=800)
    table = TableConfig.model_validate({"rows": {f"row {n}": {"detector": f"d{n}"} for n in range(5)}})
    assert [start(row, tmp_path) for row in table.rows.values()] == [*(short for _, short, _ in STARTS), "stage 1"]
    stage1 = "student timm:resnet18d distilled from timm:resnet50, 1 image seen"
    words = [text for _, _, text in STARTS]
    assert compared(table, tmp_path) == (
        "Compared: a detector from 5 starts, distilled from big.safetensors, 640 px. "
        f"row 0: {words[0]}, 400 images seen. row 1: {words[1]}, 800 images seen. row 2: {words[2]}, 800 images seen. "
        f"row 3: {words[3]}, 800 images seen. row 4: {stage1}, 800 images seen."
    )
    backbones = TableConfig.model_validate({"rows": {"SSLD": {"classifier": "student"}, "gone": {"classifier": "no"}}})
    assert compared(backbones, tmp_path) == f"Compared: 1 backbone. SSLD: {stage1}."


@pytest.mark.parametrize("settings", [{}, {"student": 3, "model": []}, {"model": {"model": 1}, "backbone": 4}, [1]])
def test_runs_without_known_settings_have_no_sentence(settings: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", settings)
    row = RowConfig(classifier=("a",), detector=("a",))
    assert origin(row, tmp_path) is None
    assert start(row, tmp_path) is None
    assert compared(TableConfig(rows={"a": row}), tmp_path) is None
    assert origin(RowConfig(classifier=("gone",), detector=("gone",)), tmp_path) is None
