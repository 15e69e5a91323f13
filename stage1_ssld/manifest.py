"""The manifest of a curation: which images of which sources were selected, as a Parquet file that is a source itself.

Columns: source (path as configured), key (name of the image in it), class (the teacher's first), score (its probability), hash (perceptual, 64 bits).
The schema's metadata has, under "ssld", kind "manifest", the settings of the pool's sources, and facts about teacher and selection.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from stage1_ssld.data_config import SourceConfig, is_remote
from stage1_ssld.formats import FileRows, ManifestRows, Rows, TableRows
from stage1_ssld.listing import Listing, filesystem_of, list_path, spread
from stage1_ssld.row_groups import row_groups

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
LOOKED_AT = 20_000
"""Files of a folder that are looked for when a manifest is opened; if one is gone, all are."""


def is_manifest(schema: pa.Schema) -> bool:
    """Whether a Parquet file with this schema is a manifest."""
    return facts_of(schema).get("kind") == "manifest"


def facts_of(schema: pa.Schema) -> dict[str, Any]:
    """What a manifest says about itself; {} for another file."""
    facts: dict[str, Any] = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
    return facts


def write_manifest(path: Path, columns: dict[str, Any], pool: list[SourceConfig], facts: dict[str, Any]) -> None:
    """Write a manifest atomically.

    Args:
        columns: as in SCHEMA, equally long.
        pool: the sources that `source` names.
        facts: JSON values on teacher and selection.
    """
    record = {"kind": "manifest", "pool": [source.model_dump(mode="json") for source in pool], **facts}
    table = pa.table(columns, schema=SCHEMA.with_metadata({_KEY: json.dumps(record).encode()}))
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def open_manifest(file: str, config: SourceConfig) -> Rows:
    """The images that a manifest names, in its order. `config.root` is the folder that the sources are in, where they have moved.

    Raises:
        UserError: a source it names is gone, or images of it are: how many, and the first.
    """
    filesystem, inner = filesystem_of(file)
    table = pq.read_table(inner, filesystem=filesystem)
    pool = [SourceConfig(**source) for source in facts_of(table.schema)["pool"]]
    number = {source.path: index for index, source in enumerate(pool)}
    keys: list[list[str]] = [[] for _ in pool]
    part_of_row, row_in_part = [], []
    for name, key in zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True):
        if name not in number:
            raise UserError(f"{file}: names the source {name}, which is not among those of its pool; curate again")
        part = number[name]
        part_of_row.append(part)
        row_in_part.append(len(keys[part]))
        keys[part].append(key)
    parts = [_open_part(file, source, names, config.root) for source, names in zip(pool, keys, strict=True)]
    return ManifestRows(parts, part_of_row, row_in_part)


def _open_part(manifest: str, source: SourceConfig, names: list[str], root: str | None) -> Rows:
    """The images `names` of one source of the pool."""
    from stage1_ssld.sources import ImageSource

    if not names:
        return FileRows("", [])
    path = source.path
    if root is not None and not is_remote(path):
        # A source with an absolute path is looked for by its last name.
        path = str(Path(root) / (Path(path).name if Path(path).is_absolute() else path))
    if not is_remote(path) and "*" not in path and not Path(path).exists():
        raise UserError(f"{manifest}: its source {path} is not there; move it back, or set root to the folder it is in")
    if Path(path).is_dir() and not any(Path(path).glob("*.parquet")) and not any(Path(path).glob("*.tar")):
        return _files(manifest, path, names)  # no need to list a folder whose files are named
    source = source.model_copy(update={"path": path, "labels": "none"})
    if not path.startswith("hub:") and (listing := list_path(path)).kind == "parquet":
        return _table_rows(manifest, source, listing, names)
    rows = ImageSource(source, 0).rows
    row_of = {rows.name(row): row for row in range(len(rows))}
    missing = [name for name in names if name not in row_of]
    if missing:
        raise _moved(manifest, path, missing, len(names))
    return ManifestRows([rows], [0] * len(names), [row_of[name] for name in names], numbered=False)


def _files(manifest: str, folder: str, names: list[str]) -> Rows:
    rows = FileRows(folder, names)
    if not all(Path(rows.location(row)).is_file() for row in spread(len(names), LOOKED_AT)):
        raise _moved(manifest, folder, [name for name in names if not (Path(folder) / name).is_file()], len(names))
    return rows


def _table_rows(manifest: str, source: SourceConfig, listing: Listing, names: list[str]) -> Rows:
    """Rows of Parquet files, row group by row group: only those that are named stay in memory."""
    wanted = np.array([int(name) for name in names])
    order = np.argsort(wanted, kind="stable")
    shards = row_groups(listing, source)
    tables, done = [], 0
    for shard in shards:
        count = int(np.searchsorted(wanted[order], shard.first + shard.length)) - done
        if count:
            tables.append(shard.table().take(wanted[order[done : done + count]] - shard.first))
            done += count
    if done < len(names):
        raise _moved(manifest, source.path, [f"row {row}" for row in wanted[order[done:]]], len(names))
    table = TableRows(source.path, pa.concat_tables(tables), source.image_column, Path(listing.folder), wanted[order])
    return ManifestRows([table], [0] * len(names), np.argsort(order).tolist(), numbered=False)


def _moved(manifest: str, source: str, missing: list[str], count: int) -> UserError:
    return UserError(
        f"{manifest}: {len(missing)} of {count} images are no longer in {source}, first {missing[0]}; curate again, or put them back"
    )
