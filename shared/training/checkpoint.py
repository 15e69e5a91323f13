"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step_00000100/` with one safetensors file for each part (model, optimizer, ema ...), `state.json` with the plain values,
`SHA256SUMS` of these, and an empty `COMPLETE`. It is written to a temporary folder, synced to disk, renamed, and marked complete last; only marked
ones are ever read, and only if the checksums are right. What an evaluation of these weights changes is added later, in `evaluation.json`. Whether a
checkpoint holds a bad update shows in the loss of the step after it, so older ones are deleted no earlier. Nothing is pickled. No random state is
kept: every draw of a run is a function of (seed, step, rank) or of the image.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssld.shared.checksums import is_sound, write_folder_sums, write_with_sum
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import save_tensors
from ssld.shared.training.checkpoint_folders import EVALUATION, MARK, complete_checkpoints, damaged_checkpoint, step_of


def save_checkpoint(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `step_<step>` below `folder`.

    Args:
        parts: file name without suffix -> tensors by name.
        state: JSON values; `step` is added.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".writing_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in parts.items():
            contents = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_tensors(contents, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
        write_folder_sums(temporary)
        for file in temporary.iterdir():
            _sync(file)
    except OSError:  # a full disk, whose last room it would hold
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _remove(final)  # one without its mark, left by a kill between rename and mark
    temporary.rename(final)
    _sync(folder)
    (final / MARK).touch()
    _sync(final)
    return final


def add_evaluation(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Replace values of the state of a checkpoint below `folder` by those after an evaluation of its weights."""
    write_with_sum(folder / f"step_{step:08d}" / EVALUATION, json.dumps(state) + "\n")


def keep_newest(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the remains of interrupted ones."""
    for old in complete_checkpoints(folder)[:-keep]:
        _remove(old)
    unmarked = [path for path in folder.glob("step_*") if not (path / MARK).exists()]
    for leftover in [*unmarked, *folder.glob(".writing_*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def drop_from(folder: Path, step: int) -> None:
    """Delete the checkpoints of this step and later ones, the newest first."""
    for checkpoint in reversed(complete_checkpoints(folder)):
        if step_of(checkpoint) >= step:
            _remove(checkpoint)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read (parts, state) as given to `save_checkpoint`, tensors on the CPU, with the values of `add_evaluation`.

    Raises UserError for a damaged checkpoint. A damaged evaluation counts as none: it can be repeated.
    """
    # Checked first: an error below, such as out of memory or Ctrl-C, then does not mean a damaged checkpoint.
    if damage := damaged_checkpoint(path):
        raise UserError(damage)
    parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    evaluation = path / EVALUATION
    return parts, state | (json.loads(evaluation.read_text(encoding="utf-8")) if is_sound(evaluation) else {})


def load_module(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a part into a module, every tensor of both sides. Raises UserError when they do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not fit this model: {first}") from None


def optimizer_part(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into (tensors, plain values) for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            key = f"{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                values[key] = value
    return tensors, values


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Restore the state from `optimizer_part`; settings such as the learning rate stay those of `optimizer`.

    Tensors of a parameter's shape get its memory format, as the optimizer would have made them: files hold contiguous tensors, and an update that
    mixes formats takes a slower path.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *values.items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARK).unlink(missing_ok=True)  # first, so that a kill in between leaves nothing that looks usable
    shutil.rmtree(checkpoint, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
