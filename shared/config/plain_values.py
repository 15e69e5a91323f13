"""Checks of values that pydantic would silently convert to another type."""

import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class PlainValues(BaseModel):
    """Settings in which `true` is not a number, a path is not empty, and a path of digits is text."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = kinds_in(cls.model_fields[info.field_name or ""].annotation)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, bool) and kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("int_type" if int in kinds else "float_type", "has to be a number")
            if isinstance(one, str) and "\0" in one:
                raise PydanticCustomError("nul", "holds a NUL character")
            if one == "" and Path in kinds:
                raise PydanticCustomError("empty_path", "names no file or folder")
        return str(value) if Path in kinds and type(value) is int else value


def kinds_in(annotation: Any) -> set[Any]:
    """Return the types in an annotation: those of `int | None` are int and NoneType."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return set()
    if typing.get_origin(annotation) is Annotated:
        inner = inner[:1]
    return set[Any]().union(*map(kinds_in, inner)) if inner else {annotation}
