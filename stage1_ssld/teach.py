"""Fine-tune a teacher on labelled images, where no off-the-shelf one has the right classes.

    accelerate launch stage1_ssld/teach.py --config stage1_ssld/configs/toy_teacher.yaml

Writes `teacher.safetensors`. The supervised baseline of a student is `distill.py --objective labels`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from stage1_ssld.config import TeachConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(TeachConfig, teach, argv, program="teach.py")


def teach(config: TeachConfig) -> None:
    """Train the teacher that `config` describes."""
    from stage1_ssld.loop import train

    train(config, command="teach", export="teacher")


if __name__ == "__main__":
    sys.exit(main())
