"""Make a teacher of an encoder that has no classes: DINOv3, SigLIP, MAE and the like, or a classifier without its head.

    accelerate launch stage1_ssld/prototypes.py --pool images/unlabeled --encoder.model timm:vit_small_patch16_dinov3 --output runs/prototypes

The encoder embeds your own images, k-means finds K prototypes among them, and the classes of the teacher are how near an image is to each. Writes
`teacher.safetensors`, a timm classifier with K classes that every command takes as a teacher, and `prototypes.png`.
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
    """Entry point; returns the exit code."""
    return run_command(PrototypesConfig, make_teacher, argv, program="prototypes.py")


def make_teacher(config: PrototypesConfig) -> None:
    """Make the teacher as `config` says."""
    from ssld.stage1_ssld.clustering.steps import make_prototypes

    make_prototypes(config)


if __name__ == "__main__":
    sys.exit(main())
