"""Kinds of numbers in settings, with the smallest and largest value that they can sensibly have.

The largest are far beyond what anyone has trained with: they catch a slip of the finger and a unit mistaken for another before memory, a disk or
years are asked for.
"""

from typing import Annotated

from pydantic import Field

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Images = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Passes = Annotated[float, Field(gt=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes
Workers = Annotated[int, Field(ge=0, le=1024)]
Processes = Annotated[int, Field(ge=1, le=1024)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Side = Annotated[int, Field(ge=8, le=16_384)]
"""of an image, in pixels"""
Count = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""of a term in a sum"""
