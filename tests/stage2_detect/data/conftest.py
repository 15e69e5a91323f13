"""A folder of six images, and COCO files about them written and read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.stage2_detect.data.coco import CocoData, read_coco


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with empty image files, which these tests never open."""
    for number in range(1, 7):
        (tmp_path / f"{number}.png").touch()
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Callable[..., CocoData]:
    """Writes the content of a COCO file into `folder`, and reads it with these options."""

    def write_and_read(data: dict[str, Any], *, training: bool = True, **options: Any) -> CocoData:
        (folder / "data.json").write_text(json.dumps(data))
        return read_coco(folder / "data.json", folder, training=training, **options)

    return write_and_read
