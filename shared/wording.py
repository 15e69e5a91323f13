"""Numbers, lists, suggestions and untrusted text in sentences."""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

FEW_IMAGES = 30
"""Number of evaluated images below which no difference is claimed: an interval over so few images is too narrow to be relied on."""
WEAK_AP50 = 0.5
"""AP50 below which a label audit says that most contradictions are the detector's own mistakes: a guess, at which half of the precision is missing"""
# Control characters, invisible ones that turn or join text, halves of characters, and what else ends a line.
_UNPRINTED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_MOST_KNOWN, _SIMILAR = 40, 8
"""known words that a line lists at most, and the most similar ones that it lists of more"""


def count(number: int, what: str, plural: str | None = None) -> str:
    """Format a number and its noun: `1 image`, `1,200 boxes`."""
    plural = plural or (f"{what}es" if what.endswith(("x", "s")) else f"{what}s")
    return f"{number:,} {what if number == 1 else plural}"


def some(values: Sequence[Any], most: int = 3) -> str:
    """Format the first items of a list: `4, 7, 9, ...`."""
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def amount(size: float) -> str:
    """Format a number of bytes: `1.2 GB`, `3.4 MB`, `0.5 kB`."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:.1f} {name}"


def duration(seconds: float | None) -> str:
    """Format a time in seconds: `0.35 s`, `12 s`, `4 min`, `3 h 20 min`, `2.5 days`; None is a dash."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 2880 else f"{minutes / 1440:.1f} days"


RENAMED = {"--look_alikes": "--near_duplicates", "pictures": "images"}
"""New name of each flag and value that an earlier version had under another name."""


def did_you_mean(word: str, known: Sequence[str], others: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the end of an error line about an unknown word: the nearest known word; else all of them, or the most similar ones of many.

    Args:
        others: other names of known words, such as those of other programs, and the known words.
    """
    others = {name: now for name, now in (RENAMED | dict(others)).items() if now in known}
    # `samples` is nearer to `samples_per_image` than to `sampling`, and `--lr` is `--optim.lr`.
    longer = [name for name in known if name.startswith(f"{word}_")]
    inner = [name for name in known if name.endswith(f".{word.lstrip('-')}")]
    renamed = [others[name] for name in (word,) if name in others]
    alike = [others.get(name, name) for name in _alike(word, [*known, *others])]
    near = [word][: word in known] or renamed or longer[:1] or inner[:1] or alike or _parts(word, known)
    if near:
        return f"; did you mean {near[0]!r}?"
    if len(known) <= _MOST_KNOWN:
        return f"; known: {', '.join(sorted(known))}"
    similar = sorted(known, key=lambda name: (-_similarity(word, name), name))[:_SIMILAR]
    return f"; the most similar of {len(known)}: {', '.join(similar)}"


def _alike(word: str, known: Sequence[str]) -> list[str]:
    """Return the known word that is spelled most like `word`, if one is; flags are compared without their dashes, which all have in common."""
    if not word.startswith("--"):
        return difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    flags = {name[2:]: name for name in known if name.startswith("--")}
    return [flags[name] for name in difflib.get_close_matches(word[2:], flags, n=1, cutoff=0.7)]


def _parts(word: str, known: Sequence[str]) -> list[str]:
    """Return the shortest known flag of which `word` is a part, if one is: `--epochs` of `--train_epochs`, `--out` of `--output`."""
    part = word.removeprefix("--")
    if part == word or len(part) < 3:
        return []
    found = [name for name in known if name.startswith(word) or re.search(rf"[._]{re.escape(part)}(_|$)", name)]
    return sorted(found, key=lambda name: (len(name), name))[:1]


def _similarity(word: str, name: str) -> float:
    """Return the similarity, 0 to 1, of a word and the last part of a name."""
    return difflib.SequenceMatcher(None, word.lstrip("-"), name.lstrip("-").rpartition(".")[2]).ratio()


def verdict(low: float, high: float, images: int | None, *, identical: bool = False) -> str:
    """Return the conclusion from the 95 % interval of a difference: `better`, `worse`, or why neither is claimed.

    Args:
        images: number of evaluated images; None if unknown.
        identical: whether both rows have the same detections.
    """
    if identical:
        return "identical detections"
    if images is not None and images < FEW_IMAGES:
        return f"evaluated on {count(images, 'image')}: too few to tell"
    return "no difference measured" if low <= 0 <= high else "better" if low > 0 else "worse"


def weakness(AP50: float | None) -> str | None:
    """Say that a detector with a low AP50 (a fraction) contradicts right labels too; None for a better one, and where it is not measured.

    What a label audit lists are contradictions, and the lower the AP50, the more of them are the detector's own mistakes.
    """
    if AP50 is None or AP50 >= WEAK_AP50:
        return None
    return (
        f"AP50 of this detector on these images is {100 * AP50:.1f}: so weak a detector contradicts right labels too, "
        "and most of what is listed are its own mistakes"
    )


def printable(text: str, keep: str = "") -> str:
    """Escape characters that would move the terminal's cursor, color it, end a line or turn the direction of writing.

    Class names, file names and metadata come from outside and may contain anything. `keep` has characters that are not escaped, such as a line break.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in _UNPRINTED and one not in keep else one
        for one in text
    )


def width_of(text: str) -> int:
    """Return the number of a terminal's columns that printable text takes: two for a wide character, as of Chinese, none for a combining one."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else not unicodedata.combining(one) for one in text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Fill text with spaces to `width` columns, behind it, or before it if it is to end at the `right`."""
    space = " " * (width - width_of(text))
    return space + text if right else text + space
