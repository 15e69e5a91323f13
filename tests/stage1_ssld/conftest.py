"""A small store of soft labels, its images, and the settings that it was written with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.stage1_ssld.data_config import DataConfig

VIEW = {"image_size": 32, "augment": "rand-m5-n1", "erase": 0.2}


@pytest.fixture(scope="session")
def store_images(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `labeled` (30) and `others` (15, one of them unreadable), apart from those of other tests."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(tiny.train, folder / "labeled")
    shutil.copytree(tiny.unlabeled, folder / "others")
    (folder / "others" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def written_store(store_images: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory, call: Any) -> Path:
    """A store of 3 views of 45 images in files of 16."""
    from ssld.stage1_ssld.write_soft_labels import main

    folder = tmp_path_factory.mktemp("written")
    settings = {
        "output": str(folder / "run"),
        "data": {"train": [str(store_images / "labeled"), str(store_images / "others")], **VIEW},
        "teacher": {"model": str(teacher_file)},
        **{"views": 3, "top": 2, "seed": 5, "shard_images": 16, "batch_size": 10},
        **{"threads": 1, "workers": 0, "device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert call(main, ["--config", str(folder / "run.yaml")]) == 0
    return folder / "run" / "store"


@pytest.fixture
def store_copy(written_store: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    shutil.copytree(written_store, tmp_path / "run" / "store")
    return tmp_path / "run" / "store"


@pytest.fixture
def store_data(store_images: Path) -> DataConfig:
    """The settings it was written with, sources the other way round."""
    return DataConfig(train=[str(store_images / "others"), str(store_images / "labeled")], **VIEW)
