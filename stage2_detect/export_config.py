"""Settings of `export.py`. Does not import torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssld.shared.config.bounds import BatchSize, Count
from ssld.shared.config.settings import CommandConfig
from ssld.shared.files import is_pattern

FILES = {"onnx": "detector.onnx", "torch": "detector.pt2"}
"""File name of each export format."""
Side = Annotated[int, Field(ge=64, le=16_384, multiple_of=32)]


class ExportDetectorConfig(CommandConfig):
    """Export a detector file: ONNX and torch.export, checked against torch, and a folder for the Hugging Face hub with a model card."""

    model: Path
    """detector file"""
    images: str | None = None
    """images to check the exported files on: image, folder, quoted pattern, or text file with one path per line; null: drawn rectangles"""
    check_images: Count = 16
    """number of images in the check"""
    batch_size: BatchSize = 4
    """images per batch in the check and in the benchmark's throughput"""
    formats: list[Literal["onnx", "torch"]] = Field(["onnx", "torch"], min_length=1)
    """formats to write: onnx (detector.onnx), torch (detector.pt2, a torch.export program)"""
    canvas: tuple[Side, Side] | None = None
    """height and width of the padded input in pixels, multiples of 32; null: dynamic from 160 on, or the recipe's largest if impossible"""
    box_tolerance: float = Field(0.05, gt=0, le=1000)
    """largest accepted difference of a box coordinate, in pixels of the input, above 0 to 1000"""
    score_tolerance: float = Field(1e-3, gt=0, le=1)
    """largest accepted difference of a score or a mask probability, above 0 to 1"""
    missing_tolerance: float = Field(0.01, ge=0, lt=1)
    """largest accepted share of detections without counterpart (rounding decides about scores at a threshold), 0 to below 1"""
    benchmark: bool = False
    """measure latency (batch 1) and throughput (batch_size) of torch and of the exported files too"""
    push_to_hub: str | None = None
    """repository on the Hugging Face hub, ORG/NAME, to upload the folder to; null: no upload"""
    private: bool = False
    """create the hub repository as a private one"""

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        return files | ({"images": Path(self.images)} if self.images and not is_pattern(self.images) else {})
