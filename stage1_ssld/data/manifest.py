"""Manifest of a curation: a Parquet file that names the selected images of a pool, and the source that reads these images in place.

Columns: source (path as configured), key (name of the image in it), class (the teacher's most likely class), score (its probability), hash (64-bit
perceptual hash). The schema's metadata hold, under "ssld", kind "manifest", the settings of the pool's sources, and facts on teacher and selection.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.errors import UserError
from ssld.shared.files import atomically, escaped, spread, unescaped
from ssld.stage1_ssld.data.listing import LOOKED_AT, Listing, filesystem_of, list_path
from ssld.stage1_ssld.data.row_groups import parquet_rows, row_groups
from ssld.stage1_ssld.data.rows import FileRows, ManifestRows, Rows
from ssld.stage1_ssld.data_config import SourceConfig, is_remote

OpenRows = Callable[[SourceConfig], Rows]
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("key", pa.string()),
        ("class", pa.int32()),
        ("score", pa.float32()),
        ("hash", pa.uint64()),
    ]
)
_KEY = b"ssld"


def is_manifest(schema: pa.Schema) -> bool:
    """Whether a Parquet file with this schema is a manifest."""
    return facts_of(schema).get("kind") == "manifest"


def facts_of(schema: pa.Schema) -> dict[str, Any]:
    """Metadata of a manifest; {} for another file."""
    facts: dict[str, Any] = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
    return facts


def write_manifest(path: Path, columns: dict[str, Any], pool: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write a manifest atomically.

    Args:
        columns: columns of SCHEMA, of equal length.
        pool: settings of the sources that the column `source` names, as JSON values.
        facts: JSON values on teacher and selection.
    """
    record = {"kind": "manifest", "pool": pool, **facts}
    table = pa.table(columns, schema=SCHEMA.with_metadata({_KEY: json.dumps(record).encode()}))
    with atomically(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True, use_dictionary=False)


def open_manifest(file: str, config: SourceConfig, open_rows: OpenRows) -> Rows:
    """Open the images that a manifest names, in its order.

    Args:
        config: settings of the manifest as a source; `root` is the folder of its sources, if they were moved.
        open_rows: opens a source that the manifest names.

    Raises:
        UserError: a named source is gone, or images of it are, with their number and the first one.
    """
    filesystem, inner = filesystem_of(file)
    table = pq.read_table(inner, filesystem=filesystem, page_checksum_verification=True)
    pool = [SourceConfig(**source) for source in facts_of(table.schema)["pool"]]
    number = {source.path: index for index, source in enumerate(pool)}
    keys: list[list[str]] = [[] for _ in pool]
    part_of_row, row_in_part = [], []
    for name, key in zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True):
        if name not in number:
            raise UserError(f"{file}: names the source {name}, which is not in its pool; curate again")
        part = number[name]
        part_of_row.append(part)
        row_in_part.append(len(keys[part]))
        keys[part].append(key)
    parts = [_open_part(file, source, names, config.root, open_rows) for source, names in zip(pool, keys, strict=True)]
    return ManifestRows(parts, part_of_row, row_in_part)


def _open_part(manifest: str, source: SourceConfig, names: list[str], root: str | None, open_rows: OpenRows) -> Rows:
    """Open the images `names` of one source of the pool."""
    if not names:
        return FileRows("", [])
    path = source.path
    if root is not None and not is_remote(path):
        # A source with an absolute path is searched for by the last part of its path.
        path = str(Path(root) / (Path(path).name if Path(path).is_absolute() else path))
    if not is_remote(path) and "*" not in path and not Path(path).exists():
        raise UserError(
            f"{manifest}: its source {path} does not exist; move it back, or set root to the folder that contains it"
        )
    if (
        source.split is None
        and Path(path).is_dir()
        and not any(Path(path).glob("*.parquet"))
        and not any(Path(path).glob("*.tar"))
    ):
        return _files(manifest, path, names)  # the files are named, so the folder need not be listed
    source = source.model_copy(update={"path": path, "labels": "none"})
    if not path.startswith("hub:") and (listing := list_path(path, source.split)).kind == "parquet":
        return _table_rows(manifest, source, listing, names)
    rows = open_rows(source)
    row_of = {rows.name(row): row for row in range(len(rows))}
    missing = [name for name in names if name not in row_of]
    if missing:
        raise _moved(manifest, path, missing, len(names))
    return ManifestRows([rows], [0] * len(names), [row_of[name] for name in names], numbered=False)


def _files(manifest: str, folder: str, names: list[str]) -> Rows:
    names = [unescaped(name) for name in names]
    rows = FileRows(folder, names)
    if not all((Path(folder) / names[row]).is_file() for row in spread(len(names), LOOKED_AT)):
        raise _moved(
            manifest, folder, [escaped(name) for name in names if not (Path(folder) / name).is_file()], len(names)
        )
    return rows


def _table_rows(manifest: str, source: SourceConfig, listing: Listing, names: list[str]) -> Rows:
    """Open the named rows of Parquet files."""
    numbers = np.array([int(name) for name in names])
    order = np.argsort(numbers, kind="stable")
    groups = row_groups(listing, source)
    gone = numbers[order[np.searchsorted(numbers[order], groups[-1].first + groups[-1].length) :]]
    if len(gone):
        raise _moved(manifest, source.path, [f"row {row}" for row in gone], len(names))
    rows = parquet_rows(listing, source.path, groups, numbers[order], named=True)
    return ManifestRows([rows], [0] * len(names), np.argsort(order).tolist(), numbered=False)


def _moved(manifest: str, source: str, missing: list[str], count: int) -> UserError:
    return UserError(
        f"{manifest}: {len(missing)} of {count} images are no longer in {source}, first {missing[0]}; curate again, or put them back"
    )
