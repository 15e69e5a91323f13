"""Files of other projects' detectors: read without running code from them, and the project that their names belong to."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.array_pickles import array_of, read_pickle
from ssld.shared.models.model_file import is_pickle
from ssld.shared.models.state_dicts import read_state_dict
from ssld.stage2_detect.foreign.detectron2_weights import is_detectron2
from ssld.stage2_detect.foreign.fitting import Tensors
from ssld.stage2_detect.foreign.mmdetection_weights import is_mmdetection

Project = Literal["torchvision", "detectron2", "mmdetection"]


def read_foreign(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read (tensors by the names of their project, what the file holds under `meta`) of a .safetensors, .pth or .pkl file.

    Raises UserError for a file that holds anything but tensors or arrays, plain numbers and text, since opening it could run code.
    """
    if file.suffix == ".pkl" and not zipfile.is_zipfile(file):
        return _arrays(file), {}
    tensors, _ = read_state_dict(file)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}, _meta(file)


def _arrays(file: Path) -> Tensors:
    """Read a file of detectron2's model zoo: a pickle of a dictionary, below `model` the arrays by name."""
    content = read_pickle(file, ".pkl")
    arrays = content.get("model") if isinstance(content, dict) else None
    if not isinstance(arrays, dict) or not all(isinstance(name, str) for name in arrays):
        raise UserError(f"{file}: has no arrays by name below `model`, as files of detectron2 have")
    tensors = {}
    for name, value in arrays.items():
        array = array_of(value, name, file)
        tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))
    return tensors


def _meta(file: Path) -> dict[str, Any]:
    if not is_pickle(file):
        return {}
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # an older file, whose tensors cannot be left out; it has been read before
        content = torch.load(file, map_location="cpu", weights_only=True)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return {str(key): value for key, value in meta.items()} if isinstance(meta, Mapping) else {}


def project_of(tensors: Mapping[str, Tensor], source: object) -> Project:
    """Return the project whose names these are. Raises UserError for others."""
    if any(name.startswith("backbone.body.") for name in tensors):
        return "torchvision"
    if is_detectron2(tensors):
        return "detectron2"
    if is_mmdetection(tensors):
        return "mmdetection"
    first = next(iter(tensors), "no tensors")
    raise UserError(
        f"{source}: no detector with FPN of torchvision, detectron2 or mmdetection (first of {len(tensors)} tensors: {first})"
    )
