"""Settings of `predict.py`. Does not import torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.files import is_pattern
from ssld.stage2_detect.config import RunDetectorConfig, Side
from ssld.stage2_detect.model_config import Fraction

THRESHOLD, PSEUDO_THRESHOLD = 0.5, 0.4
Written = Literal["json", "images", "csv", "yolo", "yolo_scores", "crops", "label_studio", "cvat"]


class PredictConfig(RunDetectorConfig):
    """Detect objects in images and videos; write COCO JSON, drawn images, CSV, YOLO labels, crops, or pseudo-labels."""

    other_names: ClassVar[Mapping[str, str]] = {
        "source": "images",
        "weights": "model",
        "conf": "threshold",
        "imgsz": "short_side",
    }

    images: str
    """images to predict on: image, video, folder (searched recursively), quoted pattern ('photos/**/*.jpg'), or text file with one path per line"""
    write: list[Written] | None = None
    """outputs to write: json, images (drawn images; a video for a video), csv, yolo (labels/), yolo_scores (with a sixth column), crops,
    label_studio and cvat (boxes of images to correct in these tools); null: json,images"""
    label_studio_prefix: str = "/data/local-files/?d="
    """text before the path of each image in label_studio.json: the place from which Label Studio reads the images"""
    pseudo_labels: bool = False
    """write only pseudo_labels.json, for ssld train --pseudo: the images with at least one box"""
    threshold: Fraction | None = None
    """lowest score of a written box, 0 to 1; null: 0.5, or 0.4 with pseudo_labels (the only threshold in SAD's released settings)"""
    classes: list[str] = []
    """names of the classes to write; empty: all"""
    exclude: Path | None = None
    """COCO JSON file whose images are left out, such as the labeled ones; matched by path relative to the folder in `images`"""
    tile: Side | None = None
    """side, in pixels, of square tiles predicted in addition to the whole image, for small objects in large images; null: no tiles"""
    overlap: float = Field(0.2, ge=0, le=0.9)
    """overlap of neighboring tiles as a share of their side, 0 to 0.9; best at least the size of the small objects"""

    @model_validator(mode="after")
    def _writes_elsewhere(self) -> Self:
        if not self.images:
            raise ValueError("images: names no image, folder or list")
        folder = Path(self.images)
        if folder.is_dir() and self.output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"output: {self.output} is inside `images`: drawn images would be read as input; give another folder"
            )
        return self

    @model_validator(mode="after")
    def _something_written(self) -> Self:
        if self.write is not None and self.pseudo_labels:
            raise ValueError("write: pseudo_labels writes its own file and nothing else; leave one of the two out")
        if self.write is not None and not self.write:
            raise ValueError(
                "write: is empty; name at least one of json, images, csv, yolo, yolo_scores, crops, label_studio, cvat"
            )
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
        return not {"json", "images"}.isdisjoint(kinds) if self.write is None else not set(self.write).isdisjoint(kinds)

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        if Path(self.images).exists() or not is_pattern(self.images):
            files["images"] = Path(self.images)
        return files | ({"exclude": self.exclude} if self.exclude else {})
