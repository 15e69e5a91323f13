"""List unlabeled photos to annotate next, by how uncertain a detector is about them; with annotations, list labels to look at first.

    python stage2_detect/audit.py --model runs/det/detector.safetensors --images more_photos --count 50 --output runs/next
    python stage2_detect/audit.py --model runs/det/detector.safetensors --images photos --annotations train.json --output runs/labels

The first command writes `annotate_next.txt`, a list of photos that other commands take as `--images`, the most doubtful first and near-duplicates
left out; `annotate_next.json`, the doubts about every photo (`prediction/doubt.py`); and `annotate_next.html`, a page with the listed photos and
their boxes. A killed run resumes with the same command. The second writes `label_audit.json` and `label_audit.jpg`, as `evaluate.py` does.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage2_detect.predict_config import AuditConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(AuditConfig, audit, argv, program="audit.py")


def audit(config: AuditConfig) -> None:
    """List photos to annotate next, or with annotations labels to look at first.

    Raises:
        UserError: bad settings or files; no photo can be read.
    """
    from ssld.stage2_detect.detector_file import load_named
    from ssld.stage2_detect.prediction.audits import check_labels, list_next

    loaded = load_named(config.model)
    if config.annotations is None:
        list_next(config, loaded)
    else:
        check_labels(config, loaded)


if __name__ == "__main__":
    sys.exit(main())
