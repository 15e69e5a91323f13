"""Pickles of NumPy arrays, read without executing them.

A pickle may call anything it names, so no name is looked up: the few names that arrays need are replaced by classes of this module, every other name
is an error. PaddlePaddle's weights and detectron2's model zoo are such files.
"""

import mmap
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.models.damage import incomplete, is_cut_short, refuse_damaged

_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def read_pickle(path: Path, kind: str) -> Any:
    """Read the content of a pickle: plain containers, numbers, text, and arrays, of which `array_of` gives the values.

    Args:
        kind: the kind of file, for messages.

    Raises UserError for a missing file, a pickle that names anything but arrays and plain containers, and for no pickle.
    """
    refuse_damaged(path)
    try:
        with path.open("rb") as file:
            _check_form(file)
            # latin1: files written by Python 2 hold their bytes as text.
            return _Unpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise UserError(
            f"{path}: asks for {error} while being opened, which could run code; only arrays are read from a {kind} file"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a pickle of garbage may fail in any way
        if is_cut_short(error):
            raise UserError(incomplete(path)) from None
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not a {kind} file ({why})") from None


def array_of(value: Any, name: object, path: Path) -> np.ndarray:
    """Return the array of a value of `read_pickle`. Raises UserError for any other value, which it calls `name`."""
    if not isinstance(value, _Array) or value.array is None:
        raise UserError(f"{path}: {name!r} is a {type(value).__name__.lstrip('_').lower()}, an array is expected")
    return value.array


_DEEPEST = 64  # values inside each other; an array takes about six
_IN_PLACE = {"SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS", "BUILD"}
_REMEMBER, _RECALL = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


def _check_form(file: IO[bytes]) -> None:
    """Raise for a pickle that the unpickler would need memory or stack for beyond its size: memo numbers in leaps, and nesting without end.

    The unpickler makes a table as long as the highest memo number; pickles count from 0 (CPython Lib/pickle.py, `memoize`). A key nested some
    thousands deep ends the process. The file is looked through by its map into memory, so that lengths that it only claims cost nothing.
    """
    mark = -1
    stack: list[int] = []  # how deep each value on the unpickler's stack is nested, or a mark
    memo: dict[int, int] = {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        argument: Any  # a number where it counts
        readable: Any = content
        for number, (code, argument, _) in enumerate(pickletools.genops(readable)):
            if code.name in _REMEMBER:
                if argument > number:
                    raise pickle.UnpicklingError(f"it remembers under number {argument} after {number} steps")
                memo[argument] = stack[-1]
            elif code.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code.name in _RECALL:
                stack.append(memo[argument])
            elif code.name == "MARK":
                stack.append(mark)
            else:
                inside = _pop(stack, code, mark)
                new = 1 + max(inside, default=-1)
                if code.name in _IN_PLACE:
                    new = max(inside[0], 1 + max(inside[1:], default=-1))
                if new > _DEEPEST:
                    raise pickle.UnpicklingError(f"more than {_DEEPEST} values inside each other")
                stack += [new] * len(code.stack_after)


def _pop(stack: list[int], code: pickletools.OpcodeInfo, mark: int) -> list[int]:
    """Pop the arguments of an operation from the stack, lowest first."""
    taken: list[int] = []
    needed = len(code.stack_before)
    if pickletools.markobject in code.stack_before:
        while (top := stack.pop()) != mark:
            taken.append(top)
        needed = code.stack_before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(needed)]
    return taken[::-1]


class _Refused(Exception):
    """A pickle names something that no array needs."""


class _Callable:
    """A callable for a pickle, of which it can set no attribute."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a function")


class _Type:
    """Replacement of `numpy.dtype`: one of the plain number types."""

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
    """Replacement of `numpy.ndarray`: a view of the pickle's bytes."""

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
            raise _Refused(full if full.isprintable() else repr(full))
        return _ADMITTED[short]
