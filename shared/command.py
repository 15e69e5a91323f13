"""What every entry script does around its work: parse, set threads, and turn a user's mistake into one line and exit code 2."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.config import ConfigT, launched_ranks, parse_config
from shared.errors import Stopped, UserError

USER_ERROR, STOPPED = 2, 143


def run_command(
    config_type: type[ConfigT],
    work: Callable[[ConfigT], None],
    argv: Sequence[str] | None,
    *,
    program: str,
    torch_threads: bool = True,
) -> int:
    """Run `work(config)` and return the exit code: 0 done, 2 a user's mistake, 143 stopped by a signal with a checkpoint written.

    A command that does without torch says so by `torch_threads=False` and starts faster.
    """
    rank, processes = launched_ranks()
    output: Path | None = None
    try:
        config = parse_config(config_type, sys.argv[1:] if argv is None else argv, program=program)
        output = config.output
        if torch_threads:
            _set_threads(config.threads)
        work(config)
    except UserError as error:
        return _report(str(error), rank, processes, output)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = error.filename or output
        return _report(
            f"{where}: {os.strerror(error.errno)}; nothing is lost: run the same command again", rank, processes, output
        )
    except Stopped as error:
        if rank == 0:
            print(f"stopped: {error}; the same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def _report(message: str, rank: int, processes: int, output: Path | None) -> int:
    lines = message.splitlines()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    for line in lines:
        print(f"{prefix}error: {line}", file=sys.stderr)
    # A launcher buries its children's output and changes their exit code: leave the line where the runner finds it.
    if rank == 0 and processes > 1 and output is not None and output.is_dir():
        (output / "error.json").write_text(
            json.dumps({"error": message, "exit_code": USER_ERROR}) + "\n", encoding="utf-8"
        )
    return USER_ERROR


def _set_threads(threads: int | None) -> None:
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local))
