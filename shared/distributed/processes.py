"""The processes of a run: accelerate's process group, device, precision and trackers, and the data loaders' workers."""

import importlib.util
import os
import re
import signal
import time
from multiprocessing.queues import Queue
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import UserError

_LAST_WORDS = 0.5  # seconds in which a worker that gives up still hands over what it has sent
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def uses_gpu(device: str) -> bool:
    """Whether a `device` setting means a CUDA device on this machine."""
    return device == "auto" and torch.cuda.is_available()


def start_processes(config: TrainingConfig) -> Accelerator:
    """Join the process group (if launched with several processes) and set up device and precision.

    Only the student or detector is ever prepared by it: schedules, loaders, checkpoints and the teacher are ours.
    Raises UserError for fp16 without an accelerator, and for a tracker that is not installed.
    """
    cpu = not uses_gpu(config.device)
    if cpu and config.precision == "fp16":
        raise UserError("precision: fp16 needs a GPU; use bf16 or fp32")
    for name in config.trackers:  # accelerate leaves out those it does not find
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out")
    trackers: list[Any] = list(config.trackers)
    return Accelerator(
        cpu=cpu,
        mixed_precision=_MIXED[config.precision],
        log_with=trackers or None,
        project_dir=str(config.output) if trackers else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Start the trackers that the configuration asks for; after the run directory is open, because they write into it."""
    if config.trackers:
        settings = {
            key: value for key, value in config.model_dump(mode="json").items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers("ssld", config=settings)


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None, *, measure: bool = False
) -> Tensor | None:
    """Clip the gradient, update the weights and clear the gradient, through the gradient scaler where the precision is fp16.

    Args:
        clip_grad_norm: largest L2 norm of the gradient over all parameters; None does not clip.
        measure: return the norm although nothing is clipped, which costs a pass over the gradients.

    Returns:
        The norm before clipping, a scalar on the device; None where it was neither clipped nor measured.
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
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    """The gradient scaler's state as JSON values; {} without one."""
    return dict(accelerator.scaler.state_dict()) if accelerator.scaler is not None else {}


def load_scaler_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Restore `scaler_state`."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting where the loader pinned the memory."""
    return tensor.to(device, non_blocking=True)


def start_worker(_: int) -> None:
    """How a data loader's worker begins: with one thread, and deaf to signals sent to the main process's group, whose decision stopping is."""
    torch.set_num_threads(1)
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGHUP):  # inherited from the main process, it would only set a flag there
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: BaseException, _: Any) -> None:
    """End a worker that cannot hand a batch over, with the number of the system's error, which `shared/config/command.py` explains.

    Python would print a traceback and go on, and the main process wait for this batch for ever.
    """
    number = re.search(r"\((\d+)\)$", str(error))  # torch's RuntimeError on shared memory
    code = getattr(error, "errno", None) or (int(number[1]) if number else 1)
    time.sleep(_LAST_WORDS)
    os._exit(code if 0 < code < 128 else 1)
