"""A CUDA device simulated on the CPU: tensors that say `cuda:0` and hold their values on the host.

    with SimulatedCuda() as gpu:
        model.to("cuda")
        with gpu.count() as counted:
            model(images, targets)
        assert counted.waits.total() == 1, counted

It acts as CUDA does where tensors of two devices meet (RuntimeError), where the host reads values or copies (counted, with the line of the project
that asked for it), under autocast, in GradScaler, in foreach optimizers and in the device threads of autograd. Whole commands run in it: torch and
accelerate are told that one GPU is there.

Not simulated: kernels (an operation, type or layout that CUDA lacks goes through here), memory, speed, streams, races, TF32, several devices or
processes, `torch.compile`, `torch.export` (but in `hidden`), and operations that change the shape of a tensor in place. Data loaders need workers=0:
forks do not go with autograd's threads. Entering it changes the process for good (driver.py), so it has one of its own.
"""

import sys
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.utils._foreach_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.simulated_cuda import driver
from tests.simulated_cuda.rules import PINNED, is_cuda, on_gpu, strangers, upload, wait

ROOT = Path(__file__).resolve().parents[2]
CODE = ("shared", "stage1_ssld", "stage2_detect", "pipelines")
GIB = 2**30
_Properties = namedtuple("_Properties", "name major minor total_memory multi_processor_count")
_READ_BY_HOST = ("aten::_local_scalar_dense", "aten::equal", "aten::is_pinned")
_running: list["SimulatedCuda"] = []  # at most one


@dataclass
class Counted:
    """Operations for which the host waits, blocking uploads, and `non_blocking` ones from pageable memory, by line of the project."""

    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: "Counted") -> "Counted":
        """Counts beyond those of `other`."""
        return Counted(self.waits - other.waits, self.uploads - other.uploads, self.pageable - other.pageable)

    def __str__(self) -> str:
        kinds = {"waits": self.waits, "blocking uploads": self.uploads, "pageable uploads": self.pageable}
        lines = [f"{n:6d} {where}" for counter in kinds.values() for where, n in counter.most_common()]
        return "\n".join([", ".join(f"{counter.total()} {kind}" for kind, counter in kinds.items()), *lines])


class DeviceTensor(Tensor):
    """A tensor of the simulated GPU; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> "DeviceTensor":
        assert not isinstance(host, DeviceTensor)
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device("cuda", 0),
            requires_grad=requires_grad,
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert _running, "a tensor of a simulated GPU outlived it"
        return _running[0].run(func, args, kwargs or {})

    # These four never come to the dispatcher, or as something else.
    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
    ) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return made.requires_grad_(requires_grad)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host!r})"


class _Dispatch(TorchDispatchMode):
    """Sees the operations that have no tensor of the GPU yet: factories and uploads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _running[0].run(func, args, kwargs or {})


