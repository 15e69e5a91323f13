"""Data checks of the doctor on folders of images without boxes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssld.pipelines.checks.data import folder_lines, sources_of
from ssld.stage1_ssld.config import CurateConfig, TeachConfig
from ssld.stage2_detect.config import TrainConfig

OPTIM = {"lr": 0.1, "reference_batch": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_findings_about_a_folder(folder: Path) -> None:
    assert [(line.level, line.text) for line in folder_lines(folder)] == [("ok", f"{folder}: 4 images")]
    shutil.copy(folder / "0.png", folder / "x.png")
    (folder / "y.jpg").write_bytes(b"nothing")
    findings = [(line.level, line.text.removeprefix(f"{folder}: ")) for line in folder_lines(folder)]
    assert findings == [
        ("ok", "6 images"),
        ("warning", "1 image of 6 cannot be read (y.jpg): training skips them"),
        ("note", "1 image with the same content as another file"),
    ]
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    assert folder_lines(folder)[1].level == "fault"
    assert folder_lines(folder, most=2)[0].text.endswith("6 images, 2 of them were opened")
    (folder / "empty").mkdir()
    assert folder_lines(folder / "empty") == []


def test_sources_of_a_command(folder: Path) -> None:
    common: dict[str, Any] = {"output": "runs/x"}
    source = [{"path": str(folder)}, {"path": str(folder / "0.png")}, {"path": "photos/*.tar"}, {"path": "gone"}]
    expected = [folder], [str(folder / "0.png"), "photos/*.tar"]
    teach = {"model": {"model": "random:test_resnet"}, "data": {"train": source}, "optim": OPTIM}
    assert sources_of(TeachConfig.model_validate(common | teach | {"steps": 2, "batch_size": 2})) == expected
    curate = {"pool": source, "keep": 1, "teacher": {"model": "random:test_resnet"}}
    assert sources_of(CurateConfig.model_validate(common | curate)) == expected
    detector = common | {"backbone": "random:test_resnet", "data": str(folder), "optim": OPTIM}
    detector |= {"steps": 2, "batch_size": 2}
    for more in (
        {"moving_teacher": {"unlabeled": [str(folder), f"{folder}/*.png"]}},
        {"distill": {"teacher": "teacher.safetensors"}, "unlabeled": [str(folder), f"{folder}/*.png"]},
    ):
        assert sources_of(TrainConfig.model_validate(detector | more)) == ([folder], [f"{folder}/*.png"])
