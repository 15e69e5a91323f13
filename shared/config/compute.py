"""Settings of commands that run a network: device, precision, and how long processes wait for each other. Does not import torch."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ssld.shared.config.settings import CommandConfig

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?|mps", re.ASCII)


def _known_device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"{text!r} is not a device; give auto, cpu, cuda, cuda:NUMBER or mps")
    return text


Device = Annotated[str, AfterValidator(_known_device)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LONGEST_TIMEOUT = 10_080.0
"""minutes in a week"""
ProcessTimeout = Annotated[float, Field(ge=1, le=LONGEST_TIMEOUT)]


class ComputeConfig(CommandConfig):
    """Settings of a command that runs a network."""

    precision: Precision = "auto"
    """precision of the forward pass; auto: bf16 on a GPU that has it, else fp32; a resumed run keeps its own; losses and boxes are fp32"""
    device: Device = "auto"
    """device of the networks: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:NUMBER or mps"""
    process_timeout: ProcessTimeout = 120.0
    """time limit, in minutes, of one process waiting for another, 1 to 10,080; the run ends after it"""
