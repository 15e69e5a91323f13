"""Fine-tune a teacher on labeled images, for classes that no ready-made teacher has.

    accelerate launch stage1_ssld/teach.py --config stage1_ssld/configs/toy_teacher.yaml

Writes `teacher.safetensors`. The supervised baseline of a student is `distill.py --objective labels`.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import TeachConfig
from ssld.stage1_ssld.distill import train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(TeachConfig, teach, argv, program="teach.py")


def teach(config: TeachConfig) -> None:
    """Train the teacher of `config`."""
    train(config, command="teach", result="teacher")


if __name__ == "__main__":
    sys.exit(main())
