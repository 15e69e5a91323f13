"""Folders of files that are made from other files and kept for later starts, by a key of these files' names, sizes and time stamps.

A folder is made under another name and renamed when it is complete: after a killed process the next one makes it anew. A lock makes other processes,
such as the other ranks of a run, wait for the one that makes the folder. Nothing is ever deleted from the cache but what a killed process has left;
the whole of it may be deleted while no run uses it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256, list_files, user_cache, write_atomically

VERSION = 3
"""version of the written files; increase it whenever a reader or the conversion changes its result"""
_RECORD = ".record.json"
"""hidden, so that no split, whose file has its name, can be called like it"""


def cache_folder() -> Path:
    """Return the folder of the entries."""
    return user_cache() / "data"


def key_of(places: Iterable[Path], *settings: Any) -> str:
    """Return the key of all files in some folders (hidden ones excepted) and of some settings; a key changes with a path, size or time stamp."""
    digest = hashlib.sha256(json.dumps([VERSION, *settings], default=str).encode())
    for place in dict.fromkeys(Path(os.path.abspath(place)) for place in places):
        for file in [place / name for name in list_files(place, ("",))] if place.is_dir() else [place]:
            try:
                stat = file.stat()
            except OSError:  # gone meanwhile: the reader reports it
                continue
            digest.update(os.fsencode(file) + f"\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def kept(key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return (folder, record) of a key; `make(folder)` fills an empty folder and returns the record, JSON values.

    The checksums of the JSON files that `make` writes, and the sizes of its other files, are compared before the folder is used again. Raises
    UserError for a cache that can neither be written nor holds the folder.
    """
    cache = cache_folder()
    folder, pending = cache / key, cache / f".{key}"
    with ExitStack() as opened:
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = opened.enter_context((cache / f".{key}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if (record := _read(folder)) is not None:  # filled before it became read-only, as in a container
                return folder, record
            raise UserError(
                f"{cache}: cannot be written ({error.strerror}), and converted data are kept there; set XDG_CACHE_HOME to another folder"
            ) from None
        if (record := _read(folder)) is not None:
            return folder, record
        shutil.rmtree(pending, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        pending.mkdir()
        try:
            record = make(pending)
            sums = {file.name: file_sha256(file) for file in sorted(pending.glob("*.json"))}
            content = {"record": record, "sha256": sums, "others": _sizes(pending)}
            write_atomically(pending / _RECORD, json.dumps(content) + "\n")
            pending.replace(folder)
        finally:
            shutil.rmtree(pending, ignore_errors=True)
    return folder, record


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the record of a complete folder, None for any other."""
    try:
        content = json.loads((folder / _RECORD).read_bytes())
        sound = all(file_sha256(folder / name) == digest for name, digest in content["sha256"].items())
        if sound and content["others"] == _sizes(folder):
            record: dict[str, Any] = content["record"]
            return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _sizes(folder: Path) -> list[int]:
    """Return the number of the files below a folder's subfolders, such as images, and the sum of their sizes."""
    sizes = [one.stat().st_size for one in folder.glob("*/**/*") if one.is_file()]
    return [len(sizes), sum(sizes)]
