"""A copy of the drawn scenes that a test damages, and the data check of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssld.stage2_detect.check_data import main

Content = dict[str, Any]


class DataSet:
    """A copy of the drawn scenes that a test may damage."""

    def __init__(self, folder: Path, source: Any) -> None:
        self.folder = folder
        for part in ("train", "val"):
            shutil.copytree(getattr(source, f"{part}_images"), folder / part)
            shutil.copy(getattr(source, f"{part}_annotations"), folder / f"{part}.json")

    def read(self, part: str = "train") -> Content:
        content: Content = json.loads((self.folder / f"{part}.json").read_text())
        return content

    def write(self, content: Content, part: str = "train") -> None:
        (self.folder / f"{part}.json").write_text(json.dumps(content))

    def check(self, *flags: str, val: bool = False) -> tuple[int, list[Content], Content]:
        """(exit code, findings, statistics of the files)."""
        report = self.folder / "report.json"
        places = ["--annotations", str(self.folder / "train.json"), "--images", str(self.folder / "train")]
        if val:
            places += ["--val_annotations", str(self.folder / "val.json"), "--val-images", str(self.folder / "val")]
        code = main([*places, "--report", str(report), *flags])
        record = json.loads(report.read_text())
        return code, record["findings"], record["files"]


@pytest.fixture
def data(tmp_path: Path, tiny_coco: Any) -> DataSet:
    return DataSet(tmp_path, tiny_coco)


def texts(findings: list[Content], level: str) -> list[str]:
    return [finding["text"] for finding in findings if finding["level"] == level]
