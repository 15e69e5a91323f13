"""The selection of half a million scored images: planted copies are found, and memory stays far below that of the pool's rows times their columns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.process
def test_planted_copies_are_found_in_little_memory() -> None:
    """The benchmark at a fortieth of its size."""
    line = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "curation_memory.py"), "--rows", "500000"]
    line += ["--classes", "100", "--keep", "200", "--held_out", "5000"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["candidates"] == 30_000
    assert result["kept"] == 20_000
    assert result["like_val"] == 1000
    assert result["like_better"] == 2000
    assert 20 < result["start_megabytes"] <= result["candidates_megabytes"] <= result["outcome_megabytes"]
    assert result["outcome_megabytes"] - result["start_megabytes"] < 300
