"""Settings in YAML files: strict reading, and merging with their bases."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ssld.shared.errors import UserError
from ssld.shared.wording import did_you_mean

Alternatives = Sequence[Sequence[str]]
"""groups of dotted keys that exclude each other"""
ShortForms = Mapping[str, str]
"""groups that may be given as one text, by the key in them that it stands for"""
NO_SHORT_FORMS: ShortForms = MappingProxyType({})


MOST_NODES, DEEPEST = 200_000, 50
"""limits of a file: number of values, each alias counted with its content, and number of levels"""


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys (PyYAML takes the last one), keys that are lists or maps, and files that grow beyond the limits by
    nesting or by aliases of aliases."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as PyYAML, not deeper than `DEEPEST`."""
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise UserError(f"{mark.name}, line {mark.line + 1}: nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Compose a document as PyYAML, not larger than `MOST_NODES`."""
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            raise UserError(
                f"{node.start_mark.name}: holds more than {MOST_NODES:,} values, through its aliases (*NAME)"
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct an object as PyYAML, whose plain Python errors for values that do not fit their tag (2020-13-45, !!int x) become UserErrors.

        Raises UserError too for a whole number in another notation, which YAML reads otherwise than it looks: a folder 010 would be 8.
        """
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            given = f"{node.value[:40]!r}" if isinstance(node.value, str) else "a list or map"
            what = f"{given} is no {node.tag.rpartition(':')[2]}; put it in quotes where it is text"
            raise UserError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: {what}") from None
        if type(value) is int and str(value) != node.value:
            place = f"{node.start_mark.name}, line {node.start_mark.line + 1}"
            raise UserError(
                f"{place}: {node.value[:40]} is {value} to YAML; write {value}, or put it in quotes where it is text"
            )
        return value


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node, those of an alias at each use; a node that contains itself is endless."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # its count inside itself
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        place = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: a key has to be one word, not a list or a map of them")
        key = loader.construct_object(key_node, deep=True)
        if key in keys:
            raise UserError(f"{place}: key {key!r} is given twice")
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


class _TextLoader(_Loader):
    """The strict loader with every value as its text: `no` is not False, and `1.10` not 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def read_yaml(path: Path, *, as_text: bool = False) -> dict[str, Any]:
    """Read the mapping in a YAML file; keys are text, or numbers inside groups, as for class names. With `as_text` every value stays text.

    Raises UserError for a missing file, bad YAML, a duplicate key, nesting and aliases out of proportion, or anything but a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _TextLoader if as_text else _Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping at the top level, found {type(content).__name__}")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: {_spelt(odd[0])}: a key has to be text; put it in quotes")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file of settings, whose keys are all text. Raises UserError as `read_yaml` does, and for other keys."""
    content = read_yaml(path)
    for key in _odd_keys(content):
        raise UserError(f"{path}: {key}: a key has to be text; put it in quotes")
    return content


def _odd_keys(value: Any, before: str = "") -> Iterator[str]:
    """Yield the dotted names of the keys that are not text."""
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _odd_keys(inner, f"{before}{number}.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"{before}{_spelt(key)}"
            yield from _odd_keys(inner, f"{before}{key}.")


def _spelt(key: Any) -> str:
    """Spell a key as YAML does: null, true, 3."""
    return json.dumps(key, default=str)


def recipe_file(name: str | Path, recipes: Path | None, others: Sequence[str] = ()) -> Path:
    """Return the YAML file at the path `name`, or the one of this name in `recipes`, the folder of a command's shipped recipes.

    Raises UserError where there is neither, with the nearest name of these recipes and of `others`, names that the caller knows.
    """
    file = Path(name)
    if recipes is None or file.is_file():
        return file
    shipped = {recipe.stem: recipe for recipe in sorted(recipes.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    hint = did_you_mean(file.stem, [*others, *shipped])
    if file.suffix or len(file.parts) > 1:  # a path, which reading refuses, unless a recipe has nearly its name
        if file.exists() or hint.startswith("; known"):
            return file
        raise UserError(f"{name}: no such file{hint}")
    raise UserError(f"{name}: no such file, and no recipe of this name{hint}")


def read_recipe(
    path: Path, alternatives: Alternatives = (), short_forms: ShortForms = NO_SHORT_FORMS, deeper: int = 2
) -> dict[str, Any]:
    """Read the settings of a YAML file, merged over those of the file that its key `base` names, relative to it.

    A base may have a base itself; longer chains are errors. Of keys that are `alternatives`, the file's replaces the base's. Raises UserError as
    `read_settings` does, and for a longer chain.
    """
    values = spelled_out(read_settings(path), short_forms)
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of a YAML file (given: {json.dumps(base, default=str)})")
    if not deeper:
        raise UserError(
            f"{path}: base: {base}: a chain of more than two bases; write the settings into one of the files"
        )
    below = read_recipe(path.parent / base, alternatives, short_forms, deeper - 1)
    return merge(without_others(below, alternatives, values), values)


def spelled_out(values: dict[str, Any], short_forms: ShortForms) -> dict[str, Any]:
    """Return `values` with each short form, `data: PATH`, as the group that it stands for, `data: {source: PATH}`, so that it merges with others."""
    return {
        key: {short_forms[key]: value} if key in short_forms and isinstance(value, str) else value
        for key, value in values.items()
    }


def without_others(below: dict[str, Any], alternatives: Alternatives, over: dict[str, Any]) -> dict[str, Any]:
    """Return `below` without the keys for which `over` has an alternative."""
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
    """Merge `over` into `base`, group by group; lists and values are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def nested(path: Sequence[Any], value: Any) -> dict[Any, Any]:
    """Return a value inside groups: {"optim": {"lr": 0.1}} for the path ("optim", "lr"), which has one part at least."""
    *groups, key = path
    values = {key: value}
    for group in reversed(groups):
        values = {group: values}
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for nested settings; lists count as values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
