"""Make a teacher from an encoder without classes, such as DINOv3, SigLIP or MAE, or from a classifier without its head.

    accelerate launch stage1_ssld/prototypes.py --pool images/unlabeled --encoder.model timm:vit_small_patch16_dinov3 --output runs/prototypes

The encoder embeds your images, k-means finds K prototypes, and the teacher's soft labels are the image's similarities to them. Writes
`teacher.safetensors`, a timm classifier with K classes that every command accepts as a teacher, and `prototypes.png`.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import PrototypesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(PrototypesConfig, make_teacher, argv, program="prototypes.py")


def make_teacher(config: PrototypesConfig) -> None:
    """Make the teacher of `config`."""
    from ssld.stage1_ssld.clustering.steps import make_prototypes

    make_prototypes(config)


if __name__ == "__main__":
    sys.exit(main())
