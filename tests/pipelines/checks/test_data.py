"""Data checks of the doctor on folders of images without boxes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssld.pipelines.checks.data import Source, source_lines, sources_of
from ssld.stage1_ssld.config import CurateConfig, TeachConfig
from ssld.stage2_detect.config import TrainConfig

OPTIM = {"lr": 0.1, "reference_batch": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_findings_about_a_folder(folder: Path) -> None:
    assert [(line.level, line.text) for line in source_lines(Source(folder))] == [("ok", f"{folder}: 4 images")]
    shutil.copy(folder / "0.png", folder / "x.png")
    (folder / "y.jpg").write_bytes(b"nothing")
    findings = [(line.level, line.text.removeprefix(f"{folder}: ")) for line in source_lines(Source(folder))]
    assert findings == [
        ("ok", "6 images"),
        ("warning", "1 image of 6 cannot be read (y.jpg): training skips them"),
        ("note", "1 image with the same content as another file"),
    ]
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    assert source_lines(Source(folder))[1].level == "fault"
    assert source_lines(Source(folder), most=2)[0].text.endswith("6 images, 2 of them were opened")
    (folder / "empty").mkdir()
    assert source_lines(Source(folder / "empty")) == []


def test_images_of_a_command(folder: Path) -> None:
    common: dict[str, Any] = {"output": "runs/x"}
    source = [{"path": str(folder)}, {"path": str(folder / "gone")}, {"path": str(folder / "0.png")}]
    expected = [Source(folder)], [str(folder / "gone"), str(folder / "0.png")]
    teach = {"model": {"model": "random:test_resnet"}, "data": {"train": source}, "optim": OPTIM}
    assert sources_of(TeachConfig.model_validate(common | teach | {"steps": 2, "batch_size": 2})) == expected
    curate = {"pool": source, "keep": 1, "teacher": {"model": "random:test_resnet"}}
    assert sources_of(CurateConfig.model_validate(common | curate)) == expected
    moving = {"unlabeled": [str(folder), str(folder / "gone"), str(folder / "0.png")]}
    detector = common | {
        "backbone": "random:test_resnet",
        "data": str(folder),
        "optim": OPTIM,
        "steps": 2,
        "batch_size": 2,
    }
    found = [Source(folder), Source(folder / "0.png")]
    assert sources_of(TrainConfig.model_validate(detector | {"moving_teacher": moving})) == (found, [])
    taught = {"distill": {"teacher": "random"}, "unlabeled": [f"{folder}/*.png", str(folder / "gone.txt")]}
    assert sources_of(TrainConfig.model_validate(detector | taught)) == ([Source(folder / "*.png")], [])


def test_lists_and_patterns_are_opened(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"nothing")
    (folder / "list.txt").write_text("0.png\n1.png\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "list.json").write_text(json.dumps({"images": [{"file_name": "2.png"}]}))
    found = [source_lines(source)[-1].text for source in (Source(folder / "list.txt"), Source(folder / "[12].png"))]
    assert found == [
        f"{folder / name}: 1 image of 2 cannot be read (1.png): training skips them"
        for name in ("list.txt", "[12].png")
    ]
    assert [line.text for line in source_lines(Source(folder / "deep/list.json", folder))] == [
        f"{folder}/deep/list.json: 1 image"
    ]
    (missing,) = source_lines(Source(folder / "deep" / "list.json"))
    assert missing.level == "fault"
    assert missing.text.startswith(f"1 of the 1 images of {folder}/deep/list.json are missing")
