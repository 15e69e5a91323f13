"""The folder that the relative paths of a pipeline begin in: that of its YAML file, and for a shipped pipeline the current one.

Work on a pipeline happens inside this folder, and its stages are started there, so that settings, records and rates are the same from wherever the
user starts it. What the user types and reads belongs to the folder where the command was typed: `rebased` and `shown` translate between the two.
Does not import torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssld.pipelines.config import ROOT
from ssld.shared.files import is_pattern, user_cache

_left: list[Path] = []  # the folders that `inside` has left, the user's first


def folder_of(file: Path) -> Path:
    """Return the folder that the relative paths in a pipeline's file begin in, with symbolic links resolved, as `..` follows them."""
    shipped = file.resolve().is_relative_to(ROOT / "pipelines")
    return Path.cwd() if shipped else file.parent.resolve()


@contextmanager
def inside(folder: Path) -> Iterator[bool]:
    """Make `folder` the current one, for this process and those that it starts; yields False where it is already."""
    before = Path.cwd()
    if folder == before:
        yield False
        return
    os.chdir(folder)
    _left.append(before)
    try:
        yield True
    finally:
        _left.pop()
        os.chdir(before)


@contextmanager
def inside_folder_of(file: Path) -> Iterator[Path]:
    """Make the folder of a pipeline's file the current one; yields the path of the file from there."""
    folder = folder_of(file)
    own = file if folder == Path.cwd() else Path(file.name)
    with inside(folder):
        yield own


def rebased(path: Path) -> Path:
    """Return a path that the user has typed as it is written in the current folder; an absolute path is unchanged."""
    return Path(os.path.relpath(_left[0] / path)) if _left and not path.is_absolute() else path


def written_in(path: Path, folder: Path) -> Path:
    """Return a path of the current folder as it is written in a file in `folder`; an absolute path is unchanged."""
    return path if path.is_absolute() or folder == Path.cwd() else Path(os.path.relpath(path, folder))


def shown(path: Path) -> Path:
    """Return a path of the current folder such that the user can open it: relative where it is below the user's folder, else absolute."""
    if not _left or path.is_absolute():
        return path
    whole = Path(os.path.abspath(path))
    return whole.relative_to(_left[0]) if whole.is_relative_to(_left[0]) else whole


def rebased_value(value: Any) -> Any:
    """Return a value that the user has typed with the paths in it, in its lists and groups too, as they are written in the current folder.

    A text is a path if its first part exists in the user's folder.
    """
    if isinstance(value, dict):
        return {key: rebased_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rebased_value(inner) for inner in value]
    return str(rebased(Path(value))) if isinstance(value, str) and _is_there(value) else value


def exists_for_user(text: str) -> bool:
    """Return whether there is a file or folder of this name for the user, in whose folder a relative path begins."""
    return os.path.lexists(os.path.join(_left[0], text) if _left else text)


def missing_text(path: Path) -> str:
    """Return the words on a path of a pipeline that does not exist, with advice if it exists in the user's folder."""
    plain = f"{path}: no such file or folder"
    if path.is_relative_to(user_cache()):
        again = "the same ssld init, with another --output, makes it again"
        return f"{plain}; it was made from other files and has been deleted from the cache: {again}"
    if not _left or path.is_absolute():
        return plain
    text = f"{path} does not exist (paths in a pipeline are relative to its folder, {shown(Path())})"
    if not left_behind(path):
        return text
    return f"{text}; it exists in the current folder: move the pipeline's file there, or write {rebased(path)} in it"


def left_behind(path: Path) -> Path | None:
    """Return a relative path in the user's folder if it exists there but not in the current one, as for pipelines of older versions."""
    if not _left or path.is_absolute() or path.exists():
        return None
    return _left[0] / path if (_left[0] / path).exists() else None


def _is_there(text: str) -> bool:
    """Return whether the first part of a text is a file or folder of the user's folder, or a pattern that fits some."""
    path = Path(text)
    if not _left or not text or path.is_absolute():
        return False
    first = (path.parts or (".",))[0]
    return os.path.lexists(_left[0] / first) or (is_pattern(first) and any(_left[0].glob(first)))
