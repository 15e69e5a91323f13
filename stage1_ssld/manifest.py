"""The manifest of a curation: which images of which sources were selected, as a Parquet file that is a source itself.

Columns: source (path as configured), key (name of the image in it), class (the teacher's first), score (its probability), hash (perceptual, 64 bits).
The schema's metadata has, under "ssld", kind "manifest", the settings of the pool's sources, and facts about teacher and selection.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from stage1_ssld.data_config import SourceConfig
from stage1_ssld.formats import FileRows, ManifestRows, Rows

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
    """The images that a manifest names, in its order.

    Raises:
        UserError: a source it names is gone, or images of it are: how many, and the first.
    """
    from stage1_ssld.sources import ImageSource

    table = pq.read_table(file)
    pool = [SourceConfig(**source) for source in facts_of(table.schema)["pool"]]
    number = {source.path: index for index, source in enumerate(pool)}
    names = table["source"].to_pylist()
    keys: list[list[str]] = [[] for _ in pool]
    part_of_row, row_in_part = [], []
    for name, key in zip(names, table["key"].to_pylist(), strict=True):
        part = number[name]
        part_of_row.append(part)
        row_in_part.append(len(keys[part]))
        keys[part].append(key)
    parts: list[Rows] = []
    for source, wanted in zip(pool, keys, strict=True):
        place = source.path
        if config.root is not None and not Path(place).is_absolute():
            place = str(Path(config.root) / place)
        if "://" not in place and "*" not in place and not Path(place).exists():
            raise UserError(
                f"{file}: its source {place} is not there; move it back, or set root to the folder it is in"
            )
        if not wanted:
            parts.append(FileRows("", []))
        elif Path(place).is_dir() and not any(Path(place).glob("*.parquet")) and not any(Path(place).glob("*.tar")):
            parts.append(_files(file, place, wanted))  # no need to list a folder whose files are named
        else:
            inner = ImageSource(source.model_copy(update={"path": place, "labels": "none"}), 0).rows
            parts.append(_rows(file, place, inner, wanted))
    return ManifestRows(parts, part_of_row, row_in_part)


def _files(manifest: str, folder: str, names: list[str]) -> Rows:
    missing = [name for name in names if not (Path(folder) / name).is_file()]
    if missing:
        raise _moved(manifest, folder, missing, len(names))
    return FileRows(folder, names)


def _rows(manifest: str, path: str, rows: Rows, names: list[str]) -> Rows:
    row_of = {rows.name(row): row for row in range(len(rows))}
    missing = [name for name in names if name not in row_of]
    if missing:
        raise _moved(manifest, path, missing, len(names))
    return ManifestRows([rows], [0] * len(names), [row_of[name] for name in names])


def _moved(manifest: str, source: str, missing: list[str], count: int) -> UserError:
    return UserError(
        f"{manifest}: {len(missing)} of {count} images are no longer in {source}, first {missing[0]}; curate again, or put them back"
    )
