"""Layouts of COCO data sets: encodings of the annotation file, and names of parts as whole words."""

import json
from pathlib import Path

import pytest
from converted_data import save, write
from many_formats import coco

from ssld.stage2_detect.data.convert.parts import find_data
from ssld.stage2_detect.data_config import DetectionDataConfig
from ssld.stage2_detect.layouts.coco import find_coco, part_kind


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    content = coco("valid", prefix="größe ")
    for number in range(2):
        save(tmp_path / "photos" / f"größe {number}.png")
    text = json.dumps(content, ensure_ascii=False).replace("\n", "\r\n")
    (tmp_path / "boxes.json").write_bytes(text.encode(encoding))
    for path in (tmp_path, tmp_path / "boxes.json"):
        layout = find_coco(path)
        assert layout is not None
        assert list(layout.parts.values()) == [(tmp_path / "boxes.json", tmp_path / "photos")]
    assert find_data(DetectionDataConfig(source=str(tmp_path))).train.annotations == tmp_path / "boxes.json"


def test_parts_are_whole_words(tmp_path: Path) -> None:
    kinds = {"contest_photos": None, "latest": None, "Test-2": "test", "instances_val2017": "val", "trainee": None}
    assert {name: part_kind(name) for name in kinds} == kinds
    for folder in ("contest_photos", "latest"):
        save(tmp_path / folder / "0.png")
    write(tmp_path / "contest_photos" / "boxes.json", json.dumps(coco("test")))
    layout = find_coco(tmp_path)
    assert layout is not None
    assert list(layout.parts) == ["train"]


@pytest.mark.parametrize(
    ("name", "part"), [("my first test", "train"), ("train test 2", "train"), ("valid", "valid"), ("test", "test")]
)
def test_the_folder_of_the_whole_data_set(tmp_path: Path, name: str, part: str) -> None:
    """Its name is that of a part only where it is nothing else; folders below it may have more words."""
    save(tmp_path / name / "photos" / "0.png")
    write(tmp_path / name / "boxes.json", json.dumps(coco("test")))
    for path in (tmp_path / name, tmp_path / name / "boxes.json"):
        layout = find_coco(path)
        assert layout is not None
        assert list(layout.parts) == [part]
