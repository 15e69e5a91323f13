"""Train a student from a teacher's soft labels (SSLD, arXiv 2103.05959), on labelled and unlabelled images alike.

    accelerate launch stage1_ssld/distill.py --config stage1_ssld/configs/resnet50d.yaml

Writes `student.safetensors`. With `--objective labels` the same settings train the supervised baseline on the labelled sources.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import DistillConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(DistillConfig, distill, argv, program="distill.py")


def distill(config: DistillConfig) -> None:
    """Train the student that `config` describes."""
    from ssld.stage1_ssld.loop import train

    train(config, command="distill", export="student")


if __name__ == "__main__":
    sys.exit(main())
