"""Runs each check_*.py of this folder in a process of its own, because a simulated GPU changes its process for good.

By hand: `pytest tests/simulated_cuda/check_detectors.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_cuda import driver

HERE = Path(__file__).parent
CHECKS = sorted(path.name for path in HERE.glob("check_*.py"))
REASON = driver.missing()
pytestmark = [pytest.mark.process, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return driver.build(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize(
    "file", [pytest.param(name, marks=[] if "device" in name else pytest.mark.slow) for name in CHECKS]
)
def test_on_a_simulated_gpu(file: str, library: Path | None) -> None:
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    environment = os.environ | ({driver.LIBRARY: str(library)} if library else {})
    done = subprocess.run(
        [*line, str(HERE / file)], env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
