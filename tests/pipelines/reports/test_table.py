"""The table of a pipeline: missing numbers, percent, signed differences, a damaged result."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ssld.pipelines.config import TableConfig
from ssld.pipelines.reports.table import table_text
from ssld.shared.errors import UserError


def test_table_says_what_is_missing(tmp_path: Path, table: dict[str, Any]) -> None:
    assert table_text(TableConfig(**table), tmp_path).splitlines() == [
        "backbone           top-1    agreement    detector AP    AP50",
        "teacher                -            -              -       -",
        "SSLD                   -            -              -       -",
        "baseline               -            -              -       -",
        "------------------------------------------------------------",
        "SSLD - baseline        -            -              -       -",
    ]


def test_table_shows_percent_and_signed_differences(
    tmp_path: Path, table: dict[str, Any], fake_stage: ModuleType
) -> None:
    measured = {
        "student": {"top1": 0.5, "agreement": 1.0},
        "baseline": {"top1": 0.6237},
        "ap": {"AP": 0.0, "AP50": 0.9},
    }
    for name, metrics in measured.items():
        flags = [f"--metrics.{key}={value}" for key, value in metrics.items()]
        assert fake_stage.main([*flags, "--output", str(tmp_path / name)]) == 0
    cells = [line.split() for line in table_text(TableConfig(**table), tmp_path).splitlines()]
    assert cells[2] == ["SSLD", "50.0", "100.0", "0.0", "90.0"]
    assert cells[3] == ["baseline", "62.4", "-", "-", "-"]
    assert cells[5] == ["SSLD", "-", "baseline", "-12.4", "-", "-", "-"]


def test_damaged_result_is_a_user_error(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json: not readable"):
        table_text(TableConfig(**table), tmp_path)
