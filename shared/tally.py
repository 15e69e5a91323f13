"""Counts of images and boxes that a reader kept and left out, by cause and with the first name; and the rule that stops a run on bulk loss.

Every reader of images or boxes fills one `Tally`. The log shows `describe()`, `result.json` holds `record()`, `ssld doctor` prints `bulk_loss()`,
and training raises the same sentence through `check()`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ssld.shared.errors import UserError
from ssld.shared.wording import count

_HALF = 0.5
_PLURALS = {"box": "boxes", "class": "classes", "entry": "entries"}


class Tally:
    """Counts of items kept, dropped, changed and skipped.

    `what` is a noun in the singular: "image", "box", "object". `cause` completes "12 boxes dropped: 9 ...", as in "outside the image" or "without
    a width". `group` is the class that something belongs to, where it has one. `name` is how the user finds the item: a file, an id, a line.
    """

    def __init__(self) -> None:
        self._kept: dict[str, int] = {}
        self._kept_in: dict[tuple[str, str], int] = {}
        self._dropped: dict[tuple[str, str], tuple[int, str]] = {}
        self._dropped_in: dict[tuple[str, str, str], tuple[int, str]] = {}
        self._changed: dict[tuple[str, str], tuple[int, str]] = {}
        self._skipped: dict[tuple[str, str], tuple[int, str]] = {}

    def keep(self, what: str, number: int = 1, *, group: str | None = None) -> None:
        """Count items that are read as they are."""
        self._kept[what] = self._kept.get(what, 0) + number
        if group is not None:
            self._kept_in[what, group] = self._kept_in.get((what, group), 0) + number

    def drop(self, what: str, cause: str, name: object, number: int = 1, *, group: str | None = None) -> None:
        """Count items that are left out; the first name of each cause is kept."""
        if number:
            _add(self._dropped, (what, cause), number, name)
            if group is not None:
                _add(self._dropped_in, (what, group, cause), number, name)

    def change(self, what: str, cause: str, name: object, number: int = 1) -> None:
        """Count items that were kept (and counted by `keep`) in another form: "clipped to the image", "with the box of its polygon"."""
        if number:
            _add(self._changed, (what, cause), number, name)

    def skip(self, what: str, cause: str, name: object, number: int = 1) -> None:
        """Count items beside the data that do not belong to it, or that the settings exclude; they are reported, but are no loss."""
        if number:
            _add(self._skipped, (what, cause), number, name)

    def merge(self, other: "Tally", *, kept: bool = True) -> None:
        """Add the counts of another tally; `kept` is false where its kept items will be counted again."""
        for what, number in other._kept.items() if kept else ():
            self._kept[what] = self._kept.get(what, 0) + number
        for member, number in other._kept_in.items() if kept else ():
            self._kept_in[member] = self._kept_in.get(member, 0) + number
        tables = (
            (self._dropped, other._dropped),
            (self._changed, other._changed),
            (self._skipped, other._skipped),
        )
        for own, added in tables:
            for key, (number, first) in added.items():
                _add(own, key, number, first)
        for place, (number, first) in other._dropped_in.items():
            _add(self._dropped_in, place, number, first)

    def kept(self, what: str, group: str | None = None) -> int:
        """Return the number of kept items, of one class where `group` names it."""
        return self._kept.get(what, 0) if group is None else self._kept_in.get((what, group), 0)

    def dropped(self, what: str, cause: str | None = None) -> int:
        """Return the number of dropped items, for one cause where it is named."""
        return sum(
            number for (kind, why), (number, _) in self._dropped.items() if kind == what and cause in (None, why)
        )

    def changed(self, what: str, cause: str | None = None) -> int:
        """Return the number of items kept in another form."""
        return sum(
            number for (kind, why), (number, _) in self._changed.items() if kind == what and cause in (None, why)
        )

    def skipped(self, what: str, cause: str | None = None) -> int:
        """Return the number of skipped items."""
        return sum(
            number for (kind, why), (number, _) in self._skipped.items() if kind == what and cause in (None, why)
        )

    def describe(self) -> str:
        """Describe the losses in one line for the log, empty where nothing was left out or changed.

        `3 boxes dropped: 2 outside the image (first: annotation 7), 1 of no size (first: annotation 9); 1 box changed: ...`
        """
        parts = []
        for table, verb in ((self._dropped, "dropped"), (self._changed, "changed"), (self._skipped, "skipped")):
            for what in dict.fromkeys(kind for kind, _ in table):
                causes = {cause: entry for (kind, cause), entry in table.items() if kind == what}
                total = sum(number for number, _ in causes.values())
                parts.append(f"{_count(total, what)} {verb}: {', '.join(_causes(causes))}")
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return the counts for `result.json`, `skipped` only where there are any:
        `{"box": {"kept": 10, "dropped": {CAUSE: {"count": 2, "first": NAME}}, "changed": {...}}}`."""
        kinds = dict.fromkeys([*self._kept, *(what for what, _ in (*self._dropped, *self._changed, *self._skipped))])
        return {
            what: {
                "kept": self.kept(what),
                "dropped": _entries(self._dropped, what),
                "changed": _entries(self._changed, what),
            }
            | ({"skipped": skipped} if (skipped := _entries(self._skipped, what)) else {})
            for what in kinds
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Tally":
        """Return the counts of a `record()`, without classes. Raises one of MALFORMED for anything else."""
        tally = cls()
        for what, entry in record.items():
            tally.keep(str(what), int(entry["kept"]))
            for add, key in ((tally.drop, "dropped"), (tally.change, "changed"), (tally.skip, "skipped")):
                for cause, one in entry.get(key, {}).items():
                    add(str(what), str(cause), one["first"], int(one["count"]))
        return tally

    def describe_kept(self) -> str:
        """Describe what was kept, such as `72 images, 945 boxes`."""
        return ", ".join(_count(number, what) for what, number in self._kept.items())

    def bulk_loss(self) -> str | None:
        """Describe a bulk loss in the sentence that training stops with; None where there is none.

        Bulk is more than half of all images or boxes, more than half of those of one class, or all of a class.
        """
        for what in dict.fromkeys(kind for kind, _ in self._dropped):
            causes = {cause: entry for (kind, cause), entry in self._dropped.items() if kind == what}
            if sentence := _bulk(what, "", self.kept(what), causes):
                return sentence
        for what, group in dict.fromkeys((kind, group) for kind, group, _ in self._dropped_in):
            causes = {
                cause: entry for (kind, of, cause), entry in self._dropped_in.items() if (kind, of) == (what, group)
            }
            if sentence := _bulk(what, f" of class {group!r}", self.kept(what, group), causes):
                return sentence
        return None

    def check(
        self, place: object, *, allow_loss: bool, otherwise: str = "set data.allow_loss: true to train on the rest"
    ) -> None:
        """Raise UserError naming `place` on a bulk loss, unless that is allowed; `otherwise` is the advice on how to allow it."""
        sentence = None if allow_loss else self.bulk_loss()
        if sentence:
            raise UserError(f"{place}: {sentence}; correct the source, or {otherwise}")


def _add(table: dict[Any, tuple[int, str]], key: tuple[str, ...], number: int, name: object) -> None:
    before, first = table.get(key, (0, str(name)))
    table[key] = (before + number, first)


def _bulk(what: str, of: str, kept: int, causes: Mapping[str, tuple[int, str]]) -> str | None:
    lost = sum(number for number, _ in causes.values())
    if lost <= _HALF * (kept + lost):
        return None
    share = "all" if not kept else f"{lost:,} of the {kept + lost:,}"
    plural = _PLURALS.get(what, f"{what}s")
    return f"{share} {plural}{of} would be left out: {', '.join(_causes(causes))}"


def _causes(causes: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    return (f"{number:,} {cause} (first: {first})" for cause, (number, first) in causes.items())


def _count(number: int, what: str) -> str:
    return count(number, what, _PLURALS.get(what))


def _entries(table: Mapping[tuple[str, str], tuple[int, str]], what: str) -> dict[str, Any]:
    return {
        cause: {"count": number, "first": first} for (kind, cause), (number, first) in table.items() if kind == what
    }
