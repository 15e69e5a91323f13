"""Settings checked against their pydantic model, and its complaints as sentences for users: one line per wrong key, which says where the value comes
from and what to give instead. Does not import torch."""

import json
from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ssld.shared.config.annotations import models_in
from ssld.shared.config.yaml_files import merge, nested
from ssld.shared.errors import UserError
from ssld.shared.wording import RENAMED, did_you_mean

ModelT = TypeVar("ModelT", bound=BaseModel)
_WORDS = {  # pydantic's kinds of mistakes in ours; its own words otherwise
    "greater_than": "has to be above {gt}",
    "greater_than_equal": "has to be at least {ge}",
    "less_than": "has to be below {lt}",
    "less_than_equal": "has to be at most {le}",
    "finite_number": "has to be a finite number",
    "int_parsing_size": "is too large a number",
    "int_parsing": "has to be a whole number",
    "int_type": "has to be a whole number",
    "int_from_float": "has to be a whole number",
    "float_parsing": "has to be a number",
    "float_type": "has to be a number",
    "bool_parsing": "has to be true or false",
    "bool_type": "has to be true or false",
    "literal_error": "has to be {expected}",
    "list_type": "has to be a list",
    "path_type": "has to be a path; put a name like that in quotes",
    "too_short": "needs at least {min_length}",
    "too_long": "takes at most {max_length}",
}


def validate(
    config_type: type[ModelT],
    values: dict[str, Any],
    *,
    source: str,
    flags: dict[str, Any] | None = None,
    call: bool = False,
) -> ModelT:
    """Build a configuration from `values` with `flags` on top; raises UserError with one line per wrong key.

    A line begins with `source`, or with "command line" where it is `flags` that are wrong or that do not go with the values below them. A
    misspelt key is named before the keys it leaves missing. With `call`, a missing key is named as an argument of a Python call.
    """
    flags = flags or {}
    items = _faults(config_type, merge(values, flags))
    if not isinstance(items, list):
        return items
    below = _own_faults(config_type, values, flags) if flags else {(item["loc"], item["msg"]) for item in items}
    lines = []
    for item in sorted(items, key=lambda item: bool(item["type"] == "missing")):
        inside = not isinstance(_at(flags, item["loc"]), dict | None)  # a flag's own value
        own = inside or (item["type"] != "missing" and (item["loc"], item["msg"]) not in below)
        lines.append(f"{'command line' if own else source}: {_explain(config_type, item, call=call)}")
    raise UserError(*dict.fromkeys(lines))


def _faults(config_type: type[ModelT], values: dict[str, Any]) -> ModelT | list[Any]:
    """Return the configuration, or the list of faults of the values."""
    try:
        return config_type(**values)
    except ValidationError as error:
        return list(error.errors())


def _own_faults(config_type: type[BaseModel], values: dict[str, Any], flags: dict[str, Any]) -> set[tuple[Any, str]]:
    """Return (location, message) of the faults that the values have without the flags.

    Missing values would hide conflicts between the others, so they are taken from the flags.
    """
    while True:
        items = _faults(config_type, values)
        if not isinstance(items, list):
            return set()
        whole = values
        for item in items:
            given = _at(flags, item["loc"]) if item["type"] == "missing" else None
            if given is not None:  # an empty group: the next round finds its required keys
                values = merge(values, nested(item["loc"], {} if isinstance(given, dict) else given))
        if values == whole:
            return {(item["loc"], item["msg"]) for item in items}


def _at(flags: Any, location: tuple[Any, ...]) -> Any:
    """Return the value of the flags at a location, or of a group around it; None where the flags do not set it."""
    for part in location:
        if not isinstance(flags, dict):
            return flags
        if part not in flags:
            return None
        flags = flags[part]
    return flags


def _explain(config_type: type[BaseModel], item: Any, *, call: bool = False) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(config_type, item["loc"][:-1])
        if hint := _as_group(item, known):
            return f"{key}: unknown key{hint}"
        return f"{key}: unknown key{did_you_mean(location[-1], known)}"
    if item["type"] == "missing":
        needed = needed_keys(config_type, item["loc"])
        if call:
            arguments = reduce(merge, [nested(tuple(name.split(".")), ...) for name in needed])
            text = ", ".join(f"{name}={value!r}" for name, value in arguments.items()).replace("Ellipsis", "...")
            return f"{key}: missing; give it in the YAML file or pass {text}"
        flags = ", ".join(f"--{name}" for name in needed)
        return f"{key}: missing; give it in the YAML file or as {flags}"
    words = _WORDS.get(item["type"])
    limits = {name: _number(limit) for name, limit in item.get("ctx", {}).items()}
    message = words.format(**limits) if words else own_words(item)
    given = json.dumps(item["input"], default=str)
    given_text = (
        f" (given: {given if len(given) <= 80 else given[:77] + '...'})" if item["type"] != "value_error" else ""
    )
    if item["type"] == "list_type" and item["input"] is None:
        message += "; [] is an empty one"
    renamed = RENAMED.get(item["input"]) if isinstance(item["input"], str) else None
    if item["type"] == "literal_error" and renamed and repr(renamed) in message:
        given_text += f"; did you mean {renamed!r}?"
    return f"{key}: {message}{given_text}" if key else message


def own_words(item: Any) -> str:
    """Return the message of an entry of `ValidationError.errors()`; of a check of this project's its own words, without pydantic's before them."""
    return str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]


def _number(limit: Any) -> Any:
    """Format a limit: 1,000,000, 0.5."""
    if not isinstance(limit, int | float):
        return limit
    return f"{int(limit):,}" if limit == int(limit) else f"{limit:g}"


def needed_keys(model: Any, location: Sequence[Any], before: str = "") -> list[str]:
    """Return the dotted names that supply a missing setting: itself, or the required keys of a group."""
    first, *rest = location
    field = getattr(model, "model_fields", {}).get(first)
    annotation = field.annotation if field else None
    inner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    name = f"{before}{first}"
    if rest:
        return needed_keys(inner, rest, f"{name}.")
    needed = [key for key, one in inner.model_fields.items() if one.is_required()] if inner else []
    return [leaf for key in needed for leaf in needed_keys(inner, (key,), f"{name}.")] or [name]


def _as_group(item: Any, known: Sequence[str]) -> str:
    """Return a hint on `roi.hidden: 8` in a file, where groups are nested; empty where the key is not part of a group."""
    *groups, last = str(item["loc"][-1]).split(".")
    if not groups or groups[0] not in known:
        return ""
    given = json.dumps(item["input"], default=str)
    text = f"{last}: {given if len(given) <= 80 else '...'}"
    for group in reversed(groups):
        text = f"{group}: {{{text}}}"
    return f"; in a YAML file groups are nested: {text}"


def _known_keys(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Return the field names of the model at `location`, through Optional, unions and lists."""
    models = [model]
    for part in location:
        inner = [m.model_fields[part].annotation for m in models if part in m.model_fields] or list(models)
        models = [m for annotation in inner for m in models_in(annotation)]
    return [name for m in models for name in m.model_fields]
