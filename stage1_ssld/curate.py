"""Select images of a pool: the best k of each of the teacher's classes, no near-duplicates of validation or training images or of each other.

    accelerate launch stage1_ssld/curate.py --pool images/unlabelled --teacher.model teacher.safetensors --keep 4000 \\
        --val images/val --train images/train --output runs/curated

Writes `selected.parquet`, which `distill.py` takes as an unlabelled source, `classes.csv`, and the pictures `curation.png` and `examples.png`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from stage1_ssld.config import CurateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(CurateConfig, curate_pool, argv, program="curate.py")


def curate_pool(config: CurateConfig) -> None:
    """Curate as `config` says."""
    from stage1_ssld.curation import curate

    curate(config)


if __name__ == "__main__":
    sys.exit(main())
