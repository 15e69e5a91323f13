"""The processes of a run: accelerate's process group, device and precision, and the data loaders' workers."""

import importlib.util
import os
import re
import signal
import time
import warnings
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import PartialState
from torch import Tensor, nn

from ssld.shared.config.compute import ComputeConfig
from ssld.shared.config.launcher import launched_ranks
from ssld.shared.distributed.ranks import from_main_rank, set_timeout, world_size
from ssld.shared.errors import UserError
from ssld.shared.machine import default_threads, ignored_threads
from ssld.shared.run_identity import recorded_precision
from ssld.shared.wording import count

_LAST_WORDS = 0.5  # seconds for a failing worker to hand over what it has sent
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ComputeT = TypeVar("ComputeT", bound=ComputeConfig)


def start_processes(config: ComputeT, *, fixed_size: bool = False) -> tuple[Accelerator, ComputeT]:
    """Join the process group (if launched with several processes) and set up device and precision.

    Accelerate prepares the student or detector only, not schedules, loaders, checkpoints and the teacher.

    Args:
        fixed_size: whether all batches of a training have one shape, so that cuDNN may measure which of its kernels is the fastest.

    Returns:
        The accelerator, whose device has an index on CUDA, and the settings with `precision: auto` resolved.

    Raises:
        UserError: a device that this machine does not have; fp16 on the CPU; a tracker that is not installed.
    """
    kind = _device_type(config.device)
    _refuse_fp16(config, kind)
    trackers: list[Any] = list(getattr(config, "trackers", []))
    for name in trackers:  # accelerate leaves out those it does not find
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out")
    timeout = timedelta(minutes=config.process_timeout)
    set_timeout(timeout)
    state = PartialState(cpu=kind == "cpu", timeout=timeout)
    state.device = device = _indexed(state.device)
    if config.precision == "auto":
        precision = from_main_rank(recorded_precision(config.output) or best_precision(device))
        config = config.model_copy(update={"precision": precision})
        _refuse_fp16(config, kind)
    if device.type == "cuda":
        # Convolutions in fp32 run in TF32 by torch's default; without this, matrix products of the same network take several times as long.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = fixed_size
    others = [name for name in trackers if name != "tensorboard"]  # see shared/training/trackers.py
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=_MIXED[config.precision],
        log_with=others or None,
        project_dir=str(config.output) if others else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    return accelerator, config


def _refuse_fp16(config: ComputeConfig, device_type: str) -> None:
    if config.precision == "fp16" and device_type == "cpu":
        raise UserError("precision: fp16 needs a GPU; use bf16 or fp32")


def _device_type(device: str) -> str:
    """Return the type of a `device` setting on this machine: cpu, cuda or mps. Raises UserError where the machine does not have it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device: {device}: torch finds no CUDA GPU on this machine; set device: auto or cpu")
        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise UserError(
                f"device: {device}: this machine has {count(torch.cuda.device_count(), 'CUDA GPU')}, counted from 0"
            )
        if ":" in device:
            if launched_ranks()[1] > 1:
                raise UserError(
                    f"device: {device}: is for one process; with several, set device: cuda, and CUDA_VISIBLE_DEVICES to choose GPUs"
                )
            torch.cuda.set_device(number)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device: mps: torch finds no Apple GPU on this machine; set device: auto or cpu")
        if launched_ranks()[1] > 1:
            raise UserError("device: mps: is for one process; start the command without a launcher")
    return device.partition(":")[0]


def _indexed(device: torch.device) -> torch.device:
    """Return the device with its index: accelerate gives a single process `cuda`, which torch's memory functions refuse."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def best_precision(device: torch.device) -> str:
    """Return the value of `precision: auto` for a run that begins on this device: bf16 where a GPU computes in it, else fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


def describe_processes(accelerator: Accelerator, config: ComputeConfig, workers: int) -> list[str]:
    """Describe device, precision, threads and workers for the log: `cuda:0, bf16, 8 threads (cores / processes), 4 workers`.

    A second line warns of an OMP_NUM_THREADS that cannot be used.
    """
    threads = count(torch.get_num_threads(), "thread")
    line = f"{accelerator.device}, {config.precision}, {threads} ({default_threads(config.threads)[1]}), {count(workers, 'worker')}"
    return [line, *([warning] if (warning := ignored_threads(config.threads)) else [])]


def prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Wrap the model for the training loop: in autocast, and in DistributedDataParallel where there are several processes."""
    if world_size() > 1 and any(_strides_are_ambiguous(parameter) for parameter in model.parameters()):
        # A 1x1 kernel has the same layout in both memory formats, with other strides at its dimensions of size 1. Autograd guarantees a gradient's
        # strides at all other dimensions (torch/csrc/autograd/functions/accumulate_grad.h), so that this warning of DDP, which compares all of them,
        # does not cover these kernels. Models without such a kernel keep it.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    prepared: nn.Module = accelerator.prepare_model(model)
    return prepared


def _strides_are_ambiguous(parameter: Tensor) -> bool:
    return (
        parameter.ndim == 4
        and parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=torch.channels_last)
        and parameter.numel() > 1
    )


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None, *, measure: bool = False
) -> tuple[Tensor | None, bool]:
    """Clip the gradient, update the weights and clear the gradient, through the gradient scaler where the precision is fp16.

    Args:
        clip_grad_norm: largest L2 norm of the gradient over all parameters; None does not clip.
        measure: return the norm although nothing is clipped, which costs a pass over the gradients.

    Returns:
        The norm before clipping, a scalar on the device, None where it was neither clipped nor measured; and whether the scaler has skipped the
        update, because the gradient was not finite, and lowered its scale.
    """
    scaler = accelerator.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = None
    if clip_grad_norm is not None or measure:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    skipped = False
    if scaler is not None:
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    """Return the gradient scaler's state as JSON values; {} without one."""
    return dict(accelerator.scaler.state_dict()) if accelerator.scaler is not None else {}


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Restore `scaler_state`."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting where the loader pinned the memory."""
    return tensor.to(device, non_blocking=True)


def pins_memory() -> bool:
    """Whether loaders should pin their batches: only in a process that uses a CUDA device already, since pinning opens a CUDA context."""
    return torch.cuda.is_initialized()


def start_worker(_: int) -> None:
    """Set up a data loader's worker: one thread, and no reaction to signals sent to the main process's group, which decides about stopping."""
    torch.set_num_threads(1)
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGHUP):  # inherited from the main process, it would only set a flag there
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: BaseException, _: Any) -> None:
    """End a worker that cannot hand a batch over, with the number of the system's error, which `shared/config/command.py` explains.

    Python would print a traceback and go on, and the main process would wait for this batch for ever.
    """
    number = re.search(r"\((\d+)\)$", str(error))  # torch's RuntimeError on shared memory
    code = getattr(error, "errno", None) or (int(number[1]) if number else 1)
    time.sleep(_LAST_WORDS)
    os._exit(code if 0 < code < 128 else 1)
