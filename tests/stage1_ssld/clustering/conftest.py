"""An encoder without classes, and settings that make prototypes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.stage1_ssld.prototypes import main as prototypes


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of a `test_vit` without classes, as encoders are published."""
    torch.manual_seed(11)
    net = timm.create_model("test_vit", num_classes=0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def settings(tiny: Any, encoder_file: Path) -> dict[str, Any]:
    """Three sources make three shards: 44 images, 30 of them twice."""
    return {
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "batch_size": 16,
        "pool": [str(tiny.unlabeled), str(tiny.parquet), str(tiny.train)],
        "encoder": {"model": str(encoder_file), "arch": "test_vit"},
        "prototypes": 6,
        "perplexity": 3.0,
        "image_size": 64,
        "examples": 3,
    }


@pytest.fixture
def made(settings: dict[str, Any], arguments: Any, call: Any, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command with changed settings; gives the run directory."""

    def make(output: str = "run", **change: Any) -> Path:
        assert call(prototypes, arguments(settings | change, output)) == 0
        return tmp_path / output

    return make
