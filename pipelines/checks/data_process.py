"""The data check of stage 2 in a process of its own, as the runner starts its stages: its answer, whatever state torch is in."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssld.pipelines.runner.stages import ROOT

FLAGS = ("annotations", "images", "val_annotations", "val_images")


def check_data(places: Sequence[Path | None], *more: str) -> tuple[int, dict[str, Any] | None]:
    """(exit code, report or None where it came to none) of `check_data.py`, which prints as it always does.

    Args:
        places: in the order of FLAGS.
        more: further words of its command line.
    """
    given = [word for name, path in zip(FLAGS, places, strict=True) if path for word in (f"--{name}", str(path))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = run_script([*given, *more, "--report", str(report)])
        return code, json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def run_script(words: list[str]) -> int:
    """Start the script and wait for it; returns its exit code."""
    script = str(ROOT / "stage2_detect" / "check_data.py")
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-W", "ignore", script, *words], check=False).returncode
