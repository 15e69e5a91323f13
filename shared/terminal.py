"""Lines for the terminal: what names and files bring along cannot move its cursor, colour it or end a line."""

from typing import TextIO

from ssld.shared.wording import printable


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text, on standard output unless `stream` says otherwise; its own line breaks and tabs stay, other control characters are escaped."""
    print(printable(text, keep="\n\t"), file=stream, flush=True)