class SimulatedCuda:
    """Context manager; see the module. `library` is what `driver.build` gave."""

    def __init__(self, library: Path | None = None) -> None:
        self._library = library
        self._counting: list[Counted] = []
        self._exits, self._dispatch = ExitStack(), _Dispatch()

    @contextmanager
    def count(self) -> Iterator[Counted]:
        """Count what happens inside."""
        counted = Counted()
        self._counting.append(counted)
        try:
            yield counted
        finally:
            self._counting.remove(counted)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, torch says that a GPU is there, but nothing can be put on it: for work that belongs on the CPU, such as `torch.export`."""
        self._dispatch.__exit__(None, None, None)
        try:
            yield
        finally:
            self._dispatch.__enter__()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the values, with the result on the device that CUDA would give it.

        Raises RuntimeError for tensors of two devices.
        """
        name, device = func._schema.name, kwargs.get("device")
        on_device = on_gpu(tree_leaves((args, kwargs)))
        if not on_device and not is_cuda(device):
            return func(*args, **kwargs)
        self._refuse_mixing(func, args, kwargs)
        self._note(func, args, kwargs)
        host_args, host_kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.host, (args, kwargs))
        if device is not None:
            host_kwargs["device"] = torch.device("cpu")
        for key in ("non_blocking", "pin_memory"):
            if key in host_kwargs:
                host_kwargs[key] = False
        result = _on_host(func, name, host_args, host_kwargs)
        if name in _READ_BY_HOST or (device is not None and not is_cuda(device)):
            return result
        if name == "aten::copy_" and not args[0].is_cuda:
            return args[0]
        result = tree_map_only(Tensor, DeviceTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if on_device else result

    def _refuse_mixing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wrong := strangers(func, args, kwargs):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in wrong)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func._schema.name} at {_line()}: on the CPU: {shapes})"
            )

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counting:
            return
        if waited := wait(func, args, kwargs):
            self.note_wait(waited)
        how = upload(func, args, kwargs)
        for counted in self._counting if how in ("blocking", "pageable") else []:
            (counted.uploads if how == "blocking" else counted.pageable)[_line()] += 1

    def note_wait(self, operation: str) -> None:
        """Count a wait here."""
        for counted in self._counting:
            counted.waits[f"{operation} at {_line()}"] += 1

    def __enter__(self) -> "SimulatedCuda":
        assert not _running, "one simulated GPU at a time"
        if reason := driver.missing():
            raise RuntimeError(reason)
        torch._C._ensureCUDADeviceGuardSet()  # autograd gets a thread for the device
        driver.install(self._library)
        _running.append(self)
        for target, value in self._answers().items():
            self._exits.enter_context(mock.patch(target, value, create=True))
        foreach_types: list[Any] = torch.utils._foreach_utils._foreach_supported_types
        foreach_types.append(DeviceTensor)
        self._exits.callback(foreach_types.remove, DeviceTensor)
        # `Module.to` has to keep its Parameter objects, as it does on CUDA.
        swapping = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._exits.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        self._dispatch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._dispatch.__exit__(*error)
        self._exits.close()
        _running.clear()

    def _answers(self) -> dict[str, Any]:
        """What replaces functions of torch that ask the driver, and the few of other libraries that look at storages."""

        def fixed(value: Any) -> Callable[..., Any]:  # a function for each: torch's tracer tells them apart by identity
            return lambda *_, **__: value

        device = _Properties("simulated", 9, 0, 141 * GIB, 132)
        return {
            "torch.accelerator.is_available": fixed(True),
            "torch.accelerator.current_accelerator": fixed(torch.device("cuda")),
            "torch.cuda._lazy_init": fixed(None),
            "torch.cuda.current_device": fixed(0),
            "torch.cuda.device_count": fixed(1),
            "torch.cuda.empty_cache": fixed(None),
            "torch.cuda.get_device_capability": fixed((device.major, device.minor)),
            "torch.cuda.get_device_name": fixed(device.name),
            "torch.cuda.get_device_properties": fixed(device),
            "torch.cuda.is_available": fixed(True),
            "torch.cuda.is_bf16_supported": fixed(True),
            "torch.cuda.is_initialized": fixed(True),
            "torch.cuda.manual_seed": fixed(None),
            "torch.cuda.manual_seed_all": fixed(None),
            "torch.cuda.mem_get_info": fixed((140 * GIB, device.total_memory)),
            "torch.cuda.memory.memory_stats": fixed(defaultdict(int)),
            "torch.cuda.set_device": fixed(None),
            "torch.cuda.synchronize": lambda *_: self.note_wait("synchronize"),
            "torch._C._cuda_resetPeakMemoryStats": fixed(None),
            "torch._C._cuda_setMemoryFraction": fixed(None),
            "torch._utils._get_current_device_index": fixed(0),
            "torch.Generator": _Generator,
            "torch.Tensor.pin_memory": _pinned,
            "torch.as_tensor": partial(_from_data, torch.as_tensor),
            "torch.tensor": partial(_from_data, torch.tensor),
            "ssld.shared.models.model_file.save_file": _save_file,
        }


def _on_host(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation by its CPU kernel; softmax of float16 to float32, which only CUDA has as one, in two steps."""
    if name in ("aten::_softmax", "aten::_log_softmax") and args[2]:
        return func(args[0].float(), args[1], False, **kwargs)
    if name in ("aten::_softmax_backward_data", "aten::_log_softmax_backward_data") and args[3] == torch.float16:
        return func(*args[:3], torch.float32, **kwargs).to(args[3])
    return func(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator of the CPU for whatever device, since values are drawn there."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _from_data(make: Callable[..., Tensor], data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor` and `torch.as_tensor`, whose uploads do not come to the dispatcher."""
    if not is_cuda(device):
        return make(data, *args, device=device, **options)
    learns = options.pop("requires_grad", False)
    return make(data, *args, **options).to(device).requires_grad_(learns)


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    copy = tensor.clone()
    setattr(copy, PINNED, True)
    return copy


def _save_file(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, *args, **options)


def _line() -> str:
    """The innermost line of the project that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if name := _own(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass or another library"


@cache
def _own(filename: str) -> str | None:
    path = Path(filename).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return name if name.startswith(CODE) else None
