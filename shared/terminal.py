"""Lines for the terminal that nothing ends by when nobody reads them any more: a pipe that `head` has left, a connection that broke. Torch-free."""

import errno
import os
import sys
from typing import TextIO

_GONE = (errno.EPIPE, errno.EIO)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output if no other stream is given; one whose reader is gone is sent to nowhere from then on."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # a name that is not text in the terminal's encoding
        print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let what is still printed to a stream go nowhere: what it holds back would otherwise fail once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no file behind it
        pass
    finally:
        os.close(nowhere)
