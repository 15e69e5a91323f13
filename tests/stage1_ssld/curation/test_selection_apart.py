"""The selection as a process of its own: it ends when it should, loads no torch and takes little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssld.shared.errors import Stopped
from ssld.stage1_ssld.curation import outcome
from ssld.stage1_ssld.curation.outcome import run_part

ROOT = Path(__file__).resolve().parents[3]


def test_a_selection_apart_ends_when_it_should(tmp_path: Path) -> None:
    """Asked to stop, left alone by the process that started it, or with a file that is not there: in the middle of a read that never ends."""
    with pytest.raises(FileNotFoundError) as caught:
        run_part("find", tmp_path, apart=True, stop=lambda: False)
    assert caught.value.filename == str(tmp_path / "selection.json")
    os.mkfifo(tmp_path / "selection.json")
    with pytest.raises(Stopped, match="the selection is not finished"):
        run_part("find", tmp_path, apart=True, stop=lambda: True)
    line = [sys.executable, outcome.__file__, "find", str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1


def test_the_selection_loads_no_torch_and_takes_little_memory() -> None:
    """The benchmark at a fortieth of its size: planted copies and mirror images are found, by processes that stay small."""
    line = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "curation_memory.py"), "--rows", "500000"]
    line += ["--classes", "100", "--keep", "200", "--protected", "5000"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["candidates"] == 30_000
    assert found["kept"] == 20_000
    assert found["like_val"] == 1000
    assert found["like_better"] == 2000
    assert 20 < found["find_megabytes"] < 400
    assert 20 < found["decide_megabytes"] < 300
