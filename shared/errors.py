"""Exceptions that a user sees as one line, their exit codes, and the test for exhausted memory."""

import errno
from typing import Any

from ssld.shared.wording import printable

USER_ERROR, STOPPED = 2, 143  # exit codes


class UserError(Exception):
    """A mistake that the user can fix: bad input, a bad key, a missing file.

    The message is one line, or one for each mistake, that names the file, the key or the id, and the remedy. The entry scripts print it without a
    traceback and exit with code 2; every other exception is a bug and keeps its traceback.

    Args:
        lines: the lines. A line break inside, as in the name of a file, is shown as `\\n`.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(printable(line, keep="\t") for line in lines))

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        """Return what a copy in another process is made of."""
        return UserError, tuple(str(self).split("\n"))


class Stopped(Exception):
    """The run was stopped by a signal, has written a checkpoint and can be resumed; the command exits with code 143."""


# Errors of reading a record whose values have other types than its writer gave them: a list for a map, text for a number, lists nested without end.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)

# Messages of libraries near the limit of memory, in a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU, or of the machine, is exhausted."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch's, without importing it
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
