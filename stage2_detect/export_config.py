"""Settings of `export.py`. Does not import torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssld.shared.config.bounds import BatchSize, Count
from ssld.shared.config.settings import CommandConfig
from ssld.shared.files import is_pattern

FILES = {"onnx": "detector.onnx", "torch": "detector.pt2"}
"""What each format is called."""
Side = Annotated[int, Field(ge=64, le=16_384, multiple_of=32)]


class ExportDetectorConfig(CommandConfig):
    """Export a detector file: ONNX and torch.export, checked against torch, and a folder for the Hugging Face hub with a model card."""

    model: Path
    """detector file"""
    images: str | None = None
    """pictures the files are checked on: picture, folder, quoted pattern, or text file with a path a line; null: drawn rectangles"""
    check_images: Count = 16
    """pictures of the check"""
    batch_size: BatchSize = 4
    """pictures of a batch in the check and in the benchmark's throughput"""
    formats: list[Literal["onnx", "torch"]] = Field(["onnx", "torch"], min_length=1)
    """onnx: detector.onnx; torch: detector.pt2, a torch.export program"""
    canvas: tuple[Side, Side] | None = None
    """height and width of the padded input, multiples of 32; null: any from 160 on, or the recipe's largest where the network cannot do that"""
    box_tolerance: float = Field(0.05, gt=0, le=1000)
    """largest difference of a coordinate, in pixels of the input"""
    score_tolerance: float = Field(1e-3, gt=0, le=1)
    """largest difference of a score, and of a mask's probability"""
    missing_tolerance: float = Field(0.01, ge=0, lt=1)
    """largest share of detections without counterpart: at a threshold, rounding decides"""
    benchmark: bool = False
    """also measure latency (batch 1) and throughput (batch_size) of torch and of the files written"""
    push_to_hub: str | None = None
    """ORG/NAME: also upload the folder"""
    private: bool = False
    """whether a new repository there is private"""

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        return files | ({"images": Path(self.images)} if self.images and not is_pattern(self.images) else {})
