"""Settings in YAML files: read strictly, laid on their bases."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssld.shared.errors import UserError

Alternatives = Sequence[Sequence[str]]
"""groups of dotted keys; of a group one is given"""


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, which PyYAML lets the last one win."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise UserError(
                f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}: key {key!r} is given twice"
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing file, bad YAML, a duplicate key or anything but a mapping."""
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values at the top level, found {type(content).__name__}")
    return content


def read_recipe(path: Path, alternatives: Alternatives = (), deeper: int = 2) -> dict[str, Any]:
    """The settings of a YAML file laid on those of the file that its key `base` names, relative to it.

    A base may have a base itself, and there the chain ends. Of keys that are `alternatives`, the file's replaces the base's. Raises UserError as
    `read_yaml` does, and for a longer chain.
    """
    values = read_yaml(path)
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of a YAML file (given: {json.dumps(base, default=str)})")
    if not deeper:
        raise UserError(
            f"{path}: base: {base}: a chain of more than two bases; write the settings into one of the files"
        )
    below = read_recipe(path.parent / base, alternatives, deeper - 1)
    return merge(without_others(below, alternatives, values), values)


def without_others(below: dict[str, Any], alternatives: Alternatives, over: dict[str, Any]) -> dict[str, Any]:
    """`below` without the keys in whose place `over` gives an alternative."""
    for keys in alternatives:
        if any(_value(over, key) is not None for key in keys):
            for key in keys:
                below = _without(below, key)
    return below


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    inner = values.get(first)
    return values | {first: _without(inner, rest)} if isinstance(inner, dict) else values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, group by group; lists and values are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
