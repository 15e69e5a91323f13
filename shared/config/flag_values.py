"""Values of settings as flags, written and read back. Does not import torch.

The text of a flag is its value: `--steps 300`, `--images photos`. Items of a list are separated by commas, `--sides 480,640`. What commas, quotes or
brackets would make ambiguous is JSON: `--images '["a,b", "c"]'`. `null` is None, and the text "null" stands in double quotes: `'"null"'`.
"""

import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from ssld.shared.config.annotations import fields_at, kinds_in, models_in
from ssld.shared.config.validation import needed_keys
from ssld.shared.config.yaml_files import flatten, merge, nested
from ssld.shared.errors import UserError

_JSON = json.JSONDecoder()
_YAML_GROUP = re.compile(r"\[?\s*\{\s*[A-Za-z_]+:\s.*\}\s*\]?")
"""a group as YAML has it, `{name: kl}`; names in JSON stand in quotes"""
_SIGNS = frozenset('[]{},"')
"""signs that have a meaning in a list"""


class _Shape(NamedTuple):
    """What the values of a setting may be, beside numbers, words and None."""

    list: bool
    mapping: bool
    group: bool
    path: bool
    """a single path"""
    texts: bool
    """the items of the list are text, also where they look like numbers"""
    paths: bool
    """the items of the list may be paths"""
    words: bool
    """values and items are text or paths, and neither numbers nor switches"""
    null: bool
    """the setting may be None"""


