"""Settings of `export.py`. Does not import torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import BatchSize, Count
from ssld.shared.config.settings import CommandConfig
from ssld.shared.files import is_pattern

FILES = {"onnx": "detector.onnx", "torch": "detector.pt2"}
"""File name of each export format."""
LOWER = {"int8": "detector_int8.onnx", "fp16": "detector_fp16.onnx"}
"""File name of each lower precision."""
Calibration = Literal["minmax", "mse", "percentile"]
Side = Annotated[int, Field(ge=64, le=16_384, multiple_of=32)]


class GateFailed(Exception):
    """A file of lower precision loses more AP than is allowed; the command ends with exit code 1."""


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
    """height and width of the padded input in pixels, multiples of 32; null: any from 160 on, or the recipe's largest if that is impossible"""
    box_tolerance: float = Field(0.05, gt=0, le=1000)
    """largest accepted difference of a box coordinate, in pixels of the input, above 0 to 1000"""
    score_tolerance: float = Field(1e-3, gt=0, le=1)
    """largest accepted difference of a score or a mask probability, above 0 to 1"""
    missing_tolerance: float = Field(0.01, ge=0, lt=1)
    """largest accepted share of detections without counterpart (rounding decides about scores at a threshold), 0 to below 1"""
    benchmark: bool = False
    """measure latency (batch 1) and throughput (batch_size) of torch and of the exported files; measured in any case with int8"""
    int8: bool = False
    """write detector_int8.onnx too: INT8 by ONNX Runtime with ranges from `images`; kept if its AP passes max_ap_drop"""
    fp16: bool = False
    """write detector_fp16.onnx too: float16 weights and products, for GPUs; kept if its AP passes max_ap_drop"""
    calibration_images: Count = 100
    """number of images that give the ranges of INT8, chosen evenly among those of `images` that are not in val_annotations"""
    calibration: Calibration = "minmax"
    """ranges of INT8 from the values on these images: minmax (all of them), mse (least rounding error), percentile (without 0.01 % at either end)"""
    float_rounds: int = Field(4, ge=0, le=8)
    """attempts, 0 to 8, to lose less AP where the loss is above max_ap_drop: the layers with the largest rounding errors, 4, then 8, 16, ... of them,
    stay in float32"""
    reduce_range: bool = False
    """write the weights of INT8 with 7 bits, for x86 CPUs without VNNI, on which sums of 8-bit products can overflow"""
    val_annotations: Path | None = None
    """COCO JSON file of the evaluation set on which AP before and after int8 or fp16 is compared"""
    val_images: Path | None = None
    """folder of the images of val_annotations"""
    max_ap_drop: float = Field(0.5, ge=0, le=100)
    """largest accepted loss of AP by int8 or fp16, in points, 0 to 100; above it, after float_rounds, the exit code is 1 and no file is left"""
    openvino: bool = False
    """run the ONNX files by OpenVINO too, in the check, in the comparison of AP and in the benchmark"""
    push_to_hub: str | None = None
    """repository on the Hugging Face hub, ORG/NAME, to upload the folder to; null: no upload"""
    private: bool = False
    """create the hub repository as a private one"""

    @model_validator(mode="after")
    def _lower_precision_is_compared(self) -> Self:
        for name in ("int8", "fp16"):
            if getattr(self, name) and (self.val_annotations is None or self.val_images is None):
                raise ValueError(
                    f"{name}: is kept only if AP holds: give val_annotations and val_images, the evaluation set of the detector"
                )
        if self.int8 and self.images is None:
            raise ValueError(
                "int8: needs `images`, on which the ranges of INT8 are measured: some of those for training"
            )
        if (self.int8 or self.fp16 or self.openvino) and "onnx" not in self.formats:
            raise ValueError("formats: int8, fp16 and openvino need onnx")
        return self

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        if self.images and not is_pattern(self.images):
            files["images"] = Path(self.images)
        given = {"val_annotations": self.val_annotations, "val_images": self.val_images}
        return files | {key: path for key, path in given.items() if path}
