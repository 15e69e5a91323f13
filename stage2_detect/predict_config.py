"""Settings of `predict.py`. Does not import torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ssld.shared.files import is_pattern
from ssld.stage2_detect.config import RunDetectorConfig, Side
from ssld.stage2_detect.model_config import Fraction

THRESHOLD, PSEUDO_THRESHOLD = 0.5, 0.4
Written = Literal["json", "pictures", "csv", "yolo", "yolo_scores", "crops"]


class PredictConfig(RunDetectorConfig):
    """Find objects in images and videos: COCO JSON, drawn images, CSV, YOLO, crops, or boxes to train on."""

    images: str
    """image, video, folder (nested as you like), quoted pattern ('photos/**/*.jpg'), or text file with a path a line"""
    write: list[Written] | None = None
    """any of json, pictures (drawn, a video as a video), csv, yolo (labels/), yolo_scores (with a sixth column), crops; null: json,pictures"""
    pseudo_labels: bool = False
    """write pseudo_labels.json, for train.py --pseudo: images with at least one box; nothing else"""
    threshold: Fraction | None = None
    """score that a box needs; null: 0.5, and 0.4 for pseudo-labels, the only one that SAD's released settings name"""
    classes: list[str] = []
    """names of the classes to keep; empty: all"""
    exclude: Path | None = None
    """COCO JSON; images whose path below the folder of `images` is a file name in it are left out, such as labeled ones"""
    tile: Side | None = None
    """side, in pixels, of square tiles that are looked at beside the whole image, for small objects in large images; null: no tiles"""
    overlap: float = Field(0.2, ge=0, le=0.9)
    """of neighbouring tiles, as a share of their side; best no smaller than the objects that only tiles show"""

    @model_validator(mode="after")
    def _writes_elsewhere(self) -> Self:
        if not self.images:
            raise ValueError("images: names no image, folder or list")
        folder = Path(self.images)
        if folder.is_dir() and self.output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"output: {self.output} is inside images, where what is drawn would be read; give another")
        return self

    @model_validator(mode="after")
    def _something_written(self) -> Self:
        if self.write is not None and self.pseudo_labels:
            raise ValueError("write: pseudo_labels writes its own file and nothing else; leave one of the two out")
        if self.write is not None and not self.write:
            raise ValueError("write: is empty; name at least one of json, pictures, csv, yolo, yolo_scores, crops")
        if self.write is not None and {"yolo", "yolo_scores"} <= set(self.write):
            raise ValueError("write: yolo and yolo_scores would write the same files; choose one")
        return self

    @property
    def least(self) -> float:
        """The threshold as it is for this run."""
        return (PSEUDO_THRESHOLD if self.pseudo_labels else THRESHOLD) if self.threshold is None else self.threshold

    def writes(self, *kinds: Written) -> bool:
        """Whether any of these files is written in this run."""
        if self.pseudo_labels:
            return False
        return (
            not {"json", "pictures"}.isdisjoint(kinds) if self.write is None else not set(self.write).isdisjoint(kinds)
        )

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        if Path(self.images).exists() or not is_pattern(self.images):
            files["images"] = Path(self.images)
        return files | ({"exclude": self.exclude} if self.exclude else {})
