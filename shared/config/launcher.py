"""What a process learns from what started it: its number and that of all processes, and whether the runner of a pipeline still lives.

Read before any process group exists; does not import torch.
"""

import os
import signal
import threading
from contextlib import suppress

from ssld.shared.errors import UserError

RUNNER = "SSLD_RUNNER"
"""environment variable of the processes of a stage, also behind a launcher: their standard input is a pipe that the runner holds open"""

_LAUNCHER = (
    "the launcher's environment is broken; unset RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT, "
    "or start with accelerate launch"
)


def launched_ranks() -> tuple[int, int]:
    """Read (rank, processes) from the launcher's environment, before any process group exists."""
    rank, processes = launched_number("RANK", 0), launched_number("WORLD_SIZE", 1)
    launched_number("LOCAL_RANK", 0)
    if processes > 1:
        launched_number("MASTER_PORT", 0)
    if not 0 <= rank < processes:
        raise UserError(f"RANK={rank} WORLD_SIZE={processes}: {_LAUNCHER}")
    return rank, processes


def launched_number(name: str, default: int) -> int:
    """Read a number from the launcher's environment. Raises UserError where the value is not a number."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name}={text}: {_LAUNCHER}")
    return int(text)


def stop_with_runner() -> None:
    """Stop this process, as SIGTERM does, when the runner that started it is gone, however that died; nothing in a command that a user has typed.

    The runner never writes into the pipe, so a thread that reads from it sleeps until its other end is closed. For what this process starts itself,
    standard input is empty.
    """
    if os.environ.pop(RUNNER, None) is None:
        return
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_stop_at_its_end, args=(pipe,), name="runner", daemon=True).start()


def _stop_at_its_end(pipe: int) -> None:
    with suppress(OSError):
        while os.read(pipe, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
