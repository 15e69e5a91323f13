"""Runs the files check_*.py of this folder in a process of their own, because a simulated GPU changes its process for good.

By hand: `pytest tests/simulated_cuda/check_detectors.py`.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.simulated_cuda import driver

HERE = Path(__file__).parent
QUICK = "check_device.py"
REASON = driver.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return driver.build(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["device", "the rest"])
def test_on_a_simulated_gpu(quick: bool, forking_python: Path, library: Path | None) -> None:
    files = sorted(str(path) for path in HERE.glob("check_*.py") if (path.name == QUICK) == quick)
    assert files
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    environment = os.environ | ({driver.LIBRARY: str(library)} if library else {})
    line = [str(forking_python), "-m", "pytest", *options, *files]
    done = subprocess.run(line, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
