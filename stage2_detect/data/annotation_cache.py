"""Cache of large annotation files: their parsed and checked content is stored in the user's cache folder.

Parsing 450 MB of JSON takes longer than everything else before the first step. An entry is one safetensors file: numbers
as arrays, names and ids as JSON text, shapes as one JSON text each, decoded when an image needs it. An entry is used
only if path, size and time stamp of the annotation file and the entry's checksums match; otherwise the annotation file
is read again. There is one entry per path, so the cache does not grow with every change. Loading executes no code: no
pickle. Each writer renames a temporary file into place, so several processes may write at once. Small files are not
cached, nor files changed less than `SETTLED_SECONDS` ago, since a second change could have the same time stamp.

Legend: N annotations of the file.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ssld.shared.files import atomically, user_cache
from ssld.stage2_detect.data.coco_json import CocoTable, read_table

VERSION = 3
"""format of an entry; increase it whenever `CocoTable` or the checks of `read_table` change"""
LEAST_BYTES = 8 << 20
"""size from which a file is cached; smaller files are parsed in less than a second"""
SETTLED_SECONDS = 2.0
"""age of a change after which another change is certain to have a different time stamp"""
_TEXTS = ("class_names", "category_ids", "image_ids", "file_names", "annotation_ids", "changes", "orientation")
_ARRAYS = ("widths_I", "heights_I", "owners_N", "labels_N", "boxes_N4", "crowd_N", "areas_N")
_SHAPES = ("shapes", "shape_bounds")


class PackedShapes(Sequence[Any]):
    """Polygons or RLE of some annotations as JSON text; each is decoded on access.

    Args:
        text: uint8, the JSON text of all annotations of the file; empty text stands for None.
        bounds: int64 [N + 1], start of each annotation in `text`.
        chosen: int64, positions of the annotations in this sequence.
    """

    def __init__(self, text: np.ndarray, bounds: np.ndarray, chosen: np.ndarray) -> None:
        self._text, self._bounds, self._chosen = text, bounds, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        which = self._chosen[index]
        text = self._text[self._bounds[which] : self._bounds[which + 1]].tobytes()
        return json.loads(text) if text else None

    def pick(self, positions: np.ndarray) -> "PackedShapes":
        """Select the shapes at some positions, still packed."""
        return PackedShapes(self._text, self._bounds, self._chosen[positions])


def cache_folder() -> Path:
    """Return the folder of the entries."""
    return user_cache() / "annotations"


def entry_of(file: str, suffix: str) -> Path:
    """Return the path of the cache entry of an annotation file."""
    return cache_folder() / f"{hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()[:32]}{suffix}"


def read_cached(file: str, *, segmentations: bool) -> CocoTable:
    """Return the result of `read_table`, from the cache if it holds a valid entry. Raises like `read_table`."""
    key = _key(file)
    if key is None:
        return read_table(file, segmentations=segmentations)
    entry = entry_of(file, ".safetensors")
    table = _load(entry, key, segmentations)
    if table is not None:
        return table
    table = read_table(file, segmentations=segmentations)
    if table.segmentations is not None:
        table = replace(table, segmentations=_pack(table.segmentations))
    if _key(file) == key and _settled(file):
        _store(entry, key, table)
    return table


def _key(file: str) -> str | None:
    """Return the key that a valid entry has (version, path, size, time stamp); None for a small or missing file."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    if stat.st_size < LEAST_BYTES:
        return None
    return json.dumps([VERSION, os.path.abspath(file), stat.st_size, stat.st_mtime_ns])


def _settled(file: str) -> bool:
    return time.time() - os.stat(file).st_mtime >= SETTLED_SECONDS


def _pack(shapes: Sequence[Any]) -> PackedShapes:
    texts = [b"" if shape is None else json.dumps(shape, separators=(",", ":")).encode() for shape in shapes]
    bounds = np.cumsum([0, *map(len, texts)])
    return PackedShapes(np.frombuffer(b"".join(texts), dtype=np.uint8), bounds, np.arange(len(texts)))


def _load(entry: Path, key: str, segmentations: bool) -> CocoTable | None:
    """Load the table of an entry; None if there is no valid entry."""
    try:
        with safe_open(entry, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("key") != key or (segmentations and "shapes" not in opened.keys()):  # noqa: SIM118
                return None
            names = [*_ARRAYS, "text", *(_SHAPES if segmentations else ())]
            arrays = {name: opened.get_tensor(name) for name in names}
        if any(metadata[name] != _checksum(array) for name, array in arrays.items()):
            return None
        texts = json.loads(arrays.pop("text").tobytes())
        shapes = None
        if segmentations:
            text, bounds = (arrays.pop(name) for name in _SHAPES)
            shapes = PackedShapes(text, bounds, np.arange(len(bounds) - 1))
        texts["changes"] = [tuple(change) for change in texts["changes"]]
        return CocoTable(**{name: texts[name] for name in _TEXTS}, **arrays, segmentations=shapes)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _store(entry: Path, key: str, table: CocoTable) -> None:
    """Write an entry; failures to write are ignored, since the cache is optional."""
    text = json.dumps({name: getattr(table, name) for name in _TEXTS}).encode()
    arrays: dict[str, np.ndarray] = {name: np.ascontiguousarray(getattr(table, name)) for name in _ARRAYS}
    arrays["text"] = np.frombuffer(text, dtype=np.uint8)
    if isinstance(table.segmentations, PackedShapes):
        arrays |= dict(zip(_SHAPES, (table.segmentations._text, table.segmentations._bounds), strict=True))
    metadata: Mapping[str, str] = {"key": key} | {name: _checksum(array) for name, array in arrays.items()}
    with contextlib.suppress(OSError, SafetensorError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomically(entry) as temporary:
            save_file(arrays, temporary, metadata=dict(metadata))


def _checksum(array: np.ndarray) -> str:
    return str(zlib.crc32(np.ascontiguousarray(array).data.cast("B") if array.size else b""))
