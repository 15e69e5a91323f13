"""How data-loader workers begin and end."""

import atexit
import multiprocessing
import signal

import torch


def start_worker(_: int) -> None:
    """One thread a worker. Stopping is the main process's decision: signals sent to the whole process group pass workers by."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # Python ends daemonic children by SIGTERM, which workers ignore, and then waits for them: a run that ends by an error would hang.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
