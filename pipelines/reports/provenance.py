"""Sentences on how the compared rows were made: student, teacher, starting weights, images seen and image size. Does not import torch.

A separate module because it reads the settings of runs, which neither the table nor the page needs otherwise.
"""

from pathlib import Path
from typing import Any

from ssld.pipelines.config import RowConfig
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.run_dir import read_result


def origin(row: RowConfig, runs: Path) -> str | None:
    """Describe the training of a row's backbone and detector from their run directories; None if neither is known.

    A detector row may name a training or an evaluation; the training of an evaluated file is looked up beside the file.
    """
    parts = [_backbone(run, runs) for run in _folders(row.classifier, runs)]
    parts += [_detector(run, runs) for run in _folders(row.detector, runs)]
    return "; ".join(part for part in parts if part) or None


def _folders(stages: tuple[str, ...], runs: Path) -> list[Path]:
    """Return the run directory of the first of several seeds."""
    return [runs / stages[0]] if stages else []


def _backbone(run: Path, runs: Path) -> str | None:
    settings = _settings(run)
    student = _text(settings, "student", "model")
    model = student or _text(settings, "model", "model")
    if model is None:
        return None
    teacher = _text(settings, "teacher", "model")
    labels = settings.get("objective") == "labels" or teacher is None
    how = "trained on labels" if labels else f"distilled from {_short(teacher, runs)}"
    return f"{'student' if student else 'network'} {_short(model, runs)} {how}{_extent(run, settings, 'data', 'image_size')}"


def _detector(run: Path, runs: Path) -> str | None:
    settings = _settings(run)
    file = settings.get("model")
    if isinstance(file, str):  # an evaluation
        run = Path(file).parent
        settings = _settings(run)
    backbone = settings.get("backbone")
    if not isinstance(backbone, str):
        return None
    return f"detector trained from {_short(backbone, runs)}{_extent(run, settings, 'resize', 'short_side')}"


def _extent(run: Path, settings: dict[str, Any], group: str, key: str) -> str:
    """Return the number of images seen in training (repeats included) and their size, in words."""
    try:
        images_seen = ((read_result(run) or {}).get("metrics") or {}).get("images_seen")
    except (*MALFORMED, UserError):
        images_seen = None
    side = settings[group].get(key) if isinstance(settings.get(group), dict) else None
    words = f", {images_seen:,} images seen" if isinstance(images_seen, int) else ""
    return words + (f" at {side} px" if isinstance(side, int) else "")


def _settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run; empty if they are missing or damaged, which the stage itself reports."""
    try:
        return read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    except (OSError, *MALFORMED, UserError):
        return {}


def _text(settings: dict[str, Any], group: str, key: str) -> str | None:
    value = settings[group].get(key) if isinstance(settings.get(group), dict) else None
    return value if isinstance(value, str) else None


def _short(reference: str | None, runs: Path) -> str:
    """Return a file below the folder of runs relative to it, anything else unchanged."""
    path = Path(str(reference))
    return path.relative_to(runs).as_posix() if path.is_relative_to(runs) else str(reference)