def flags(config_type: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that `read_flags` reads back as these settings.

    A text for a list of paths is one path, whatever it holds; for another list it is the text of the flag, and may name several items.

    Args:
        values: settings, nested or by dotted key.

    Raises:
        UserError: a fraction or a switch where text is expected: as a flag, the file's 1.10 would be the text "1.1" and its `no` the text "false".
    """
    words: list[str] = []
    for key, value in _with_mappings_whole(config_type, values):
        shape = _shape(config_type, key)
        for one in value if isinstance(value, list) else (value,):
            if shape.words and isinstance(one, float | bool):
                raise UserError(f"{key}: is {json.dumps(one)} to YAML; put a text like that in quotes")
        text = _written(value, shape)
        words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return words


def read_flags(config_type: type[BaseModel], given: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    """Return the nested settings in {dotted key: text of its flag, or texts of its repetitions}.

    A repeated flag adds to its list or mapping; where the setting may be a single path, the last one counts. Raises UserError for a text that cannot
    be a group of settings, and for one that is nested too deeply; other mistakes are left to the check of the settings.
    """
    values: dict[str, Any] = {}
    for key in sorted(given, key=lambda key: key.count(".")):  # a group as a whole first, then its own settings
        texts = given[key]
        read = [read_value(config_type, key, text) for text in ([texts] if isinstance(texts, str) else texts)]
        last = read[-1]
        if isinstance(last, str) and _is_group_alone(config_type, key):
            needed = needed_keys(config_type, key.split("."))
            inner = f"{needed[0]} VALUE" if needed != [key] else f"{key}.KEY VALUE"
            raise UserError(f"--{key}: is a group or list of settings: give --{inner}, or the whole as JSON")
        if not _shape(config_type, key).path and last is not None:
            last = reduce(_added, read)
        if isinstance(last, str) and any(other.startswith(f"{key}.") for other in given):
            last = _with_its_key(config_type, key, last)
        values = merge(values, nested(key.split("."), last))
    return values


def read_value(
    config_type: type[BaseModel], key: str, text: str, exists: Callable[[str], bool] = os.path.lexists
) -> Any:
    """Return the value that the text of a flag stands for.

    The name of an existing file or folder is a path, whatever it looks like: `[old]`, `a,b`. Only `null` is None where a setting may be that: a stray
    file of this name does not change what a pipeline has written.

    Args:
        key: dotted key of the setting.
        exists: whether there is a file or folder of this name.

    Raises:
        UserError: it is nested too deeply, or a group that is not JSON.
    """
    shape = _shape(config_type, key)
    if shape.null and text.strip() == "null":
        return None
    try:
        if shape.list:
            if _YAML_GROUP.fullmatch(text) and not exists(text):
                raise UserError(f"{key}: {text} is not JSON: put names and texts in double quotes")
            return _read_list(text, shape, exists)
        if text == "null":
            return "./null" if key.endswith("path") and exists(text) else None
        if text.startswith("{") and (shape.group or shape.mapping):
            with suppress(ValueError):
                return json.loads(text)
            if shape.group and ":" in text and text.endswith("}") and not exists(text):
                raise UserError(
                    f"{key}: {text} is not JSON: put names and texts in double quotes, or give --{key}.NAME VALUE"
                )
        if shape.mapping and all("=" in item for item in text.split(",")):
            return dict(_pair(item) for item in text.split(","))
        if text.startswith('"') and not exists(text):
            with suppress(ValueError):
                return json.loads(text)
    except RecursionError:
        raise UserError("command line: a value is nested too deeply") from None
    return text


def _with_mappings_whole(config_type: type[BaseModel], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of settings, with the entries of a mapping together: their names may hold dots and are no flags."""
    whole: dict[str, Any] = {}
    for key, value in flatten(values):
        ends = [place for place, sign in enumerate(key) if sign == "."]
        end = next((end for end in ends if _shape(config_type, key[:end]).mapping), None)
        if end is None:
            whole[key] = value
        else:
            before = whole.get(key[:end]) or {}
            if isinstance(before, str):
                raise UserError(f"{key[:end]}: is the text {before!r} and has {key} too; give one mapping")
            whole[key[:end]] = before | {key[end + 1 :]: value}
    yield from whole.items()


def _written(value: Any, shape: _Shape) -> str:
    if isinstance(value, list) and value and all(map(_is_plain, value)):
        one_path = shape.paths and len(value) > 1 and any(isinstance(item, str) for item in value)
        if shape.list and not one_path:  # several paths with commas could be the name of one
            return ",".join(item if isinstance(item, str) else json.dumps(item) for item in value)
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    if shape.list:
        return value if _is_plain(value) or not shape.paths else json.dumps([value], ensure_ascii=False)
    ambiguous = value == "null" or value.startswith('"') or (shape.group and value.startswith("{"))
    return json.dumps(value, ensure_ascii=False) if ambiguous else value


def _is_plain(value: Any) -> bool:
    """Whether a value is itself as an item between commas."""
    if isinstance(value, str):
        return value not in ("", "null") and value == value.strip() and _SIGNS.isdisjoint(value)
    return isinstance(value, int | float)


def _read_list(text: str, shape: _Shape, exists: Callable[[str], bool]) -> Any:
    if shape.paths and exists(text):
        return [text]
    if text.strip() == "null":
        return None
    if text.startswith("["):
        for whole in (text, f"[{text}]"):
            with suppress(ValueError):
                return json.loads(whole)
        if text.endswith("]"):  # as `[a, b]`, without quotes
            text = text[1:-1]
    return list(_items(text, as_text=shape.texts))


def _items(text: str, *, as_text: bool) -> Iterator[Any]:
    """Yield the items between commas; one that begins with a quote, bracket or brace is JSON where it can be."""
    more = True
    while more:
        text = text.strip()
        try:
            item, end = _JSON.raw_decode(text) if text[:1] in ('"', "[", "{") else (None, 0)
        except ValueError:
            end = 0
        rest = text[end:].lstrip()
        if not end or (rest and not rest.startswith(",")):
            item, comma, rest = text.partition(",")
            item, rest = _word(item.strip(), as_text=as_text), comma + rest
        yield item
        more, text = bool(rest), rest[1:]


def _word(text: str, *, as_text: bool) -> Any:
    if not as_text:
        with suppress(ValueError):
            return json.loads(text)
    return text


def _pair(item: str) -> tuple[str, str]:
    name, _, value = item.partition("=")
    return name.strip(), value.strip()


def _added(before: Any, value: Any) -> Any:
    """Return the values of two flags of one setting together."""
    if isinstance(before, list) and isinstance(value, list):
        return before + value
    return before | value if isinstance(before, dict) and isinstance(value, dict) else value


def _is_group_alone(config_type: type[BaseModel], key: str) -> bool:
    """Whether a setting is a group of settings and nothing else, not even null."""
    annotations = [field.annotation for field in fields_at(config_type, key.split("."))]
    return all(isinstance(one, type) and issubclass(one, BaseModel) for one in annotations) and bool(annotations)


def _with_its_key(config_type: type[BaseModel], key: str, text: str) -> Any:
    """Return the group that a text stands for, so that `--data.val DIR` goes with `--data.val.labels none`: its one required setting is the text."""
    models = [model for field in fields_at(config_type, key.split(".")) for model in models_in(field.annotation)]
    required = {name for model in models for name, field in model.model_fields.items() if field.is_required()}
    return {required.pop(): text} if len(required) == 1 else text


def _shape(config_type: type[BaseModel], key: str) -> _Shape:
    annotations = [one for field in fields_at(config_type, key.split(".")) for one in _members(field.annotation)]
    lists = [one for one in annotations if typing.get_origin(one) in (list, tuple)]
    models = [model for one in lists for model in models_in(one)]
    kinds = set[Any]().union(*map(kinds_in, lists))
    every = set[Any]().union(*map(kinds_in, annotations)) - {type(None)}
    return _Shape(
        list=bool(lists),
        mapping=any(typing.get_origin(one) is dict for one in annotations),
        group=any(isinstance(one, type) and issubclass(one, BaseModel) for one in annotations),
        path=Path in annotations,
        texts=bool(models or kinds & {str, Path}),
        paths=Path in kinds or any(not {"path", "model"}.isdisjoint(model.model_fields) for model in models),
        words=bool(every) and every.isdisjoint({int, float, bool, Any}),
        null=type(None) in annotations,
    )


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the types that a union is of, without their metadata."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(annotation)[: 1 if origin is typing.Annotated else None]:
            yield from _members(inner)
    else:
        yield annotation
