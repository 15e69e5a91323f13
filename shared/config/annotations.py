"""Annotations of settings: the types and the groups of settings in them, and the fields that a dotted key leads to."""

import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def kinds_in(annotation: Any) -> set[Any]:
    """Return the types in an annotation: those of `int | None` are int and NoneType."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return set()
    if typing.get_origin(annotation) is Annotated:
        inner = inner[:1]
    return set[Any]().union(*map(kinds_in, inner)) if inner else {annotation}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation, through Optional, unions and lists."""
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def fields_at(model: type[BaseModel], path: Sequence[str]) -> list[FieldInfo]:
    """Return the fields that a dotted key, in its parts, leads to: none for an unknown key, several where a group may be one of several models."""
    models, fields = [model], list[FieldInfo]()
    for part in path:
        fields = [one.model_fields[part] for one in models if part in one.model_fields]
        models = [inner for field in fields for inner in models_in(field.annotation)]
    return fields
