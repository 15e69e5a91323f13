"""What the processes of one run tell each other. Everything works without a process group, as one rank."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_alone = False


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if world_size() > 1 else 0


def total_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on its device and without a host sync; not differentiated through."""
    if world_size() == 1 or _alone:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def _own(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Ranks:
    """The processes whose losses are divided by common counts; by default one.

    Data-parallel training averages gradients over ranks: what is divided by a count of all of them is multiplied by their
    number.
    """

    world_size: int = 1
    total: Callable[[Tensor], Tensor] = _own
    """sum of a tensor over the ranks, without gradient"""


ONE_RANK = Ranks()


def all_ranks() -> Ranks:
    """All processes of this run."""
    return Ranks(world_size(), total_over_ranks)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, `total_over_ranks` asks nobody: for what a rank tries for itself, and may break off."""
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
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def share_buffers(module: nn.Module) -> None:
    """Give every rank the main rank's buffers: between two forward passes the ranks' running statistics differ."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_lists(items: list[T]) -> list[T]:
    """The lists of all ranks, one after the other in the order of ranks, on every rank."""
    if world_size() == 1:
        return items
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def gather_on_main_rank(items: list[T]) -> list[T]:
    """The lists of all ranks on the main rank, in the order of ranks; nothing on the others, which spares a machine their copies."""
    if world_size() == 1:
        return items
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, gathered)
    return [item for part in gathered or [] for item in part]


def from_main_rank(value: T) -> T:
    """The main rank's value, on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received
