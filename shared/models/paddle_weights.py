"""PaddlePaddle's weight files (.pdparams): read without executing them, and converted to torch's names and layouts.

Such a file is a pickle of a dictionary, layer names -> NumPy arrays, beside two records of `paddle.save`: parameter names, and how parameters that
pickle protocols below 4 could not hold were cut into slices (PaddlePaddle@v2.6 python/paddle/framework/io.py). `array_pickles.py` reads it.
Deliberately absent: PaddlePaddle itself, optimizer files (.pdopt), programs of static graphs (.pdmodel, .pdiparams).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.array_pickles import array_of, read_pickle

_PARAMETER_NAMES, _SLICES = "StructuredToParameterName@@", "UnpackBigParamInfor@@"
LEAVES = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}


def read_paddle_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a .pdparams file by their structured names.

    Raises UserError for a missing file, a pickle that names anything but arrays and plain containers, and for any other content.
    """
    content = read_pickle(path, ".pdparams")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the parameters of a model by name")
    unnamed = next((name for name in content if not isinstance(name, str)), None)
    if unnamed is not None:
        raise UserError(f"{path}: keys must be parameter names (found {type(unnamed).__name__})")
    odd = next((name for name in content if not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"{path}: a parameter is called {odd[:80]!r}, which cannot be printed; the file is damaged")
    content.pop(_PARAMETER_NAMES, None)
    slices = content.pop(_SLICES, {})
    arrays = {name: _array_of(value, name, path) for name, value in content.items()}
    try:
        for name, cut in slices.items():
            arrays[name] = np.concatenate([arrays.pop(part) for part in cut["slices"]]).reshape(cut["OriginShape"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its record of sliced parameters does not fit them; the file is damaged") from None
    return arrays


def to_torch(arrays: Mapping[str, np.ndarray], modules: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Convert arrays to tensors by torch's names, float32, linear weights transposed to [out, in].

    Args:
        modules: PaddlePaddle's layer -> torch's module, all of them: `stem.0.bn` -> `conv1.1`. Layers with two-dimensional weights are linear.
        source: the file's name, for messages.

    Raises:
        UserError: a parameter of a layer that `modules` does not know, a layer without parameters, or values that are not weights.
    """
    tensors: dict[str, Tensor] = {}
    strange, known = [], set()
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in modules or leaf not in LEAVES:
            strange.append(name)
            continue
        known.add(layer)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{source}: {name} holds {_fault(array)}, no weights; the file is damaged")
        value = np.array(array.T if leaf == "weight" and array.ndim == 2 else array, np.float32, order="C")
        tensors[f"{modules[layer]}.{LEAVES[leaf]}"] = torch.from_numpy(value)
        if leaf == "_mean":  # torch's BatchNorm counts its batches, PaddlePaddle's does not
            tensors[f"{modules[layer]}.num_batches_tracked"] = torch.tensor(0)
    missing = [layer for layer in modules if layer not in known]
    if strange or missing:
        first = "; ".join([f"{name} unknown" for name in strange[:2]] + [f"{layer} missing" for layer in missing[:2]])
        raise UserError(
            f"{source}: its parameters are not those of the network ({len(strange)} unknown, {len(missing)} layers missing: {first})"
        )
    return tensors


def _fault(array: np.ndarray) -> str:
    return "values that are not finite" if array.dtype.kind == "f" else f"{array.dtype} values"


def _array_of(value: Any, name: str, path: Path) -> np.ndarray:
    if (
        isinstance(value, tuple) and len(value) == 2
    ):  # (parameter name, array): how a tensor outside a state dict is saved
        value = value[1]
    return array_of(value, name, path)
