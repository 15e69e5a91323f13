"""Write a store of soft labels: the teacher's soft labels of V views of every image, for any number of students.

    accelerate launch stage1_ssld/write_soft_labels.py --config soft_labels.yaml

Writes `store/`, which `distill.py --store` reads. The processes share its files; a killed run continues with the next file.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import SoftLabelsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(SoftLabelsConfig, write_soft_labels, argv, program="write_soft_labels.py")


def write_soft_labels(config: SoftLabelsConfig) -> None:
    """Write the store of `config`."""
    from ssld.stage1_ssld.distillation.soft_label_writer import write_store

    write_store(config)


if __name__ == "__main__":
    sys.exit(main())
