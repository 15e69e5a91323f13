"""Words of a command line, brought into the form that the parser takes: keys as in YAML, and a value for each. Does not import torch."""

import json
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
        whole = given == "null" or _is_json_group(given)
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


def takes_path(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Return whether a value of the key, in its parts, may be a path: a path, text but for names of classes, a group, or a list of these."""
    return "classes" not in path and any(
        models_in(field.annotation) or not kinds_in(field.annotation).isdisjoint({Path, str})
        for field in fields_at(model, path)
    )


def _is_json_group(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_switch(model: type[BaseModel], path: Sequence[str]) -> bool:
    return any(field.annotation in (bool, bool | None) for field in fields_at(model, path))
