"""Label-free distillation of backbones (SSLD), and detectors fine-tuned from them.

The folders of the repository are parts of this package: `ssld.shared`, `ssld.stage1_ssld`, `ssld.stage2_detect`, `ssld.pipelines`. They are
linked in this folder, so that the installation uses one name.

From Python, `ssld.distill`, `ssld.register_loss`, `ssld.train`, `ssld.load_backbone`, `ssld.build_detector` and `ssld.load_detector` (docs/api.md)
are imported at their first use, so that `import ssld` and the command's `--help` do not wait for torch.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssld.shared.models.backbones import load_backbone
    from ssld.stage1_ssld.data_config import register_loss
    from ssld.stage1_ssld.distill import distill_student as distill
    from ssld.stage2_detect.detector_file import load_detector
    from ssld.stage2_detect.train import train_detector as train
    from ssld.stage2_detect.training.new_detector import build_detector

__all__ = ["build_detector", "distill", "load_backbone", "load_detector", "register_loss", "train"]

_HERE = Path(__file__).resolve().parent


def _fault() -> str | None:
    """Return why the script that was started cannot use this package, or None."""
    if not (_HERE / "shared").is_dir():
        return f"{_HERE}: the links in this folder are missing; clone with git, or unpack with tar or unzip, on Linux, macOS or WSL"
    started = getattr(sys.modules["__main__"], "__file__", None)
    if started is None:
        return None
    script = Path(started).resolve()
    own, copy = _HERE / script.parent.name / script.name, script.parent.parent
    # An entry of another copy of the project would run this copy's modules. A user's own script may have any name.
    if own.is_file() and not own.samefile(script) and (copy / "ssld" / "__init__.py").is_file():
        return (
            f"{started}: belongs to {copy}, but the package ssld that is installed is that of {_HERE.parent}; "
            f"run pip install -e . in {copy}"
        )
    return None


if _message := _fault():
    print(f"error: {_message}", file=sys.stderr)
    sys.exit(2)

# name -> (module, name there)
_FUNCTIONS = {
    "build_detector": ("ssld.stage2_detect.training.new_detector", "build_detector"),
    "distill": ("ssld.stage1_ssld.distill", "distill_student"),
    "load_backbone": ("ssld.shared.models.backbones", "load_backbone"),
    "load_detector": ("ssld.stage2_detect.detector_file", "load_detector"),
    "register_loss": ("ssld.stage1_ssld.data_config", "register_loss"),
    "train": ("ssld.stage2_detect.train", "train_detector"),
}


if not TYPE_CHECKING:  # a checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(f"module 'ssld' has no attribute {name!r}")
        module, function = _FUNCTIONS[name]
        return getattr(import_module(module), function)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
