"""Types of numbers in settings, with their smallest and largest sensible values.

The limits are far beyond any real training: they catch typing mistakes and wrong units before a run requests too much memory, disk or time.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_MOST_STEPS = 1_000_000_000


def _interval(value: Any) -> int | float:
    return _length(value, least=1)


def _position(value: Any) -> int | float:
    return _length(value, least=0)


def _length(value: Any, *, least: int) -> int | float:
    """Read whole steps, or a fraction of the run. Refuses 1.0, which could mean one step or the whole run."""
    fault = ValueError(
        f"has to be a whole number of steps, {least} to {_MOST_STEPS:,}, or a fraction of the run above 0 and below 1, "
        f"such as 0.7 (given: {value})"
    )
    if not isinstance(value, int | float | str):
        raise fault
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise fault from None
    if 0 < number < 1:
        return number
    if not number.is_integer() or not least <= number <= _MOST_STEPS or (number == 1 and "." in str(value)):
        raise fault
    return int(number)


Steps = Annotated[int, Field(ge=1, le=_MOST_STEPS)]
_Fraction = Annotated[float, Field(gt=0, lt=1)]
Interval = Annotated[Steps | _Fraction, BeforeValidator(_interval)]
"""distance between two events of a run: whole steps from 1, or a fraction of the run"""
Position = Annotated[Annotated[int, Field(ge=0, le=_MOST_STEPS)] | _Fraction, BeforeValidator(_position)]
"""a step of a run, counted from 0, or a fraction of the run"""
Images = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
"""number of images of a run, repeats included"""
Passes = Annotated[float, Field(gt=0, le=1_000_000)]
"""passes over the training images"""
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # accepted by every library
Workers = Annotated[int, Field(ge=0, le=1024)]
Processes = Annotated[int, Field(ge=1, le=1024)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
"""images per step, or passes per step"""
Side = Annotated[int, Field(ge=8, le=16_384)]
"""side of an image, in pixels"""
Count = Annotated[int, Field(ge=1, le=100_000)]
"""number of things of a network or a run: channels, layers, proposals, checkpoints"""
Positive = Annotated[float, Field(gt=0, le=1_000_000)]
"""number above 0: a temperature, a norm, a share"""
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""weight of a term in a sum"""
