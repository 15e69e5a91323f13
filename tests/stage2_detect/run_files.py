"""Reading of files that runs have written."""

import json
from pathlib import Path
from typing import Any


def content(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text())
    return read
