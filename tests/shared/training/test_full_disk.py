"""A disk that is really full ends a command with one line and exit code 2, and leaves what was there before.

The limit on file sizes stands in for the disk: a write beyond it fails in the kernel, inside the library that writes tensors, and not in a stand-in.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssld.shared.models.model_file import read_tensors
from ssld.shared.training.checkpoint import load_checkpoint
from ssld.shared.training.checkpoint_folders import complete_checkpoints

ROOT = Path(__file__).resolve().parents[3]

# Each child writes once with room, and once without: 40 kB where a file may have 20 kB.
WRITERS = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from ssld.shared.training.checkpoint import save_checkpoint
from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.models.model_file import save_model_file

class Config(CommandConfig):
    pass

def checkpoint(path, value):
    tensors = {"w": torch.full((10_000,), float(value))}
    save_checkpoint(path / "checkpoints", value, {"model": tensors, "optimizer": tensors}, {})

def model_file(path, value):
    save_model_file(path / "model.safetensors", {"w": torch.full((10_000,), float(value))}, {"kind": "backbone"})

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = {"checkpoint": checkpoint, "model_file": model_file}[sys.argv[2]]

def work(config):
    writer(config.output, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    writer(config.output, 2)

sys.exit(run_command(Config, work, ["--output", sys.argv[3], "--threads", "1"], program="write.py"))
"""


@pytest.mark.process
@pytest.mark.parametrize("writer", ["checkpoint", "model_file"])
def test_a_full_disk_costs_one_line_and_nothing_else(writer: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITERS, str(ROOT), writer, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"error: {tmp_path}")
    assert os.strerror(errno.EFBIG) in process.stderr
    assert "run the same command again" in process.stderr
    if writer == "checkpoint":
        (only,) = (tmp_path / "checkpoints").iterdir()  # and no remains, which would hold the last room
        assert complete_checkpoints(tmp_path / "checkpoints") == [only]
        before = load_checkpoint(only)[0]["model"]
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        before = read_tensors(tmp_path / "model.safetensors")
    assert torch.equal(before["w"], torch.ones(10_000))
