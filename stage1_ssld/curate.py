"""Select images of a pool: the best k of each of the teacher's classes, without near-duplicates of validation, training or other selected images.

    accelerate launch stage1_ssld/curate.py --pool images/unlabeled --teacher.model teacher.safetensors --keep 4000 \\
        --val images/val --train images/train --output runs/curated

Writes `selected.parquet`, an unlabeled source for `distill.py`, `classes.csv`, and the plots `curation.png` and `examples.png`.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import CurateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(CurateConfig, curate_pool, argv, program="curate.py")


def curate_pool(config: CurateConfig) -> None:
    """Curate the pool of `config`."""
    from ssld.stage1_ssld.curation.steps import curate

    curate(config)


if __name__ == "__main__":
    sys.exit(main())
