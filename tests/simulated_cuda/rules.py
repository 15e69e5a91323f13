"""Which operations CUDA refuses, and for which of them the host waits; by the schema of an operation and the devices of its tensors.

CUDA's own rules, from the sources of torch: TensorIterator lets a CPU tensor without dimensions into pointwise operations, `index` takes CPU indices,
copies go between devices. Waits are what `torch.cuda.set_sync_debug_mode` warns of: values that the host reads, results whose size follows from
values, and copies that are not `non_blocking`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PINNED = "_simulated_pinned"
"""attribute that marks a tensor of the host as pinned"""
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_SIZED_BY_VALUES = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
    "torchvision::nms",
}
# Beside those that are tagged pointwise.
_TAKE_CPU_SCALARS = {"aten::fill_", "aten::lerp_", "aten::masked_fill", "aten::masked_fill_", "aten::where"}


def on_gpu(values: Iterable[Any]) -> bool:
    """Whether any tensor among the values lies on the GPU."""
    return any(isinstance(value, Tensor) and value.is_cuda for value in values)


def strangers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors of the host with which CUDA would refuse the operation; [] where none of its tensors is on the GPU."""
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if name in _COPIES or not on_gpu(tensors):
        return []
    if name in _INDEXING:
        indexed, indices, values = args[0], [one for one in args[1] if isinstance(one, Tensor)], args[2:3]
        if not indexed.is_cuda:
            return [indexed] if on_gpu(indices) or on_gpu(values) else []
        return [one for one in values if isinstance(one, Tensor) and not one.is_cuda and one.dim()]
    of_the_host = [tensor for tensor in tensors if not tensor.is_cuda]
    scalars_pass = torch.Tag.pointwise in func.tags or "_foreach" in name or name in _TAKE_CPU_SCALARS
    return [tensor for tensor in of_the_host if tensor.dim() or not scalars_pass]


def wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The operation for which the host waits until the GPU has caught up; None where it does not."""
    name: str = func._schema.name
    if not on_gpu(tree_leaves((args, kwargs))):
        return None
    if name in _INDEXING:
        indices = [one for one in args[1] if isinstance(one, Tensor)]
        masks = [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and not args[2].is_cuda and args[2].dim() == 0  # becomes masked_fill
        if masks and not (filled and len(masks) == len(indices)):
            return f"{name} by a mask"
        return None
    if name == "aten::repeat_interleave":
        return None if kwargs.get("output_size") is not None else name
    if _copies_to_the_host(name, args, kwargs):
        return "copy to the host"
    return name if name in _SIZED_BY_VALUES else None


def upload(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """How the host's data come to the GPU in this operation: "blocking", "pageable" (non_blocking without pinned memory) or "pinned"; None: they do
    not."""
    name = func._schema.name
    if name in _INDEXING and args[0].is_cuda:  # torch moves the indices itself
        moved = [one for one in args[1] if isinstance(one, Tensor) and not one.is_cuda and one.dim()]
        return "blocking" if moved else None
    if name == "aten::_to_copy":
        source, to_gpu, non_blocking = args[0], is_cuda(kwargs.get("device")), kwargs.get("non_blocking")
    elif name == "aten::copy_":
        source, to_gpu = args[1], args[0].is_cuda
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
    else:
        return None
    if not to_gpu or source.is_cuda:
        return None
    if not non_blocking:
        return "blocking"
    return "pinned" if getattr(source, PINNED, False) else "pageable"


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument names a GPU."""
    return device is not None and torch.device(device).type == "cuda"


def _copies_to_the_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "aten::_to_copy":
        device = kwargs.get("device")
        return args[0].is_cuda and device is not None and not is_cuda(device) and not kwargs.get("non_blocking")
    return name == "aten::copy_" and args[1].is_cuda and not args[0].is_cuda and not (len(args) > 2 and args[2])
