"""Communication between the processes of one run. Everything works without a process group, as one rank."""

import functools
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssld.shared.terminal import say
from ssld.shared.wording import duration

T = TypeVar("T")
_FIRST_NOTICE, _NEXT_NOTICE = 60.0, 600.0
"""seconds of waiting before the first line about it, and between two lines"""
_alone = False  # inside `alone`
_timeout: timedelta | None = None  # of `set_timeout`


def set_timeout(timeout: timedelta) -> None:
    """Set how long the ranks of this run wait for each other; before the first communication."""
    global _timeout
    _timeout = timeout


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if world_size() > 1 else 0


def total_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on its device and without a host sync; it has no gradient."""
    if world_size() == 1 or _alone:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def for_sums(value: Tensor) -> Tensor:
    """Convert to float64, in which sums over many images are exact to all printed digits; to float32 on Apple GPUs, which have no float64."""
    return value.to(sum_dtype(value.device))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Float type of sums over many images on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Ranks:
    """The processes whose losses are divided by common counts; by default one.

    Data-parallel training averages gradients over ranks: a loss that is divided by a count over all ranks has to be multiplied by the number of
    ranks.
    """

    world_size: int = 1
    total: Callable[[Tensor], Tensor] = _unchanged
    """sum of a tensor over the ranks, without gradient"""


ONE_RANK = Ranks()


def all_ranks() -> Ranks:
    """All processes of this run."""
    return Ranks(world_size(), total_over_ranks)


@contextmanager
def alone() -> Iterator[None]:
    """Context manager: `total_over_ranks` returns the local value, for work that one rank does alone and may abort."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; a reduction between hosts, which no device waits for."""
    if world_size() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total, group=_host_group())
    return bool(total.item())


@functools.cache
def _host_group() -> Any:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_timeout)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the main rank's buffers: between two forward passes the ranks' running statistics differ."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_lists(items: list[T]) -> list[T]:
    """Return the lists of all ranks, joined in the order of ranks, on every rank."""
    if world_size() == 1:
        return items
    gathered: list[Any] = [None] * world_size()
    with _announced_wait("the other processes"):
        dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def gather_on_main_rank(items: list[T]) -> list[T]:
    """Return the lists of all ranks, joined in the order of ranks, on the main rank; an empty list on the others, to save memory."""
    if world_size() == 1:
        return items
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    with _announced_wait("the other processes"):
        dist.gather_object(items, gathered)
    return [item for part in gathered or [] for item in part]


def wait_for_all() -> None:
    """Return when every rank has called this, as after work that the ranks share. `from_main_rank` does not wait like this: see there."""
    gather_lists([])


def from_main_rank(value: T, work: str = "") -> T:
    """Return the main rank's value on every rank. The main rank may go on before the others have it.

    A value whose computation may fail, or takes long, belongs in `on_main_rank`.

    Args:
        work: what the main rank does meanwhile, for the line that the others print after a minute.
    """
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    with _announced_wait(f"the main process{f' ({work})' if work else ''}"):
        dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def on_main_rank(work: Callable[[], T], name: str = "") -> T:
    """Do `work` on the main rank while the others wait; return its result on every rank. Whatever it raises is raised on every rank.

    Args:
        work: without communication between ranks; its result is small and can be pickled, as it is sent to the other processes.
        name: what `work` is, for the line that the others print after a minute.
    """
    if rank() == 0:
        try:
            result = work()
            if world_size() > 1:
                pickle.dumps(result)  # the others wait: a result that cannot be sent must end them too
        except BaseException as error:
            if world_size() > 1:
                from_main_rank((None, _sendable(error)))
            raise
        return from_main_rank((result, None))[0]
    replaced: Any = (None, None)
    result, raised = from_main_rank(replaced, name)
    if raised is not None:
        raise raised
    return result


def _sendable(error: BaseException) -> BaseException:
    """Return an exception as other processes can receive it: not all of them can be made again from what pickle keeps."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"the main process failed: {type(error).__name__}: {error}")


@contextmanager
def _announced_wait(whom: str) -> Iterator[None]:
    """Context manager: print a line on standard error after a minute of waiting for other processes, and one every ten minutes after that."""
    arrived = threading.Event()
    began = time.monotonic()

    def announce() -> None:
        pause = _FIRST_NOTICE
        while not arrived.wait(pause):
            limit = f"; process_timeout ends the run after {duration(_timeout.total_seconds())}" if _timeout else ""
            say(f"[rank {rank()}] waiting for {whom} for {duration(time.monotonic() - began)}{limit}", sys.stderr)
            pause = _NEXT_NOTICE

    thread = threading.Thread(target=announce, name="announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        arrived.set()
        thread.join()
