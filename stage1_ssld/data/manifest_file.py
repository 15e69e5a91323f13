"""The file of a manifest, for those that write one and those that ask whether a file is one. Torch-free; what it names is opened in manifest.py.

Columns: source (path as configured), key (name of the image in it), class (the teacher's first), score (its probability), hash (perceptual, 64 bits).
The schema's metadata has, under "ssld", kind "manifest", the settings of the pool's sources, and facts about teacher and selection.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ssld.shared.files import atomically

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


def write_manifest(path: Path, columns: dict[str, Any], pool: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write a manifest atomically.

    Args:
        columns: as in SCHEMA, equally long.
        pool: settings of the sources that `source` names, as JSON values.
        facts: JSON values on teacher and selection.
    """
    record = {"kind": "manifest", "pool": pool, **facts}
    table = pa.table(columns, schema=SCHEMA.with_metadata({_KEY: json.dumps(record).encode()}))
    with atomically(path) as temporary:
        pq.write_table(table, temporary)
