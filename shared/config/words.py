"""Words of a command line, brought into the form in which pydantic-settings parses them. Does not import torch."""

import json
import os
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel

from ssld.shared.config.annotations import fields_at, kinds_in, models_in


def underscored(word: str) -> str:
    """Spell a flag as its key: `--push-to-hub` becomes `--push_to_hub`."""
    name, equals, value = word.partition("=")
    known = not name.startswith("--") or name == "--print-config"
    return word if known else f"--{name[2:].replace('-', '_')}{equals}{value}"


def with_short_forms(argv: Sequence[str], short_forms: Mapping[str, str]) -> list[str]:
    """Spell out groups that are given as one text: `--data PATH` becomes `--data.source PATH`; `null` and JSON of the whole group stay."""
    words: list[str] = []
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        key = name.removeprefix("--")
        inner = short_forms.get(key) if name.startswith("--") else None
        given = value if equals else following
        whole = given == "null" or given.startswith("{")
        words.append(f"--{key}.{inner}{equals}{value}" if inner and not whole else word)
    return words


def with_values(config_type: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """Give switches without a value `true`: `--benchmark` becomes `--benchmark true`."""
    words: list[str] = []
    for word, following in pairwise([*argv, "--"]):
        words.append(word)
        alone = word.startswith("--") and "=" not in word and following.startswith("--")
        if alone and _is_switch(config_type, word.removeprefix("--").split(".")):
            words.append("true")
    return words


def without_repeats(config_type: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """Keep the last of several equal flags that take a path or a list of paths, as of any other flag: a repeated one adds no file to a list."""
    words: list[str | None] = list(argv)
    places: dict[str, int] = {}
    for place, word in enumerate(argv):
        name = word.partition("=")[0]
        if not name.startswith("--") or not _takes_path_or_list(config_type, name.removeprefix("--").split(".")):
            continue
        if name in places:
            earlier = places[name]
            length = 1 if "=" in argv[earlier] else 2
            words[earlier : earlier + length] = [None] * length
        places[name] = place
    return [word for word in words if word is not None]


def _takes_path_or_list(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a key takes a path or a list of paths."""
    return any({Path, list[Path]} <= set(typing.get_args(field.annotation)) for field in fields_at(model, path))


def with_paths(config_type: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """Keep names of existing files and folders as paths, whatever they look like: `--pool [old]`, `--pool a,b`, `--data.path null`."""
    words: list[str] = []
    for word, before in zip(argv, ["", *argv], strict=False):
        key = before.removeprefix("--").split(".")
        there = before.startswith("--") and not word.startswith("-") and os.path.exists(word)
        if there and key[-1] == "path" and word == "null":
            words.append("./null")
        else:
            listed = there and _lists_sources(config_type, key)
            # The parser takes the text between the quotes as it is: escapes, as of ü, would become part of the path.
            words.append(f'["{word}"]' if listed and '"' not in word else json.dumps([word]) if listed else word)
    return words


def _lists_sources(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether a key is that of a list of paths, or of groups of settings that each may be given as a path."""
    for field in fields_at(model, path):
        has_path = any("path" in one.model_fields for one in models_in(field.annotation))
        is_list = typing.get_origin(field.annotation) is list
        if (is_list and has_path) or list[Path] in (field.annotation, *typing.get_args(field.annotation)):
            return True
    return False


def takes_path(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Return whether a value of the key, in its parts, may be a path: a path, text but for names of classes, a group, or a list of these."""
    return "classes" not in path and any(
        models_in(field.annotation) or not kinds_in(field.annotation).isdisjoint({Path, str})
        for field in fields_at(model, path)
    )


def _is_switch(model: type[BaseModel], path: Sequence[str]) -> bool:
    return any(field.annotation in (bool, bool | None) for field in fields_at(model, path))
