"""Values that pydantic would take for something else without a word."""

from pathlib import Path

import pytest

from ssld.shared.config.bounds import Steps
from ssld.shared.config.settings import Config
from ssld.shared.config.validation import validate
from ssld.shared.errors import UserError


class Values(Config):
    """Settings of a test."""

    steps: Steps | None = None
    rate: float = 0.1
    sides: list[int] = []
    area: tuple[float, float] = (0.0, 1.0)
    shuffle: bool | int = False
    name: str = ""
    folder: Path | None = None
    files: list[Path] = []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("steps", True, "steps: has to be a whole number (given: true)"),
        ("rate", False, "rate: has to be a number (given: false)"),
        ("sides", [8, True], "sides: has to be a whole number (given: [8, true])"),
        ("area", [True, 1.0], "area: has to be a number (given: [true, 1.0])"),
        ("name", "a\0b", r'name: holds a NUL character (given: "a\u0000b")'),
        ("folder", "a\0b", r'folder: holds a NUL character (given: "a\u0000b")'),
        ("folder", "", 'folder: names no file or folder (given: "")'),
        ("files", ["a", ""], 'files: names no file or folder (given: ["a", ""])'),
        ("folder", 1.5, "folder: has to be a path; put a name like that in quotes (given: 1.5)"),
        ("folder", True, "folder: has to be a path; put a name like that in quotes (given: true)"),
    ],
)
def test_what_is_refused(key: str, value: object, line: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(Values, {key: value}, source="FILE")
    assert str(caught.value) == f"FILE: {line}"


def test_what_is_taken() -> None:
    values = validate(Values, {"folder": 2024, "shuffle": True, "steps": "3", "name": "", "rate": 1}, source="FILE")
    assert (values.folder, values.shuffle, values.steps, values.name, values.rate) == (Path("2024"), True, 3, "", 1.0)
