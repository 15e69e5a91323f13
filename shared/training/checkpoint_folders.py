"""Folders of checkpoints: how many steps a run has done, and whether it can continue from there. Does not import torch."""

import re
from pathlib import Path

from ssld.shared.checksums import damage_in_folder

MARK = "COMPLETE"
"""file in a checkpoint that is written last"""
EVALUATION = "evaluation.json"
"""file in a checkpoint with what an evaluation of its weights changes"""
_NAME = re.compile(r"step_\d+")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the usable checkpoints below a folder, oldest first."""
    return sorted(
        (mark.parent for mark in folder.glob(f"step_*/{MARK}") if _NAME.fullmatch(mark.parent.name)), key=step_of
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest usable checkpoint below a folder, None without one."""
    return next(reversed(complete_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """Return the number of updates that a checkpoint holds."""
    return int(checkpoint.name.removeprefix("step_"))


def damaged_checkpoint(checkpoint: Path) -> str | None:
    """Return the message on a checkpoint whose files do not match their checksums; None for a sound one."""
    damage = damage_in_folder(checkpoint)
    return damage and (
        f"{checkpoint}: checkpoint is damaged: {damage}; delete this folder to resume from the one before, if there is one"
    )


def beyond_the_end(run: Path, step: int, steps: int) -> str:
    """Return the message on a run that has done more steps than are requested."""
    return f"{run}: is at step {step} already, beyond the {steps} requested"
