"""How data-loader workers begin."""

import os
import signal

import torch


def start_worker(_: int) -> None:
    """One thread a worker. Stopping is the main process's decision: signals sent to its process group do not reach its workers."""
    torch.set_num_threads(1)
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # inherited from the main process, it would only set a flag there
