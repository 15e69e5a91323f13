"""Types of numbers in settings, with their smallest and largest sensible values.

The limits are far beyond any real training: they catch typing mistakes and wrong units before a run requests too much memory, disk or time.
"""

from typing import Annotated

from pydantic import Field

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Images = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Passes = Annotated[float, Field(gt=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # accepted by every library
Workers = Annotated[int, Field(ge=0, le=1024)]
Processes = Annotated[int, Field(ge=1, le=1024)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Side = Annotated[int, Field(ge=8, le=16_384)]
"""side of an image, in pixels"""
Count = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""weight of a term in a sum"""
