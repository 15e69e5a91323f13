"""Flags as people type them, made into what the parser of a configuration takes."""

from collections.abc import Sequence

from pydantic import BaseModel

from ssld.shared.config.help import models_in


def with_values(config_type: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """A switch may stand alone: `--benchmark` is `--benchmark true`."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        words.append(word)
        alone = word.startswith("--") and "=" not in word and following.startswith("--")
        if alone and _is_switch(config_type, word.removeprefix("--").split(".")):
            words.append("true")
    return words


def _is_switch(model: type[BaseModel], path: Sequence[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    if len(path) == 1:
        return field.annotation in (bool, bool | None)
    return any(_is_switch(inner, path[1:]) for inner in models_in(field.annotation))
