"""Search for the number of passes per step (`accumulate`) whose images fit into memory, on the largest images of the run.

The batch size of a step does not change. The result is kept in the run directory for a resumed run; where the passes were too few after all,
`run_command` writes a note there, and the next start tries more of them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ssld.shared.config.training import PASSES_FILE
from ssld.shared.distributed.ranks import alone, any_rank, gather_lists
from ssld.shared.errors import UserError, is_out_of_memory
from ssld.shared.files import write_atomically
from ssld.shared.run_dir import RunDir

RESERVE = 0.08  # share of a GPU's memory that a trial leaves free, for fragmentation and other processes


def find_passes(
    run: RunDir,
    batch_size: int,
    ranks: int,
    attempt: Callable[[int], None],
    *,
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """Find `accumulate` for a run with `auto_batch`, all ranks together: the fewest passes whose images fit on every rank.

    Args:
        attempt: runs a whole step with that many images, and an evaluation batch; `networks` and `optimizer` are restored afterwards.

    Raises:
        UserError: not even one image per pass fits, or `batch_size` does not divide over the ranks.
    """
    if batch_size % ranks:
        raise UserError(f"batch_size {batch_size} is not a multiple of {ranks} processes")
    notes = gather_lists([_read(run.path)])  # of every rank: any of them may have run out of memory
    result = notes[0]
    too_few = max(note.get("too_few", 0) if note.get("processes") == ranks else 0 for note in notes)
    if too_few or result.get("processes") != ranks or "accumulate" not in result:
        with _put_back(networks, optimizer):
            passes = _fewest_passes(batch_size // ranks, attempt, device, too_few=too_few)
        result = {"accumulate": passes, "processes": ranks}
        if run.main:
            write_atomically(run.path / PASSES_FILE, json.dumps(result) + "\n")
    passes = int(result["accumulate"])
    images = batch_size // ranks // passes
    run.log(f"auto_batch: {images} of {batch_size} images per process and pass fit, so accumulate is {passes}")
    return passes


def _read(run: Path) -> dict[str, int]:
    """Return the result or the note of too few passes; {} where the file cannot be read, so that the search is repeated."""
    try:
        content = json.loads((run / PASSES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(content, dict) and all(type(value) is int and value > 0 for value in content.values())
    return content if whole else {}


def _fewest_passes(images: int, attempt: Callable[[int], None], device: torch.device, *, too_few: int) -> int:
    for passes in range(too_few + 1, images + 1):
        if images % passes == 0 and not any_rank(not _fits(attempt, images // passes, device)):
            return passes
    raise UserError(
        "auto_batch: not even one image per pass fits into memory; use smaller images, a smaller network, or --precision bf16"
    )


def _fits(attempt: Callable[[int], None], images: int, device: torch.device) -> bool:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1 - RESERVE, device)
    try:
        with alone():  # a rank that runs out of memory must not leave the others waiting
            attempt(images)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return True


@contextmanager
def _put_back(networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore weights, buffers and modes afterwards, and clear the state of the optimizer, which has not begun."""
    before = {
        name: {key: value.to("cpu", copy=True) for key, value in network.state_dict().items()}
        for name, network in networks.items()
    }
    training = {name: network.training for name, network in networks.items()}
    try:
        yield
    finally:
        for name, network in networks.items():
            network.load_state_dict(before[name])
            network.train(training[name])
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
