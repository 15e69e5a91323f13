"""PaddlePaddle's weight files (.pdparams): read without running what they hold, and brought to torch's names and layouts.

Such a file is a pickle of a dictionary, layer names -> NumPy arrays, beside two records of `paddle.save`: parameter names, and how parameters that
pickle protocols below 4 could not hold were cut into slices (PaddlePaddle@v2.6 python/paddle/framework/io.py). A pickle may call anything it names,
so none of what it names is looked up: the few names that arrays need get stand-ins of ours, every other one ends the reading. Deliberately
absent: PaddlePaddle itself, optimizer files (.pdopt), programs of static graphs (.pdmodel, .pdiparams).
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ssld.shared.errors import UserError

_PARAMETER_NAMES, _SLICES = "StructuredToParameterName@@", "UnpackBigParamInfor@@"
_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_REMEMBERS = ("PUT", "BINPUT", "LONG_BINPUT")
_TUPLES, _BETWEEN = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), (*_REMEMBERS, "MEMOIZE", "MARK", "NONE")
_DEEPEST = 100
LEAVES = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}


def read_paddle_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .pdparams file by their structured names.

    Raises UserError for a missing file, a pickle that names anything but arrays and plain containers, and for any other content.
    """
    try:
        with path.open("rb") as file:
            _check_steps(file)
            # latin1: files written by Python 2 hold their bytes as text.
            content = _Unpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise UserError(
            f"{path}: asks for {error} while being opened, which could run code; only arrays are read from a .pdparams file"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a pickle of garbage may fail in any way
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not a .pdparams file ({why})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the parameters of a model by name")
    content.pop(_PARAMETER_NAMES, None)
    slices = content.pop(_SLICES, {})
    arrays = {str(name): _array_of(value, str(name), path) for name, value in content.items()}
    try:
        for name, cut in slices.items():
            arrays[name] = np.concatenate([arrays.pop(part) for part in cut["slices"]]).reshape(cut["OriginShape"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its record of sliced parameters does not fit them; the file is damaged") from None
    return arrays


def to_torch(arrays: Mapping[str, np.ndarray], modules: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Tensors by torch's names, float32, linear weights transposed to [out, in].

    Args:
        modules: PaddlePaddle's layer -> torch's module, all of them: `stem.0.bn` -> `conv1.1`. Layers with two-dimensional weights are linear.
        source: the file's name, for messages.

    Raises:
        UserError: a parameter of a layer that `modules` does not know, a layer without parameters, or values that are no weights.
    """
    tensors: dict[str, Tensor] = {}
    strange, found = [], set()
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in modules or leaf not in LEAVES:
            strange.append(name)
            continue
        found.add(layer)
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{source}: {name} holds {_fault(array)}, no weights; the file is damaged")
        value = np.array(array.T if leaf == "weight" and array.ndim == 2 else array, np.float32, order="C")
        tensors[f"{modules[layer]}.{LEAVES[leaf]}"] = torch.from_numpy(value)
        if leaf == "_mean":  # torch's BatchNorm counts its batches, PaddlePaddle's does not
            tensors[f"{modules[layer]}.num_batches_tracked"] = torch.tensor(0)
    missing = [layer for layer in modules if layer not in found]
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
    if not isinstance(value, _Array) or value.array is None:
        raise UserError(f"{path}: {name!r} is a {type(value).__name__.lstrip('_').lower()}, an array is expected")
    return value.array


def _check_steps(file: BinaryIO) -> None:
    """Go through a pickle without carrying it out; raises UnpicklingError for what would take memory or stack out of proportion to the file.

    The table of what it remembers is as long as its largest index, whatever the file's size; and tuples in tuples that become a key are hashed
    one inside the other, without a limit.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    tuples = 0
    steps: Any = pickletools.genops(cast(BinaryIO, _Sized(file, size)))
    for step, argument, _ in steps:
        if step.name in _REMEMBERS and int(argument) > size:  # a step of a byte or more for each
            raise pickle.UnpicklingError(f"remembers something as number {argument}")
        tuples = tuples + 1 if step.name in _TUPLES else tuples if step.name in _BETWEEN else 0
        if tuples > _DEEPEST:
            raise pickle.UnpicklingError(f"tuples in each other, more than {_DEEPEST} deep")
    file.seek(0)


class _Sized:
    """A file of which nobody can ask for more than it has; pickletools allocates what a damaged length says."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self.readline, self.tell = file, size, file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


class _Refused(Exception):
    """A pickle asks for something that no array needs."""


class _Callable:
    """What a pickle may call. It can do nothing else with it: no attribute of it can be set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a function")


class _Type:
    """Stands for `numpy.dtype`: one of the plain number types."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _NUMBERS:
            raise pickle.UnpicklingError(f"array of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self) -> Any:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for `numpy.ndarray`: a view of the pickle's bytes."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _from_bytes(data, kind, shape, "F" if fortran else "C").array


def _from_bytes(data: Any, kind: _Type, shape: Any, order: str = "C") -> _Array:
    content = data.encode("latin1") if isinstance(data, str) else bytes(data)
    made = _Array()
    made.array = np.frombuffer(content, kind.numpy()).reshape(shape, order="F" if order == "F" else "C")
    return made


def _scalar(kind: _Type, data: Any) -> Any:
    return _from_bytes(data, kind, ()).array.item()  # type: ignore[union-attr]  # just made


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded by {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Protocols below 3 write empty bytes as a call without arguments."""
    return b""


# NumPy 2 moved its internals from numpy.core to numpy._core: files of either are read by either.
_ADMITTED = {
    "multiarray._reconstruct": _Callable(_Array),
    "multiarray.scalar": _Callable(_scalar),
    "numeric._frombuffer": _Callable(_from_bytes),
    "numpy.ndarray": _Callable(_Array),
    "numpy.dtype": _Callable(_Type),
    "collections.OrderedDict": _Callable(dict),
    "builtins.tuple": _Callable(tuple),
    "__builtin__.tuple": _Callable(tuple),
    "builtins.bytes": _Callable(_no_bytes),
    "__builtin__.bytes": _Callable(_no_bytes),
    "_codecs.encode": _Callable(_latin1),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        short = full.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if short not in _ADMITTED or (short == full and short.startswith(("multiarray.", "numeric."))):
            raise _Refused(full)
        return _ADMITTED[short]
