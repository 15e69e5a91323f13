"""Sentences on how the rows of the table were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines.config import RowConfig
from ssld.pipelines.reports.provenance import origin


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
    detector = {"backbone": str(tmp_path / "ssld/student.safetensors"), "resize": {"short_side": 128}}
    write(tmp_path / "detector", detector, images_seen=2400)
    write(tmp_path / "ap", {"model": str(tmp_path / "detector/detector.safetensors")})
    expected = "detector trained from ssld/student.safetensors, 2,400 images seen at 128 px"
    assert origin(RowConfig(detector=("ap", "ap_1")), tmp_path) == expected
    assert origin(RowConfig(detector=("detector",)), tmp_path) == expected
    row = RowConfig.model_validate({"classifier": "ssld", "detector": "ap"})
    distilled = "student random:resnet18d distilled from teacher/teacher.safetensors, 25,600 images seen at 48 px"
    assert origin(row, tmp_path) == f"{distilled}; {expected}"
    row = RowConfig.model_validate({"classifier": "base"})
    assert origin(row, tmp_path) == "student random:resnet18d trained on labels at 48 px"
    write(tmp_path / "teacher", {"model": {"model": "timm:resnet50"}})
    assert origin(RowConfig(classifier=("teacher",)), tmp_path) == "network timm:resnet50 trained on labels"


@pytest.mark.parametrize("settings", [{}, {"student": 3, "model": []}, {"model": {"model": 1}, "backbone": 4}, [1]])
def test_runs_without_known_settings_have_no_sentence(settings: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", settings)
    assert origin(RowConfig(classifier=("a",), detector=("a",)), tmp_path) is None
    assert origin(RowConfig(classifier=("gone",), detector=("gone",)), tmp_path) is None
