"""Label-free distillation of backbones (SSLD), and detectors fine-tuned from them.

The folders of the repository are this package's parts: `ssld.shared`, `ssld.stage1_ssld`, `ssld.stage2_detect`, `ssld.pipelines`, linked here so
that no other name is taken where the package is installed.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _fault() -> str | None:
    """Why this package cannot serve the script that was started, if it cannot."""
    if not (_HERE / "shared").is_dir():
        return f"{_HERE}: its links were lost on the way here; clone with git, or unpack with tar or unzip, on Linux, macOS or WSL"
    started = getattr(sys.modules["__main__"], "__file__", None)
    if started is None:
        return None
    script = Path(started).resolve()
    own, copy = _HERE / script.parent.name / script.name, script.parent.parent
    # An entry of another copy of the project would run this copy's modules. A script of the user's own, of whatever name, is welcome.
    if own.is_file() and not own.samefile(script) and (copy / "ssld" / "__init__.py").is_file():
        return (
            f"{started}: belongs to {copy}, but the package ssld that is installed is that of {_HERE.parent}; "
            f"run pip install -e . in {copy}"
        )
    return None


if _message := _fault():
    print(f"error: {_message}", file=sys.stderr)
    sys.exit(2)
