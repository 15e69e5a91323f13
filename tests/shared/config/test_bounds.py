"""Every number that a setting takes has a smallest and a largest value, and is finite."""

import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.runner.stages import KINDS
from ssld.shared.config.annotations import models_in

# dotted name of a class and a field -> why it has no bound
FREE = {
    "PipelineConfig.variables": "text for the settings that it is put into, which have bounds",
}


def _models(model: type[BaseModel], visited: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in visited:
        return
    visited.add(model)
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            yield from _models(inner, visited)


def _numbers(annotation: Any, constraints: tuple[Any, ...]) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """(int or float, constraints) of every number in an annotation."""
    if annotation in (int, float):
        yield annotation, constraints
        return
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        flat = tuple(one for item in inner[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item]))
        yield from _numbers(inner[0], (*constraints, *flat))
    elif origin in (typing.Union, types.UnionType):
        numbers = [number for one in inner for number in _numbers(one, constraints)]
        yield from numbers[:1] if [kind for kind, _ in numbers] == [int, float] else numbers  # steps, or a fraction
    elif origin is not typing.Literal:  # a field's own constraints are about the list, not about what is in it
        for one in inner:
            yield from _numbers(one, ())


SEEN: set[type[BaseModel]] = set()
TOPS: list[type[BaseModel]] = [*(kind.config_type for kind in KINDS.values()), PipelineConfig]
SETTINGS = [
    (f"{model.__name__}.{name}", model, name, kind, constraints)
    for top in TOPS
    for model in _models(top, SEEN)
    for name, field in model.model_fields.items()
    for kind, constraints in _numbers(field.annotation, tuple(field.metadata))
]


def _bounds(constraints: tuple[Any, ...]) -> tuple[float | None, float | None]:
    low = high = None
    for one in constraints:
        low = getattr(one, "ge", getattr(one, "gt", low))
        high = getattr(one, "le", getattr(one, "lt", high))
    return low, high


def test_there_are_settings() -> None:
    assert len(SETTINGS) > 150


def _objections(model: type[BaseModel], field: str, value: float) -> set[str]:
    """Kinds of mistakes that a field finds in a number, given as it is, in lists of any form that fields have, and by name."""
    keys = set()
    for given in (value, *([value] * length for length in range(1, 6)), [[value] * 4] * 3, {"name": value}):
        try:
            model.model_validate({field: given})
        except ValidationError as error:
            own = {item["type"] for item in error.errors() if item["loc"][:1] == (field,)}
            assert own, f"takes {given}"
            keys |= own
        else:
            raise AssertionError(f"takes {given}")
    return keys


@pytest.mark.parametrize(("name", "model", "field", "kind", "constraints"), SETTINGS, ids=[one[0] for one in SETTINGS])
def test_a_number_has_bounds(
    name: str, model: type[BaseModel], field: str, kind: type, constraints: tuple[Any, ...]
) -> None:
    if name in FREE:
        return
    own = {"value_error"} if any(isinstance(one, BeforeValidator) for one in constraints) else set()
    for odd in (math.inf, -math.inf, math.nan):
        assert _objections(model, field, odd) & {"finite_number", *own}
    low, high = _bounds(constraints)
    assert low is not None
    assert high is not None
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert _objections(model, field, low - 1) & {"greater_than", "greater_than_equal", "multiple_of", *own}
    assert _objections(model, field, high + 1) & {"less_than", "less_than_equal", "multiple_of", *own}
    assert _objections(model, field, 10**30) & {"less_than", "less_than_equal", "multiple_of", *own}


def test_what_is_free_is_there() -> None:
    assert set(FREE) <= {name for name, *_ in SETTINGS}
