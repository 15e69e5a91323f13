"""Settings of a run that differ from the defaults of its command, for the report. Does not import torch."""

import json
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from ssld.pipelines.runner.stages import KINDS
from ssld.shared.config.settings import differences
from ssld.shared.config.yaml_files import flatten

_PLACES = frozenset({"output", "recipe"})  # not settings of the work itself
REQUIRED = "required"
NONE = "-"


def changed_settings(command: str, text: str) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of every setting that differs from its default; empty for an unknown command.

    Args:
        command: name of the command in a pipeline.
        text: content of config.yaml. Raises one of MALFORMED if it is no YAML mapping.
    """
    kinds = {str(name): kind for name, kind in KINDS.items()}
    if command not in kinds or not text:
        return []
    try:
        recorded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError("config.yaml is no YAML") from error
    rows = _changed({key: value for key, value in recorded.items() if key not in _PLACES}, kinds[command].config_type)
    return [
        (key, _text(value), REQUIRED if default is PydanticUndefined else _text(default))
        for key, value, default in rows
    ]


def _changed(recorded: dict[str, Any], config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, default) of what differs; PydanticUndefined as the default of a required setting."""
    for key, value in recorded.items():
        field = config.model_fields.get(key)
        default: Any = None
        if field is not None:
            default = field.get_default(call_default_factory=True, validated_data={})
            default = default if default is PydanticUndefined else to_jsonable_python(default)
        group = _group_of(field.annotation) if field is not None else None
        if isinstance(value, dict) and isinstance(default, dict):
            yield from (
                (f"{prefix}{inner}", after, before) for inner, before, after in differences(default, value, f"{key}.")
            )
        elif isinstance(value, dict) and group is not None:
            yield from _changed(value, group, f"{prefix}{key}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{inner}", one, None) for inner, one in flatten({key: value}))
        elif value != default:
            yield f"{prefix}{key}", value, default


def _group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a group of settings, also of an optional one; None for other types and for a choice of several groups."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    groups = [group for one in get_args(annotation) if (group := _group_of(one))]
    return groups[0] if len(groups) == 1 else None


def _text(value: Any) -> str:
    """Format a value: text as it is, lists in short, None as a dash."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "[]"
    if isinstance(value, dict):
        given = {key: one for key, one in value.items() if one not in (None, False, [], {})}
        return _text(given["path"]) if list(given) == ["path"] else json.dumps(given, ensure_ascii=False)
    return str(value)
