"""Settings of `predict.py`. Does not import torch."""

import re
from pathlib import Path
from typing import Self

from pydantic import model_validator

from stage2_detect.config import RunDetectorConfig
from stage2_detect.model_config import Fraction

THRESHOLD, PSEUDO_THRESHOLD = 0.5, 0.4


def is_pattern(images: str) -> bool:
    """Whether a path has wildcards."""
    return re.search(r"[*?[]", images) is not None


class PredictConfig(RunDetectorConfig):
    """Find objects in pictures: COCO JSON and drawn pictures, or boxes to train on."""

    images: str
    """picture, folder (nested as you like), quoted pattern ('photos/**/*.jpg'), or text file with a path a line"""
    pseudo_labels: bool = False
    """write pseudo_labels.json, for train.py --pseudo: pictures with at least one box, nothing drawn"""
    threshold: Fraction | None = None
    """score that a box needs; null: 0.5, and 0.4 for pseudo-labels, the only one that SAD's released settings name"""
    classes: list[str] = []
    """names of the classes to keep; empty: all"""
    exclude: Path | None = None
    """COCO JSON; pictures whose path below the folder of `images` is a file name in it are left out, such as labelled ones"""
    draw: bool | None = None
    """draw the boxes into pictures/; null: yes, but not for pseudo-labels"""
    csv: bool = False
    """also write predictions.csv, a box a line"""

    @model_validator(mode="after")
    def _writes_elsewhere(self) -> Self:
        folder = Path(self.images)
        if folder.is_dir() and self.output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"output: {self.output} is inside images, where what is drawn would be read; give another")
        return self

    @property
    def least(self) -> float:
        """The threshold as it is for this run."""
        return (PSEUDO_THRESHOLD if self.pseudo_labels else THRESHOLD) if self.threshold is None else self.threshold

    @property
    def draws(self) -> bool:
        """Whether pictures are drawn in this run."""
        return not self.pseudo_labels if self.draw is None else self.draw

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model}
        if not is_pattern(self.images):
            files["images"] = Path(self.images)
        return files | ({"exclude": self.exclude} if self.exclude else {})
