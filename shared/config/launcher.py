"""The launcher's environment: the number of this process and of all. Read before any process group exists; does not import torch."""

import os

from ssld.shared.errors import UserError

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
