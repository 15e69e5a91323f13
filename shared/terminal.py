"""Lines for the terminal: control characters in names and files are escaped, and a closed pipe (as behind `head`) does not end the program. Does not
import torch."""

import errno
import os
import sys
from typing import TextIO

from ssld.shared.wording import printable

_GONE = (errno.EPIPE, errno.EIO)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output or `stream`; tabs stay, other control characters are escaped, so that a name cannot begin a line of its own.

    A stream whose reader is gone is redirected to the null device.
    """
    _print(printable(text, keep="\t"), stream or sys.stdout)


def say_lines(text: str, stream: TextIO | None = None) -> None:
    """Print text as `say` does, with its line breaks: the names in it are escaped already."""
    _print(printable(text, keep="\n\t"), stream or sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # letters that the terminal's encoding does not have
        print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device: its buffered text would otherwise raise the error once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no file behind it
        pass
    finally:
        os.close(nowhere)
