"""Label-free distillation of backbones (SSLD), and detectors fine-tuned from them.

The folders of the repository are this package's parts: `ssld.shared`, `ssld.stage1_ssld`, `ssld.stage2_detect`, `ssld.pipelines`, linked here so
that no other name is taken where the package is installed.
"""

import sys
from pathlib import Path


def _refuse_script_of_another_tree() -> None:
    """End in one line where an entry script was started by path out of another copy of the project: it would run the installed copy's modules."""
    started = getattr(sys.modules["__main__"], "__file__", None)
    if started is None:
        return
    script, here = Path(started).resolve(), Path(__file__).resolve().parent
    ours = here / script.parent.name / script.name
    if ours.is_file() and not ours.samefile(script):
        folder = script.parents[1]
        print(
            f"error: {started}: belongs to {folder}, but the package ssld that is installed is that of {here.parent}; "
            f"run pip install -e . in {folder}",
            file=sys.stderr,
        )
        sys.exit(2)


_refuse_script_of_another_tree()
