"""The one exception a user is meant to see."""

import errno


class UserError(Exception):
    """Something the user can mend: bad input, a bad key, a missing file.

    The message is one line that names the file, the key or the id and says what to do. The entry scripts print it without a traceback and
    exit with code 2; every other exception is a bug and keeps its traceback.
    """


class Stopped(Exception):
    """The run was asked to stop by a signal, has written a checkpoint and can go on; the command exits with code 143."""


# What looking at a record ends in whose values are of other kinds than its writer's: a list for a map, text for a number, lists without end.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)

# What libraries say near the limit, in a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory, or the machine's, is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch's, without importing it
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
