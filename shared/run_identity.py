"""What makes a run the same run: its settings and the content of its inputs, compared with those that a run directory has recorded.

Does not import torch.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ssld.shared.config.settings import NOT_IDENTITY, CommandConfig, differences, dump
from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256, files_digest

_UNRECORDED_PRECISION = "fp32"  # of a command that had no such setting; `auto`, the default of today, is never recorded


def recorded_identity(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read (settings, input digests) of the run in a folder. Raises UserError where its records are damaged."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("config.yaml: expected a mapping")
        inputs = read_mapping(run / "environment.json").get("inputs", {})
        if not isinstance(inputs, dict):
            raise ValueError("environment.json: inputs: expected a mapping")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{run}: its config.yaml or environment.json is not readable ({' '.join(str(error).split())}); delete the folder"
        ) from None
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}, inputs


def recorded_precision(run: Path) -> str | None:
    """Read the precision of the run in a folder; None where there is no run, or its records are damaged, which `RunDir` reports."""
    try:
        value = recorded_identity(run)[0].get("precision", _UNRECORDED_PRECISION)
    except UserError:
        return None
    return value if value in ("fp32", "bf16", "fp16") else None


def changes_since(run: Path, config: CommandConfig, inputs: dict[str, str]) -> tuple[list[str], list[str]]:
    """Compare the recorded run of a folder with the requested one; return lines about (permitted, refused) differences.

    A setting that the record lacks, because an earlier version wrote it, counts as its default of today, `precision` as fp32.
    """
    recorded, old_inputs = recorded_identity(run)
    if hasattr(config, "precision"):
        recorded = {"precision": _UNRECORDED_PRECISION, **recorded}
    may_change = config.may_change
    if not (run / "result.json").exists():  # the rest of the training uses them
        may_change |= config.may_change_before_the_end
    permitted: list[str] = []
    refused: list[str] = []
    for key, before, after in differences(_with_defaults(recorded, config), dump(config)):
        # `auto` keeps the recorded precision.
        if key in NOT_IDENTITY or _same_place(before, after) or (key == "precision" and after == "auto"):
            continue
        # Not given in this start: either left out now, or given in no start and another default in the version of the last one.
        plain = not isinstance(before, dict | list) and not _is_given(config, key.split("."))
        keep = f" (the default; set it to {json.dumps(before)} to go on as before)" if plain else ""
        line = f"{key}: {json.dumps(before)} -> {json.dumps(after)}{keep}"
        (permitted if key in may_change else refused).append(line)
    refused += [
        f"{key} has other content" for key, before, after in differences(old_inputs, inputs) if before and after
    ]
    return permitted, refused


def _with_defaults(record: Any, config: Any) -> Any:
    """Return recorded settings with the default of each field of `config` that they lack, in groups and lists of groups too."""
    if isinstance(record, list) and isinstance(config, list | tuple) and len(record) == len(config):
        return [_with_defaults(one, group) for one, group in zip(record, config, strict=True)]
    if not isinstance(record, dict) or not isinstance(config, BaseModel):
        return record
    defaults = type(config).model_construct().model_dump(mode="json", warnings=False)
    return defaults | {key: _with_defaults(value, getattr(config, key, None)) for key, value in record.items()}


def _is_given(config: Any, keys: Sequence[str]) -> bool:
    """Whether a setting was given, in a file or by a flag, and is not left to its default; also true of a former setting, which cannot be set."""
    group, rest = getattr(config, keys[0], None), keys[1:]
    if keys[0] not in type(config).model_fields:
        return True
    given = keys[0] in config.model_fields_set
    return given and (not rest or not isinstance(group, BaseModel) or _is_given(group, rest))


def _same_place(before: Any, after: Any) -> bool:
    """Whether two values are spellings of the path of one file or folder: `data/`, `data`, an absolute and a relative one. Lists item by item."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same_place, before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_same_place(before[key], after[key]) for key in before)
    if before == after:
        return True
    texts = isinstance(before, str) and isinstance(after, str)
    return texts and os.path.exists(after) and os.path.realpath(before) == os.path.realpath(after)


def input_digests(config: CommandConfig) -> dict[str, str]:
    """Return the digest of every input of a configuration. Raises UserError for a missing path."""
    digests = {}
    for key, path in config.inputs().items():
        if not path.exists():
            raise UserError(f"{key}: {path}: no such file or folder")
        if not (
            path.is_file() or path.is_dir()
        ):  # inputs are read more than once, and a pipe without a writer never ends
            raise UserError(f"{key}: {path}: is neither a file nor a folder")
        digests[key] = input_digest(path, config.output)
    return digests


def input_digest(path: Path, output: Path | None = None) -> str:
    """Return the digest of one input: of the bytes of a model file, `files_digest` of other inputs; files of the run's own output do not count."""
    return file_sha256(path) if path.suffix == ".safetensors" else files_digest(path, without=output)


def read_mapping(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping. Raises OSError, ValueError or RecursionError for any other file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name}: expected a mapping")
    return content
