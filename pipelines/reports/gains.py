"""Gains of the page: what one row of the table has over another, with its interval and whether it is claimed. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from ssld.pipelines.config import TableConfig
from ssld.pipelines.reports.stage_view import MINUS
from ssld.pipelines.reports.table import CLAIMS, Interval, Row

MEASURES = (("detector AP", 2), ("top-1", 0))
"""(title, index into a row's values)"""


@dataclass(frozen=True)
class Gain:
    """Gain of one row of the table over another by one measure, in percentage points.

    Attributes:
        interval: 95 % interval as fractions; None if it was not measured.
        others: (name, points) of the other rows with this measure whose difference to `better` has no interval.
        note: reason why a difference over several runs has no interval, or None.
        brought: what the better row had and the other had not, in words; None where this is not one thing.
    """

    measure: str
    points: float
    interval: Interval | None
    better: str
    base: str
    others: list[tuple[str, float]]
    note: str | None = None
    brought: str | None = None

    @property
    def text(self) -> str:
        """Points as text, with sign."""
        return signed(self.points)

    @property
    def interval_text(self) -> str:
        """Interval as text, in points with sign, and its basis."""
        if self.interval is None:
            return self.note or "no interval measured"
        low, high = (signed(100 * bound) for bound in (self.interval.low, self.interval.high))
        return f"95 % interval {low} to {high} ({self.interval.basis})"

    @property
    def verdict(self) -> str:
        """`good` or `bad` if a gain or a loss is claimed, else `none`."""
        return CLAIMS.get(self.interval.verdict, "none") if self.interval else "none"

    @property
    def heading(self) -> str:
        """Conclusion where no difference is claimed."""
        return capitalized(self.interval.verdict) if self.interval else "Not compared"


def gains(
    table: TableConfig,
    rows: list[Row],
    difference: Row | None,
    further: Mapping[tuple[str, str], Row] | None = None,
    brought: Mapping[tuple[str, str], str | None] | None = None,
) -> list[Gain]:
    """Return the gain between the two rows of `table.gain` by each measure that both have, then the further measured differences.

    Args:
        rows, difference: of the table.
        further: differences by (row, the row that it is compared with).
        brought: what the first row of a pair had and the second had not, in words.
    """
    result = []
    pairs = {**({table.gain: difference} if table.gain and difference else {}), **(further or {})}
    shown = {name for pair in pairs for name in pair}
    for pair, one in pairs.items():
        for measure, column in MEASURES:
            points, interval = one.values[column], one.intervals[column]
            if points is None or (pair != table.gain and interval is None):
                continue
            values = {row.name: value for row in rows if (value := row.values[column]) is not None}
            others = [name for name in values if name not in shown] if pair == table.gain else []
            over = [(name, 100 * (values[pair[0]] - values[name])) for name in others] if len(others) <= 2 else []
            words = (brought or {}).get(pair) if measure == MEASURES[0][0] else None
            result.append(Gain(measure, 100 * points, interval, *pair, over, one.notes[column], words))
    return result


def capitalized(text: str) -> str:
    """Return text with a capital first letter."""
    return text[:1].upper() + text[1:]


def signed(points: float) -> str:
    """Format points with one decimal and a sign, none for zero."""
    text = f"{points:+.1f}".replace("-", MINUS)
    return text if text[1:] != "0.0" else "0.0"
